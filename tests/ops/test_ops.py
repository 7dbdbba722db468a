"""The fused operators against Paddle's own, finite differences, itself and a machine without a compiler."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import ops
from model import attention
from model.layers import ConvNormAct, compiled, use_operators
from ops import build

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(paddle.get_device() != 'cpu' or not ops.load(), reason='no C++ compiler, or not a CPU')

# B, N, d, v, Y, X, block, halo, stride
GRID = [
    (2, 8, 32, 32, 2, 2, 8, 2, 1),    # the layers of halonet_26t, halonet_50ts and others
    (2, 8, 64, 64, 2, 2, 8, 2, 2),
    (1, 4, 32, 32, 4, 4, 8, 3, 1),
    (1, 4, 16, 16, 3, 2, 8, 3, 1),
    (2, 1, 8, 4, 1, 3, 4, 1, 1),      # one head, d != v, not square
    (2, 3, 5, 7, 2, 1, 4, 3, 2),      # widths that are no multiple of a vector
    (1, 2, 20, 12, 2, 2, 6, 0, 3),    # no halo, stride 3
    (1, 1, 3, 33, 2, 2, 1, 1, 1),     # blocks of one pixel
    (1, 2, 4, 4, 1, 1, 20, 2, 1),     # windows wider than a vector
]


def sizes(shape):
    _, N, _, _, _, _, block, halo, stride = shape
    return dict(num_heads=N, block_size=block, halo_size=halo, stride=stride)


def arrays(shape, dtype, H=None, W=None):
    """Seeded q, kv, both tables and a gradient of the output; H and W replace those of whole blocks."""
    B, N, d, v, Y, X, block, halo, stride = shape
    H, W = H or Y * block, W or X * block
    queries, w = (-(-H // stride), -(-W // stride)), block + 2 * halo
    random = np.random.default_rng(0)
    draw = lambda *size: random.standard_normal(size).astype(dtype)         # noqa: E731
    return (draw(B, N * d, *queries), draw(B, N * (d + v), H, W), draw(2 * w - 1, d) * d ** -0.5, draw(2 * w - 1, d) * d ** -0.5,
            draw(B, N * v, *queries))


def results(attend, inputs, **kwargs):
    """Output and gradients of `attend`."""
    *tensors, gradient = [paddle.to_tensor(x.astype(inputs[0].dtype), stop_gradient=False) for x in inputs]
    out = attend(*tensors, **kwargs)
    out.backward(gradient)
    return [out.numpy()] + [x.grad.numpy() for x in tensors]


def difference(a, b):
    """Norm of a - b over the norm of b, both in float64."""
    return np.linalg.norm((a.astype('float64') - b).ravel()) / max(np.linalg.norm(b.astype('float64').ravel()), 1e-30)


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('float64', 1e-12)])
@pytest.mark.parametrize('shape', GRID)
def test_output_and_gradients_equal_the_composed_path(shape, dtype, tolerance):
    kwargs = sizes(shape)
    inputs = arrays(shape, dtype)
    for ours, theirs in zip(results(ops.halo_attention, inputs, **kwargs), results(attention.halo_attention, inputs, **kwargs)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert difference(ours, theirs) < tolerance


def test_a_map_without_pixels_has_no_result_and_no_gradient():
    q, kv, height_rel, width_rel = (paddle.ones(shape) for shape in ([2, 64, 0, 8], [2, 128, 0, 8], [15, 2], [15, 2]))
    for x in (q, kv, height_rel, width_rel):
        x.stop_gradient = False
    out = ops.halo_attention(q, kv, height_rel, width_rel, num_heads=32, block_size=4, halo_size=2)
    out.sum().backward()
    assert out.shape == [2, 64, 0, 8] and kv.grad.shape == kv.shape
    assert not height_rel.grad.any() and not width_rel.grad.any()


def test_gradients_equal_finite_differences():
    shape = (1, 2, 3, 4, 2, 1, 4, 1, 2)
    kwargs = sizes(shape)
    *inputs, weight = arrays(shape, 'float64')
    _, *gradients = results(ops.halo_attention, (*inputs, weight), **kwargs)

    def loss(changed, which):
        tensors = [paddle.to_tensor(changed if i == which else x) for i, x in enumerate(inputs)]
        return float((ops.halo_attention(*tensors, **kwargs).numpy() * weight).sum())
    for which, gradient in enumerate(gradients):
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(*gradient.shape):
            step = np.zeros_like(gradient)
            step[index] = 1e-6
            numeric[index] = (loss(inputs[which] + step, which) - loss(inputs[which] - step, which)) / 2e-6
        assert difference(gradient, numeric) < 1e-8


def reference(q, kv, height_rel, width_rel, num_heads, block_size, halo_size, stride):
    """Query by query, for any map: the window ends where the zeros around the map end."""
    d = height_rel.shape[1]
    b, w = block_size // stride, block_size + 2 * halo_size
    v = kv.shape[1] // num_heads - d
    padded = np.pad(kv, [(0, 0), (0, 0), (halo_size, halo_size), (halo_size, halo_size)])
    out = np.zeros((q.shape[0], num_heads * v, *q.shape[2:]))
    for B, head, qy, qx in np.ndindex(q.shape[0], num_heads, *q.shape[2:]):
        y, x = qy // b * block_size, qx // b * block_size
        window = padded[B, head * (d + v):(head + 1) * (d + v), y:y + w, x:x + w]
        query = q[B, head * d:(head + 1) * d, qy, qx]
        rows = height_rel[w - 1 - qy % b:][:window.shape[1]] @ query
        columns = width_rel[w - 1 - qx % b:][:window.shape[2]] @ query
        logits = np.einsum('c,cyx->yx', query, window[:d]) * d ** -0.5 + rows[:, None] + columns
        weights = np.exp(logits - logits.max())
        out[B, head * v:(head + 1) * v, qy, qx] = (window[d:] * weights).sum((1, 2)) / weights.sum()
    return out


@pytest.mark.parametrize('shape, H, W', [
    ((1, 2, 4, 6, 2, 2, 4, 1, 1), 8, 8),
    ((1, 2, 4, 6, 2, 2, 4, 1, 1), 7, 9),
    ((2, 1, 5, 3, 2, 2, 8, 3, 1), 11, 3),
    ((1, 2, 4, 4, 2, 2, 8, 2, 2), 17, 13),
])
def test_a_map_of_any_size_equals_the_reference(shape, H, W):
    kwargs = sizes(shape)
    inputs = arrays(shape, 'float64', H, W)
    out, *gradients = results(ops.halo_attention, inputs, **kwargs)
    expected = reference(*inputs[:4], **kwargs)
    assert difference(out, expected) < 1e-12
    for ours, composed in zip([out, *gradients], results(attention.halo_attention, inputs, **kwargs)):
        assert difference(ours, composed) < 1e-12
    for which, gradient in enumerate(gradients):         # along one random direction each
        step = np.random.default_rng(which).standard_normal(gradient.shape) * 1e-6
        moved = [[x + sign * step if i == which else x for i, x in enumerate(inputs[:4])] for sign in (1, -1)]
        numeric = ((reference(*moved[0], **kwargs) - reference(*moved[1], **kwargs)) * inputs[4]).sum() / 2
        assert abs((gradient * step).sum() - numeric) < 1e-7 * np.linalg.norm(gradient) * np.linalg.norm(step)


def test_bits_do_not_depend_on_the_threads():
    shape = (2, 8, 16, 16, 2, 2, 8, 2, 1)
    kwargs = sizes(shape)
    runs = []
    for threads in (1, 2, 3, 2):
        paddle.base.core.set_num_threads(threads)
        runs.append(results(ops.halo_attention, arrays(shape, 'float32'), **kwargs))
    paddle.base.core.set_num_threads(1)
    for run in runs[1:]:
        assert all((a == b).all() for a, b in zip(runs[0], run))


@pytest.mark.parametrize('bits', [0x7fc00000, 0xffc00000, 0x7fc00001, 0xffffffff])
def test_nan_is_not_lost(bits):
    q, kv, rows, columns, _ = arrays(GRID[4], 'float32')
    kv[0, 0, 0, 0] = np.array(bits, 'uint32').view('float32')
    q, kv, rows, columns = map(paddle.to_tensor, (q, kv, rows, columns))
    out = ops.halo_attention(q, kv, rows, columns, **sizes(GRID[4]))
    assert out[0].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize('change, message', [
    (dict(num_heads=3), 'num_heads'), (dict(halo_size=3), 'tables'), (dict(block_size=5, halo_size=1), 'tables'),
])
def test_wrong_arguments_are_named(change, message):
    shape = (2, 2, 8, 8, 2, 2, 4, 2, 1)
    tensors = [paddle.to_tensor(x) for x in arrays(shape, 'float32')[:4]]
    with pytest.raises(OSError, match=message):           # what Paddle makes of a failed PD_CHECK
        ops.halo_attention(*tensors, **{**sizes(shape), **change})


SECOND_DERIVATIVES = {                               # operator -> (its call, the shapes of its inputs)
    'halo_attention': (lambda *x: ops.halo_attention(*x, num_heads=2, block_size=4, halo_size=1),
                       [(1, 8, 8, 8), (1, 16, 8, 8), (11, 4), (11, 4)]),
    'convolution': (ops.convolution, [(2, 3, 8, 8), (4, 3, 3, 3)]),
    'batch_norm_act': (lambda *x: ops.batch_norm_act(*x, 1e-5, 'silu')[0], [(2, 3, 8, 8), (3,), (3,)]),
    'max_pool': (ops.max_pool, [(2, 3, 8, 8)]),
}


@pytest.mark.parametrize('operator, which', [(name, i) for name, (_, shapes) in SECOND_DERIVATIVES.items()
                                             for i in range(len(shapes))])
def test_second_derivatives_are_refused(operator, which):
    call, shapes = SECOND_DERIVATIVES[operator]
    inputs = [paddle.randn(shape) for shape in shapes]
    for x in inputs:
        x.stop_gradient = False
    first, = paddle.grad(call(*inputs).square().sum(), [inputs[which]], create_graph=True)   # the first one is no error
    with pytest.raises(OSError, match='no second derivatives. MODEL.ATTENTION composed'):
        first.square().sum().backward()


def test_layer_trains_alike_under_to_static_with_any_batch():
    def run(kind, static):
        paddle.seed(0)
        layer = use_operators(attention.HaloAttention(32, 32, 4, 4, 1, stride=2), kind)
        call = layer
        if static:
            call = paddle.jit.to_static(layer, full_graph=True, input_spec=[paddle.static.InputSpec([None, 32, 8, 8])])
        found = []
        for B in (2, 3):
            x = paddle.to_tensor(np.random.default_rng(B).standard_normal((B, 32, 8, 8)).astype('float32'), stop_gradient=False)
            out = call(x)
            (out * out).sum().backward()
            found += [out.numpy(), x.grad.numpy()] + [p.grad.numpy() for p in layer.parameters()]
        return found
    expected = run('composed', static=False)
    for kind, static in [('fused', False), ('fused', True), ('auto', True)]:
        assert max(map(difference, run(kind, static), expected)) < 1e-5


def python(code, **environment):
    """Runs `code` in a new process: what it printed, its log included. A variable that is None is left out."""
    environment = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    process = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_without_a_compiler_the_composed_path_serves_after_one_notice(tmp_path):
    text = python('''
import paddle
from model import attention
from model.layers import use_operators
auto, again, composed = (use_operators(attention.HaloAttention(8, 8, 2, 4, 1), kind) for kind in ('auto', 'auto', 'composed'))
x = paddle.randn([1, 8, 8, 8])
composed.set_state_dict(auto.state_dict())
assert (auto(x) == composed(x)).all()
again(x)
try:
    use_operators(attention.HaloAttention(8, 8, 2, 4, 1), 'fused')(x)
except ValueError as error:
    print('refused:', error)
''', PATH='', CXX=None, HALONET_OPS_CACHE=str(tmp_path))
    assert text.count('no compiled operators') == 1 and text.count('no C++ compiler') == 1
    assert text.count('refused: MODEL.ATTENTION is fused') == 1


def test_a_failing_compiler_is_quoted(tmp_path):
    compiler = tmp_path / 'broken'
    compiler.write_text('#!/bin/sh\necho it is broken\nexit 1\n')
    compiler.chmod(0o755)
    text = python('import ops; assert not ops.load() and not ops.load()', CXX=str(compiler), HALONET_OPS_CACHE=str(tmp_path))
    assert text.count('no compiled operators') == 1 and 'it is broken' in text.split('failed:')[1]


def test_a_compiler_that_no_shell_could_read_is_named():
    text = python('import ops; assert not ops.load()', CXX='g++ "')
    assert text.count('no compiled operators') == 1 and "CXX is 'g++ \"'" in text


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


def test_a_library_in_the_cache_is_not_compiled_again(cache):
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
def test_a_library_that_is_damaged_or_of_others_is_compiled_again(cache, name, damage):
    try:
        damage(cache.folder / name)
    except PermissionError:
        pytest.skip('only root can give a file to another user')
    path = Path(build.library())
    assert len(cache.builds) == 2 and path.read_bytes() == b'a library' and not path.is_symlink()
    build.library()
    assert len(cache.builds) == 2 and cache.folder.stat().st_mode & 0o022 == 0


def test_a_cache_of_another_user_is_refused_in_one_line(cache, monkeypatch):
    monkeypatch.setattr(build, 'TRUSTED', {12345})
    with pytest.raises(build.BuildError, match=f'^{cache.folder} .* belongs to another user .*HALONET_OPS_CACHE$'):
        build.library()


def test_a_link_in_the_cache_is_refused_and_one_to_the_cache_is_followed(cache, tmp_path, monkeypatch):
    (tmp_path / 'link').symlink_to('cache')
    monkeypatch.setenv('HALONET_OPS_CACHE', str(tmp_path / 'link'))
    assert Path(build.library()).parent == cache.folder and len(cache.builds) == 1
    link(cache.folder)
    with pytest.raises(build.BuildError, match='is a link'):
        build.library()


def test_what_a_killed_build_left_is_removed(cache):
    (cache.folder / 'tmpabc').mkdir()
    (cache.folder / 'tmpabc' / 'operators.so').write_bytes(b'half')
    (cache.folder / 'operators.so').unlink()
    build.library()
    assert 'tmpabc' not in cache.builds[1]
    assert sorted(os.listdir(cache.folder)) == ['lock', 'operators.sha256', 'operators.so']


@pytest.mark.slow
def test_two_builds_at_once_make_one_library(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-m', 'ops']
    environment = {**os.environ, 'HALONET_OPS_CACHE': str(tmp_path)}
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    assert sum(error.count('compiling the fused') for _, error in outputs) == 1
    assert [path.name for path in tmp_path.glob('*/*.so')] == ['operators.so']


@pytest.mark.slow
def test_the_cuda_source_compiles(tmp_path):
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    build.compile_cuda(nvcc, 'sm_80', str(tmp_path / 'gpu.o'))
    symbols = subprocess.run(['nm', '-C', tmp_path / 'gpu.o'], stdout=subprocess.PIPE, text=True, check=True).stdout
    for name in 'float', '__half', '__nv_bfloat16':
        assert f'halo::forward<{name}>(' in symbols and f'halo::backward<{name}>(' in symbols


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
    build.run([*build.find_compiler(), *build.FLAGS, '-fsyntax-only', str(build.SOURCE), *flags, *build.include_flags()])


def test_a_gpu_gets_its_operator_only_when_asked(monkeypatch):
    attend, convolve = attention.HaloAttention(8, 8, 2, 4, 1), ConvNormAct(8, 8, 1)
    monkeypatch.setattr(paddle, 'get_device', lambda: 'gpu:0')
    monkeypatch.setattr(ops, 'load', lambda: ('cpu', 'gpu'))
    assert not compiled(attend, ('cpu', 'gpu'))                 # auto: nobody has measured it
    assert compiled(use_operators(attend, 'fused'), ('cpu', 'gpu')) and not compiled(use_operators(convolve, 'fused'))
    monkeypatch.setattr(ops, 'load', lambda: ('cpu',))
    with pytest.raises(ValueError, match='nvcc'):
        compiled(attend, ('cpu', 'gpu'))


@pytest.mark.slow
def test_cuda_kernels_equal_the_cpu_in_emulation(tmp_path):
    program, sources = tmp_path / 'emulation', [f'-I{ROOT}/tests', f'-I{ROOT}/ops', str(ROOT / 'tests/helpers/cuda_emulation.cc')]
    subprocess.run([*build.find_compiler(), '-std=c++17', '-O1', '-w', *sources, '-o', str(program)], check=True)
    result = subprocess.run([program], stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stdout


def test_large_tensors_take_the_memory_that_earlier_ones_gave_back():
    """Told by the pages that the kernel had to hand out for 20 tensors of 64 MiB, 16384 each. Where small blocks lie in the
    way a tensor may miss the place of the last one; that it does a few times, no more."""
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
