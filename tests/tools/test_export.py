"""Exported files give the logits of the model in Paddle Inference and ONNX Runtime, or nothing is written."""
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

from system import console
from tools import export
from tools.deployed import Windows, deployed, look_windows_up

import numpy as np
import paddle
import pytest

from config import get_config
from halonet import build_halonet

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = ['DATA.IMAGE_SIZE', 32, 'MODEL.NUM_CLASSES', 7, 'MODEL.STEM', '3x3', 'MODEL.STEM_WIDTH', 8,
         'MODEL.STEM_POOL', False, 'MODEL.STAGES', "['conv halo', 'halo*2']", 'MODEL.WIDTHS', '[32, 64]',
         'MODEL.STRIDES', '[1, 2]', 'MODEL.HEADS', '[2, 4]', 'MODEL.BLOCK_SIZE', 4, 'MODEL.HALO_SIZE', 1]


def live_model(opts, seed=0):
    """A model without initial values: the zero scales and plain statistics of a new one would hide faults."""
    paddle.seed(seed)
    model = build_halonet(get_config(None, SMALL + opts + ['MODEL.ATTENTION', 'composed']))
    random = np.random.default_rng(seed)
    for key, value in model.state_dict().items():
        if len(value.shape) == 1:
            low, high = (0.5, 1.5) if key.endswith(('_variance', 'weight')) else (-0.3, 0.3)
            value.set_value(random.uniform(low, high, value.shape).astype('float32'))
    model.eval()
    return model


def close(x, y):
    assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max()


@pytest.mark.parametrize('opts', [
    [], ['DATA.IMAGE_SIZE', 42], ['MODEL.VALUE_RATIO', 0.5, 'MODEL.QK_RATIO', 2.0],
    ['MODEL.STRIDES', '[1, 3]'], ['MODEL.GROUP_SIZE', 4, 'MODEL.CHANNEL_ATTN', 'se', 'MODEL.ACT', 'silu'],
    ['MODEL.STAGES', "['conv bot', 'lambda halo']"]],
    ids=['plain', 'ragged', 'ratios', 'pooled', 'groups', 'others'])
def test_folded_model_with_window_lookups_gives_the_logits(opts):
    model = live_model(opts)
    side = get_config(None, SMALL + opts).DATA.IMAGE_SIZE
    x = paddle.randn([2, 3, side, side])
    with paddle.no_grad():
        wanted = model(x).numpy()
        assert wanted.std() > 1e-3
        deployed(model)
        close(model(x).numpy(), wanted)
        look_windows_up(model)
        close(model(x).numpy(), wanted)


@pytest.mark.parametrize('windows', [Windows(8, 8, 4), Windows(8, 8, 4, 1), Windows(7, 10, 4, 2)],
                         ids=['blocks', 'windows', 'ragged'])
def test_rows_of_windows_are_numbered_as_by_a_loop(windows):
    N, H, W, halo = 2, windows.height, windows.width, windows.halo
    numbers, hidden = [], []
    for top in range(-halo, H - halo, windows.step):
        for left in range(-halo, W - halo, windows.step):
            for head in range(N):
                for y in range(top, top + windows.side):
                    for x in range(left, left + windows.side):
                        inside = 0 <= y < H and 0 <= x < W
                        numbers.append((y * W + x) * N + head if inside else H * W * N)
                        hidden.append(y >= H + halo or x >= W + halo)
    assert windows.row_numbers(N).tolist() == numbers
    mask = windows.mask('block', 1, N)
    assert np.isneginf(mask).flatten().tolist() == hidden and (mask[~np.isneginf(mask)] == 0).all()
    assert mask.shape == (windows.count * N, 1, windows.side ** 2)


def arguments(folder, *more):
    weights = os.path.join(folder, 'w.pdparams')
    paddle.save(live_model([]).state_dict(), weights)
    config = os.path.join(folder, 'c.yaml')
    with open(config, 'w', encoding='utf-8') as file:
        file.write('{}\n')
    return export.parser().parse_args(
        [
            '-cfg',
            config,
            '-pretrained',
            weights,
            '-output',
            os.path.join(folder, 'out'),
            '-device',
            'cpu',
            *more,
            '-opts',
            *map(str, SMALL),
        ]
    )


def test_program_of_a_gpu_build_has_operators_of_paddle2onnx(tmp_path, monkeypatch):
    """A GPU build calls linear_v2 for F.linear, which Paddle2ONNX does not know."""
    layer = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 3), paddle.nn.Flatten(), paddle.nn.Linear(144, 2))
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: True)
    paddle.set_flags({'FLAGS_use_legacy_linear': False})
    spec = paddle.static.InputSpec([None, 3, 8, 8], 'float32')
    paddle.jit.save(paddle.jit.to_static(layer.forward, [spec], full_graph=True), str(tmp_path / 'gpu'))
    assert 'linear_v2' in (tmp_path / 'gpu.json').read_text()
    export.save(layer, (3, 8, 8), str(tmp_path / 'ours'))
    assert 'linear_v2' not in (tmp_path / 'ours.json').read_text()


def images(side=32, count=4):
    return np.random.default_rng(5).standard_normal((count, 3, side, side), dtype='float32')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The folder of an export by the command, in every format whose packages are there, and its result.

    polygraphy would install packages, from where there is no index.
    """
    folder = tmp_path_factory.mktemp('exported')
    formats = ['paddle', 'onnx'] if has_onnx() else ['paddle']
    args = arguments(str(folder))
    command = [sys.executable, os.path.join(ROOT, 'tools', 'export.py'), '-cfg', args.cfg, '-pretrained',
               args.pretrained, '-output', args.output, '-device', 'cpu', '-format', *formats,
               '-opts', *map(str, SMALL)]
    environment = {**os.environ, 'POLYGRAPHY_AUTOINSTALL_DEPS': '1', 'PIP_INDEX_URL': 'http://127.0.0.1:9/'}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, result


def has_onnx():
    return all(importlib.util.find_spec(name) for name in export.NEEDED)


def need_onnx():
    for name in export.NEEDED:
        pytest.importorskip(name, reason=f'{name} is not installed (requirements-export.txt)')


def test_paddle_inference_gives_the_logits(exported):
    folder, _ = exported
    x = images()
    engine = export.runtimes.paddle_inference(str(folder / 'out'))
    close(engine(x), live_model([])(paddle.to_tensor(x)).numpy())
    meta = json.loads((folder / 'out' / 'meta.json').read_text())
    assert meta['size'] == 32 and meta['mean'] == [0.485, 0.456, 0.406] and meta['classes'] is None
    assert sorted(os.listdir(folder)) == ['c.yaml', 'out', 'w.pdparams']


@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
def test_onnx_gives_the_logits(exported, tmp_path, dynamic):
    need_onnx()
    folder, _ = exported
    if dynamic:
        folder = tmp_path
        assert export.main(arguments(str(folder), '-format', 'onnx', '-dynamic')) == 0
    engine, model = export.runtimes.onnxruntime(str(folder / 'out' / 'model.onnx')), live_model([])
    for count in (1, 4, 9):                         # both threads on one batch, a piece each, a rest
        x = images(40 if dynamic else 32, count)
        close(engine(x), model(paddle.to_tensor(x)).numpy())


def test_export_with_other_logits_is_refused(tmp_path, monkeypatch, capsys):
    real = export.FORMATS['paddle']

    def wrong(folder):
        run = real(folder)
        return lambda x: run(x) * (1 + 2e-4)

    monkeypatch.setitem(export.FORMATS, 'paddle', wrong)
    assert export.main(arguments(str(tmp_path), '-format', 'paddle')) == 1
    assert 'nothing written' in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ['c.yaml', 'w.pdparams']


def test_export_with_nan_logits_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(export.FORMATS, 'onnx', export.FORMATS['paddle'])   # the second of two is wrong
    monkeypatch.setattr(export, 'to_onnx', lambda *paths: None)
    monkeypatch.setattr(export.runtimes, 'need', lambda name: None)
    real, folders = export.difference, iter([False, True])
    monkeypatch.setattr(export, 'difference', lambda runtime, expected: real(
        (lambda x: runtime(x) * (np.nan if len(x) == 3 else 1)) if next(folders) else runtime, expected))
    assert export.main(arguments(str(tmp_path))) == 1
    assert 'onnx: differs from the model by nan' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ['c.yaml', 'w.pdparams']


@pytest.mark.parametrize('size', [1, 8, 13, 14, 256])
def test_small_images_are_not_empty(size):
    args = SimpleNamespace(dynamic=True, input='float32')
    assert all(min(x.shape) > 0 for x in export.images((3, size, size), args))


def test_output_has_only_the_results(exported):
    _, result = exported
    assert result.stderr.startswith('no class names are known') and result.stderr.count('\n') == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + has_onnx() and lines[0].startswith('paddle: differs')
    assert not has_onnx() or lines[1].startswith('onnx: differs')


@pytest.mark.parametrize('name', export.NEEDED)
def test_missing_package_is_named_and_not_installed(tmp_path, monkeypatch, name):
    need_onnx()
    args = arguments(str(tmp_path), '-format', 'onnx')
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(subprocess, 'run', lambda *args, **kwargs: pytest.fail('a process was started'))
    message = f'{name} cannot be imported.*python -m pip install -r requirements-export.txt'
    with pytest.raises(ValueError, match=message):
        export.main(args)
    assert sorted(os.listdir(tmp_path)) == ['c.yaml', 'w.pdparams']


def test_constants_are_folded_and_no_package_is_installed(exported, tmp_path, monkeypatch):
    need_onnx()
    import onnx
    import polygraphy.config
    monkeypatch.setattr(polygraphy.config, 'AUTOINSTALL_DEPS', True)
    folder, _ = exported
    export.to_onnx(str(folder / 'out' / 'model'), str(tmp_path / 'again.onnx'), 17)
    assert not polygraphy.config.AUTOINSTALL_DEPS
    lookups, windows = [{node.op_type for node in onnx.load(str(path)).graph.node}
                        for path in (folder / 'out' / 'model.onnx', tmp_path / 'again.onnx')]
    assert 'Gather' in lookups and not lookups & {'Constant', 'ConstantOfShape', 'Range'}
    # the windows of a feature map are ranges whose length paddle2onnx takes from its shape
    assert 'Range' in windows and not windows & {'Constant', 'ConstantOfShape'}


@pytest.mark.parametrize('opset', [-1, 12, 22, 99])
def test_unknown_opset_is_refused(tmp_path, opset):
    with pytest.raises(ValueError, match=f'-opset {opset}: it must be from 13 to 21'):
        export.main(arguments(str(tmp_path), f'-opset={opset}'))


def test_hidden_output_is_shown_with_an_exception(capfd):
    with console.quiet():
        os.write(1, b'unseen\n')
    with pytest.raises(RuntimeError), console.quiet():
        os.write(2, b'seen\n')
        raise RuntimeError
    captured = capfd.readouterr()
    assert captured.out == '' and captured.err == 'seen\n'


def test_mistakes_are_reported_before_the_work(tmp_path):
    args = arguments(str(tmp_path), '-dynamic')
    args.opts += ['MODEL.STAGES', "['conv bot', 'halo']"]
    with pytest.raises(ValueError, match='-dynamic'):
        export.main(args)
    args = arguments(str(tmp_path))
    os.makedirs(args.output)
    open(os.path.join(args.output, 'mine'), 'w').close()
    with pytest.raises(ValueError, match='not an empty folder'):
        export.main(args)
