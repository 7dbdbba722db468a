"""Short trainings, and the results of checks, for tools/gpu_checks.py."""
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system import lifeline
from tools import cli

PASSED, FAILED, OPEN, NOTED = 'passed', 'failed', 'open', 'noted'
CONFIG = os.path.join(cli.ROOT, 'configs', 'halonet_digits.yaml')
QUICK = ['TRAIN.NUM_EPOCHS', 2, 'TRAIN.WARMUP_EPOCHS', 0, 'DATA.NUM_WORKERS', 1, 'DATA.BATCH_SIZE', 16,
         'REPORT_FREQ', 1, 'MODEL.FREEZE_NORM', True]
TRAIN_IMAGES, VAL_IMAGES = 96, 23


@dataclass
class Machine:
    """What is checked: the device, the number of its GPUs, and a folder for files."""
    device: str                                     # gpu or cpu
    gpus: int
    folder: str

    @property
    def processes(self) -> int:
        """Processes of a run on several devices: one per GPU, or two on a CPU. 1 if there is one GPU."""
        return self.gpus if self.device == 'gpu' else 2


@dataclass
class Check:
    """The result of a check, as text."""
    name: str
    expected: str
    measured: str
    state: str                                      # PASSED, FAILED, OPEN or NOTED


def at_most(name: str, value: float, limit: float) -> Check:
    """Check a number against a limit; NaN fails."""
    return Check(name, f'at most {limit:g}', f'{value:.3g}', PASSED if value <= limit else FAILED)


def equal(name: str, value: Any, expected: Any) -> Check:
    """Check that two values are equal."""
    return Check(name, str(expected), str(value), PASSED if value == expected else FAILED)


def noted(name: str, value: Any) -> Check:
    """Note a value for which nothing is expected."""
    return Check(name, '', str(value), NOTED)


def left_open(name: str, reason: str) -> Check:
    """Leave a check open that cannot be made here."""
    return Check(name, '', reason, OPEN)


def needs_gpu(name: str) -> Check:
    """Leave a check open on a CPU."""
    return left_open(name, 'needs a GPU')


# ---- runs

def make_images(folder: str) -> str:
    """Write images of ten colours with noise, and their lists, to `folder` once; return it."""
    import numpy as np
    from PIL import Image
    if os.path.exists(os.path.join(folder, 'val_list.txt')):
        return folder
    random = np.random.default_rng(0)
    colours = random.integers(0, 128, (10, 3))
    for split, count in (('train', TRAIN_IMAGES), ('val', VAL_IMAGES)):
        os.makedirs(os.path.join(folder, split))
        lines = []
        for i in range(count):
            pixels = colours[i % 10] + random.integers(0, 128, (40, 40, 3))
            Image.fromarray(pixels.astype('uint8')).save(os.path.join(folder, split, f'{i}.png'))
            lines.append(f'{split}/{i}.png {i % 10}\n')
        cli.write_text(os.path.join(folder, f'{split}_list.txt'), ''.join(lines))
    return folder


def options(machine: Machine, name: str, *opts: Any) -> list[str]:
    """Return the words after -cfg FILE of a short training into the run folder `name`."""
    words = ['-data_path', make_images(os.path.join(machine.folder, 'images')),
             '-output', os.path.join(machine.folder, name), '-device', machine.device]
    chosen = {**pairs(QUICK), **pairs(opts)}
    return [*words, '-opts', *(str(word) for pair in chosen.items() for word in pair)]


def pairs(opts: Any) -> dict:
    return dict(zip(opts[::2], opts[1::2]))


def start(program: str, *words: str) -> subprocess.Popen:
    """Start a program of this repository; `finish` reads its output."""
    return start_python(os.path.join(cli.ROOT, program), *words)


def start_python(*words: str) -> subprocess.Popen:
    """Start Python with these words. It ends when this process ends, and so do those that it starts."""
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cli.ROOT,
        errors='replace', preexec_fn=lifeline.die_with_parent)


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """Return the exit code and the output of a program; it is killed after `seconds`."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += f'\nended by the time limit of {seconds} s'
    return process.returncode, output


def run(machine: Machine, name: str, *opts: Any, program: str = 'main_single_gpu.py',
        flags: tuple = ()) -> str:
    """Train as `options` says and return the run folder. Raises RuntimeError with its last line."""
    code, output = finish(start(program, '-cfg', CONFIG, *flags, *options(machine, name, *opts)))
    if code:
        raise RuntimeError(f'{name}: exit code {code}: {output.strip().splitlines()[-1]}')
    return os.path.join(machine.folder, name)


def losses(folder: str, split: str = 'train') -> list[float]:
    """Return the losses in metrics.jsonl of a run."""
    text = Path(folder, 'metrics.jsonl').read_text(encoding='utf-8')
    records = [json.loads(line) for line in text.splitlines()]
    return [record['loss'] for record in records if record['split'] == split]


def apart(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of two lists, or infinity if one is shorter."""
    if len(values) != len(expected):
        return math.inf
    return max(abs(x - y) / abs(y) for x, y in zip(values, expected))


def weights_apart(folder: str, other: str) -> float:
    """Return the largest difference between the final weights of two runs."""
    import numpy as np
    import paddle
    ours, theirs = (paddle.load(os.path.join(path, 'final.pdparams'), return_numpy=True)
                    for path in (folder, other))
    return max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
