"""Compiles the fused operators into a cache: <cache>/<key>/operators.so, the key naming all that goes into it.

The cache is $HALONET_OPS_CACHE, or else halonet/ops below $XDG_CACHE_HOME or ~/.cache. Processes that need the same
library wait for the first of them to have built it. $CXX names the compiler, g++, c++ or clang++ otherwise; $CUDA_HOME
the folder of CUDA, that of the nvcc on the PATH or /usr/local/cuda otherwise.

A library is loaded only from a folder that belongs to the user or to root and that nobody else can write to, and if its
sha256 is that of the build.
"""
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

from system import cpu, files

import paddle
from paddle.utils.cpp_extension import extension_utils

logger = logging.getLogger('halonet.ops')

HERE = Path(__file__).parent
SOURCE, CUDA_SOURCE, HEADERS = HERE / 'operators.cc', HERE / 'halo_attention.cu', sorted(HERE.glob('*.h'))
FLAGS = ['-std=c++17', '-O3', '-march=native', '-ffp-contract=fast', '-fno-math-errno', '-fopenmp', '-fPIC', '-Wno-psabi',
         '-DPADDLE_WITH_CUSTOM_KERNEL']
CUDA_FLAGS = ['-std=c++17', '-O3', '-Xcompiler', '-fPIC']


TRUSTED = {0, os.geteuid()}                         # whose libraries are loaded: root's and the user's own
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class BuildError(Exception):
    """No compiler, or it failed; the message says what it said."""


def library(arch=''):
    """The path of the compiled operators, compiled now if the cache does not have them; with `arch`, such as sm_90, the attention
    for such a GPU as well. Raises BuildError or OSError."""
    compiler, nvcc = find_compiler(), find_nvcc() if arch else None
    folder = cache_folder().resolve() / key(compiler, nvcc, arch)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_owner(folder)
    path = folder / 'operators.so'
    if not is_whole(path):
        with open(folder / 'lock', 'wb') as file:
            locked = files.lock(file)                # until the file is closed, or its process dies
            if not is_whole(path):
                if locked:
                    remove_leftovers(folder)
                compile_library(compiler, path, nvcc, arch)
    return str(path)


def check_owner(folder: Path) -> None:
    """Raise BuildError for a folder in which another user could change the library that is loaded.

    One of the user's own that others can write to is replaced by an empty one that they cannot.
    """
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid not in TRUSTED:
        raise BuildError(f'{folder} is a link or belongs to another user (number {status.st_uid}), who could change what is '
                         'loaded from it; name another folder by HALONET_OPS_CACHE')
    if status.st_mode & OTHERS_WRITE:
        if status.st_uid != os.geteuid():
            raise BuildError(f'{folder} can be changed by other users; name another folder by HALONET_OPS_CACHE')
        shutil.rmtree(folder)
        folder.mkdir(mode=0o755)


def is_whole(path: Path) -> bool:
    """True if the library is as it was built, and only a TRUSTED user can change it: a damaged one would end the process."""
    try:
        status = path.lstat()
        safe = stat.S_ISREG(status.st_mode) and status.st_uid in TRUSTED and not status.st_mode & OTHERS_WRITE
        return safe and path.with_suffix('.sha256').read_bytes() == digest(path)
    except FileNotFoundError:
        return False


def digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def remove_leftovers(folder: Path) -> None:
    """Remove what builds that were killed have left in a locked folder."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def find_compiler():
    """The command of the compiler, a list: $CXX may hold arguments, or ccache before the compiler."""
    candidates = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'c++', 'clang++']
    try:
        commands = [shlex.split(candidate) for candidate in candidates]
    except ValueError as error:
        raise BuildError(f'CXX is {candidates[0]!r}: {error}') from None
    for command in commands:
        if command and shutil.which(command[0]):
            return [shutil.which(command[0]), *command[1:]]
    raise BuildError(f'no C++ compiler on the PATH (looked for {", ".join(candidates)})')


def gpu_arch():
    """Such as sm_90, of the GPU that is Paddle's device; '' where none is."""
    if not paddle.get_device().startswith('gpu'):
        return ''
    return 'sm_{}{}'.format(*paddle.device.cuda.get_device_capability())


def find_nvcc():
    """The nvcc of a CUDA with its headers."""
    on_path = shutil.which('nvcc')
    homes = [Path(on_path).resolve().parent.parent, Path('/usr/local/cuda')] if on_path else [Path('/usr/local/cuda')]
    if os.environ.get('CUDA_HOME'):
        homes = [Path(os.environ['CUDA_HOME'])]
    for home in homes:
        if (home / 'bin' / 'nvcc').exists() and (home / 'include' / 'cuda_runtime.h').exists():
            return home / 'bin' / 'nvcc'
    raise BuildError(f'no CUDA with bin/nvcc and its headers in {" or ".join(map(str, homes))}; name its folder by CUDA_HOME')


def cache_folder():
    if os.environ.get('HALONET_OPS_CACHE'):
        return Path(os.environ['HALONET_OPS_CACHE'])
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'halonet' / 'ops'


def key(compiler, nvcc, arch):
    """A hash of the sources, the compilers, the flags, Paddle, and the CPU that -march=native means."""
    versions = [subprocess.run([*command, '--version'], capture_output=True, text=True).stdout
                for command in ([compiler, [nvcc]] if arch else [compiler])]
    parts = [*compiler, *versions, *FLAGS, paddle.__version__, paddle.version.commit, os.path.dirname(paddle.__file__),
             processor()]
    parts += [path.read_text() for path in (SOURCE, *HEADERS)]
    if arch:
        parts += [arch, *CUDA_FLAGS, CUDA_SOURCE.read_text()]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]


def processor():
    """Return the name and the instructions of the processor, as a text."""
    names = ('model name', 'flags', 'Features', 'CPU')
    lines = [f'{name}: {value}' for name, value in cpu.facts().items() if name.startswith(names)]
    return '\n'.join(lines) or platform.machine()


def compile_library(compiler, path, nvcc, arch):
    logger.warning('compiling the fused operators for this machine into %s (about %s, once)', path.parent,
                   'a minute and a half' if arch else 'half a minute')
    start = time.time()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output, gpu = os.path.join(folder, path.name), []
        if arch:
            compile_cuda(nvcc, arch, os.path.join(folder, 'gpu.o'))
            gpu = [os.path.join(folder, 'gpu.o'), *cuda_flags(nvcc)]
        run([*compiler, *FLAGS, '-shared', str(SOURCE), '-o', output, *gpu, *include_flags(), *link_flags()], folder)
        os.chmod(output, 0o755)
        with open(output, 'rb') as file:
            files.sync(file.fileno())
        files.atomic_write(path.with_suffix('.sha256'), lambda file: file.write(digest(Path(output))))
        os.replace(output, path)                      # whole or not at all
    logger.info('compiled in %.0f s', time.time() - start)


def compile_cuda(nvcc, arch, output):
    """The attention for GPUs of `arch` as an object file."""
    run([str(nvcc), *CUDA_FLAGS, f'-arch={arch}', '-c', str(CUDA_SOURCE), '-o', output], os.path.dirname(output))


def run(command, folder=None):
    """Run a compiler, with its temporary files in `folder`. Raises BuildError with its output."""
    environment = {**os.environ, 'TMPDIR': folder} if folder else None
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            errors='replace')
    if result.returncode:
        raise BuildError(f'{" ".join(command)} failed:\n{result.stdout[-4000:]}')


def cuda_flags(nvcc):
    """Headers of CUDA, and of the libraries that come with Paddle as packages of their own; CUDA's runtime."""
    home, packages = nvcc.parent.parent, Path(paddle.__file__).parent.parent / 'nvidia'
    folders = [home / 'include', home / 'include' / 'cccl', *sorted(packages.glob('*/include'))]
    headers = [flag for folder in folders for flag in ('-isystem', str(folder))]
    return ['-DPADDLE_WITH_CUDA', *headers, f'-L{home}/lib64', '-lcudart']


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
