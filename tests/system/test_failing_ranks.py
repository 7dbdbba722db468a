"""A rank that fails ends the others, by tests/helpers/faulty.py."""
import signal
import socket

from system import stopping

import pytest
from exact_runs import words
from runs import kill_all, program, start


def launch_faulty(fault, tmp_path, *line):
    return program('-mpaddle.distributed.launch', '--nproc_per_node', 2, '--log_dir', tmp_path / 'launch',
                   'tests/helpers/faulty.py', fault, *line, check=False, timeout=240)


@pytest.mark.slow
def test_nonfinite_loss_on_one_rank_stops_all(images, tmp_path):
    opts = ['DATA.BATCH_SIZE', 2, 'REPORT_FREQ', 5, 'TRAIN.NUM_EPOCHS', 3]
    done = launch_faulty('nan', tmp_path, *words(images, tmp_path / 'run', *opts))
    assert done.returncode == stopping.MISTAKE, done.stdout
    lines = [(tmp_path / 'run' / name).read_text() for name in ('log.txt', 'log_rank1.txt')]
    message = 'the loss is not finite: epoch 1, step 3, rank 1, learning rate '
    assert all(message in text for text in lines) and not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_full_disk_on_rank_0_stops_all(images, tmp_path):
    done = launch_faulty('full', tmp_path, *words(images, tmp_path / 'run', 'DATA.BATCH_SIZE', 4))
    assert done.returncode == stopping.FAILURE, done.stdout
    assert 'error: [Errno 28] cannot write: No space left' in done.stdout
    assert 'another process failed' in (tmp_path / 'run' / 'log_rank1.txt').read_text()


@pytest.mark.slow
def test_one_rank_may_work_longer_than_the_timeout_of_gloo(images, tmp_path):
    opts = ['DATA.BATCH_SIZE', 4, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0]
    done = launch_faulty('slow', tmp_path, *words(images, tmp_path / 'run', *opts))
    assert done.returncode == 0 and '(11 images)' in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('fault, message', [
    ('lost', 'error: process 1 has ended; its own message tells why'),
    ('hang', 'error: process 1 has ended, and this one waited for it; its own message tells why')])
def test_killed_rank_of_another_machine_is_noticed(images, tmp_path, fault, message):
    """The launcher of rank 0 does not see it, nor does gloo: rank 0 waits for it outside of a collective.

    lost: on the store. hang: in a call that never returns, as the collectives of NCCL.
    """
    line = words(images, tmp_path / 'run', 'DATA.BATCH_SIZE', 4, 'SAVE_STEPS', 1)
    with socket.create_server(('127.0.0.1', 0)) as free:
        master = f'127.0.0.1:{free.getsockname()[1]}'
    nodes, logs = [], [tmp_path / 'output0.txt', tmp_path / 'output1.txt']
    for rank, log in enumerate(logs):
        launch = ['-mpaddle.distributed.launch', '--nnodes', 2, '--rank', rank, '--master', master,
                  '--nproc_per_node', 1, '--log_dir', tmp_path / f'launch{rank}']
        nodes.append(start(*launch, 'tests/helpers/faulty.py', fault, *line, log=log))
    try:
        assert [node.wait(90) for node in nodes] == [stopping.FAILURE, 256 - signal.SIGKILL]
    finally:
        kill_all(*logs)
    assert message in logs[0].read_text()
