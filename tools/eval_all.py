"""Evaluate a list of models, each at several input sizes and crops, into one table.

LIST is a YAML file with a list of entries, or a CSV file with a line per entry under a heading. An entry has cfg and
pretrained, and may have image_size, crop_pct (one or several; else those given here; else those of the cfg) and opts (options of
config.py as 'KEY VALUE ...'). Paths are relative to the folder of the LIST.

  - {cfg: configs/halonet_26t_256.yaml, pretrained: halonet_26t_256.pdparams, image_size: [256, 288], crop_pct: [0.95, 1.0]}
  - {cfg: configs/halonet_50ts_256.yaml, pretrained: halonet_50ts_256.pdparams}

  python tools/eval_all.py models.yaml -data_path imagenet -results runs/results.csv
  python tools/eval_all.py models.csv -data_path imagenet -image_size 224 256 288 -crop_pct 0.875 1.0 -opts DATA.NUM_WORKERS 8

Each evaluation is a main_multi_gpu.py of its own, on all GPUs; one that fails is reported, and the others go on. The lines are
those of `-eval -results`, and the table is printed at the end. Exit status: 0, or 1 if one failed, or 2 for a mistake in the
command.
"""
import csv
import itertools
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli

import yaml

from config import with_opts

SHOWN = {'model': 'model', 'weights': 'weights', 'image_size': 'size', 'crop_pct': 'crop', 'top1': 'top-1', 'top5': 'top-5',
         'images': 'images', 'images_per_s': 'images/s', 'parameters_m': 'M parameters', 'multiply_adds_g': 'G multiply-adds'}
KEYS = ('cfg', 'pretrained', 'image_size', 'crop_pct', 'opts')


@dataclass
class Job:
    """One evaluation; an empty size or crop is that of the cfg."""
    cfg: str
    pretrained: str
    image_size: str
    crop_pct: str
    opts: list

    def __str__(self):
        words = (self.pretrained, self.image_size and f'{self.image_size} px', self.crop_pct and f'crop {self.crop_pct}')
        return ' '.join(word for word in words if word)


def read_entries(path):
    """The dicts in a LIST. Raises ValueError, naming the file and entry, for one that is not as it should be."""
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
        unknown = [key for key in entry if key not in KEYS]
        if unknown:
            raise ValueError(f'{path}: entry {i} has {unknown[0]}; known are ' + ', '.join(KEYS))
    return entries


def words_of(value):
    """A YAML list, or one value, or the words of a text -> texts."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [] if value is None else shlex.split(str(value))


def place(folder, name):
    """A path of the LIST; a name that is no file beside it, such as one that stands for weights elsewhere, stays as it is."""
    name = os.path.expanduser(str(name))
    path = os.path.join(folder, name)
    return path if os.path.exists(path) or os.path.exists(f'{path}.pdparams') else name


def jobs_of(path, sizes, crops):
    """The Jobs of a LIST; `sizes` and `crops` are for the entries that name none."""
    folder, jobs = os.path.dirname(path), []
    for entry in read_entries(path):
        for size, crop in itertools.product(words_of(entry.get('image_size')) or sizes or [''],
                                            words_of(entry.get('crop_pct')) or crops or ['']):
            jobs.append(Job(place(folder, entry['cfg']), place(folder, entry['pretrained']), size, crop,
                            words_of(entry.get('opts'))))
    return jobs


def opts_of(job, args):
    """The words after -opts of an evaluation. Raises ValueError where they contradict the size or the crop."""
    opts, flags = job.opts + args.opts, {'DATA.IMAGE_SIZE': job.image_size, 'DATA.CROP_PCT': job.crop_pct}
    with_opts({key: value for key, value in flags.items() if value}, opts)
    return opts + (['DATA.CROP_PCT', job.crop_pct] if job.crop_pct else [])


def run(job, args, folder):
    """Evaluate; returns what went wrong in one line, or ''. `folder` gets the run folder's files."""
    flags = [f'-cfg={job.cfg}', f'-pretrained={job.pretrained}', f'-data_path={args.data_path}', f'-results={args.results}',
             f'-output={folder}', '-eval', *(['-amp'] if args.amp else [])]
    flags += [f'-image_size={job.image_size}'] if job.image_size else []
    flags += [f'-batch_size_eval={args.batch_size}'] if args.batch_size else []
    opts = opts_of(job, args)
    command = [sys.executable, os.path.join(cli.ROOT, 'main_multi_gpu.py'), *flags, *(['-opts', *opts] if opts else [])]
    done = cli.run_program(command)
    if done.returncode == 0:
        return ''
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    says = [line for line in lines if 'error' in line.lower()] or lines or ['it said nothing']
    return f'{says[-1]} (exit status {done.returncode})'


def last_line(path, pretrained):
    """{column: text} of the last line about these weights in a results CSV. Raises ValueError if there is none."""
    with open(path, encoding='utf-8', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['weights'] == pretrained]
    if not rows:
        raise ValueError(f'{path} has no line about {pretrained}; does the cfg or opts name other weights?')
    return rows[-1]


def table(rows):
    """{column: text} dicts as Markdown."""
    cells = [list(SHOWN.values())] + [[os.path.basename(row[key]) for key in SHOWN] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in cells]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]])


def parser():
    parser = cli.Parser(__doc__)
    parser.add_argument('list', metavar='LIST', help='YAML or CSV file with the models')
    parser.add('data_path', 'folder with val_list.txt', required=True, metavar='DIR')
    parser.add('results', 'the CSV file that gets a line per evaluation (default: results.csv)', default='results.csv',
               metavar='FILE')
    parser.add('image_size', 'sizes for entries that name none', nargs='+', metavar='N')
    parser.add('crop_pct', 'crops for entries that name none', nargs='+', metavar='X')
    parser.add('batch_size', 'images per process', metavar='N')
    parser.add('amp', 'mixed precision (on a GPU)', action='store_true')
    parser.add('opts', 'options of config.py for all', nargs='+', action='extend', default=[], metavar='KEY VALUE')
    return parser


def main(args):
    from training import results  # late: with it comes Paddle
    jobs, failed, rows = jobs_of(args.list, args.image_size, args.crop_pct), [], []
    for job in jobs:
        opts_of(job, args)                          # a contradiction is better told before hours of evaluations
    os.makedirs(os.path.dirname(args.results) or '.', exist_ok=True)
    cli.check_outputs(args.results)
    results.check_table(args.results)
    for i, job in enumerate(jobs, 1):
        print(f'[{i}/{len(jobs)}] {job}: ', end='', flush=True)
        with tempfile.TemporaryDirectory(prefix='eval_all_') as folder:
            problem = run(job, args, folder)
        if problem:
            failed.append((job, problem))
            print(f'FAILED: {problem}')
            continue
        rows.append(last_line(args.results, job.pretrained))
        print(f'top-1 {rows[-1]["top1"]}  top-5 {rows[-1]["top5"]}  {rows[-1]["images_per_s"]} images/s')
    print(f'\n{table(rows)}' if rows else '')
    if failed:
        print(f'\n{len(failed)} of {len(jobs)} failed:')
        print('\n'.join(f'  {job}: {problem}' for job, problem in failed))
    return int(bool(failed))


if __name__ == '__main__':
    parser().run(main)
