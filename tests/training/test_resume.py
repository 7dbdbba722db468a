"""Resuming with a changed list or changed options: refused if the results depend on them, in one line."""
import hashlib
import os
import shutil

import pytest
from runs import TINY

from config import get_config
from data import list_file
from training import checkpoint, engine


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
