"""The dry run of -check: what it tells, what it leaves behind, and how it ends."""
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from system import memory
from system.stopping import Stop

import numpy as np
import pytest
from exact_runs import run
from runs import TINY, make_images, options, processes, program, start, wait_until

from config import get_config
from training import dry_run, measure

FACTS = {
    'model': 'tiny', 'image_size': '32x64', 'device': 'gpu', 'processes': 2, 'precision': 'bfloat16',
    'gpu_bytes': 30 * 2 ** 30, 'gpu_total': 80 * 2 ** 30, 'host_bytes': 3 * 2 ** 29, 'eval_images': 500,
    'eval_speed': 250.0, 'train_images': 10000, 'images_per_step': 64, 'steps_per_epoch': 156, 'epochs': 30,
    'evaluations': 20, 'train_speed': 400.0, 'model_speed': 500.0, 'data_speed': 200.0, 'checkpoints': 3,
    'checkpoint_bytes': 2 ** 30, 'weight_bytes': 2 ** 30,
}


def tiny(images, *opts):
    """The words of a command line for a tiny run on the images."""
    return ['-data_path', images, *options([*TINY, *opts])]


# ---- what it tells

def test_facts_are_those_of_the_whole_run(tmp_path, monkeypatch):
    """Sizes, steps and images are compared with a run that is not shortened."""
    images = make_images(tmp_path / 'data', train=150, val=90)
    values = ['TRAIN.NUM_EPOCHS', 3, 'TRAIN.EMA_DECAY', 0.9, 'VALIDATE_FREQ', 2, 'TRAIN.ACCUM_ITER', 1]
    run(images, tmp_path / 'run', *values)
    folder = str(tmp_path / 'check')
    monkeypatch.setenv(dry_run.ORDER, json.dumps([folder, 0]))
    config = get_config(None, [*TINY, *values, 'DATA.DATA_PATH', images, 'OUTPUT', str(tmp_path / 'never')])
    measure.run(config, Stop())
    facts = json.loads((tmp_path / 'check' / dry_run.FACTS).read_text())
    checkpoints = list((tmp_path / 'run' / 'checkpoints').iterdir())
    weights = [path.stat().st_size for path in (tmp_path / 'run').glob('*.pdparams')]
    largest = max(path.stat().st_size for path in checkpoints)
    assert facts['checkpoint_bytes'] == pytest.approx(largest, rel=0.02)
    assert facts['weight_bytes'] == sum(weights) and len(weights) == 4
    with open(tmp_path / 'run' / 'metrics.jsonl', encoding='utf-8') as file:
        rows = list(map(json.loads, file))
    assert facts['steps_per_epoch'] * facts['epochs'] == rows[-1]['step'] == 54
    assert facts['evaluations'] == sum(row['split'] != 'train' for row in rows) == 4
    assert facts['train_images'] == 150 and facts['eval_images'] == 90 and facts['images_per_step'] == 8
    assert facts['device'] == 'cpu' and facts['precision'] == 'float32' and facts['checkpoints'] == 3
    done = [json.loads(line) for line in (tmp_path / 'check' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in done if row['split'] == 'train'] == [4, 8, 12]
    assert not (tmp_path / 'never').exists()


def test_report_adds_up():
    text = dry_run.report(FACTS, free_disk=10 * 2 ** 30)
    assert 'tiny, gpu x 2, bfloat16, images of 32x64 pixels' in text
    assert '30.0 of 80.0 GB of a GPU; on the host 1.5 of ' in text
    assert '200 images/s: reading the data limits it (the model alone 500, reading alone 200)' in text
    assert '50 s for 10000 images in 156 steps of 64' in text            # 10000 / 200
    assert '250 images/s; 500 images take 2 s' in text
    assert '26 min for 30 epochs with 20 evaluations' in text            # 30 x 50 s + 20 x 2 s
    assert '5.0 GB: 3 checkpoints of 1.0 GB and the weights; 10.0 GB are free' in text
    assert 'TOO LITTLE' in dry_run.report(FACTS, free_disk=4 * 2 ** 30)
    by_model = dry_run.report({**FACTS, 'data_speed': 900.0}, free_disk=10 * 2 ** 30)
    assert '400 images/s: the model limits it (the model alone 500, reading alone 900)' in by_model


@pytest.mark.parametrize('seconds, text', [
    (0.5, '0.5 s'), (99, '99 s'), (100, '2 min'), (3569, '59 min'), (3600, '1 h 00 min'),
    (86000, '23 h 53 min'), (100 * 3600, '100 h')])
def test_duration_in_words(seconds, text):
    assert dry_run.duration(seconds) == text


# ---- what is measured, with a clock of the test

class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def loader_of(clock, seconds, batch=8, workers=0):
    """A loader whose batches come after so many seconds each."""
    def epoch(number):
        for pause in seconds:
            clock.now += pause
            yield np.zeros((batch, 3, 4, 4)), None, None
    return SimpleNamespace(epoch=epoch, num_workers=workers)


@pytest.mark.parametrize('workers, seconds, expected', [
    (0, [5, *[2] * 20], 4), (2, [9, 0, 0, 0, 0, *[4] * 20], 2), (2, [4, 1, 0], 24 / 5),
    (1, [0.5, 0, 0, *[16] * 20], 0.5)])
def test_reading_speed_leaves_out_what_was_read_ahead(monkeypatch, workers, seconds, expected):
    """Unless an epoch has no more than that: then its whole time counts."""
    clock = Clock()
    monkeypatch.setattr(measure.time, 'perf_counter', clock)
    assert measure.reading_speed(loader_of(clock, seconds, workers=workers)) == pytest.approx(expected)
    assert clock.now < 100                          # slow data are not read for minutes


@pytest.mark.parametrize('seconds, expected', [([9, 2, 2], 4), ([4], 2)])
def test_evaluation_speed_leaves_out_the_first_batch(monkeypatch, seconds, expected):
    clock = Clock()
    monkeypatch.setattr(measure.time, 'perf_counter', clock)
    model = measure.nn.Identity()
    evaluation = SimpleNamespace(
        loader=loader_of(clock, seconds), to_input=measure.paddle.to_tensor, autocast=measure.paddle.no_grad)
    assert measure.evaluation_speed(model, evaluation) == pytest.approx(expected)


def test_speed_of_reports_leaves_out_the_warm_up(tmp_path):
    rows = [{'split': 'train', 'images_per_s': 1.0, 'data_wait': 0.0},
            {'split': 'train', 'images_per_s': 10.0, 'data_wait': 0.4},      # of the same images as the next
            {'split': 'train', 'images_per_s': 30.0, 'data_wait': 0.0}, {'split': 'val', 'images_per_s': 5.0}]
    path = tmp_path / 'metrics.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    assert measure.speed_of_reports(str(path)) == pytest.approx((15, 0.3))
    path.write_text(json.dumps(rows[0]))
    assert measure.speed_of_reports(str(path)) == pytest.approx((1, 0))


# ---- memory

HOLDER = """
import os, sys, time
held = bytearray(os.urandom(1)) * (200 << 20)
for _ in range(2):
    if os.fork() == 0:
        break
os.write(1, b'ready\\n')
time.sleep(100)
"""


def test_memory_that_processes_share_counts_once():
    process = subprocess.Popen([sys.executable, '-c', HOLDER], stdout=subprocess.PIPE, start_new_session=True)
    try:
        for _ in range(3):
            assert process.stdout.readline() == b'ready\n'
        assert 200 << 20 < memory.used_in_session(process.pid) < 260 << 20
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: memory.used_in_session(process.pid) == 0, 10, 'all have ended')


def test_container_limits_the_memory(tmp_path, monkeypatch):
    machine = memory.total()
    monkeypatch.setattr(memory, 'CGROUP', tmp_path)
    (tmp_path / 'memory.max').write_text('max\n')
    assert memory.total() == machine
    (tmp_path / 'memory.max').write_text('1000\n')
    (tmp_path / 'memory.current').write_text('700\n')
    (tmp_path / 'memory.stat').write_text('anon 500\ninactive_file 150\n')
    assert memory.total() == 1000 and memory.available() == 450


# ---- the child

def started(monkeypatch, folder, code):
    monkeypatch.setattr(sys, 'argv', ['-c', code])
    return dry_run.start(str(folder), shown=True)


def test_killed_child_is_reported(tmp_path, monkeypatch, capsys):
    done = started(monkeypatch, tmp_path, 'import os; os.kill(os.getpid(), 9)')
    assert done.code and done.is_out_of_memory
    assert 'the process was killed: out of memory; lower DATA.BATCH_SIZE' in capsys.readouterr().err


def test_child_is_killed_before_memory_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, 'available', lambda: 0)
    assert started(monkeypatch, tmp_path, 'import time; time.sleep(100)').is_out_of_memory


def test_mistake_of_the_child_is_shown(tmp_path, monkeypatch, capsys):
    done = started(monkeypatch, tmp_path, "import sys; print('error: no such list'); sys.exit(2)")
    assert done.code == 2 and not done.is_out_of_memory
    assert 'error: no such list' in capsys.readouterr().out


# ---- the largest batch

@pytest.mark.parametrize('good', [0, 1, 3, 8, 32])
@pytest.mark.parametrize('limit', [1, 2, 7, 8, 31, 33, 100, 777, 1000])
def test_largest_batch_is_found(good, limit):
    tried = []

    def fits(size):
        assert 0 < size <= 1000 and size not in tried
        tried.append(size)
        return size <= limit

    found = dry_run.largest(fits, good, 1000)
    truth = max(limit, good)
    assert found <= truth and truth - found <= max(truth // dry_run.PRECISION, 0) + (good > limit)
    assert len(tried) <= 14


def test_nothing_is_tried_without_need():
    assert dry_run.largest(lambda size: pytest.fail('tried'), 8, 8) == 8
    assert dry_run.largest(lambda size: pytest.fail('tried'), 0, 0) == 0


# ---- the command

def test_check_tells_and_leaves_nothing(images, tmp_path):
    done = program('main_single_gpu.py', *tiny(images), '-check', '-output', tmp_path / 'new' / 'run')
    for text in ('epoch 1/1  step 2/2', 'tiny, cpu x 1, float32, images of 16 pixels', '  memory  ',
                 'images/s: the model limits it', ' for 20 images in 2 steps of 8', '  disk  ',
                 ' for 2 epochs with 2 evaluations'):
        assert text in done.stdout, text
    assert 'final.pdparams' not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_largest_batch_is_looked_for(images, tmp_path):
    words = tiny(images, 'TRAIN.GLOBAL_BATCH', 16)
    done = program('main_single_gpu.py', *words, '-check_batch', '-output', tmp_path)
    assert '  batch    16: ' in done.stdout and '  batch    20: ' in done.stdout
    assert done.stdout.splitlines()[-1] == 'the largest batch per process that fits: 20 images, of at most 20'


@pytest.mark.slow
def test_evaluation_is_checked(images, full_run, tmp_path):
    words = [*tiny(images, 'DATA.BATCH_SIZE_EVAL', 4), '-eval', '-output', tmp_path]
    words += ['-pretrained', full_run / 'final.pdparams']
    done = program('main_single_gpu.py', *words, '-check')
    assert '  evaluation  ' in done.stdout and '11 images take' in done.stdout
    assert 'training' not in done.stdout.partition('tiny, cpu x 1')[2] and list(tmp_path.iterdir()) == []
    done = program('main_single_gpu.py', *words, '-check_batch')
    assert '  batch     8: ' in done.stdout and '  batch    11: ' in done.stdout
    assert 'that fits: 11 images, of at most 11' in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_are_checked_together(images, tmp_path):
    done = program('main_multi_gpu.py', *tiny(images), '-check', '-nprocs', 2, '-output', tmp_path)
    assert 'tiny, cpu x 2' in done.stdout and ' for 20 images in 1 steps of 16' in done.stdout


def test_mistakes_end_the_check(images, tmp_path):
    words = [*tiny(images), '-output', tmp_path]
    done = program('main_single_gpu.py', *words, '-check', '-pretrained', 'none', check=False)
    assert done.returncode == 2 and 'none' in done.stdout and list(tmp_path.iterdir()) == []
    done = program('main_single_gpu.py', *words, '-check_batch', check=False, PADDLE_TRAINER_ID='0')
    assert done.returncode == 2 and '-check_batch starts the processes itself' in done.stderr


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_stopped_check_leaves_nothing(images, tmp_path, signum):
    log = tmp_path / 'log.txt'
    process = start('main_single_gpu.py', *tiny(images, 'DATA.NUM_WORKERS', 1), '-check', '-output',
                    tmp_path / 'runs', log=log)
    wait_until(lambda: len(processes(log)) > 1 and [*tmp_path.glob('.check-*')], 30, 'its child has started')
    time.sleep(1)
    process.send_signal(signum)
    assert process.wait(20) == dry_run.INTERRUPTED
    wait_until(lambda: not processes(log), 20, 'all have ended')
    assert [path.name for path in tmp_path.iterdir()] == ['log.txt']
