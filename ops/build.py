"""Compiles the operators into a cache: <cache>/<key>/operators.so, the key being a hash of all its parts.

The cache is $HALONET_OPS_CACHE, or else halonet/ops below $XDG_CACHE_HOME or ~/.cache. Processes that
need the same library wait until the first of them has built it. $CXX names the compiler; the default is
g++, c++ or clang++. $CUDA_HOME names the folder of CUDA; the default is that of the nvcc on the PATH, or
/usr/local/cuda.

A library is loaded only if it belongs to the user or to root, nobody else can write to it or its folder,
and its sha256 is that of the build.
"""
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from system import cpu, files, paddle_internals

import paddle

logger = logging.getLogger('halonet.ops')

HERE = Path(__file__).parent
SOURCE, CUDA_SOURCE = HERE / 'operators.cc', HERE / 'halo_attention.cu'
HEADERS = sorted(HERE.glob('*.h'))
FLAGS = ['-std=c++17', '-O3', '-march=native', '-ffp-contract=fast', '-fno-math-errno', '-fopenmp', '-fPIC',
         '-Wno-psabi', '-DPADDLE_WITH_CUSTOM_KERNEL']
CUDA_FLAGS = ['-std=c++17', '-O3', '-Xcompiler', '-fPIC']

TRUSTED = {0, os.geteuid()}                         # whose libraries are loaded: root's and the user's own
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
QUOTED = 4000                                       # characters of a failed compiler's output in the message


class BuildError(Exception):
    """There is no compiler, or it failed. The message quotes its output."""


def library(arch: str = '') -> str:
    """Return the path of the compiled operators. Compile them if the cache does not have them.

    With `arch`, such as sm_90, the library has halo attention for such a GPU as well. Raises BuildError
    or OSError.
    """
    compiler = find_compiler()
    nvcc = find_nvcc() if arch else None
    if nvcc:
        check_cuda(nvcc)
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


# ---- the cache

def cache_folder() -> Path:
    """Return the folder of the cache."""
    if os.environ.get('HALONET_OPS_CACHE'):
        return Path(os.environ['HALONET_OPS_CACHE'])
    return Path(files.cache_folder('ops'))


def key(compiler: list[str], nvcc: Optional[Path], arch: str) -> str:
    """Hash the sources, compilers, flags, Paddle, and the processor, which -march=native depends on."""
    parts = [*compiler, version(compiler), *FLAGS]
    parts += [paddle.__version__, paddle.version.commit, os.path.dirname(paddle.__file__), processor()]
    parts += [path.read_text() for path in (SOURCE, *HEADERS)]
    if nvcc:
        parts += [version([str(nvcc)]), arch, *CUDA_FLAGS, CUDA_SOURCE.read_text()]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]


def version(command: list[str]) -> str:
    """Return what a compiler prints for --version."""
    return subprocess.run([*command, '--version'], capture_output=True, text=True).stdout


def processor() -> str:
    """Return the name and the instructions of the processor, as a text."""
    names = ('model name', 'flags', 'Features', 'CPU')
    lines = [f'{name}: {value}' for name, value in cpu.facts().items() if name.startswith(names)]
    return '\n'.join(lines) or platform.machine()


def check_owner(folder: Path) -> None:
    """Raise BuildError for a folder in which another user could change the library.

    A folder of the user that others can write to is replaced by an empty one that they cannot write to.
    """
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid not in TRUSTED:
        raise BuildError(f'{folder} is a link or belongs to another user (number {status.st_uid}), who could '
                         'change what is loaded from it; name another folder by HALONET_OPS_CACHE')
    if status.st_mode & OTHERS_WRITE:
        if status.st_uid != os.geteuid():
            raise BuildError(f'{folder} can be changed by other users; '
                             'name another folder by HALONET_OPS_CACHE')
        shutil.rmtree(folder)
        folder.mkdir(mode=0o755)


def is_whole(path: Path) -> bool:
    """True if the library is as it was built, and only a TRUSTED user can change it.

    Loading a damaged one would end the process.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in TRUSTED or status.st_mode & OTHERS_WRITE:
            return False
        return path.with_suffix('.sha256').read_bytes() == digest(path)
    except FileNotFoundError:
        return False


def digest(path: Path) -> bytes:
    """Return the sha256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of builds that were killed. The folder must be locked."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


# ---- compilers

def find_compiler() -> list[str]:
    """Return the command of the compiler. $CXX may hold arguments, or ccache before the compiler."""
    names = ['g++', 'c++', 'clang++']
    if os.environ.get('CXX'):
        names = [os.environ['CXX']]
    for name in names:
        try:
            command = shlex.split(name)
        except ValueError as error:
            raise BuildError(f'CXX is {name!r}: {error}') from None
        program = shutil.which(command[0]) if command else None
        if program:
            return [program, *command[1:]]
    raise BuildError(f'no C++ compiler on the PATH (looked for {", ".join(names)})')


def gpu_arch() -> str:
    """Return the architecture of the GPU that is Paddle's device, such as sm_90, or '' if a CPU is."""
    if not paddle.get_device().startswith('gpu'):
        return ''
    major, minor = paddle.device.cuda.get_device_capability()
    return f'sm_{major}{minor}'


def find_nvcc() -> Path:
    """Return the nvcc of a CUDA with its headers."""
    homes = [Path('/usr/local/cuda')]
    on_path = shutil.which('nvcc')
    if os.environ.get('CUDA_HOME'):
        homes = [Path(os.environ['CUDA_HOME'])]
    elif on_path:
        homes.insert(0, Path(on_path).resolve().parent.parent)
    for home in homes:
        if (home / 'bin' / 'nvcc').exists() and (home / 'include' / 'cuda_runtime.h').exists():
            return home / 'bin' / 'nvcc'
    folders = ' or '.join(map(str, homes))
    raise BuildError(f'no CUDA with bin/nvcc and its headers in {folders}; name its folder by CUDA_HOME')


def check_cuda(nvcc: Path) -> None:
    """Raise BuildError if nvcc and Paddle are of different major versions of CUDA: a driver may lack one."""
    ours = re.search(r'release ((\d+)\.\d+)', version([str(nvcc)]))
    theirs = re.match(r'(\d+)\.\d+', str(paddle.version.cuda()))     # False without CUDA
    if ours and theirs and ours[2] != theirs[1]:
        raise BuildError(f'{nvcc} is of CUDA {ours[1]}, and Paddle of CUDA {theirs[0]}; '
                         f'name the folder of a CUDA {theirs[1]} by CUDA_HOME')


# ---- compiling

def compile_library(compiler: list[str], path: Path, nvcc: Optional[Path], arch: str) -> None:
    """Compile the operators to `path`, with `nvcc` also halo attention for a GPU. Raises BuildError."""
    logger.warning('compiling the fused operators for this machine into %s (about %s, once)', path.parent,
                   'a minute and a half' if nvcc else 'half a minute')
    start = time.time()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = os.path.join(folder, path.name)
        gpu = []
        if nvcc:
            gpu_object = os.path.join(folder, 'gpu.o')
            compile_cuda(nvcc, arch, gpu_object)
            gpu = [gpu_object, *cuda_flags(nvcc)]
        command = [*compiler, *FLAGS, '-shared', str(SOURCE), '-o', output, *gpu]
        run([*command, *include_flags(), *link_flags()], folder)
        os.chmod(output, 0o755)
        with open(output, 'rb') as file:
            files.sync(file.fileno())
        files.atomic_write(str(path.with_suffix('.sha256')), lambda file: file.write(digest(Path(output))))
        os.replace(output, path)                    # whole or not at all
    logger.info('compiled in %.0f s', time.time() - start)


def compile_cuda(nvcc: Path, arch: str, output: str) -> None:
    """Compile halo attention for GPUs of `arch` to an object file."""
    command = [str(nvcc), *CUDA_FLAGS, f'-arch={arch}', '-c', str(CUDA_SOURCE), '-o', output]
    run(command, os.path.dirname(output))


def run(command: list[str], folder: Optional[str] = None) -> None:
    """Run a compiler, with its temporary files in `folder`. Raises BuildError with its output."""
    environment = {**os.environ, 'TMPDIR': folder} if folder else None
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors='replace')
    if result.returncode:
        raise BuildError(f'{" ".join(command)} failed:\n{result.stdout[-QUOTED:]}')


def cuda_flags(nvcc: Path) -> list[str]:
    """Return the flags for CUDA's headers and runtime, and for the headers in Paddle's nvidia-* packages."""
    home, packages = nvcc.parent.parent, Path(paddle.__file__).parent.parent / 'nvidia'
    folders = [home / 'include', home / 'include' / 'cccl', *sorted(packages.glob('*/include'))]
    # the runtime goes into the library: the dynamic linker need not find CUDA's folder
    runtime = [f'-L{home}/lib64', '-lcudart_static', '-lrt', '-lpthread', '-ldl']
    return ['-DPADDLE_WITH_CUDA', *system_headers(map(str, folders)), *runtime]


def include_flags() -> list[str]:
    """Return the flags for the headers of Paddle and Python."""
    return system_headers(paddle_internals.operator_includes())


def system_headers(folders: Iterable[str]) -> list[str]:
    """Return the flags for folders of headers whose warnings do not matter."""
    flags = []
    for folder in folders:
        flags += ['-isystem', folder]
    return flags


def link_flags() -> list[str]:
    """Return the flags to link Paddle's own library and its OpenMP.

    With a second OpenMP beside it, its idle threads would compete with ours for the cores.
    """
    flags = []
    for folder in paddle_internals.library_folders():
        flags += [f'-L{folder}', f'-Wl,-rpath,{folder}']
    flags.append('-l:libpaddle.so')
    openmp = paddle_internals.openmp_library()
    if openmp:
        # before the library of -fopenmp itself, which is then not needed
        flags += [f'-l:{openmp}', '-Wl,--as-needed']
    return flags
