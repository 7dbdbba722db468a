"""Exports give the model's logits: folded, with windows looked up, in Paddle Inference and in ONNX; else nothing is written."""
import json
import os
import subprocess
import sys

from tools import export
from tools.deployed import deployed, look_windows_up

import numpy as np
import paddle
import pytest

from config import get_config
from halonet import build_halonet

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = ['DATA.IMAGE_SIZE', 32, 'MODEL.NUM_CLASSES', 7, 'MODEL.STEM', '3x3', 'MODEL.STEM_WIDTH', 8, 'MODEL.STEM_POOL', False,
         'MODEL.STAGES', "['conv halo', 'halo*2']", 'MODEL.WIDTHS', '[32, 64]', 'MODEL.STRIDES', '[1, 2]',
         'MODEL.HEADS', '[2, 4]', 'MODEL.BLOCK_SIZE', 4, 'MODEL.HALO_SIZE', 1]


def live_model(opts, seed=0):
    """A model with no weight at its start: the zero scales and plain statistics of a new one would hide mistakes."""
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
    [], ['DATA.IMAGE_SIZE', 42], ['MODEL.VALUE_RATIO', 0.5, 'MODEL.QK_RATIO', 2.0], ['MODEL.STRIDES', '[1, 3]'],
    ['MODEL.GROUP_SIZE', 4, 'MODEL.CHANNEL_ATTN', 'se', 'MODEL.ACT', 'silu'], ['MODEL.STAGES', "['conv bot', 'lambda halo']"]],
    ids=['plain', 'ragged', 'ratios', 'pooled', 'groups', 'others'])
def test_folded_and_looked_up_model_is_the_model(opts):
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


def arguments(folder, *more):
    weights = os.path.join(folder, 'w.pdparams')
    paddle.save(live_model([]).state_dict(), weights)
    config = os.path.join(folder, 'c.yaml')
    with open(config, 'w', encoding='utf-8') as file:
        file.write('{}\n')
    return export.parser().parse_args(['-cfg', config, '-pretrained', weights, '-output', os.path.join(folder, 'out'),
                                       '-device', 'cpu', *more, '-opts', *map(str, SMALL)])


def images(side=32, count=4):
    return np.random.default_rng(5).standard_normal((count, 3, side, side), dtype='float32')


def test_paddle_inference_gives_the_logits(tmp_path):
    assert export.main(arguments(str(tmp_path), '-format', 'paddle')) == 0
    x = images()
    close(export.runtimes.paddle_inference(str(tmp_path / 'out'))(x), live_model([])(paddle.to_tensor(x)).numpy())
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta['size'] == 32 and meta['mean'] == [0.485, 0.456, 0.406] and meta['classes'] is None
    assert sorted(os.listdir(tmp_path)) == ['c.yaml', 'out', 'w.pdparams']


@pytest.mark.parametrize('more', [[], ['-dynamic']], ids=['fixed', 'dynamic'])
def test_onnx_gives_the_logits(tmp_path, more):
    need_onnx()
    assert export.main(arguments(str(tmp_path), '-format', 'onnx', *more)) == 0
    engine, model = export.runtimes.onnxruntime(str(tmp_path / 'out' / 'model.onnx')), live_model([])
    for count in (1, 4, 9):                                     # the two threads together, each by itself, and one with a rest
        x = images(40 if more else 32, count)
        close(engine(x), model(paddle.to_tensor(x)).numpy())


def test_a_file_with_other_logits_is_refused(tmp_path, monkeypatch, capsys):
    real = export.FORMATS['paddle']

    def wrong(folder):
        run = real(folder)
        return lambda x: run(x) * (1 + 2e-4)

    monkeypatch.setitem(export.FORMATS, 'paddle', wrong)
    assert export.main(arguments(str(tmp_path), '-format', 'paddle')) == 1
    assert 'nothing written' in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ['c.yaml', 'w.pdparams']


def test_logits_that_are_no_numbers_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(export.FORMATS, 'onnx', export.FORMATS['paddle'])   # two formats, the second of which is wrong
    monkeypatch.setattr(export, 'to_onnx', lambda *paths: None)
    monkeypatch.setattr(export.runtimes, 'need', lambda name: None)
    real, folders = export.difference, iter([False, True])
    monkeypatch.setattr(export, 'difference', lambda runtime, expected: real(
        (lambda x: runtime(x) * (np.nan if len(x) == 3 else 1)) if next(folders) else runtime, expected))
    assert export.main(arguments(str(tmp_path))) == 1
    assert 'onnx: differs from the model by nan' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ['c.yaml', 'w.pdparams']


@pytest.mark.parametrize('size', [1, 8, 13, 14, 256])
def test_small_images_are_compared_as_well(size):
    assert all(min(x.shape) > 0 for x in export.images(size, dynamic=True))


def need_onnx():
    for name in export.NEEDED:
        pytest.importorskip(name, reason=f'{name} is not installed (requirements-export.txt)')


def test_nothing_but_the_results_is_printed(tmp_path):
    need_onnx()
    args = arguments(str(tmp_path))
    command = [sys.executable, os.path.join(ROOT, 'tools', 'export.py'), '-cfg', args.cfg, '-pretrained', args.pretrained,
               '-output', args.output, '-device', 'cpu', '-opts', *map(str, SMALL)]
    environment = {**os.environ, 'POLYGRAPHY_AUTOINSTALL_DEPS': '1', 'PIP_INDEX_URL': 'http://127.0.0.1:9/'}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith('no class names are known') and result.stderr.count('\n') == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith('paddle: differs') and lines[1].startswith('onnx: differs')


@pytest.mark.parametrize('name', export.NEEDED)
def test_a_missing_package_is_named_and_not_installed(tmp_path, monkeypatch, name):
    need_onnx()
    args = arguments(str(tmp_path), '-format', 'onnx')
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(subprocess, 'run', lambda *args, **kwargs: pytest.fail('a process was started'))
    with pytest.raises(ValueError, match=f'{name} cannot be imported.*python -m pip install -r requirements-export.txt'):
        export.main(args)
    assert sorted(os.listdir(tmp_path)) == ['c.yaml', 'w.pdparams']


def test_constants_are_folded_without_any_installation(tmp_path, monkeypatch):
    need_onnx()
    import onnx
    import polygraphy.config
    args = arguments(str(tmp_path), '-format', 'onnx')
    monkeypatch.setattr(polygraphy.config, 'AUTOINSTALL_DEPS', True)
    assert export.main(args) == 0 and not polygraphy.config.AUTOINSTALL_DEPS
    nodes = onnx.load(os.path.join(args.output, 'model.onnx')).graph.node
    assert not any(node.op_type in ('Constant', 'ConstantOfShape', 'Range') for node in nodes)


@pytest.mark.parametrize('opset', [-1, 12, 22, 99])
def test_an_opset_that_the_converter_does_not_know_is_refused(tmp_path, opset):
    with pytest.raises(ValueError, match=f'-opset {opset}: it must be from 13 to 21'):
        export.main(arguments(str(tmp_path), f'-opset={opset}'))


def test_what_libraries_printed_is_shown_with_an_exception(capfd):
    with export.quiet():
        os.write(1, b'unseen\n')
    with pytest.raises(RuntimeError), export.quiet():
        os.write(2, b'seen\n')
        raise RuntimeError
    captured = capfd.readouterr()
    assert captured.out == '' and captured.err == 'seen\n'


def test_mistakes_are_said_first(tmp_path):
    args = arguments(str(tmp_path), '-dynamic')
    args.opts += ['MODEL.STAGES', "['conv bot', 'halo']"]
    with pytest.raises(ValueError, match='-dynamic'):
        export.main(args)
    args = arguments(str(tmp_path))
    os.makedirs(args.output)
    open(os.path.join(args.output, 'mine'), 'w').close()
    with pytest.raises(ValueError, match='not an empty folder'):
        export.main(args)
