"""tools/export.py -precision: files in int8 and float16 that keep their accuracy, or nothing."""
import importlib.util
import json
import subprocess
import sys

from tools import export, precision, runtimes

import numpy as np
import pytest
from runs import TINY, make_images, options, program

HAS_ONNX = all(importlib.util.find_spec(name) for name in export.NEEDED)
needs_onnx = pytest.mark.skipif(
    not HAS_ONNX, reason='the packages of requirements-export.txt are not installed')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The images and the weights of a training that tells red, green, blue and grey apart."""
    folder = tmp_path_factory.mktemp('precision')
    images = make_images(folder / 'data', train=40, val=30)
    values = [*TINY, 'TRAIN.NUM_EPOCHS', 6]
    program('main_single_gpu.py', '-data_path', images, '-output', folder / 'run', *options(values))
    return images, folder / 'run' / 'final.pdparams'


def export_to(folder, run, *words, check=True):
    return program('tools/export.py', '-pretrained', run[1], '-output', folder, *words, check=check)


def meta(folder):
    return json.loads((folder / 'meta.json').read_text())


def accuracy_by_infer(folder, images):
    """The accuracy of an exported folder by its own program, in percent."""
    done = subprocess.run([sys.executable, folder / 'infer.py', f'{images}/val', '-json', '-top', '1'],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {entry['picture'].split('/data/')[1]: entry['top'][0]['label']
             for entry in json.loads(done.stdout)['pictures']}
    with open(f'{images}/val_list.txt', encoding='utf-8') as file:
        labels = dict(line.split() for line in file)
    return 100 * np.mean([found[name] == int(label) for name, label in labels.items()])


@needs_onnx
@pytest.mark.parametrize('words', [(), ('-dynamic',), ('-input', 'uint8', '-result', 'topk', '-topk', '2')])
def test_int8_states_the_accuracy_of_its_file(run, tmp_path, words):
    """The oracle is infer.py, which reads the images on its own; -drop 100 lets every loss pass."""
    done = export_to(tmp_path / 'out', run, '-precision', 'int8', '-calibrate', run[0], '-drop', 100, *words)
    facts = meta(tmp_path / 'out')
    assert facts['precision'] == 'int8' and facts['beside_float32']['images'] == 30
    expected = accuracy_by_infer(tmp_path / 'out', run[0])
    assert facts['beside_float32']['top1'] == pytest.approx(expected, abs=1e-3)
    assert 'times as fast' in done.stdout and '0 of' in done.stdout
    assert 'of val_list.txt; the same file in float32 had' in (tmp_path / 'out' / 'README.md').read_text()
    assert not list((tmp_path / 'out').glob('*.pdiparams'))


@needs_onnx
def test_weights_are_int8_and_attention_terms_are_not(run, tmp_path):
    import onnx
    from onnx import numpy_helper
    export_to(tmp_path / 'out', run, '-precision', 'int8', '-calibrate', run[0], '-drop', 100)
    graph = onnx.load(tmp_path / 'out' / 'model.onnx').graph
    makers = {name: node for node in graph.node for name in node.output}
    small = [numpy_helper.to_array(value) for value in graph.initializer
             if value.name.endswith('_quantized') and value.data_type == onnx.TensorProto.INT8]
    assert len(small) == meta(tmp_path / 'out')['beside_float32']['layers'] > 5
    assert all(np.abs(weights.astype(int)).max() <= 64 for weights in small)     # 7 bits
    for softmax in (node for node in graph.node if node.op_type == 'Softmax'):
        logits = makers[softmax.input[0]]
        while logits.op_type in ('Reshape', 'Identity'):
            logits = makers[logits.input[0]]
        assert logits.op_type == 'Add'              # of the products with keys and with positions
        waiting, products = list(logits.input), 0
        while waiting:
            node = makers.get(waiting.pop())
            assert node is None or node.op_type not in ('DequantizeLinear', 'QuantizeLinear')
            if node is not None and node.op_type in ('MatMul', 'Einsum'):
                products += 1
            elif node is not None:
                waiting += node.input
        assert products == 3                        # with keys, and with rows and columns of positions


@needs_onnx
def test_layers_stay_float32_until_the_accuracy_holds(run, tmp_path, monkeypatch, capsys):
    """A worst layer is that which changes the logits most when it alone is in int8."""
    import onnx
    found = iter([90.0, 80.0, 85.0, 89.8])          # of float32, then with 0, 1 and 2 layers in float32
    monkeypatch.setattr(precision, '_accuracy', lambda *args: next(found))
    monkeypatch.setattr(precision, 'ROUNDS', 1)
    words = ['-pretrained', run[1], '-output', tmp_path / 'out', '-precision', 'int8', '-calibrate', run[0]]
    args = export.parser().parse_args([str(word) for word in words])
    assert export.main(args) == 0
    facts = meta(tmp_path / 'out')['beside_float32']
    assert len(facts['float32_layers']) == 2 and facts['top1'] == 89.8
    assert f'in float32 next: {facts["float32_layers"][0]}\n' in capsys.readouterr().out
    graph = onnx.load(tmp_path / 'out' / 'model.onnx').graph
    constants = {value.name for value in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    assert all(nodes[name].input[1] in constants for name in facts['float32_layers'])


@needs_onnx
def test_worst_layers_are_found(run, tmp_path):
    """A channel is made 1000 times smaller, and its weights in the next layer 1000 times larger.

    The logits stay, but the steps of int8 are too large for what both layers share.
    """
    from tools.quantization import Quantizer

    import onnx
    from onnx import numpy_helper
    export_to(tmp_path / 'out', run, '-format', 'onnx')
    path = str(tmp_path / 'out' / 'model.onnx')
    onnx.save(onnx.load(Quantizer(path, str(tmp_path)).prepared), path)      # with fused biases
    model = onnx.load(path)
    constants = {value.name: value for value in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}

    def scale(name, where, factor):
        values = numpy_helper.to_array(constants[name]).copy()
        values[where] *= factor
        constants[name].CopyFrom(numpy_helper.from_array(values, name))

    for spoilt in (node for node in model.graph.node if node.op_type == 'Conv'):
        relu = makers.get(spoilt.input[0])
        before = makers.get(relu.input[0]) if relu is not None and relu.op_type == 'Relu' else None
        users = [node for node in model.graph.node if relu is not None and relu.output[0] in node.input]
        if before is not None and before.op_type == 'Conv' and len(users) == 1:
            break
    scale(spoilt.input[1], ..., 100)                # a young block adds little to its shortcut
    onnx.save(model, path)
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16), dtype='float32')
    expected = runtimes.onnxruntime(path)(images)
    scale(before.input[1], 0, 1e-3)
    scale(before.input[2], 0, 1e-3)
    scale(spoilt.input[1], (slice(None), 0), 1e3)
    onnx.save(model, path)
    np.testing.assert_allclose(runtimes.onnxruntime(path)(images), expected, rtol=0,
                               atol=1e-4 * np.abs(expected).max())
    quantizer = Quantizer(path, str(tmp_path))
    quantizer.calibrate(image[None] for image in images)
    ranked = precision._rank(quantizer, str(tmp_path / 'one.onnx'), path, images)
    assert set(ranked[:2]) == {before.name, spoilt.name} and sorted(ranked) == sorted(quantizer.layers)


@needs_onnx
def test_float16_gives_the_same_logits_and_takes_float32(run, tmp_path):
    done = export_to(tmp_path / 'out', run, '-precision', 'float16')
    export_to(tmp_path / 'float32', run, '-format', 'onnx')
    images = np.random.default_rng(1).standard_normal((4, 3, 16, 16), dtype='float32')
    half, whole = (runtimes.onnxruntime(str(tmp_path / name / 'model.onnx'))(images)
                   for name in ('out', 'float32'))
    assert half.dtype == np.float32 and 0 < np.abs(half - whole).max() <= 5e-3 * np.abs(whole).max()
    assert 'float16: differs from float32 by' in done.stdout
    assert 0 < meta(tmp_path / 'out')['beside_float32']['difference_from_float32'] < 5e-3


@pytest.mark.parametrize('words, message', [
    (['-precision', 'int8'], '-precision int8 needs -calibrate DATA'),
    (['-precision', 'int8', '-calibrate', 'DATA', '-drop', '-1'], '-drop -1.0: it must be 0 or more'),
    (['-calibrate', 'DATA'], '-calibrate is for -precision int8'),
    (['-precision', 'float16', '-drop', '1'], '-drop is for -precision int8'),
    (['-precision', 'int8', '-format', 'paddle', 'onnx'], '-precision int8 is for -format onnx only'),
    (['-precision', 'int8', '-calibrate', 'DATA', '-opts', 'MODEL.NUM_CLASSES', '0'], 'no accuracy')])
def test_options_that_do_not_go_together_are_refused(run, tmp_path, words, message):
    words = [run[0] if word == 'DATA' else word for word in words]
    done = export_to(tmp_path / 'out', run, *words, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_bad_calibration_data_are_refused(run, tmp_path):
    few = make_images(tmp_path / 'few', train=20)
    done = export_to(tmp_path / 'out', run, '-precision', 'int8', '-calibrate', few, check=False)
    assert done.returncode == 2 and 'train_list.txt: 20 images; calibration needs 32 or more' in done.stderr
    damaged = make_images(tmp_path / 'damaged', train=40)
    (tmp_path / 'damaged' / 'train' / '7.png').write_bytes(b'no image')
    done = export_to(tmp_path / 'out', run, '-precision', 'int8', '-calibrate', damaged, check=False)
    assert done.returncode == 2 and 'train/7.png: not an image' in done.stderr
    missing = tmp_path / 'none'
    done = export_to(tmp_path / 'out', run, '-precision', 'int8', '-calibrate', missing, check=False)
    assert done.returncode == 2 and 'none' in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ['damaged', 'few']


@needs_onnx
def test_list_to_evaluate_stands_in_for_a_training_list(run, tmp_path):
    images = make_images(tmp_path / 'data', val=40)
    (tmp_path / 'data' / 'train_list.txt').unlink()
    done = export_to(tmp_path / 'out', run, '-precision', 'int8', '-calibrate', images, '-drop', 100)
    assert 'calibrating on 40 images of val_list.txt' in done.stdout
