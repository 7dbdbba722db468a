"""How main_multi_gpu.py watches the processes that it has started."""
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

from system.stopping import Stop
import utils

import pytest
from runs import wait_until

import main_multi_gpu
from config import get_config

fork = multiprocessing.get_context('fork')


def work(signals, end, code):
    """Count SIGTERMs in `signals`, and exit with `code`: when 'asked' by the first, 'at once' or never."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def count(*_):
        signals.value += 1
    signal.signal(signal.SIGTERM, count)
    signals.value = 0                               # it listens
    while not (end == 'at once' or end == 'asked' and signals.value):
        time.sleep(0.01)
    os._exit(code)


@pytest.fixture
def started():
    """A function that starts processes (end, exit code); returns them and the counts of their SIGTERMs."""
    processes = []

    def start(*kinds):
        counts = [fork.Value('i', -1) for _ in kinds]
        for count, (end, code) in zip(counts, kinds):
            processes.append(fork.Process(target=work, args=(count, end, code), daemon=True))
            processes[-1].start()
        wait_until(lambda: all(count.value >= 0 for count in counts), 10, 'all listen')
        return processes, counts
    yield start
    for process in processes:
        process.kill()
        process.join()


def supervise(processes, requested='', grace=60):
    main_multi_gpu.supervise(processes, SimpleNamespace(requested=requested))
    return [process.exitcode for process in processes]


def test_all_processes_are_asked_once_when_one_fails(started):
    processes, counts = started(('asked', 75), ('at once', 3), ('asked', 0))
    assert supervise(processes) == [75, 3, 0]
    assert [counts[0].value, counts[2].value] == [1, 1]


def test_request_to_stop_is_passed_on_once(started, capsys):
    processes, counts = started(('asked', 75), ('asked', 1))
    assert supervise(processes, 'SIGINT') == [75, 1]
    assert [count.value for count in counts] == [1, 1] and capsys.readouterr().err == ''


def test_processes_that_do_not_stop_are_killed(started, monkeypatch):
    monkeypatch.setattr(main_multi_gpu, 'GRACE', 0.3)
    processes, counts = started(('never', 0), ('at once', 1))
    assert supervise(processes) == [-signal.SIGKILL, 1]
    assert counts[0].value == 1


def test_process_that_was_killed_is_reported(started, capsys):
    processes, _ = started(('asked', 75), ('never', 0))
    processes[1].kill()
    assert supervise(processes) == [75, -signal.SIGKILL]
    message = 'error: process 1 was ended by SIGKILL; if nobody did that, look at the free memory (dmesg)\n'
    assert capsys.readouterr().err == message


@pytest.mark.parametrize('codes, requested, expected', [
    ([0, 0], '', 0), ([0, 0], 'SIGTERM', 0), ([0, 2], '', 2), ([-9, 75], '', 75), ([75, 75], 'SIGTERM', 75),
    ([-9, 0], '', 1), ([-15, -15], 'SIGTERM', 75), ([-15, 1], 'SIGTERM', 1)])
def test_exit_code_of_several_processes(codes, requested, expected):
    processes = [SimpleNamespace(exitcode=code) for code in codes]
    assert main_multi_gpu.exit_code_of(processes, SimpleNamespace(requested=requested)) == expected


# ---- how many processes, and on which GPUs

@pytest.mark.parametrize('nprocs, device, gpus, count', [
    (0, 'gpu', 4, 4), (2, 'gpu', 4, 2), (4, 'gpu', 4, 4), (0, 'cpu', 0, 1), (3, 'cpu', 0, 3)])
def test_one_process_for_each_gpu(monkeypatch, nprocs, device, gpus, count):
    monkeypatch.setattr(utils, 'gpu_count', lambda: gpus)
    assert main_multi_gpu.count_processes(nprocs, device) == count


def test_several_processes_on_another_device_are_left_to_the_launcher():
    assert main_multi_gpu.count_processes(0, 'npu') == main_multi_gpu.count_processes(1, 'npu') == 1
    with pytest.raises(ValueError, match='-nprocs 2: this program starts one process on a device of k'):
        main_multi_gpu.count_processes(2, 'npu')


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(utils, 'gpu_count', lambda: 2)
    monkeypatch.setattr(utils, 'choose_device', lambda device: 'gpu')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1')
    monkeypatch.setattr(utils.log, 'handlers', [])
    with pytest.raises(SystemExit) as stop:
        main_multi_gpu.start_processes(get_config(None, ['NPROCS', 3]), Stop())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: -nprocs 3: Paddle sees 2 GPU(s) here (CUDA_VISIBLE_DEVICES is '0,1')")
    assert 'use -nprocs 2 or less' in message and message.count('\n') == 1


@pytest.mark.parametrize('visible, spawned', [
    ('0, 1', '0,1'), (' 2 ,3', '2,3'), ('0,1', '0,1'), ('0,1,', '0,1,'),
    ('GPU-8932f937-d72c,MIG-GPU-1/1/0', 'GPU-8932f937-d72c,MIG-GPU-1/1/0')])
def test_spaces_between_visible_gpus_do_not_reach_paddle(monkeypatch, visible, spawned):
    """Its spawn compares the names between the commas, spaces and all."""
    import paddle.distributed as dist
    monkeypatch.setattr(utils, 'gpu_count', lambda: 2)
    monkeypatch.setattr(utils, 'choose_device', lambda device: 'gpu')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    seen = []

    def spawn(*args, **kwargs):
        seen.append(os.environ['CUDA_VISIBLE_DEVICES'])
        return SimpleNamespace(processes=[])

    monkeypatch.setattr(dist, 'spawn', spawn)
    with pytest.raises(SystemExit):
        main_multi_gpu.start_processes(get_config(None, ['NPROCS', 2]), Stop())
    assert seen == [spawned]
