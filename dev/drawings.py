"""Fine-tune configs/halonet_mini_96.yaml on drawings and photographs, with and without pretraining.

    python dev/drawings.py FOLDER           download 340 MB, pretrain, fine-tune over 5 seeds; print a table
                                            and draw FOLDER/chart.svg
    python dev/drawings.py FOLDER -data     only download and make the folders of images

Pretraining: emoji as four companies draw them, 98 classes (npm, MIT licence); the fourth company's are for
validation. Fine-tuning: stamps of Tux Paint, 7 classes, 456 images (Debian, GPL-2); in each seed another half
is for training. A run that is complete is kept, so the next call finishes an interrupted one.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reporting import charts

ROOT = Path(__file__).resolve().parents[1]
NPM = 'https://registry.npmjs.org/emoji-datasource-{0}/-/emoji-datasource-{0}-16.0.0.tgz'
DEBIAN = ('https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/'
          'tuxpaint-stamps-default_2022.06.04-1_all.deb')
PACKAGES = {                                        # file: its address and SHA-256
    'apple.tgz': (NPM.format('apple'), 'b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075'),
    'facebook.tgz': (NPM.format('facebook'),
                     '017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e'),
    'google.tgz': (NPM.format('google'), 'fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438'),
    'twitter.tgz': (NPM.format('twitter'),
                    'f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877'),
    'stamps.deb': (DEBIAN, '6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34'),
}
TRAIN_VENDORS, VAL_VENDOR = ('apple', 'facebook', 'twitter'), 'google'
STAMPS = ('animals', 'food', 'household', 'plants', 'seasonal', 'town', 'vehicles')
COPIES = ('_mirror', '_flip')                       # how the names of mirrored copies end
SEEDS = range(5)
MODEL = 'configs/halonet_mini_96.yaml'
PRETRAINING = ('TRAIN.NUM_EPOCHS', '40', 'TRAIN.LR_BATCH', '0', 'TRAIN.BASE_LR', '0.001',
               'TRAIN.EMA_DECAY', '0.998', 'TRAIN.MIXUP_ALPHA', '0', 'TRAIN.CUTMIX_ALPHA', '0',
               'VALIDATE_FREQ', '10', 'SAVE_FREQ', '10')
LONG = ('TRAIN.BASE_LR', '0.001', 'TRAIN.NUM_EPOCHS', '150', 'TRAIN.PATIENCE', '0')
FINE_TUNINGS = {                                    # the rows of the table: options, and if pretrained
    'pretrained': ((), True),
    'random weights': ((), False),
    'random weights, long': (LONG, False),
    'pretrained, long': (LONG, True),
}
CHART = 'chart.svg'                                 # in FOLDER
COLOURS = ('#0b6e99', '#c2571a', '#3c8031', '#7a3fa0', '#8a6d00')
STYLE = ''.join(f'.line.s{i}{{stroke:{colour}}}.mark.s{i},.label.s{i}{{fill:{colour}}}'
                for i, colour in enumerate(COLOURS))
STYLE += ('.line{fill:none;stroke-width:1.8}.grid,.axis{stroke:#9aa3ad;fill:none;stroke-width:.6}'
          'text{font:11px sans-serif;fill:#555}')


# ---- images

def download(folder: Path, packages: dict[str, tuple[str, str]] = PACKAGES) -> None:
    """Download what `folder` does not hold yet. Raises SystemExit for a file with another checksum."""
    for name, (address, checksum) in packages.items():
        path = folder / name
        if not path.exists():
            print(f'{name}: downloading {address}', flush=True)
            part = path.with_suffix('.part')
            with urllib.request.urlopen(address, timeout=60) as source, open(part, 'wb') as target:
                shutil.copyfileobj(source, target)
            part.rename(path)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != checksum:
            raise SystemExit(f'{path}: SHA-256 is {found} instead of {checksum}; delete the file')


def content_of(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    """Return the content of a file in an archive. Raises ValueError for a folder."""
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f'{archive.name!r}: {member} is no file')
    return file.read()


def make_emoji(folder: Path, packages: Path) -> None:
    """Make the folder for pretraining: VENDOR/NAME.png, the two lists and class_names.txt."""
    with tarfile.open(packages / 'apple.tgz') as archive:
        emoji = json.loads(content_of(archive, 'package/emoji.json'))
    classes = sorted({entry['subcategory'] for entry in emoji if entry['category'] != 'Component'})
    lines: dict[str, list[str]] = {'train_list.txt': [], 'val_list.txt': []}
    for vendor in (*TRAIN_VENDORS, VAL_VENDOR):
        wanted = {f'package/img/{vendor}/64/{entry["image"]}': entry for entry in emoji
                  if entry[f'has_img_{vendor}'] and entry['subcategory'] in classes}
        (folder / vendor).mkdir(parents=True, exist_ok=True)
        with tarfile.open(packages / f'{vendor}.tgz') as archive:
            for member in archive:
                if member.name in wanted:
                    (folder / vendor / Path(member.name).name).write_bytes(content_of(archive, member))
        for entry in wanted.values():
            label = classes.index(entry['subcategory'])
            name = 'val_list.txt' if vendor == VAL_VENDOR else 'train_list.txt'
            lines[name].append(f'{vendor}/{entry["image"]} {label}\n')
    for name, texts in lines.items():
        (folder / name).write_text(''.join(texts))
    (folder / 'class_names.txt').write_text(''.join(f'{name}\n' for name in classes))


def make_stamps(folder: Path, packages: Path) -> None:
    """Make the folder of the task: CLASS/NAME.png, without copies of images that are mirrored."""
    unpacked = folder.with_name('unpacked')
    subprocess.run(['dpkg-deb', '-x', packages / 'stamps.deb', unpacked], check=True)
    for name in STAMPS:
        source = unpacked / 'usr/share/tuxpaint/stamps' / name
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in sorted(source.rglob('*.png')):
            if not path.stem.endswith(COPIES):
                shutil.copyfile(path, folder / name / '_'.join(path.relative_to(source).parts))
    shutil.rmtree(unpacked)


# ---- runs

def run(*words: object) -> None:
    """Run a program of this repository. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def train(output: Path, data: Path, cfg: str | Path, *options: object, weights: Path | None = None) -> Path:
    """Train a run, unless it is complete, and return its folder."""
    if not (output / 'final.pdparams').exists():
        start = () if weights is None else ('-pretrained', weights)
        run('main_single_gpu.py', '-cfg', cfg, '-data_path', data, '-output', output, '-resume', 'auto',
            *start, '-opts', 'MODEL.NUM_CLASSES', -1, *options)
    return output


def accuracies(output: Path) -> list[float]:
    """Return the accuracy of each evaluation of a run, in percent."""
    rows = [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]
    return [row['acc1'] for row in rows if row['split'] == 'val']


def mean_curve(runs: list[list[float]]) -> list[tuple[float, float]]:
    """Return (epoch, mean accuracy) over runs, up to the end of the shortest."""
    return [(epoch, statistics.mean(values)) for epoch, values in enumerate(zip(*runs), 1)]


def chart(curves: dict[str, list[list[float]]]) -> str:
    """Draw the mean accuracies of {name: runs} by epoch, as an SVG file."""
    return svg([charts.Series(name, mean_curve(runs), colour=i, dash=i, marker=-1)
                for i, (name, runs) in enumerate(curves.items())])


def svg(curves: list[charts.Series]) -> str:
    """Draw accuracies in percent by epoch, as an SVG file with a legend."""
    drawn = str(charts.line_chart('accuracy', curves, unit=' %', linear=True))
    body = drawn[drawn.rindex('<svg'):drawn.rindex('</svg>')]
    body = re.sub(r' (data-chart|tabindex)="[^"]*"', '', body)               # for the script of a page
    body = body.replace('<svg', '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    opening, _, rest = body.partition('>')
    top = 192 - 14 * (len(curves) - 1)
    labels = ''.join(f'<text class="label s{curve.colour}" x="230" y="{top + 14 * i}">{curve.label}</text>'
                     for i, curve in enumerate(curves))
    return f'{opening}><style>{STYLE}</style>{rest}{labels}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='FOLDER', type=Path, help='for packages, images and runs')
    parser.add_argument('-data', '--data', action='store_true', help='only make the folders of images')
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    download(folder)
    if not (folder / 'emoji').exists():
        make_emoji(folder / 'emoji', folder)
    if not (folder / 'stamps').exists():
        make_stamps(folder / 'stamps', folder)
    if args.data:
        return

    pretraining = train(folder / 'pretraining', folder / 'emoji', MODEL, *PRETRAINING)
    print(f'pretraining: {accuracies(pretraining)[-1]:.1f} % of the emoji of {VAL_VENDOR}')
    recipe = folder / 'stamps.yaml'
    recipe.write_text(f'BASE: [{ROOT}/{MODEL}, {ROOT}/configs/_finetune.yaml]\nMODEL: {{NAME: stamps}}\n')
    results: dict[str, list[list[float]]] = {name: [] for name in FINE_TUNINGS}
    for seed in SEEDS:
        data = folder / f'stamps_{seed}'
        if not data.exists():
            shutil.copytree(folder / 'stamps', data)
        run('tools/make_lists.py', data, '-val_share', 0.5, '-seed', seed)
        for i, (name, (options, pretrained)) in enumerate(FINE_TUNINGS.items()):
            weights = pretraining / 'final.pdparams' if pretrained else None
            output = train(folder / f'run_{seed}_{i}', data, recipe, 'SEED', seed, *options, weights=weights)
            results[name].append(accuracies(output))
    print('| start | accuracy, % | over the seeds |\n|---|---|---|')
    for name, runs in results.items():
        values = [run[-1] for run in runs]
        mean, spread = statistics.mean(values), statistics.stdev(values)
        single = ', '.join(f'{value:.1f}' for value in values)
        print(f'| {name} | {mean:.1f} ± {spread:.1f} | {single} |')
    (folder / CHART).write_text(chart(results))


if __name__ == '__main__':
    main()
