"""tools/follow.py: every record of a run reaches a tracker once, also after stops and failures."""
import json
import os
import sys
import threading
import types

from tools import follow

import pytest
from event_files import read_events

KEYS = ('loss', 'acc1', 'lr')


def record(step, split='train', epoch=1):
    values = {'loss': 1 / step, 'acc1': 10.0 * step, 'lr': 0.1 if split == 'train' else None}
    return json.dumps({'epoch': epoch, 'step': step, 'split': split, **values}) + '\n'


def write(folder, *lines):
    (folder / 'metrics.jsonl').write_text(''.join(lines))


def expected(*names):
    """Return what a tracker should have got for (split, step): {(step, name): value}."""
    found = {}
    for split, step in names:
        values = json.loads(record(step, split))
        found.update({(step, f'{split}/{key}'): values[key] for key in KEYS if values[key] is not None})
    return found


class Tracker(types.ModuleType):
    """Stands for swanlab and wandb, with the functions that both have, and keeps what it gets."""

    def __init__(self, fails_at=None):
        super().__init__('tracker')
        self.starts, self.got, self.fails_at, self.finished = [], {}, fails_at, 0

    def init(self, *, project, name, id, resume, config):
        assert resume == 'allow'
        self.starts.append({'project': project, 'name': name, 'id': id, 'config': config})

    def log(self, data, step):
        if step == self.fails_at:
            raise RuntimeError('no network')
        for name, value in data.items():
            assert (step, name) not in self.got, 'sent twice'
            self.got[step, name] = value

    def finish(self):
        self.finished += 1


@pytest.fixture
def tracker(monkeypatch):
    tracker = Tracker()
    for name in ('swanlab', 'wandb'):
        monkeypatch.setitem(sys.modules, name, tracker)
    return tracker


def run(folder, *words):
    return follow.main(follow.parser().parse_args([str(folder), *words]))


@pytest.mark.parametrize('name', ['swanlab', 'wandb'])
def test_records_are_sent_once(name, tracker, tmp_path):
    write(tmp_path, record(2), record(4), record(4, 'val'))
    (tmp_path / 'config.yaml').write_text('TRAIN: {NUM_EPOCHS: 7}\n')
    assert run(tmp_path, '-to', name, '-once', '-name', 'first') == 0
    assert tracker.got == expected(('train', 2), ('train', 4), ('val', 4))
    write(tmp_path, record(2), record(4), record(4, 'val'), record(6))
    run(tmp_path, '-to', name, '-once')
    assert tracker.got == expected(('train', 2), ('train', 4), ('val', 4), ('train', 6))
    first, second = tracker.starts
    assert first['project'] == 'halonet' and first['config']['TRAIN.NUM_EPOCHS'] == 7
    assert (first['name'], second['name']) == ('first', tmp_path.name)
    assert first['id'] == second['id'] and tracker.finished == 2


def test_a_running_run_is_followed_to_its_end(tracker, tmp_path, monkeypatch):
    """A torn line waits, and a resumed run that writes records again sends none twice."""
    looks = iter([
        lambda: write(tmp_path, record(2), record(4)[:20]),
        lambda: write(tmp_path, record(2), record(4), record(4, 'val')),
        lambda: write(tmp_path, record(2)),                             # resumed from step 2
        lambda: write(tmp_path, record(2), record(4), record(4, 'val'), record(6)),
        lambda: (tmp_path / 'final.pdparams').touch()])
    monkeypatch.setattr(follow.time, 'sleep', lambda seconds: next(looks)())
    (tmp_path / 'final.pdparams').touch()           # of the training before it was continued
    os.utime(tmp_path / 'final.pdparams', (1, 1))
    assert run(tmp_path, '-to', 'wandb') == 0
    assert tracker.got == expected(('train', 2), ('train', 4), ('val', 4), ('train', 6))
    assert next(looks, None) is None


def test_a_tracker_that_fails_loses_nothing(tracker, tmp_path):
    write(tmp_path, *map(record, (2, 4, 6)))
    tracker.fails_at = 4
    with pytest.raises(ValueError, match='wandb: RuntimeError: no network; 1 records were sent'):
        run(tmp_path, '-to', 'wandb', '-once')
    tracker.fails_at = None
    run(tmp_path, '-to', 'wandb', '-once')
    assert tracker.got == expected(('train', 2), ('train', 4), ('train', 6)) and tracker.finished == 2


def test_tensorboard_gets_the_same(tmp_path):
    write(tmp_path, record(2), record(4), record(4, 'val'))
    for _ in range(2):
        run(tmp_path, '-to', 'tensorboard', '-once', '-output', str(tmp_path / 'curves'))
        write(tmp_path, record(2), record(4), record(4, 'val'), record(6))
    found = {(step, f'{split}/{key}'): value for split in ('train', 'val')
             for (step, key), value in read_events(tmp_path / 'curves' / split).items()}
    wanted = expected(('train', 2), ('train', 4), ('val', 4), ('train', 6))
    assert found == {key: pytest.approx(value) for key, value in wanted.items()}


@pytest.mark.parametrize('prepare, words, message', [
    (lambda folder: None, ['-to', 'tensorboard'], 'needs -output DIR'),
    (lambda folder: write(folder, record(2), 'no record\n'), ['-to', 'wandb'], 'jsonl:2: not a record'),
    (lambda folder: (folder / 'follow_wandb.json').write_text('[]'), ['-to', 'wandb'], 'not the place'),
])
def test_mistakes_are_named(prepare, words, message, tracker, tmp_path):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, '-once', *words)


def test_a_missing_folder_or_package_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='nowhere: no such folder'):
        run('nowhere', '-to', 'wandb')
    monkeypatch.setitem(sys.modules, 'swanlab', None)
    monkeypatch.setattr(sys, 'meta_path', [])
    monkeypatch.delitem(sys.modules, 'swanlab')
    with pytest.raises(ValueError, match='the package swanlab is missing in .* -m pip install swanlab'):
        run(tmp_path, '-to', 'swanlab')


def test_it_ends_at_ctrl_c(tracker, tmp_path, monkeypatch):
    """It waits for a run that has not ended; the tracker is closed."""
    def interrupt(seconds):
        assert threading.current_thread() is threading.main_thread()
        raise KeyboardInterrupt
    monkeypatch.setattr(follow.time, 'sleep', interrupt)
    write(tmp_path, record(2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, '-to', 'wandb')
    assert tracker.got == expected(('train', 2)) and tracker.finished == 1
