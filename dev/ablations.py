"""Train variants of halo attention on the demo's digits: a table, and a chart of some.

    python dev/ablations.py FOLDER                  minutes on a CPU; a complete training is kept

The variants are those of configs/paper/ on the network of the demo. Digits of 8x8 pixels are no ImageNet: the
sweep shows that each variant trains, and what it costs here.
"""
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dev import drawings

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, tuple[str, ...]] = {            # options on top of configs/halonet_digits.yaml
    'as the demo': (),
    'padding masked': ('MODEL.WINDOW', 'inside'),
    'window per query': ('MODEL.WINDOW', 'query'),
    'no positions': ('MODEL.POSITIONS', 'none'),
    'absolute positions': ('MODEL.POSITIONS', 'absolute'),
    'pooled stride': ('MODEL.HALO_STRIDE', 'pool'),
    'blocks of 2': ('MODEL.BLOCK_SIZE', '2'),
    'blocks of 8': ('MODEL.BLOCK_SIZE', '8'),
    'no halo': ('MODEL.HALO_SIZE', '0'),
    'convolutions': ('MODEL.STAGES', '[conv, conv*2, conv*2]', 'MODEL.HEADS', '[0, 0, 0]'),
}
DRAWN = ('as the demo', 'window per query', 'no positions', 'no halo', 'convolutions')
SEEDS = range(3)
SHORT = ('TRAIN.NUM_EPOCHS', '6', 'TRAIN.EMA_DECAY', '0.0', 'SAVE_FREQ', '6')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='FOLDER', type=Path, help='for images and runs')
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / 'digits'
    if not data.exists():
        subprocess.run([sys.executable, ROOT / 'tools/make_digits.py', data], check=True)
    runs: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        for i, (name, options) in enumerate(VARIANTS.items()):
            output = drawings.train(folder / f'run_{seed}_{i}', data, 'configs/halonet_digits.yaml',
                                    'SEED', seed, *SHORT, *options)
            runs[name].append(drawings.accuracies(output))
    print('| variant | accuracy, % | in each seed |\n|---|---|---|')
    for name, curves in runs.items():
        last = [curve[-1] for curve in curves]
        single = ', '.join(f'{value:.1f}' for value in last)
        print(f'| {name} | {statistics.mean(last):.1f} ± {statistics.stdev(last):.1f} | {single} |')
    (folder / 'chart.svg').write_text(drawings.chart({name: runs[name] for name in DRAWN}))


if __name__ == '__main__':
    main()
