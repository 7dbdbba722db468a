"""Write docs/models.md: parameters and multiply-adds of every model in configs/, beside published results.

  python dev/model_table.py            writes docs/models.md; tests/model/test_family.py compares
  python dev/model_table.py -check     reports whether the page is up to date

The published results are in dev/published.yaml alone. Exit status: 0, or 1 if the page is out of date.
"""
import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import (
    paddle_import,  # noqa: F401  before Paddle
    sizes,
)
from tools import cli

import paddle
import yaml

from config import get_config
from halonet import build_halonet, count_parameters
from training.macs import total_multiply_adds

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'models.md'
NONE = '–'                                          # nothing is published
INTRODUCTION = """# Models

`python dev/model_table.py` makes this page from `configs/` and `dev/published.yaml`; a test compares them.

The parameters are the trainable ones. The counts of Paddle and PaddleViT include the running statistics of
batch norms. Multiply-adds (GMACs) are counted for one image of the given size. They include convolutions,
the classifier and the products of attention, with relative positions. They agree with timm's numbers for
its models to 2 %. The accuracy is in percent on ImageNet-1k, as the source reports it; it was not measured
here. The weights are the names of timm's files, and of PaddleViT's where there is one. A dash means that
nothing is published.

"""
TITLES = ('model', 'parameters', 'GMACs', 'image', 'crop', 'top-1 / top-5', 'source', 'weights', 'config')


def model_configs() -> dict[Path, Any]:
    """Return {config file: config} of every model: the files in configs/ whose names do not begin with _."""
    return {path: get_config(path) for path in sorted((ROOT / 'configs').glob('[!_]*.yaml'))}


def published() -> tuple[dict[str, dict], dict[str, str]]:
    """Return the published facts by model name, and the description of each source."""
    content = yaml.safe_load((Path(__file__).parent / 'published.yaml').read_text(encoding='utf-8'))
    return content['models'], content['sources']


def accuracy(facts: dict) -> str:
    """Format the published top-1 and top-5 accuracy; some sources give top-1 alone, with one decimal."""
    if 'top1' not in facts:
        return NONE
    if 'top5' not in facts:
        return f'{facts["top1"]:.1f}'
    return f'{facts["top1"]:.2f} / {facts["top5"]:.2f}'


def row(path: Path, config: Any, facts: dict) -> str:
    """Return a model's line of the table."""
    with paddle.LazyGuard():                        # only shapes are needed
        model = build_halonet(config)
    size = config.DATA.IMAGE_SIZE
    weights = ', '.join(f'`{name}`' for name in facts.get('weights', ()))
    cells = [
        config.MODEL.NAME,
        f'{count_parameters(model) / 1e6:.2f} M',
        f'{total_multiply_adds(model, *sizes.sides(size)) / 1e9:.2f}',
        sizes.as_text(size),
        config.DATA.CROP_PCT,
        accuracy(facts),
        facts.get('source', NONE) if 'top1' in facts else NONE,
        weights or NONE,
        f'`{path.relative_to(ROOT)}`',
    ]
    return '| ' + ' | '.join(str(cell) for cell in cells) + ' |\n'


def page() -> str:
    """Return the text of docs/models.md."""
    facts, sources = published()
    lines = ['| ' + ' | '.join(TITLES) + ' |\n', '|---' * len(TITLES) + '|\n']
    for path, config in model_configs().items():
        lines.append(row(path, config, facts[config.MODEL.NAME]))
    notes = [f'- {name}: {text}\n' for name, text in sources.items()]
    return INTRODUCTION + ''.join(lines) + '\nSources of the accuracy:\n\n' + ''.join(notes)


def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add('check', 'write nothing', action='store_true')
    return parser


def main(args: argparse.Namespace) -> int:
    text = page()
    if not args.check:
        cli.write_text(str(PAGE), text)
    elif PAGE.read_text(encoding='utf-8') != text:
        print(f'{PAGE} is out of date; run python dev/model_table.py', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    parser().run(main)
