"""Write the page of a run: its curves, confusions, errors, configuration and machine in one HTML file.

RUN is a run folder. One gives RUN/report.html, as a training does at its end. Several are compared, in
compare.html here. The page names the parts for which a run has no data yet. Needs no GPU and no model.

  python tools/report.py demo/run
  python tools/report.py demo/run demo/other -output demo/compare.html

Prints the name of the page. Exit status: 0, or 2 for a mistake in the command or a folder that holds no run.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import cli


def parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument('run', nargs='+', metavar='RUN', help='run folder')
    parser.add('output', 'the page (default: RUN/report.html, or compare.html for several)', metavar='FILE')
    parser.add('classes', "class names, one per line in the labels' order (default: the run's "
               "class_names.txt, else the data's)", metavar='FILE')
    return parser


def main(args: argparse.Namespace) -> int:
    default = os.path.join(args.run[0], 'report.html') if len(args.run) == 1 else 'compare.html'
    from reporting import report
    print(report.write(args.run, args.output or default, args.classes))
    return 0


if __name__ == '__main__':
    parser().run(main)
