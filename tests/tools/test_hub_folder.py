"""The folder that timm and the hub expect, and loading it again."""
import json

from tools import hub_folder, port_weights

import numpy as np
import paddle
import pytest
from PIL import Image
from runs import program

from config import get_config
from halonet import build_halonet
from model import hub, weights

# of the pretrained_cfg in timm 1.0.31: side of the images, crop, first convolution, mean of each channel
TIMM = {
    'halonet26t': (256, 0.95, 'stem.conv1.conv', 0.485), 'halonet50ts': (256, 0.94, 'stem.conv1.conv', 0.485),
    'halonet_h1': (256, 0.95, 'stem.conv1.conv', 0.485),
    'sehalonet33ts': (256, 0.94, 'stem.conv1.conv', 0.485),
    'eca_halonext26ts': (256, 0.94, 'stem.conv1.conv', 0.485),
    'haloregnetz_b': (224, 0.94, 'stem.conv', 0.5),
    'halo2botnet50ts_256': (256, 0.95, 'stem.conv1.conv', 0.485),
    'lamhalobotnet50ts_256': (256, 0.95, 'stem.conv1.conv', 0.485),
}


@pytest.mark.parametrize('file, name', hub_folder.ARCHITECTURES.items())
def test_config_has_timms_values(file, name):
    content = hub_folder.hub_config(get_config(file), 2048, None)
    found = content['pretrained_cfg']
    side, crop, first_conv, mean = TIMM[name]
    assert content['architecture'] == name and content['num_classes'] == found['num_classes'] == 1000
    assert found['input_size'] == [3, side, side] and found['pool_size'] == [side // 32] * 2
    assert (found['crop_pct'], found['first_conv'], found['mean'][0]) == (crop, first_conv, mean)
    assert found['fixed_input_size'] == ('bot' in name)
    assert len(TIMM) == len(hub_folder.ARCHITECTURES)


def test_training_options_do_not_change_the_network():
    opts = ['MODEL.NAME', 'flowers', 'MODEL.NUM_CLASSES', 5, 'MODEL.DROPPATH', 0.1, 'MODEL.ATTENTION', 'sdpa']
    assert hub_folder.architecture(get_config('halonet_26t', opts)) == 'halonet26t'
    for other in (['MODEL.HALO_SIZE', 3], ['MODEL.ACT', 'silu']):
        with pytest.raises(ValueError, match='timm has no network like flowers'):
            hub_folder.architecture(get_config('halonet_26t', opts + other))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """The run folder of a halonet_26t for 3 classes that was not trained, and its hub folder."""
    folder = tmp_path_factory.mktemp('hub')
    (folder / 'run').mkdir()
    config = get_config('halonet_26t', ['MODEL.NUM_CLASSES', 3, 'MODEL.NAME', 'flowers'])
    (folder / 'run' / 'config.yaml').write_text(config.dump())
    (folder / 'run' / 'class_names.txt').write_text('daisy\nrose\ntulip\n')
    paddle.seed(1)
    paddle.save(build_halonet(config).state_dict(), str(folder / 'run' / 'final.pdparams'))
    done = program('tools/port_weights.py', folder / 'run' / 'final.pdparams', folder / 'out', '-to', 'hub')
    assert 'arrays' in done.stdout
    return folder / 'run', folder / 'out'


def test_folder_has_weights_names_and_a_card(made):
    run, out = made
    assert sorted(path.name for path in out.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    content = json.loads((out / 'config.json').read_text())
    assert content['label_names'] == ['daisy', 'rose', 'tulip'] and content['num_classes'] == 3
    assert content['num_features'] == 2048 and content['architecture'] == 'halonet26t'
    card = (out / 'README.md').read_text()
    assert card.startswith('---\ntags:\n') and '# flowers' in card and '10.4' in card and str(run) not in card


@pytest.mark.parametrize('form', ['{}', '{}/', 'local-dir:{}', '{}/model.safetensors'])
def test_folder_is_loaded_again(made, form):
    run, out = made
    model = build_halonet(get_config(run / 'config.yaml'))
    weights.load_pretrained(model, form.format(out))
    expected = weights.read(str(run / 'final.pdparams'))
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), expected[key], err_msg=key)


def test_folder_predicts(made, tmp_path):
    run, out = made
    Image.new('RGB', (30, 20), (200, 30, 10)).save(tmp_path / 'x.png')
    results = []
    for source in (run / 'final.pdparams', out):
        words = ['-cfg', run / 'config.yaml', '-pretrained', source, tmp_path / 'x.png', '-image_size', 64]
        words += ['-json', '-', '-quiet', '-classes', run / 'class_names.txt']
        done = program('tools/predict.py', *words)
        results.append(json.loads(done.stdout)['pictures'])
    assert results[0] == results[1]


def test_folder_without_weights_is_no_weight_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file'):
        hub.find(str(tmp_path))


def test_mistakes_make_no_folder(made, tmp_path, capsys):
    run, out = made
    with pytest.raises(ValueError, match='exists and is not an empty folder'):
        port_weights.port_to_hub(str(run / 'final.pdparams'), str(out))
    with pytest.raises(ValueError, match='timm has no network like'):
        port_weights.port_to_hub(str(run / 'final.pdparams'), str(tmp_path / 'a'), cfg='halonet_digits')
    state = weights.read(str(run / 'final.pdparams'))
    body = {key: value for key, value in state.items() if 'head' not in key}
    paddle.save(body, str(tmp_path / 'b.pdparams'))
    with pytest.raises(ValueError, match='it has no classifier'):
        port_weights.port_to_hub(str(tmp_path / 'b.pdparams'), str(tmp_path / 'a'), cfg='halonet_26t')
    assert [path.name for path in tmp_path.iterdir()] == ['b.pdparams']
