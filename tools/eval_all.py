"""Evaluate a list of models, each at several input sizes and crops, into one table.

LIST is a YAML file with a list of entries, or a CSV file with a header and a line per entry. An entry has cfg
and pretrained. It may have image_size and crop_pct (one or several; default: those of the command, else those
of the cfg) and opts (options of config.py as 'KEY VALUE ...'). A size that is no square is written 128x256,
height first. Paths are relative to the folder of the LIST.

  - {cfg: configs/halonet_26t_256.yaml, pretrained: halonet_26t_256.pdparams, image_size: [256, 288]}
  - {cfg: configs/halonet_50ts_256.yaml, pretrained: halonet_50ts_256.pdparams, crop_pct: [0.94, 1.0]}

  python tools/eval_all.py models.yaml -data_path imagenet -results runs/results.csv
  python tools/eval_all.py models.csv -data_path imagenet -image_size 224 256 -crop_pct 0.875 1.0

Each evaluation is a main_multi_gpu.py of its own, on all GPUs. A failure is reported, and the others go on.
The lines are those of `-eval -results`, and the table is printed at the end.
Exit status: 0, or 1 if an evaluation failed, or 2 for a mistake in the command.
"""
import argparse
import csv
import itertools
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli

import yaml

from config import with_opts

SHOWN = {                                           # column of the CSV -> heading of the printed table
    'model': 'model', 'weights': 'weights', 'image_size': 'size', 'crop_pct': 'crop', 'top1': 'top-1',
    'top5': 'top-5', 'images': 'images', 'images_per_s': 'images/s', 'parameters_m': 'M parameters',
    'multiply_adds_g': 'G multiply-adds',
}
KEYS = ('cfg', 'pretrained', 'image_size', 'crop_pct', 'opts')
Results = list[dict[str, str]]                      # lines of a results CSV


@dataclass
class Job:
    """One evaluation; an empty size or crop is that of the cfg."""
    cfg: str
    pretrained: str
    image_size: str
    crop_pct: str
    opts: list[str]

    def __str__(self) -> str:
        text = self.pretrained
        if self.image_size:
            text += f' {self.image_size} px'
        if self.crop_pct:
            text += f' crop {self.crop_pct}'
        return text


def read_entries(path: str) -> list[dict[str, Any]]:
    """Read the entries of a LIST. Raises ValueError with the file and the number of a bad entry."""
    with open(path, encoding='utf-8-sig', newline='') as file:
        try:
            entries = list(csv.DictReader(file)) if path.lower().endswith('.csv') else yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f'{path}: not valid: ' + ' '.join(str(error).split())) from None
    if not entries or not isinstance(entries, list):
        raise ValueError(f'{path}: expected a list of entries with cfg and pretrained (-h shows one)')
    for i, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not entry.get('cfg') or not entry.get('pretrained'):
            raise ValueError(f'{path}: entry {i} needs cfg and pretrained, found {entry}')
        for key in entry:
            if key not in KEYS:
                raise ValueError(f'{path}: entry {i} has {key}; known are ' + ', '.join(KEYS))
    return entries


def words_of(value: Any) -> list[str]:
    """Return the items of a YAML list, or the words of a text or number, as texts."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [] if value is None else shlex.split(str(value))


def resolve(folder: str, name: Any) -> str:
    """Return a path of the LIST. Other names, such as those of weights on the hub, stay as they are."""
    name = os.path.expanduser(str(name))
    path = os.path.join(folder, name)
    return path if os.path.exists(path) or os.path.exists(f'{path}.pdparams') else name


def jobs_of(path: str, sizes: Optional[list[str]], crops: Optional[list[str]]) -> list[Job]:
    """Return the evaluations of a LIST; `sizes` and `crops` are for the entries that name none."""
    folder = os.path.dirname(path)
    jobs = []
    for entry in read_entries(path):
        cfg, pretrained = resolve(folder, entry['cfg']), resolve(folder, entry['pretrained'])
        own_sizes = words_of(entry.get('image_size')) or sizes or ['']
        own_crops = words_of(entry.get('crop_pct')) or crops or ['']
        for size, crop in itertools.product(own_sizes, own_crops):
            jobs.append(Job(cfg, pretrained, size, crop, words_of(entry.get('opts'))))
    return jobs


def opts_of(job: Job, args: argparse.Namespace) -> list[str]:
    """Return the words after -opts of an evaluation. Raises ValueError for a contradiction to its flags."""
    opts = job.opts + args.opts
    flags = {'DATA.IMAGE_SIZE': job.image_size, 'DATA.CROP_PCT': job.crop_pct}
    with_opts({key: value for key, value in flags.items() if value}, opts)
    if job.crop_pct:
        opts += ['DATA.CROP_PCT', job.crop_pct]
    return opts


def run(job: Job, args: argparse.Namespace, folder: str) -> str:
    """Evaluate in the run folder `folder`. Returns the error in one line, or ''."""
    command = [
        sys.executable, os.path.join(cli.ROOT, 'main_multi_gpu.py'), '-eval', f'-cfg={job.cfg}',
        f'-pretrained={job.pretrained}', f'-data_path={args.data_path}', f'-results={args.results}',
        f'-output={folder}']
    if args.amp:
        command.append('-amp')
    if job.image_size:
        command.append(f'-image_size={job.image_size}')
    if args.batch_size:
        command.append(f'-batch_size_eval={args.batch_size}')
    opts = opts_of(job, args)
    if opts:
        command += ['-opts', *opts]
    done = cli.run_program(command)
    if done.returncode == 0:
        return ''
    return f'{last_error(done.stdout)} (exit status {done.returncode})'


def last_error(output: str) -> str:
    """Return the last line that mentions an error, or else the last line."""
    last, error = 'no output', ''
    for line in output.splitlines():
        last = line.strip() or last
        if 'error' in line.lower():
            error = line.strip()
    return error or last


def last_line(path: str, pretrained: str) -> dict[str, str]:
    """Return the last line about these weights in a results CSV. Raises ValueError if there is none."""
    found = None
    with open(path, encoding='utf-8', newline='') as file:
        for row in csv.DictReader(file):
            if row['weights'] == pretrained:
                found = row
    if found is None:
        raise ValueError(f'{path} has no line about {pretrained}; does the cfg or opts name other weights?')
    return found


def table(rows: Results) -> str:
    """Format lines of a results CSV as a Markdown table."""
    lines = [''] * (len(rows) + 2)
    for key, heading in SHOWN.items():
        cells = [heading, '', *(os.path.basename(row[key]) for row in rows)]
        width = max(len(cell) for cell in cells)
        cells[1] = '-' * width
        for i, cell in enumerate(cells):
            lines[i] += f'| {cell:{width}} '
    return '|\n'.join(lines) + '|'


def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument('list', metavar='LIST', help='YAML or CSV file with the models')
    parser.add('data_path', 'folder with val_list.txt', required=True, metavar='DIR')
    parser.add('results', 'the CSV file that gets a line per evaluation (default: results.csv)',
               default='results.csv', metavar='FILE')
    parser.add('image_size', 'sizes for entries that name none', nargs='+', metavar='N')
    parser.add('crop_pct', 'crops for entries that name none', nargs='+', metavar='X')
    parser.add('batch_size', 'images per process', metavar='N')
    parser.add('amp', 'mixed precision (on a GPU)', action='store_true')
    parser.add('opts', 'options of config.py for all', nargs='+', action='extend', default=[],
               metavar='KEY VALUE')
    return parser


def main(args: argparse.Namespace) -> int:
    from training import results  # late, because it imports Paddle
    jobs = jobs_of(args.list, args.image_size, args.crop_pct)
    for job in jobs:
        opts_of(job, args)                          # reports a contradiction before hours of evaluations
    os.makedirs(os.path.dirname(args.results) or '.', exist_ok=True)
    cli.check_outputs(args.results)
    results.check_table(args.results)
    rows, failed = evaluate_all(jobs, args)
    print(f'\n{table(rows)}' if rows else '')
    if failed:
        print(f'\n{len(failed)} of {len(jobs)} failed:')
        for job, problem in failed:
            print(f'  {job}: {problem}')
    return int(bool(failed))


def evaluate_all(jobs: list[Job], args: argparse.Namespace) -> tuple[Results, list[tuple[Job, str]]]:
    """Run all evaluations. Returns their lines of the results CSV, and the failed ones with their errors."""
    rows: Results = []
    failed: list[tuple[Job, str]] = []
    for i, job in enumerate(jobs, 1):
        print(f'[{i}/{len(jobs)}] {job}: ', end='', flush=True)
        with tempfile.TemporaryDirectory(prefix='eval_all_') as folder:
            problem = run(job, args, folder)
        if problem:
            failed.append((job, problem))
            print(f'FAILED: {problem}')
            continue
        row = last_line(args.results, job.pretrained)
        rows.append(row)
        print(f'top-1 {row["top1"]}  top-5 {row["top5"]}  {row["images_per_s"]} images/s')
    return rows, failed


if __name__ == '__main__':
    parser().run(main)
