"""Resuming with a changed list or changed options: refused if the results depend on them, in one line."""
import hashlib
import json
import os
import shutil

import pytest
from operators import COMPILED
from runs import TINY

from config import get_config
from data import list_file
from model import layers
from training import builders, checkpoint, engine


def run(images, output, *opts):
    return engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(output), *opts]))


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'run'
    run(images, folder)
    return folder


def change_list(path, change):
    path.write_bytes(change(path.read_bytes()))


HARMLESS = {
    'a comment': lambda text: b'# checked on Monday\n' + text,
    'empty lines': lambda text: text.replace(b'\n', b'\n\n'),
    'line endings of Windows': lambda text: text.replace(b'\n', b'\r\n'),
    'a byte-order mark': lambda text: b'\xef\xbb\xbf' + text,
    'no last line ending': lambda text: text.rstrip(b'\n'),
    'tabs': lambda text: text.replace(b' ', b'\t'),
    'other blanks': lambda text: text.replace(b' ', b'  ').replace(b'\n', b' \n'),
    'zeros before a label': lambda text: text.replace(b' 3', b' 03'),
}
HARMFUL = {
    'another label': lambda text: text.replace(b' 3\n', b' 2\n', 1),
    'another name': lambda text: text.replace(b'1.png', b'./1.png', 1),
    'a line less': lambda text: text[text.index(b'\n') + 1:],
    'a line more': lambda text: text + text[:text.index(b'\n') + 1],
    'a letter that moves to the next name':
        lambda text: text.replace(b'0.png 0\ntrain/1', b'0.pngt 0\nrain/1'),
}


@pytest.mark.parametrize('how', HARMLESS)
def test_list_with_the_same_names_and_labels_is_accepted(images, whole, tmp_path, how):
    shutil.copytree(images, tmp_path / 'data')
    change_list(tmp_path / 'data' / 'train_list.txt', HARMLESS[how])
    run(str(tmp_path / 'data'), tmp_path / 'run', 'MODEL.RESUME', checkpoint.steps(whole)[0])
    assert 'resumed from' in (tmp_path / 'run' / 'log.txt').read_text()


@pytest.mark.parametrize('how', HARMFUL)
def test_list_with_other_names_or_labels_is_refused(images, whole, tmp_path, how):
    shutil.copytree(images, tmp_path / 'data')
    change_list(tmp_path / 'data' / 'train_list.txt', HARMFUL[how])
    with pytest.raises(ValueError, match='train_list.txt was 20 images, sha256 .*, is '):
        run(str(tmp_path / 'data'), tmp_path / 'run', 'MODEL.RESUME', checkpoint.steps(whole)[0])


def test_checkpoint_of_an_earlier_version_knows_the_list_by_its_bytes(images, whole, tmp_path):
    state = checkpoint.load(checkpoint.steps(whole)[0])
    with open(os.path.join(images, 'train_list.txt'), 'rb') as file:
        state['facts']['train_list.txt'] = hashlib.sha256(file.read()).hexdigest()[:16]
    checkpoint.save(str(tmp_path / 'old'), 4, state, keep=1)
    path = checkpoint.newest(tmp_path / 'old')
    run(images, tmp_path / 'run', 'MODEL.RESUME', path)
    shutil.copytree(images, tmp_path / 'data')
    change_list(tmp_path / 'data' / 'train_list.txt', HARMFUL['another label'])
    with pytest.raises(ValueError, match='train_list.txt was '):
        run(str(tmp_path / 'data'), tmp_path / 'run2', 'MODEL.RESUME', path)


def test_lists_are_hashed_in_parts(images, monkeypatch):
    samples = list_file.read_list(os.path.join(images, 'train_list.txt'), images, 4)
    digests = []
    for count in (1, 3, 20, 1 << 20):
        monkeypatch.setattr(list_file, 'SAMPLES_AT_A_TIME', count)
        digests.append(samples.digest())
    assert len({*digests}) == 1
    names = b''.join(samples.name(i).encode() for i in range(len(samples)))
    monkeypatch.undo()
    assert samples._names(0, len(samples)) == names


def test_other_number_of_epochs_is_explained(images, whole, tmp_path):
    for epochs in (3, 9):
        with pytest.raises(ValueError) as error:
            run(images, tmp_path / 'run', 'TRAIN.NUM_EPOCHS', epochs,
                'MODEL.RESUME', checkpoint.steps(whole)[0])
        text = str(error.value)
        assert f'TRAIN.NUM_EPOCHS was 2, is {epochs}.' in text and '\n' not in text
        assert f'-pretrained {whole}/final.pdparams' in text and 'MODEL.RESUME_FORCE True' in text


# ---- how attention is computed

def attention_of(folder):
    return json.loads((folder / 'machine.json').read_text())['attention']


@COMPILED
def test_resumed_run_keeps_its_attention_when_auto_takes_another(images, whole, tmp_path, monkeypatch):
    """The rule of auto changes within a run, which ends as if it had not."""
    assert attention_of(whole) == 'fused'
    shutil.copytree(whole, tmp_path / 'run')
    os.remove(checkpoint.steps(tmp_path / 'run')[0])
    monkeypatch.setattr(layers, 'auto_choice', lambda layer: 'sdpa')
    run(images, tmp_path / 'run', 'MODEL.RESUME', 'auto')
    assert attention_of(tmp_path / 'run') == 'fused'
    assert (tmp_path / 'run/final.pdparams').read_bytes() == (whole / 'final.pdparams').read_bytes()
    run(images, tmp_path / 'new')
    assert attention_of(tmp_path / 'new') == 'sdpa'


def kind_of(folder, resume='auto', *opts):
    opts = [*TINY, 'OUTPUT', str(folder), 'MODEL.RESUME', resume, *opts]
    return builders.build_attention(get_config(None, opts), 'cpu')


@pytest.mark.parametrize('machine, expected', [
    ({'device': 'cpu x 2', 'attention': 'sdpa'}, 'sdpa'),
    ({'device': 'gpu x 1', 'attention': 'sdpa'}, 'auto'),             # another kind of device
    ({'device': 'cpu x 2'}, 'auto'),                                  # of an earlier version
    ({'device': 'cpu x 2', 'attention': 'rm -r'}, 'auto')])
def test_attention_of_a_resumed_run(tmp_path, caplog, machine, expected):
    (tmp_path / 'machine.json').write_text(json.dumps(machine))
    assert kind_of(tmp_path) == expected
    assert kind_of('elsewhere', str(tmp_path / checkpoint.FOLDER / 'step_00000001.pdckpt')) == expected
    assert kind_of(tmp_path, '') == 'auto' and not caplog.text
    assert kind_of(tmp_path, 'auto', 'MODEL.ATTENTION', 'composed') == 'composed'
    said = 'attention was sdpa' in caplog.text and 'composed now, as MODEL.ATTENTION says' in caplog.text
    assert said == (machine.get('attention') == 'sdpa')


def test_attention_that_cannot_be_compiled_any_more_is_composed(tmp_path, caplog, monkeypatch):
    (tmp_path / 'machine.json').write_text('{"device": "cpu x 1", "attention": "fused"}')
    monkeypatch.setattr(builders.ops, 'load', lambda: ())
    assert kind_of(tmp_path) == 'composed'
    assert 'attention was fused, which cannot be compiled any more' in caplog.text
