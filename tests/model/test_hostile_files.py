"""Weight files made to run code, to take memory or time are refused in one line, soon, in bounded memory.

They are read in a process of their own, so that a crash or a hang is an outcome too. The slow test
changes real files at random.
"""
import json
import pickle
import random
import resource
import struct
import subprocess
import sys

import numpy as np
import paddle
import pytest
import reference as ref
from hostile_files import HOSTILE, MANY, pickled
from runs import ROOT
from safetensors.numpy import save_file

from model import weight_files

TORCH = ref.FIXTURES / 'torch'
MEGABYTES = 1000                                    # at most, of which Python and Paddle take 310
MUTATIONS = 20_000
SECONDS = 300                                       # for all the files: a guard, each takes seconds at most


READ = '''
import sys
from model import weight_files
for path in sys.argv[1:]:
    for read in (weight_files.read, weight_files.read_pickle):
        try:
            read(path)
            print('read')
        except ValueError as error:
            print(error if str(error).isprintable() else 'not one line')
with open('/proc/self/status') as status:         # ru_maxrss would count the process that started this one
    print(next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) // 1024, flush=True)
'''


def read_apart(paths):
    """Return the lines of read and read_pickle for each path, by a new process, and its megabytes."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', READ, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-400:], done.stderr[-400:])
    *lines, megabytes = done.stdout.splitlines()
    return list(zip(lines[::2], lines[1::2])), int(megabytes)


def check(folder, contents):
    """Check that each {title: content} is refused in one line, all within SECONDS and MEGABYTES."""
    paths = [folder / str(n) for n in range(len(contents))]
    for path, content in zip(paths, contents.values()):
        path.write_bytes(content)
    outcomes, megabytes = read_apart(paths)
    assert len(outcomes) == len(contents) and megabytes < MEGABYTES
    for title, path, (line, _) in zip(contents, paths, outcomes):
        assert line.startswith(f'{path}: ') and len(line) < 700, (title, line)


def test_hostile_files_are_refused_in_one_line_and_bounded_memory(tmp_path):
    check(tmp_path, HOSTILE)


@pytest.mark.slow
@pytest.mark.parametrize('what', MANY)
def test_millions_of_instructions_are_refused_soon(tmp_path, what):
    check(tmp_path, {what: pickled(MANY[what] * 5_000_000)})


def test_sparse_files_are_not_read(tmp_path):
    """64 GB of zeros, of which the disk holds none, behind heads of every format."""
    header = json.dumps({'a.b': {'dtype': 'F32', 'shape': [2 ** 34], 'data_offsets': [0, 2 ** 36]}}).encode()
    heads = [
        b'',
        pickle.PROTO + b'\4',
        pickle.PROTO + b'\4' + pickle.BINBYTES8 + struct.pack('<Q', 2**35),
        b'PK\3\4',
        struct.pack('<Q', len(header)) + header,
    ]
    paths = [tmp_path / str(n) for n in range(len(heads))]
    for path, head in zip(paths, heads):
        with open(path, 'wb') as file:
            file.write(head)
            file.truncate(len(head) + 2 ** 36)
    outcomes, megabytes = read_apart(paths)
    assert not any('read' in lines for lines in outcomes) and megabytes < MEGABYTES


# ---- real files, changed at random

def seeds(folder):
    """Real files of each format, by PyTorch, Paddle, numpy and safetensors."""
    weights = {
        'stem.a': np.arange(6, dtype='f4').reshape(2, 3),
        'stem.b': np.arange(4, dtype='f8')[::2],
        'stem.c': np.int64([3]),
    }
    tensors = {key: paddle.to_tensor(value) for key, value in weights.items()}
    for protocol in (2, 3, 4, 5):
        (folder / f'numpy{protocol}').write_bytes(pickle.dumps({'model': weights, 'epoch': 3}, protocol))
    paddle.save(tensors, str(folder / 'paddle2'), protocol=2)
    paddle.save({'model': tensors, 'epoch': 1}, str(folder / 'nested'))
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, folder / 'safetensors')
    return [path.read_bytes() for path in (*sorted(TORCH.glob('*.pth*')), *sorted(folder.iterdir()))]


def mutated(content, rng):
    """`content` with a few bytes changed, removed, repeated or inserted."""
    content = bytearray(content)
    for _ in range(min(rng.choice((1, 1, 2, 4, 16)), len(content) // 128)):
        at, length = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64))
        piece = content[at:at + length]
        content[at : at + length] = rng.choice(
            (
                bytes(rng.randrange(256) for _ in piece),
                b'',
                piece + piece,
                b'\xff' * len(piece),
                bytes(len(piece)),
                bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:],
                rng.randbytes(length) + piece,
            )
        )
    return bytes(content)


@pytest.mark.slow
def test_random_changes_of_real_files_are_read_or_refused(tmp_path):
    """Nothing else: no other error, no crash, no line that is long or has control characters, no gigabyte."""
    (tmp_path / 'seeds').mkdir()
    originals, rng, path, refused = seeds(tmp_path / 'seeds'), random.Random(0), tmp_path / 'mutated', 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(rng.choice(originals), rng))
        for read in (weight_files.read, weight_files.read_pickle):
            try:
                read(str(path))
            except ValueError as error:
                refused += 1
                assert (
                    str(error).startswith(f'{path}: ') and str(error).isprintable() and len(str(error)) < 600
                )
    assert refused > MUTATIONS / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
