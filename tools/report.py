"""The page of a run: curves, configuration, machine, confusions and surest mistakes in one HTML file without network access.

RUN is a run folder. One gives RUN/report.html, as a training does at its end; several are compared, in compare.html here.
Whatever a run has not written yet is missing in the page and said to be. Needs no GPU and no model.

  python tools/report.py demo/run
  python tools/report.py demo/run demo/other -output demo/compare.html

Prints the name of the page. Exit status: 0, or 2 for a mistake in the command or a folder that holds no run.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli  # noqa: E402


def write(folders, path, classes=None):
    """Make the HTML file `path` about one run folder, or about several side by side; `classes`: a file of class names.

    Raises ValueError for a folder that holds no run, OSError where `path` cannot be written.
    """
    import utils  # isort: skip  (first: it prepares for Paddle's import)
    from tools.reporting import page
    from tools.reporting.runs import read_run
    runs = [read_run(folder, classes) for folder in folders]
    text = page.run_page(runs[0]) if len(runs) == 1 else page.comparison(runs)
    utils.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'replace')))
    return path


def parser():
    parser = cli.Parser(__doc__)
    parser.add_argument('run', nargs='+', metavar='RUN', help='run folder')
    parser.add('output', 'the page (default: RUN/report.html, or compare.html for several)', metavar='FILE')
    parser.add('classes', "class names, one per line in the labels' order (default: the run's class_names.txt, else the data's)",
               metavar='FILE')
    return parser


def main(args):
    default = os.path.join(args.run[0], 'report.html') if len(args.run) == 1 else 'compare.html'
    print(write(args.run, args.output or default, args.classes))
    return 0


if __name__ == '__main__':
    parser().run(main)
