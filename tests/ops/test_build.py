"""Compiling the operators: compilers, the cache, concurrent and killed builds, CUDA in emulation."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from operators import COMPILED

from ops import build

ROOT = Path(__file__).resolve().parents[2]
pytestmark = COMPILED


def python(code, **environment):
    """Run `code` in a new process. Returns its output and log. A variable that is None is left out."""
    environment = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_composed_operators_are_used_without_a_compiler(tmp_path):
    text = python(
        '''
import paddle
from model import attention
from model.layers import use_operators
auto, again, composed = (use_operators(attention.HaloAttention(8, 8, 2, 4, 1), kind)
                         for kind in ('auto', 'auto', 'composed'))
x = paddle.randn([1, 8, 8, 8])
composed.set_state_dict(auto.state_dict())
assert (auto(x) == composed(x)).all()
again(x)
try:
    use_operators(attention.HaloAttention(8, 8, 2, 4, 1), 'fused')(x)
except ValueError as error:
    print('refused:', error)
''',
        PATH='', CXX=None, HALONET_OPS_CACHE=str(tmp_path),
    )
    assert text.count('no compiled operators') == 1 and text.count('no C++ compiler') == 1
    assert text.count('refused: MODEL.ATTENTION is fused') == 1


def test_output_of_a_failing_compiler_is_quoted(tmp_path):
    compiler = tmp_path / 'broken'
    compiler.write_text('#!/bin/sh\necho it is broken\nexit 1\n')
    compiler.chmod(0o755)
    text = python(
        'import ops; assert not ops.load() and not ops.load()', CXX=str(compiler),
        HALONET_OPS_CACHE=str(tmp_path),
    )
    assert text.count('no compiled operators') == 1 and 'it is broken' in text.split('failed:')[1]


def test_malformed_compiler_command_is_named():
    text = python('import ops; assert not ops.load()', CXX='g++ "')
    assert text.count('no compiled operators') == 1 and "CXX is 'g++ \"'" in text


def test_cuda_of_another_major_version_is_refused_before_compiling(tmp_path, monkeypatch):
    for name in 'bin/nvcc', 'include/cuda_runtime.h':
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    for same in '13.2', 'False':                    # False: Paddle for a CPU
        monkeypatch.setattr(build.paddle.version, 'cuda', lambda version=same: version)
        build.check_cuda(build.find_nvcc())
    monkeypatch.setattr(build.paddle.version, 'cuda', lambda: '12.6')
    monkeypatch.setattr(build, 'cache_folder', lambda: pytest.fail('compiling began'))
    message = 'bin/nvcc is of CUDA 13.0, and Paddle of CUDA 12.6; name the folder of a CUDA 12 by CUDA_HOME$'
    with pytest.raises(build.BuildError, match=message):
        build.library('sm_90')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a stand-in for the compiler's work: `builds` lists what `build.library` compiled."""
    monkeypatch.setenv('HALONET_OPS_CACHE', str(tmp_path / 'cache'))
    builds = []

    def run(command, folder=None):
        builds.append(os.listdir(Path(folder).parent))
        Path(command[command.index('-o') + 1]).write_bytes(b'a library')
    monkeypatch.setattr(build, 'run', run)
    return SimpleNamespace(builds=builds, folder=Path(build.library()).parent)


def test_cached_library_is_not_compiled_again(cache):
    for _ in range(2):
        assert Path(build.library()) == cache.folder / 'operators.so'
    assert len(cache.builds) == 1
    assert (cache.folder / 'operators.so').stat().st_mode & 0o022 == cache.folder.stat().st_mode & 0o022 == 0


def link(path):
    path.rename(path.with_name('elsewhere'))
    path.symlink_to('elsewhere')


@pytest.mark.parametrize('name, damage', [
    ('operators.so', lambda path: path.write_bytes(b'b library')),           # of the same size
    ('operators.so', lambda path: path.write_bytes(b'a lib')),
    ('operators.so', lambda path: path.unlink()),
    ('operators.so', lambda path: path.chmod(0o775)),
    ('operators.so', link),
    ('operators.so', lambda path: os.chown(path, 12345, -1)),
    ('operators.sha256', lambda path: path.unlink()),
    ('operators.sha256', lambda path: path.write_bytes(b'\xff')),
    ('', lambda path: path.chmod(0o777)),
    ('', lambda path: path.chmod(0o775))])
def test_damaged_or_foreign_library_is_compiled_again(cache, name, damage):
    try:
        damage(cache.folder / name)
    except PermissionError:
        pytest.skip('only root can give a file to another user')
    path = Path(build.library())
    assert len(cache.builds) == 2 and path.read_bytes() == b'a library' and not path.is_symlink()
    build.library()
    assert len(cache.builds) == 2 and cache.folder.stat().st_mode & 0o022 == 0


def test_cache_of_another_user_is_refused_in_one_line(cache, monkeypatch):
    monkeypatch.setattr(build, 'TRUSTED', {12345})
    with pytest.raises(
        build.BuildError, match=f'^{cache.folder} .* belongs to another user .*HALONET_OPS_CACHE$'
    ):
        build.library()


def test_link_inside_the_cache_is_refused_and_link_to_it_followed(cache, tmp_path, monkeypatch):
    (tmp_path / 'link').symlink_to('cache')
    monkeypatch.setenv('HALONET_OPS_CACHE', str(tmp_path / 'link'))
    assert Path(build.library()).parent == cache.folder and len(cache.builds) == 1
    link(cache.folder)
    with pytest.raises(build.BuildError, match='is a link'):
        build.library()


def test_leftovers_of_a_killed_build_are_removed(cache):
    (cache.folder / 'tmpabc').mkdir()
    (cache.folder / 'tmpabc' / 'operators.so').write_bytes(b'half')
    (cache.folder / 'operators.so').unlink()
    build.library()
    assert 'tmpabc' not in cache.builds[1]
    assert sorted(os.listdir(cache.folder)) == ['lock', 'operators.sha256', 'operators.so']


@pytest.mark.slow
def test_concurrent_builds_make_one_library(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-m', 'ops']
    environment = {**os.environ, 'HALONET_OPS_CACHE': str(tmp_path)}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    assert sum(error.count('compiling the fused') for _, error in outputs) == 1
    assert [path.name for path in tmp_path.glob('*/*.so')] == ['operators.so']


@pytest.mark.slow
def test_cuda_source_compiles(tmp_path):
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    build.compile_cuda(nvcc, 'sm_80', str(tmp_path / 'gpu.o'))
    symbols = subprocess.run(
        ['nm', '-C', tmp_path / 'gpu.o'], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    for name in 'float', '__half', '__nv_bfloat16':
        assert f'halo::forward<{name}>(' in symbols and f'halo::backward<{name}>(' in symbols
    library = tmp_path / 'gpu.so'
    runtime = [flag for flag in build.cuda_flags(nvcc) if flag.startswith(('-L', '-l'))]
    link = [*build.find_compiler(), '-shared', '-Wl,-z,defs', str(tmp_path / 'gpu.o'), '-o', str(library)]
    build.run([*link, *runtime])
    needed = subprocess.run(['readelf', '-d', library], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert 'NEEDED' in needed and 'cudart' not in needed


@pytest.mark.slow
def test_operators_compile_for_a_gpu(tmp_path):
    """The binding to Paddle, against CUDA's headers, which a machine may have without its libraries' ones."""
    try:
        flags = build.cuda_flags(build.find_nvcc())
    except build.BuildError as error:
        pytest.skip(str(error))
    folders = [Path(folder) for flag, folder in zip(flags, flags[1:]) if flag == '-isystem']
    if not any((folder / 'cublasXt.h').exists() for folder in folders):
        pytest.skip('no headers of cuBLAS, which those of Paddle include')
    flags = [flag for flag in flags if not flag.startswith(('-L', '-l'))]
    build.run(
        [
            *build.find_compiler(), *build.FLAGS, '-fsyntax-only', str(build.SOURCE), *flags,
            *build.include_flags(),
        ]
    )


@pytest.mark.slow
def test_cuda_kernels_equal_the_cpu_in_emulation(tmp_path):
    program, sources = (
        tmp_path / 'emulation',
        [f'-I{ROOT}/tests/helpers', f'-I{ROOT}/ops', str(ROOT / 'tests/helpers/cuda_emulation.cc')],
    )
    subprocess.run(
        [*build.find_compiler(), '-std=c++17', '-O1', '-w', *sources, '-o', str(program)], check=True
    )
    result = subprocess.run([program], stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stdout


def test_freed_memory_is_reused_for_large_tensors():
    """Count the pages that the kernel hands out for 20 tensors of 64 MiB, 16384 pages each.

    Small blocks of memory may prevent the reuse a few times, but not in most cases.
    """
    program = '''
import resource, utils, paddle
{}
for _ in range(20):
    x = paddle.ones([16, 2 ** 20])
    del x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
'''
    kept, returned = (int(python(program.format(line))) for line in ('utils.tune_cpu()', ''))
    assert returned - kept > 10 * 16384
