"""Small runs for the tests: a list-file folder of noisy coloured squares, and a HaloNet that trains on it."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TINY = ['DATA.IMAGE_SIZE', 16, 'DATA.BATCH_SIZE', 8, 'DATA.NUM_WORKERS', 0, 'DATA.CROP_PCT', 1.0,
        'MODEL.NUM_CLASSES', 4, 'MODEL.STEM', '3x3', 'MODEL.STEM_WIDTH', 8, 'MODEL.STEM_POOL', False,
        'MODEL.STAGES', ['conv', 'halo'], 'MODEL.WIDTHS', [16, 32], 'MODEL.STRIDES', [1, 2],
        'MODEL.HEADS', [0, 2], 'MODEL.BLOCK_SIZE', 4, 'MODEL.HALO_SIZE', 1, 'MODEL.NAME', 'tiny',
        'TRAIN.NUM_EPOCHS', 2, 'TRAIN.WARMUP_EPOCHS', 1, 'REPORT_FREQ', 1, 'DEVICE', 'cpu']


def make_images(folder, train=20, val=11, seed=0):
    """Write PNG images of 4 classes to `folder`, with train_list.txt and val_list.txt; return it as text."""
    rng = np.random.default_rng(seed)
    for split, count in (('train', train), ('val', val)):
        os.makedirs(folder / split)
        lines = []
        for i in range(count):
            pixels = rng.integers(0, 128, (20, 24, 3))
            pixels[:, :, i % 4 % 3] += 100 if i % 4 < 3 else 0
            Image.fromarray(pixels.astype('uint8')).save(folder / split / f'{i}.png')
            lines.append(f'{split}/{i}.png {i % 4}\n')
        (folder / f'{split}_list.txt').write_text(''.join(lines))
    return str(folder)


def options(values):
    """{'KEY': value} or [KEY, value, ...] as command-line words after -opts."""
    return ['-opts', *(str(value) for value in values)]


def program(name, *words, check=True, timeout=120, **environment):
    """Run a main program as a user would; returns the finished process with its output as text."""
    command = [sys.executable, name, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def records(folder, split=None):
    """The records of a run's metrics.jsonl."""
    with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as file:
        lines = [json.loads(line) for line in file]
    return [line for line in lines if split in (None, line['split'])]


def start(name, *words, log, prefix=(), **environment):
    """Start a main program, or a script, in a session of its own; its output goes to the file `log`."""
    command = [f'./{name}'] if name.endswith('.sh') else [sys.executable, name]
    environment = {**os.environ, 'PYTHON': sys.executable, 'RUN_OF_TEST': str(log), **environment}
    return subprocess.Popen([*prefix, *command, *map(str, words)], cwd=ROOT, env=environment,
                            stdout=log.open('w'), stderr=subprocess.STDOUT, start_new_session=True)


def processes(log):
    """{pid: command line} of the living processes of the run with this `log`."""
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/environ', 'rb') as environ, open(f'/proc/{pid}/cmdline', 'rb') as command:
                if f'RUN_OF_TEST={log}\0'.encode() in environ.read():
                    found[int(pid)] = command.read().replace(b'\0', b' ').decode()
        except OSError:
            continue                                # it has ended, or is a zombie
    return found


def kill_all(*logs):
    """Kill the living processes of the runs with these logs."""
    for log in logs:
        for pid in processes(log):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition, seconds, what):
    """Poll until `condition()` is true; returns what it gave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f'{what}: not within {seconds} s')


def leaves(process, log, seconds=40):
    """The exit code of a program that must end within `seconds`, and with it all that it has started."""
    code = process.wait(seconds)
    wait_until(lambda: not processes(log), 10, f'no process left: {processes(log)}')
    return code


def wait_for_step(folder, step, process, seconds=90):
    """Wait until the run in `folder` has written the record of `step`."""
    def there():
        assert process.poll() is None, 'it ended before'
        path = os.path.join(folder, 'metrics.jsonl')
        if not os.path.exists(path):
            return False
        with open(path, encoding='utf-8') as file:
            return any(json.loads(line)['step'] >= step for line in file if line.endswith('\n'))
    wait_until(there, seconds, f'step {step} in {folder}')
