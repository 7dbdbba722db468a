"""The records of a training: metrics, log, TensorBoard logs, predictions, machine."""
import json
import logging
import os
import shutil
import sys

import numpy as np
import paddle
import pytest
from event_files import read_events
from exact_runs import EVERYTHING, run
from runs import TINY, options, program, records

from reporting import report
from training import checkpoint
from training import records as run_records

# ---- records

def test_rewind_of_metrics(tmp_path):
    metrics = run_records.Metrics(tmp_path)
    for epoch in (1, 2):
        for step in (2 * epoch - 1, 2 * epoch):
            metrics.write(epoch=epoch, step=step, split='train', loss=1 / 3)
        metrics.write(epoch=epoch, step=2 * epoch, split='val', loss=0.5)
    lines = open(metrics.path, encoding='utf-8').read().splitlines(keepends=True)
    assert lines[0] == '{"epoch": 1, "step": 1, "split": "train", "loss": 0.33333333}\n'
    with open(metrics.path, 'a', encoding='utf-8') as file:
        file.write('{"step": 4, "lo')                # a kill in the middle of a line
    for step, epochs, kept in ((9, 9, 6), (4, 2, 6), (4, 1, 5), (3, 1, 4), (2, 1, 3), (2, 0, 2), (0, 0, 0)):
        metrics.rewind(step, epochs)
        assert open(metrics.path, encoding='utf-8').read() == ''.join(lines[:kept])


def test_damaged_metrics_file_is_named(tmp_path):
    (tmp_path / 'metrics.jsonl').write_bytes(b'{"epoch": 1, "step": 1, "split": "train"}\n\xff\x00\n')
    with pytest.raises(ValueError, match='metrics.jsonl:2: not a record'):
        run_records.Metrics(tmp_path).rewind(5, 5)


def test_log_names_data_splits_and_page(images, full_run):
    log = (full_run / 'log.txt').read_text(encoding='utf-8')
    lines = [line.split(' ', 2)[2] for line in log.splitlines()]
    assert f'{images}: 20 images to train on' in lines and 'imagenet2012' not in ''.join(lines)
    assert lines[-1] == f'page: {full_run}/report.html'
    last = records(full_run, 'val_ema')[-1]
    assert lines[-5].startswith(f'val_ema  acc@1 {last["acc1"]:.2f}  acc@5 ')
    assert lines[-6].startswith('val  acc@1 ')


# ---- TensorBoard

def same_as_the_records(folder):
    splits = {record['split'] for record in records(folder)}
    assert splits == {'train', 'val', 'val_ema'} == set(os.listdir(folder / 'tensorboard'))
    for split in splits:
        expected = {}
        for record in records(folder, split):
            for tag in {*run_records.SCALARS} & record.keys():
                if record[tag] is not None:
                    expected[record['step'], tag] = record[tag]
        found = read_events(folder / 'tensorboard' / split)
        assert found.keys() == expected.keys() and len(found) >= 4 * 4
        assert all(found[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-8) for key in found)


def test_tensorboard_gets_the_records(full_run):
    same_as_the_records(full_run)
    drawn = {tag for _, tag in read_events(full_run / 'tensorboard' / 'train')}
    assert drawn == {*run_records.SCALARS} - {'loss_scale'}          # of float16 alone


def test_resumed_run_replaces_later_curves(images, full_run, tmp_path):
    shutil.copytree(full_run, tmp_path / 'run')
    for path in checkpoint.steps(tmp_path / 'run')[:2]:
        os.remove(path)
    os.remove(tmp_path / 'run' / 'final.pdparams')
    run(images, tmp_path / 'run', *EVERYTHING, 'MODEL.RESUME', 'auto')
    same_as_the_records(tmp_path / 'run')
    assert len(os.listdir(tmp_path / 'run' / 'tensorboard' / 'train')) == 2


# ---- what is kept

def predictions(folder, split='val'):
    with np.load(folder / f'predictions_{split}.npz') as file:
        return dict(file)


def test_predictions_are_of_the_last_evaluation(full_run, images):
    labels = [int(line.split()[1]) for line in open(os.path.join(images, 'val_list.txt'), encoding='utf-8')]
    for split in ('val', 'val_ema'):
        found, last = predictions(full_run, split), records(full_run, split)[-1]
        assert found['index'].tolist() == list(range(11)) and found['label'].tolist() == labels
        assert 100 * (found['top1'] == found['label']).mean() == pytest.approx(last['acc1'])
        losses = -np.log(found['label_probability'].astype('float64'))
        assert losses.mean() == pytest.approx(last['loss'], rel=1e-5)
        assert (found['probability'] >= found['label_probability']).all()
        right = found['top1'] == found['label']
        assert ((found['probability'] == found['label_probability']) == right).all()


def test_predictions_of_two_processes_are_those_of_one(full_run, images, tmp_path):
    program('main_multi_gpu.py', '-data_path', images, '-eval', '-nprocs', 2,
            '-pretrained', full_run / 'final', '-output', tmp_path, *options(TINY))
    one, two = predictions(full_run), predictions(tmp_path, 'eval')
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4)
    assert (tmp_path / 'report.html').exists()


def test_skipped_images_have_no_prediction(full_run, images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / '5.png').write_bytes(b'')
    run(str(tmp_path / 'data'), tmp_path / 'run', 'EVAL', True, 'DATA.ON_ERROR', 'skip',
        'MODEL.PRETRAINED', str(full_run / 'final'))
    assert predictions(tmp_path / 'run', 'eval')['index'].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_no_commit_without_git(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert run_records.commit() == ''


def test_small_numbers_keep_8_digits(tmp_path):
    run_records.Metrics(str(tmp_path)).write(step=0, split='train', lr=1.2345678e-9)
    assert json.loads((tmp_path / 'metrics.jsonl').read_text())['lr'] == 1.2345678e-9


def test_machine_json(full_run):
    facts = json.loads((full_run / 'machine.json').read_text())
    assert facts['device'] == 'cpu x 1' and facts['paddle'] == paddle.__version__
    assert facts['folder'] == os.getcwd()
    assert facts['cores'] >= 1 and facts['python'] == sys.version.split()[0]


@pytest.mark.parametrize('name', ['machine', 'write_predictions', 'report'])
def test_failed_record_does_not_fail_a_training(images, tmp_path, monkeypatch, name):
    def fails(*args):
        raise RuntimeError('no such luck')
    monkeypatch.setattr(*((report, 'write') if name == 'report' else (run_records, name)), fails)
    run(images, tmp_path)
    assert (tmp_path / 'final.pdparams').exists()
    assert (tmp_path / 'log.txt').read_text().count('could not be written: RuntimeError: no such luck') == 1
    assert logging.getLogger('halonet').handlers and not list(tmp_path.glob('*.tmp*'))
