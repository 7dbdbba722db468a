"""Parameters and multiply-adds of every model in configs/, beside what is published about it: docs/models.md.

  python dev/model_table.py            writes docs/models.md; tests/model/test_family.py compares
  python dev/model_table.py -check     only says whether it is up to date

What was published stands in dev/published.yaml and nowhere else. Exit status: 0, or 1 if the page is out of date.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import paddle_import  # noqa: F401  before Paddle
from tools import cli

import paddle
import yaml

from config import get_config
from halonet import build_halonet
from training.macs import total_multiply_adds

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'models.md'
INTRODUCTION = """# Models

`python dev/model_table.py` makes this page from `configs/` and `dev/published.yaml`; a test compares them.

The parameters are the trainable ones. The counts of Paddle and PaddleViT include the running statistics of batch norms.
Multiply-adds (GMACs) are counted for one image of the given side. They include convolutions, the classifier and the
products of attention, with relative positions. They agree with timm's numbers for its models to 2 %. The accuracy is in percent
on ImageNet-1k, as the source reports it; it was not measured here. The weights are the names of timm's files, and of
PaddleViT's where there is one. A dash means that nothing is published.

"""


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
    return INTRODUCTION + ''.join(lines) + '\nSources of the accuracy:\n\n' + ''.join(notes)


def parser():
    parser = cli.Parser(__doc__)
    parser.add('check', 'write nothing', action='store_true')
    return parser


def main(args):
    text = page()
    if not args.check:
        cli.write_text(str(PAGE), text)
    elif PAGE.read_text(encoding='utf-8') != text:
        print(f'{PAGE} is out of date; run python dev/model_table.py', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    parser().run(main)
