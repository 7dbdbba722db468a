"""Time ONNX files by turns in onnxruntime and OpenVINO.

    python dev/onnx_speed.py float32/model.onnx int8/model.onnx

Prints the milliseconds of an image, median (lowest to highest), on random images in batches of 1 and 16.
Each runtime is a process of its own. Needs requirements-export.txt.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import runtimes

BATCHES = (1, 16)
ROUNDS = 15
RUNTIMES = {'onnxruntime': runtimes.onnxruntime, 'openvino': runtimes.openvino}


def measure(runtime: str, files: list[str], size: int) -> None:
    """Time the files, which take float32 (B, 3, size, size), in one runtime, and print a line for each."""
    programs = {file: RUNTIMES[runtime](file) for file in files}
    for batch in BATCHES:
        images = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype='float32')
        for file, found in runtimes.time_by_turns(programs, images, ROUNDS).items():
            print(f'{runtime}, batch {batch}, {file}: {statistics.median(found):.1f} ms an image '
                  f'({min(found):.1f} to {max(found):.1f})', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', metavar='FILE')
    parser.add_argument('-size', '--size', type=int, default=256, help='side of the images, pixels')
    parser.add_argument('-runtime', '--runtime', choices=RUNTIMES, help='only this one')
    args = parser.parse_args()
    if args.runtime:
        measure(args.runtime, args.files, args.size)
        return
    for name in RUNTIMES:
        subprocess.run([sys.executable, __file__, *args.files, f'-size={args.size}', f'-runtime={name}'],
                       check=True)


if __name__ == '__main__':
    main()
