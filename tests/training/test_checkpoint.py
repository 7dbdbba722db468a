"""Files of a run folder: whole or not there, recognised when damaged, the same bytes for the same content."""
import hashlib
import os
import pickle

from system import files
import utils

import numpy as np
import paddle
import pytest

from training import checkpoint


def state(value):
    return {
        'model': {'w': paddle.full([3], value)}, 'progress': {'epoch': 1, 'best': {'val': [97.5, 1]}},
        'scaler': {}, 'ema': {}, 'optimizer': {'w|moment1_0': paddle.ones([3])}, 'ranks': [{'buffers': {}}],
        'facts': {'SEED': 0}}


def test_checkpoint_round_trip(tmp_path):
    checkpoint.save(str(tmp_path), 12, state(0.5), keep=1)
    path = checkpoint.newest(tmp_path)
    assert path.endswith('checkpoints/step_00000012.pdckpt')
    loaded = checkpoint.load(path)
    assert loaded['progress'] == state(0)['progress'] and loaded['scaler'] == {}
    np.testing.assert_array_equal(loaded['model']['w'], np.full(3, 0.5, 'float32'))


def test_newest_checkpoints_by_step_are_kept(tmp_path):
    for step in (8, 9, 100_000_000, 10):
        checkpoint.save(str(tmp_path), step, state(step), keep=3)
    assert [os.path.basename(path) for path in checkpoint.steps(tmp_path)] == [
        'step_100000000.pdckpt', 'step_00000010.pdckpt', 'step_00000009.pdckpt']


@pytest.mark.parametrize('damage', [
    lambda data: data[:-1], lambda data: data[:100], lambda data: b'', lambda data: b'text',
    lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], lambda data: data + b'x'])
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage):
    for step in (1, 2):
        checkpoint.save(str(tmp_path), step, state(step), keep=3)
    path = checkpoint.steps(tmp_path)[0]
    with open(path, 'rb') as file:
        data = file.read()
    with open(path, 'wb') as file:
        file.write(damage(data))
    with pytest.raises(ValueError, match='step_00000002.pdckpt: .* damaged'):
        checkpoint.load(path)
    assert checkpoint.newest(tmp_path).endswith('step_00000001.pdckpt')


def test_later_checkpoints_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(str(tmp_path), step, state(step), keep=3)
    (tmp_path / 'best.pdparams.tmp12').write_text('')
    checkpoint.tidy(str(tmp_path), 1)
    assert [os.path.basename(path) for path in checkpoint.steps(tmp_path)] == ['step_00000001.pdckpt']
    assert sorted(os.listdir(tmp_path / 'checkpoints'))[1:] == [
        'step_00000002.pdckpt.aside', 'step_00000003.pdckpt.aside']
    assert os.listdir(tmp_path) == ['checkpoints']


def test_missing_checkpoints(tmp_path):
    assert checkpoint.newest(tmp_path) == ''
    with pytest.raises(FileNotFoundError, match='nowhere: no such checkpoint'):
        checkpoint.load('nowhere')


class Bomb:
    def __reduce__(self):
        return os.system, ('touch bomb_went_off',)


def test_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(str(tmp_path), 1, {**state(0), 'scaler': Bomb()}, keep=1)        # with a valid checksum
    with pytest.raises(ValueError, match='system'):
        checkpoint.load(checkpoint.steps(tmp_path)[0])
    assert not os.path.exists('bomb_went_off')


NESTED = [1]
for _ in range(60):
    NESTED = [NESTED, NESTED]                       # 2 ** 60 values


@pytest.mark.parametrize('change', [
    {'model': []}, {'model': {'w': 'text'}}, {'model': {'w': [1.0]}}, {'model': {1: np.zeros(3)}},
    {'ema': None}, {'optimizer': 3}, {'ranks': {}}, {'ranks': [3]},
    {'ranks': [{'buffers': {}, 'totals': {'sums': [1.0], 'seconds': 1.0}}]},
    {'facts': 'text'}, {'progress': {'epoch': 'x'}},
    {'progress': {'epoch': -2}}, {'progress': {'epoch': 2 ** 70}}, {'progress': {'other': 1}},
    {'progress': {'best': [1]}}, {'progress': {'best': {'val': 'text'}}}, {'scaler': ()}, {'more': {}},
])
def test_checkpoint_of_other_parts_is_refused(tmp_path, change):
    checkpoint.save(str(tmp_path), 1, state(0), keep=1)
    rewrite(checkpoint.steps(tmp_path)[0], {**state_as_arrays(), **change})
    message = 'step_00000001.pdckpt: this checkpoint is of another version of this project'
    with pytest.raises(ValueError, match=message):
        checkpoint.load(checkpoint.steps(tmp_path)[0])


def state_as_arrays():
    return checkpoint.to_numpy(state(0))


def rewrite(path, content):
    """Give a checkpoint another content, with the right checksum."""
    data = pickle.dumps(content, protocol=4)
    with open(path, 'wb') as file:
        file.write(data + checkpoint.FOOTER + hashlib.sha256(data).hexdigest().encode())


@pytest.mark.parametrize('content', [{**state(0), 'facts': {'SEED': NESTED}}, NESTED])
def test_checkpoint_of_endless_values_is_refused(tmp_path, content):
    """Comparing or printing them would take Python ages."""
    path = tmp_path / 'a.pdckpt'
    rewrite(path, {**state_as_arrays(), 'facts': content['facts']} if isinstance(content, dict) else content)
    message = f'^{path}: .*nested deeper than 50 levels, or holds more than 200000 values'
    with pytest.raises(ValueError, match=message):
        checkpoint.load(str(path))


def test_values_of_a_file_are_logged_on_one_line():
    [line] = checkpoint.differences({'SEED': '\x1b[31m\n' * 999}, {'SEED': 0})
    assert line.isprintable() and len(line) < 300


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'file'
    files.atomic_write(path, lambda file: file.write(b'old'))

    def fail(file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    with pytest.raises(OSError, match='No space'):
        files.atomic_write(path, fail)
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['file']


def test_saved_weights_load_with_paddle_load_and_are_reproducible(tmp_path):
    for name in ('a', 'b'):
        paddle.seed(1)
        checkpoint.save_weights(str(tmp_path / name), paddle.nn.Linear(2, 3).state_dict())
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()
    loaded, layer = paddle.load(str(tmp_path / 'a')), paddle.nn.Linear(2, 3)
    assert layer.set_state_dict(loaded) == ([], [])
    with open(tmp_path / 'a', 'rb') as file:
        np.testing.assert_array_equal(layer.weight, pickle.load(file)['weight'])


def test_run_folders_of_the_same_second_differ(tmp_path):
    folders = {utils.make_run_folder('', str(tmp_path), 'train-x') for _ in range(3)}
    assert len(folders) == 3 and all(os.path.isdir(folder) for folder in folders)
    assert utils.make_run_folder(str(tmp_path / 'here'), 'unused', 'name') == str(tmp_path / 'here')
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot make the run folder'):
        utils.make_run_folder(str(tmp_path / 'file'), 'unused', 'name')


def test_totals_sum_what_is_added():
    totals = utils.Totals()
    logits = paddle.to_tensor([[3., 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    totals.add(paddle.to_tensor([1., 2., 3.]), logits, paddle.to_tensor([0, 1, 0]))
    totals.add(paddle.to_tensor([6.]), logits[:1], paddle.to_tensor([5]))
    assert totals.reduce() == {'loss': 3.0, 'acc1': 25.0, 'acc5': 50.0, 'images': 4}
    assert totals.first_nonfinite() is None
    again = utils.Totals.merged([totals.state(), {'sums': [1, 1, 1, 1], 'seconds': 100.0}])
    assert again.sums.tolist() == [13, 2, 3, 5] and 100 <= again.seconds() < 101
    totals.add(paddle.to_tensor([float('nan')]), logits[:1], paddle.to_tensor([5]), step=7)
    totals.add(paddle.to_tensor([float('inf')]), logits[:1], paddle.to_tensor([5]), step=8)
    assert totals.first_nonfinite() == (7, 0)


def test_totals_rank_logits_of_16_bits_as_float32():
    """Equal numbers get one order in every precision, and so the same accuracy."""
    logits = paddle.to_tensor(np.random.default_rng(0).integers(0, 3, (64, 40)).astype('float32'))
    labels = paddle.arange(64) % 40
    counted = []
    for dtype in ('float32', 'float16', 'bfloat16'):
        totals = utils.Totals()
        totals.add(paddle.zeros([64]), logits.astype(dtype), labels)
        counted.append(totals.reduce())
    assert counted[0] == counted[1] == counted[2]
