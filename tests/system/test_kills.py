"""Processes that are killed and stopped: the run continues, and ends as one without interruption."""
import os
import random
import signal
import time
from pathlib import Path

from system import stopping

import numpy as np
import pytest
from exact_runs import CHANCE, TWO, assert_close_weights, assert_same_run, run, words
from runs import leaves, make_images, processes, program, records, start, wait_for_step

from training import checkpoint

DRAW = random.Random(4)                             # the steps at which runs are interrupted


def test_kill_and_sigterm_with_data_workers(images, whole, tmp_path, log):
    """SIGKILL, then SIGTERM to the whole process group: the resumed run ends as an uninterrupted one."""
    folder, kill_at, stop_at = tmp_path / 'run', DRAW.randrange(3, 9), DRAW.randrange(10, 16)
    line = words(images, folder, *CHANCE, 'SAVE_STEPS', 2, 'DATA.NUM_WORKERS', 2, 'MODEL.RESUME', 'auto')
    process = start('main_single_gpu.py', *line, log=log)
    wait_for_step(folder, kill_at, process)
    process.kill()
    assert leaves(process, log) == -signal.SIGKILL
    process = start('main_single_gpu.py', *line, log=log)
    wait_for_step(folder, stop_at, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert leaves(process, log) == stopping.STOPPED, log.read_text()
    assert 'stopped after step' in log.read_text() or 'during an evaluation' in log.read_text()
    run(images, folder, *CHANCE, 'MODEL.RESUME', 'auto')
    assert_same_run(folder, whole)


def ranks(process, log):
    """The pids of the training processes below a spawning or launching one, rank 0 first."""
    def parent(pid):
        try:
            return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
        except OSError:                             # it has ended
            return None
    return sorted(pid for pid, command in processes(log).items()
                  if parent(pid) == process.pid and ('spawn_main' in command or 'main_multi' in command))


def interrupt(process, log, how):
    """Do to a run what `how` says; returns the exit codes that it may have."""
    if how.startswith('kill rank'):
        os.kill(ranks(process, log)[int(how[-1])], signal.SIGKILL)
    elif how == 'kill all but the ranks':
        process.kill()
    elif how == 'SIGTERM':
        process.terminate()
    else:                                           # Ctrl-C in a terminal
        os.killpg(process.pid, signal.SIGINT)


def interrupted_run(start_it, folder, log, codes):
    """Start a run of TWO once for each of `codes` {how to end it: exit codes}, then let it finish."""
    steps = sorted(DRAW.sample(range(2, 26), len(codes)))
    for step, (how, code) in zip(steps, codes.items()):
        process = start_it()
        wait_for_step(folder, step, process)
        asked = time.monotonic()
        interrupt(process, log, how)
        assert leaves(process, log) in code, (how, log.read_text())
        lines = log.read_text().splitlines()
        assert 'Traceback (most recent call last):' not in lines             # C++ traces may be
        print(f'{how} at step {step}: all gone after {time.monotonic() - asked:.1f} s')
    assert start_it().wait(120) == 0, log.read_text()


@pytest.mark.slow
def test_interrupted_run_of_two_spawned_processes_is_bit_identical(images, two, tmp_path, log):
    folder = tmp_path / 'run'
    line = ['main_multi_gpu.py', '-nprocs', 2, *words(images, folder, *TWO)]
    interrupted_run(lambda: start(*line, log=log), folder, log, {
        'kill rank 0': [1], 'SIGTERM': [75], 'kill rank 1': [1], 'kill all but the ranks': [-9],
        'Ctrl-C': [75]})
    assert_same_run(folder, two)


@pytest.mark.slow
def test_interrupted_run_of_two_launched_processes_is_bit_identical(images, two, tmp_path, log):
    """The launcher ends with the number of its signal, or the code of a failed rank (241 is SIGTERM's)."""
    folder = tmp_path / 'run'
    line = ['-mpaddle.distributed.launch', '--nproc_per_node', 2, '--log_dir', tmp_path / 'launch',
            'main_multi_gpu.py', *words(images, folder, *TWO)]
    interrupted_run(lambda: start(*line, log=log), folder, log, {
        'kill rank 0': [1, 241, 247, 250], 'kill rank 1': [1, 241, 247, 250], 'SIGTERM': [15],
        'kill all but the ranks': [-9]})
    assert_same_run(folder, two)


@pytest.mark.slow
def test_logged_accuracy_is_that_of_the_saved_weights(images, two, tmp_path):
    """With statistics that differed between the processes; and the checkpoint evaluates as the file."""
    last = records(two, 'val')[-1]
    state = checkpoint.load(checkpoint.steps(two)[1])                        # in the middle of an epoch
    own = [rank['buffers'] for rank in state['ranks']]
    assert state['progress']['steps_of_epoch'] and len(own) == 2
    assert any((own[0][key] != own[1][key]).any() for key in own[0])
    for key in own[0]:
        np.testing.assert_allclose(state['model'][key], (own[0][key] + own[1][key]) / 2, rtol=1e-6)
    for weights in ('MODEL.PRETRAINED', two / 'final.pdparams'), ('MODEL.RESUME', checkpoint.newest(two)):
        result = run(images, tmp_path, 'EVAL', True, *map(str, weights))['val']
        keys = ('acc1', 'acc5', 'loss')
        assert [result[key] for key in keys] == pytest.approx([last[key] for key in keys], rel=1e-6)


@pytest.mark.slow
def test_resume_with_another_number_of_processes(tmp_path):
    """8 images a step on one process, then on two, then on one; without dropout, which differs by process."""
    images = make_images(tmp_path / 'data', train=16)
    opts = ['MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.EMA_DECAY', 0.9,
            'TRAIN.NUM_EPOCHS', 4, 'SAVE_STEPS', 1, 'SAVE_KEEP', 100, 'REPORT_FREQ', 4]
    run(images, tmp_path / 'one', *opts)
    step3 = checkpoint.steps(tmp_path / 'one')[5]                            # of 8
    line = words(images, tmp_path / 'two', *opts, 'DATA.BATCH_SIZE', 4, 'MODEL.RESUME', step3)
    program('main_multi_gpu.py', '-nprocs', 2, *line)
    step5 = checkpoint.steps(tmp_path / 'two')[3]
    run(images, tmp_path / 'again', *opts, 'MODEL.RESUME', step5)
    for name, steps in (('two', [4, 6, 8]), ('again', [6, 8])):
        assert_close_weights(tmp_path / 'one', tmp_path / name)
        ours, theirs = (records(tmp_path / folder, 'train') for folder in (name, 'one'))
        assert [record['step'] for record in ours] == steps
        for one, other in zip(ours, theirs[-len(ours):]):                    # the open log window went along
            assert one['acc1'] == other['acc1'] and one['loss'] == pytest.approx(other['loss'], rel=1e-5)
