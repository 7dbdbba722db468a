"""Compiles the fused operators into a cache: <cache>/<key>/operators.so, the key naming all that goes into it.

The cache is $HALONET_OPS_CACHE, or else halonet/ops below $XDG_CACHE_HOME or ~/.cache. Processes that need the same
library wait for the first of them to have built it. $CXX names the compiler, g++, c++ or clang++ otherwise.
"""
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import paddle
from paddle.utils.cpp_extension import extension_utils

logger = logging.getLogger('halonet.ops')

HERE = Path(__file__).parent
SOURCE, HEADERS = HERE / 'operators.cc', sorted(HERE.glob('*.h'))
FLAGS = ['-std=c++17', '-O3', '-march=native', '-ffp-contract=fast', '-fno-math-errno', '-fopenmp', '-fPIC', '-Wno-psabi',
         '-DPADDLE_WITH_CUSTOM_KERNEL']


class BuildError(Exception):
    """No compiler, or it failed; the message says what it said."""


def library():
    """The path of the compiled operator, compiled now if the cache does not have it. Raises BuildError or OSError."""
    compiler = find_compiler()
    path = cache_folder() / key(compiler) / 'operators.so'
    if not whole(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / 'lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)             # released when the file is closed, or its process dies
            if not whole(path):
                compile_library(compiler, path)
    return str(path)


def whole(path):
    """Whether the library is there as it was built: to load one that was cut would end the process."""
    size = path.with_suffix('.size')
    return path.exists() and size.exists() and size.read_text() == str(path.stat().st_size)


def find_compiler():
    """The command of the compiler, a list: $CXX may hold arguments, or ccache before the compiler."""
    candidates = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'c++', 'clang++']
    for command in map(shlex.split, candidates):
        if command and shutil.which(command[0]):
            return [shutil.which(command[0]), *command[1:]]
    raise BuildError(f'no C++ compiler on the PATH (looked for {", ".join(candidates)})')


def cache_folder():
    if os.environ.get('HALONET_OPS_CACHE'):
        return Path(os.environ['HALONET_OPS_CACHE'])
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'halonet' / 'ops'


def key(compiler):
    """A hash of the sources, the compiler, the flags, Paddle, and the CPU that -march=native means."""
    version = subprocess.run([*compiler, '--version'], capture_output=True, text=True).stdout
    parts = [*compiler, version, *FLAGS, paddle.__version__, paddle.version.commit, os.path.dirname(paddle.__file__), cpu()]
    parts += [path.read_text() for path in (SOURCE, *HEADERS)]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]


def cpu():
    try:
        lines = Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
        return '\n'.join(line for line in lines if line.startswith(('model name', 'flags', 'Features', 'CPU')))
    except OSError:
        return platform.machine() + platform.processor()


def compile_library(compiler, path):
    logger.warning('compiling the fused operators for this machine into %s (about half a minute, once)', path.parent)
    start = time.time()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = os.path.join(folder, path.name)
        command = [*compiler, *FLAGS, '-shared', str(SOURCE), '-o', output, *include_flags(), *link_flags()]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
        if result.returncode:
            raise BuildError(f'{" ".join(command)} failed:\n{result.stdout[-4000:]}')
        with open(output, 'rb') as file:
            os.fsync(file.fileno())
        path.with_suffix('.size').write_text(str(os.path.getsize(output)))
        os.replace(output, path)                      # whole or not at all
    logger.info('compiled in %.0f s', time.time() - start)


def include_flags():
    folders = extension_utils.find_paddle_includes() + extension_utils.find_python_includes()
    return [flag for folder in folders for flag in ('-isystem', folder)]


def link_flags():
    """Paddle's own library, and its OpenMP: with a second one beside it, its idle threads would spin against ours."""
    base = os.path.dirname(paddle.__file__)
    folders = [os.path.join(base, 'base'), os.path.join(base, 'libs')]
    flags = [flag for folder in folders for flag in (f'-L{folder}', f'-Wl,-rpath,{folder}')] + ['-l:libpaddle.so']
    if os.path.exists(os.path.join(base, 'libs', 'libiomp5.so')):
        return flags + ['-l:libiomp5.so', '-Wl,--as-needed']   # before -fopenmp's own library, which is then not needed
    return flags
