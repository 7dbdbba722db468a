"""Judge the predictions of a run: precision, recall and F1 by class, calibration, confusions.

RUN is a run folder with predictions_SPLIT.npz, which the last evaluation of a training and every -eval write.
The files go beside them: metrics_SPLIT.json, classes_SPLIT.csv and confusion_SPLIT.csv. A training writes
them as well. Needs no GPU, no model and no images.

  python tools/metrics.py demo/run
  python tools/metrics.py demo/run -output scores -classes names.txt

Exit status: 0, or 2 for a mistake in the command or a folder without predictions.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli


def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument('run', metavar='RUN', help='run folder')
    parser.add('output', 'folder for the files (default: RUN)', metavar='DIR')
    parser.add('classes', "class names, one per line in the labels' order (default: the run's "
               "class_names.txt, else the data's)", metavar='FILE')
    return parser


def main(args: argparse.Namespace) -> int:
    from reporting import runs, scores
    run = runs.read_run(args.run, args.classes)
    folder = args.output or args.run
    os.makedirs(folder, exist_ok=True)
    found = scores.write_all(run, folder)
    if not found:
        raise ValueError(f'{args.run}: no predictions (predictions_*.npz); the last evaluation of a training '
                         'and every -eval write them')
    for split, result in found.items():
        print(f'{split}: metrics_{split}.json, classes_{split}.csv and confusion_{split}.csv in {folder}')
        for name, value in scores.summary(result).items():
            if name != 'calibration':
                print(f'  {name.replace("_", " "):<28}{"unknown" if value is None else value}')
    return 0


if __name__ == '__main__':
    parser().run(main)
