"""The page of a run: curves, configuration, machine, confusions and surest mistakes in one HTML file without network access.

    python tools/report.py RUN                       writes RUN/report.html (a training does this at its end)
    python tools/report.py RUN RUN ... [-output F]   compares runs in one page, compare.html

RUN is a run folder; whatever a run has not written yet is missing in the page and said to be. Needs no GPU and no model.
"""
import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import utils  # noqa: E402
from tools.reporting import page  # noqa: E402
from tools.reporting.runs import read_run  # noqa: E402


def write(folders, path, classes=None):
    """Make the HTML file `path` about one run folder, or about several side by side; `classes`: a file of class names.

    Raises ValueError for a folder that holds no run, OSError where `path` cannot be written.
    """
    runs = [read_run(folder, classes) for folder in folders]
    text = page.run_page(runs[0]) if len(runs) == 1 else page.comparison(runs)
    utils.atomic_write(path, lambda file: file.write(text.encode('utf-8', 'replace')))
    return path


def parser():
    options = argparse.ArgumentParser(description='Write the page of a run, or a page that compares several.')
    options.add_argument('run', nargs='+', metavar='RUN', help='run folder')
    options.add_argument('-output', '--output', metavar='FILE', help='default: RUN/report.html, or compare.html for several')
    options.add_argument('-classes', '--classes', metavar='FILE', help='class names, one per line in the order of the labels')
    return options


def main(argv=None):
    args = parser().parse_args(argv)
    default = os.path.join(args.run[0], 'report.html') if len(args.run) == 1 else 'compare.html'
    with utils.plain_errors():
        print(write(args.run, args.output or default, args.classes))


if __name__ == '__main__':
    main()
