"""Parameters and multiply-adds of every model in configs/, beside what is published about it: docs/models.md.

  python tools/model_table.py            writes docs/models.md; tests/test_family.py compares
  python tools/model_table.py -check     only says whether it is up to date

What was published stands in tools/published.yaml and nowhere else. Exit status: 0, or 1 if the page is out of date.
"""
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import cli  # noqa: E402  isort: skip  (first: it reports a missing package)
import utils  # noqa: E402, F401  isort: skip  (first: it prepares for Paddle's import)

import paddle  # noqa: E402
import yaml  # noqa: E402
from paddle import nn  # noqa: E402

from attention import BottleneckAttention, HaloAttention, LambdaLayer  # noqa: E402
from config import get_config  # noqa: E402
from halonet import (  # noqa: E402
    Bottleneck,
    EfficientChannelAttention,
    SqueezeExcite,
    Stage,
    Stem,
    build_halonet,
)
from layers import ConvNormAct  # noqa: E402

PAGE = ROOT / 'docs' / 'models.md'
INTRODUCTION = """# Models

Made by `python tools/model_table.py` from `configs/` and `tools/published.yaml`; a test compares.

Parameters are the trainable ones; Paddle's own count and PaddleViT's tables include the running statistics of batch norms.
Multiply-adds (GMACs) are those of one image of the given side: convolutions, the classifier and the products of attention,
relative positions included. They agree with the figures that timm gives for its models to 2 %. Accuracy is that on
ImageNet-1k in percent, as the source gives it, and not measured here. The weights are the names of timm's files, and of
PaddleViT's where there is one. A dash: nothing is published.

"""


# ---- counting

def side_after(layer, size):
    """The side of a convolution's or pooling's map: this network rounds up."""
    stride = getattr(layer, '_stride', None) or getattr(layer, 'stride', 1)
    return -(-size // (stride[0] if isinstance(stride, (list, tuple)) else stride))


def convolution(layer, H, W):
    H, W = side_after(layer, H), side_after(layer, W)
    return math.prod(layer.weight.shape) * H * W, H, W


def chain(layers, H, W):
    """(multiply-adds, height, width) after layers, one after another."""
    total = 0
    for layer in layers:
        count, H, W = multiply_adds(layer, H, W)
        total += count
    return total, H, W


def bottleneck(block, H, W):
    main, height, width = chain([block.conv1_1x1, *(getattr(block, name) for name in block.spatial), block.conv3_1x1], H, W)
    shortcut = multiply_adds(block.shortcut, H, W)[0] if block.shortcut is not None else 0
    return main + shortcut, height, width


def halo(layer, H, W):
    block, w, stride = layer.block_size, layer.block_size + 2 * layer.halo_size, layer.stride
    projections = multiply_adds(layer.q, H, W)[0] + multiply_adds(layer.kv, H, W)[0]
    queries = -(-H // block) * -(-W // block) * (block // stride) ** 2       # those that fill the last blocks are computed too
    d = layer.q.weight.shape[0]                                             # of all heads
    products = queries * (w * w * (d + layer.out_width) + 2 * (2 * w - 1) * d)        # positions as timm takes them: all rows
    H, W = -(-H // stride), -(-W // stride)
    return projections + products, side_after(layer.pool, H), side_after(layer.pool, W)


def whole_map(layer, H, W):
    side = layer.map_size
    products = side ** 2 * (side ** 2 * (layer.qk_width + layer.out_width) + 2 * (2 * side - 1) * layer.qk_width)
    return multiply_adds(layer.qkv, H, W)[0] + products, side_after(layer.pool, H), side_after(layer.pool, W)


def lambdas(layer, H, W):
    position = math.prod(layer.conv_lambda.weight.shape) * layer.v          # for each value by itself
    content, applied = layer.d * layer.v, layer.num_heads * layer.d * layer.v
    products = H * W * (position + content + applied)
    return multiply_adds(layer.qkv, H, W)[0] + products, side_after(layer.pool, H), side_after(layer.pool, W)


COUNTED = {                                         # class -> (layer, H, W) -> (multiply-adds, height, width)
    nn.Conv2D: convolution,
    ConvNormAct: lambda layer, H, W: multiply_adds(layer.conv, H, W),
    Stem: lambda layer, H, W: chain(layer.children(), H, W),
    Stage: lambda layer, H, W: chain(layer.children(), H, W),
    Bottleneck: bottleneck,
    HaloAttention: halo,
    BottleneckAttention: whole_map,
    LambdaLayer: lambdas,
    SqueezeExcite: lambda layer, H, W: (math.prod(layer.fc1.weight.shape) + math.prod(layer.fc2.weight.shape), H, W),
    EfficientChannelAttention: lambda layer, H, W: (math.prod(layer.conv.weight.shape), H, W),
    nn.MaxPool2D: lambda layer, H, W: (0, -(-H // 2), -(-W // 2)),
}


def multiply_adds(layer, H, W):
    """(multiply-adds of one image, height, width of the map that comes out) of a layer for a map of H x W that goes in."""
    return COUNTED.get(type(layer), lambda layer, H, W: (0, H, W))(layer, H, W)


def total_multiply_adds(model, H, W):
    """Multiply-adds of a HaloNet for one image of H x W pixels."""
    total = chain([model.stem, *model.stages, model.final_conv], H, W)[0]
    return total + (math.prod(model.head.fc.weight.shape) if isinstance(model.head.fc, nn.Linear) else 0)


def parameters(model):
    return sum(math.prod(p.shape) for p in model.parameters() if p.trainable)


# ---- the page

def model_configs():
    """{config file: config} of every model: the files in configs/ whose names do not begin with _."""
    return {path: get_config(path) for path in sorted((ROOT / 'configs').glob('[!_]*.yaml'))}


def published():
    """(facts by model name, what each source is)."""
    content = yaml.safe_load((Path(__file__).parent / 'published.yaml').read_text(encoding='utf-8'))
    return content['models'], content['sources']


def row(path, config, facts):
    with paddle.LazyGuard():                        # shapes are all that counts
        model = build_halonet(config)
    side = config.DATA.IMAGE_SIZE
    accuracy = ' / '.join(f'{facts[key]:.{decimals}f}' for key, decimals in (('top1', 2 if 'top5' in facts else 1), ('top5', 2))
                          if key in facts)
    cells = [config.MODEL.NAME, f'{parameters(model) / 1e6:.2f} M', f'{total_multiply_adds(model, side, side) / 1e9:.2f}',
             side, config.DATA.CROP_PCT, accuracy or '–', facts.get('source', '–') if accuracy else '–',
             ', '.join(f'`{name}`' for name in facts.get('weights', ())) or '–', f'`{path.relative_to(ROOT)}`']
    return '| ' + ' | '.join(map(str, cells)) + ' |\n'


def page():
    """The text of docs/models.md."""
    facts, sources = published()
    titles = ['model', 'parameters', 'GMACs', 'image', 'crop', 'top-1 / top-5', 'source', 'weights', 'config']
    lines = ['| ' + ' | '.join(titles) + ' |\n', '|---' * len(titles) + '|\n']
    lines += [row(path, config, facts[config.MODEL.NAME]) for path, config in model_configs().items()]
    notes = [f'- {name}: {text}\n' for name, text in sources.items()]
    return INTRODUCTION + ''.join(lines) + '\nSources of the accuracies:\n\n' + ''.join(notes)


def parser():
    parser = cli.Parser(__doc__)
    parser.add('check', 'write nothing', action='store_true')
    return parser


def main(args):
    text = page()
    if not args.check:
        cli.write_text(str(PAGE), text)
    elif PAGE.read_text(encoding='utf-8') != text:
        print(f'{PAGE} is out of date; run python tools/model_table.py', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    parser().run(main)
