"""Files that survive full disks, crashes, odd file systems and other writers."""
import contextlib
import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess

from system import files, stopping
import utils

import pytest
from exact_runs import words
from runs import TINY, processes, program, records, start, wait_for_step, wait_until

from config import get_config
from halonet import build_halonet
from training import builders, engine, results
from training.records import Metrics

NO_DISK = OSError(errno.ENOSPC, 'No space left on device')
fork = multiprocessing.get_context('fork')


def content(folder):
    """{relative path: bytes} of the files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@contextlib.contextmanager
def full_at(size):
    """Limit files to `size` bytes: a write that crosses the limit is done in part, and the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))             # Python ignores its signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def failing(number, only_folders=False):
    """An os.fsync that fails."""
    fsync = os.fsync

    def fail(descriptor):
        if not only_folders or os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)
    return fail


# ---- whole files

@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize('only_folders', [True, False])
def test_file_system_without_fsync(tmp_path, monkeypatch, number, only_folders):
    monkeypatch.setattr(os, 'fsync', failing(number, only_folders))
    files.atomic_write(tmp_path / 'a', lambda file: file.write(b'new'))
    assert content(tmp_path) == {'a': b'new'}


@pytest.mark.parametrize('only_folders, message, left', [
    (True, 'written, but its folder cannot be flushed to the disk', b'new'),
    (False, 'cannot write: .* what was there before is intact', b'old')])
def test_failing_fsync_is_reported(tmp_path, monkeypatch, only_folders, message, left):
    (tmp_path / 'a').write_bytes(b'old')
    monkeypatch.setattr(os, 'fsync', failing(errno.EIO, only_folders))
    with pytest.raises(OSError, match=message) as error:
        files.atomic_write(tmp_path / 'a', lambda file: file.write(b'new'))
    assert error.value.filename == str(tmp_path / 'a') and content(tmp_path) == {'a': left}


def test_write_to_a_folder_without_read_permission(tmp_path, monkeypatch):
    open_ = os.open

    def refuse(path, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return open_(path, *rest, **options)
    monkeypatch.setattr(os, 'open', refuse)
    files.atomic_write(tmp_path / 'a', lambda file: file.write(b'new'))
    assert content(tmp_path) == {'a': b'new'}


def test_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    reader = subprocess.Popen(['cat', tmp_path / 'pipe'], stdout=subprocess.PIPE)
    files.atomic_write(tmp_path / 'pipe', lambda file: file.write(b'new'))
    assert reader.communicate(timeout=10)[0] == b'new' and (tmp_path / 'pipe').is_fifo()


def test_temporary_files_of_living_writers_stay(tmp_path):
    """As when a training starts while tools/report.py writes its page into the same folder."""
    (tmp_path / 'a.tmp1234').write_bytes(b'half')

    def write(file):
        file.write(b'new')
        files.remove_temporary(tmp_path)
    files.atomic_write(tmp_path / 'b', write)
    assert content(tmp_path) == {'b': b'new'}


# ---- appended lines

def append(path, line, is_whole=lambda line: False):
    with files.appending(path, is_whole) as file:
        files.write_all(file, line)


@pytest.mark.parametrize('room', [0, 1, 4])
def test_line_that_does_not_fit_is_undone(tmp_path, room):
    path = tmp_path / 'a'
    append(path, b'first\n')
    with full_at(6 + room), pytest.raises(OSError, match='cannot append to it: File too large; .*intact.*/a'):
        append(path, b'second\n')
    append(path, b'third\n')
    assert path.read_bytes() == b'first\nthird\n'


@pytest.mark.parametrize('last, left', [(b'whole', b'whole\n'), (b'who', b''), (b'', b'')])
def test_last_line_without_a_line_end_is_not_continued(tmp_path, last, left):
    (tmp_path / 'a').write_bytes(b'first\n' + last)
    append(tmp_path / 'a', b'next\n', is_whole=lambda line: line == b'whole')
    assert (tmp_path / 'a').read_bytes() == b'first\n' + left + b'next\n'


def test_lines_of_several_processes_do_not_mix(tmp_path):
    def work(number):
        for _ in range(50):
            with files.appending(tmp_path / 'a', bool) as file:
                for byte in b'%d' % number * 20 + b'\n':
                    file.write(bytes([byte]))
    workers = [fork.Process(target=work, args=(number,), daemon=True) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    lines = (tmp_path / 'a').read_bytes().splitlines()
    assert sorted(lines) == sorted(b'%d' % number * 20 for number in range(3) for _ in range(50))


@pytest.fixture(scope='module')
def model():
    return build_halonet(get_config(None, TINY))


def save(path, model, weights='w'):
    result = {'acc1': 50.0, 'acc5': 75.0, 'loss': 1.0, 'images': 4, 'images_per_s': 8.0}
    columns = builders.build_columns(get_config(None, TINY), 'cpu', '')
    results.save_result(str(path), results.row(columns, model, weights, result))


def test_full_disk_keeps_the_table_of_results(tmp_path, model):
    path = tmp_path / 'results.csv'
    for size in (0, 10, 140):                       # before and in the heading, and in the first row
        with full_at(size), pytest.raises(OSError, match='File too large.*results.csv'):
            save(path, model)
        assert path.read_bytes() == b''
    save(path, model, 'one')
    whole = path.read_text()
    with full_at(len(whole) + 20), pytest.raises(OSError, match='results.csv'):
        save(path, model, 'two')
    assert path.read_text() == whole
    path.write_text(f'{whole}tiny,thr')             # by a version that did not undo it
    save(path, model, 'four')
    path.write_text(path.read_text()[:-1])          # by an editor
    save(path, model, 'five')
    rows = path.read_text().splitlines()
    assert [line.split(',')[1] for line in rows] == ['weights', 'one', 'four', 'five']


def test_pipe_as_a_table_of_results_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ValueError, match='/pipe: not a file that lines can be appended to'):
        results.check_table(str(tmp_path / 'pipe'))


def test_full_disk_keeps_the_records(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(epoch=1, step=0, split='val', loss=1.0)
    whole = (tmp_path / 'metrics.jsonl').read_text()
    with full_at(len(whole) + 9), pytest.raises(OSError, match='File too large.*metrics.jsonl'):
        metrics.write(epoch=1, step=0, split='val', loss=2.0)
    assert (tmp_path / 'metrics.jsonl').read_text() == whole
    metrics.write(epoch=1, step=0, split='val', loss=3.0)
    assert [record['loss'] for record in records(tmp_path)] == [1.0, 3.0]


def test_unwritable_curves_give_one_warning(tmp_path, caplog):
    metrics = Metrics(tmp_path)
    (tmp_path / 'tensorboard').write_text('a file in its place')
    for step in (1, 2):
        metrics.write(epoch=1, step=step, split='train', loss=1.0)
    assert len(records(tmp_path)) == 2
    assert [record.message for record in caplog.records] == [
        f'{tmp_path}/tensorboard/train: cannot write: Not a directory; the run goes on without these curves']


def test_log_on_a_full_disk_warns_once(tmp_path, capfd, monkeypatch):
    """Not with a traceback for each line."""
    (tmp_path / 'log.txt').symlink_to('/dev/full')
    monkeypatch.setattr(utils.log, 'handlers', [])
    utils.setup_logger(tmp_path)
    for _ in range(3):
        utils.log.info('a line')
    utils.log.handlers[0].close()
    out, err = capfd.readouterr()
    assert out == 'a line\n' * 3
    assert err == (f'warning: {tmp_path}/log.txt: cannot write: No space left on device; the run goes on, '
                   'its log has gaps\n')


def test_console_on_a_full_disk_warns_once(tmp_path):
    """As by `| head -n 1`."""
    code = ('import os, sys, utils; utils.setup_logger(sys.argv[1])\n'
            'os.dup2(os.open("/dev/full", os.O_WRONLY), 1)\n'
            'for i in range(3): utils.log.info("line %d", i)')
    done = program('-c', code, tmp_path, check=False)
    assert done.stderr.count('console: cannot write: No space left on device') == 1
    assert 'Traceback' not in done.stderr
    assert len((tmp_path / 'log.txt').read_text().splitlines()) == 3


# ---- one writer per run folder

def hold(folder, pipe):
    with files.reserved(folder):
        pipe.send('held')
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path, as a run does."""
    pipe, other = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path, other), daemon=True)
    process.start()
    assert pipe.recv() == 'held'
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize('opts', [[], ['MODEL.RESUME', 'auto'], ['EVAL', True, 'MODEL.PRETRAINED', 'w']])
def test_second_run_in_a_folder_is_refused_and_changes_nothing(images, tmp_path, holder, monkeypatch, opts):
    (tmp_path / 'log.txt').write_text('of the first')
    before = content(tmp_path)
    monkeypatch.setattr(files, 'LOCK_PATIENCE', 0.1)
    config = get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(tmp_path), *opts])
    message = f'{tmp_path} is in use by process {holder.pid} on host .* since 2.*-output'
    with pytest.raises(ValueError, match=message):
        engine.run(config)
    assert content(tmp_path) == before


@pytest.mark.slow
def test_second_start_is_refused_with_one_line(images, tmp_path):
    """By the commands; the first goes on and ends well."""
    folder, log = tmp_path / 'run', tmp_path / 'output.txt'
    opts = ['TRAIN.NUM_EPOCHS', 100_000, 'DATA.NUM_WORKERS', 1]
    first = start('main_single_gpu.py', *words(images, folder, *opts), log=log)
    wait_for_step(folder, 1, first)
    for command in (['main_single_gpu.py'], ['main_multi_gpu.py', '-nprocs', 2]):
        line = words(images, folder, 'MODEL.RESUME', 'auto', 'DATA.BATCH_SIZE', 4)
        second = program(*command, *line, check=False)
        assert second.returncode == stopping.MISTAKE and 'Traceback' not in second.stderr
        assert second.stderr.count(f'in use by process {first.pid} on') == 1
    first.terminate()
    assert first.wait(60) == stopping.STOPPED and not processes(log)
    steps = [record['step'] for record in records(folder, 'train')]
    assert steps == list(range(1, len(steps) + 1))


def test_next_start_waits_for_a_run_that_ends(tmp_path, holder):
    """A process that is killed leaves the file, and no lock."""
    pipe, end = fork.Pipe()
    other = fork.Process(target=hold, args=(tmp_path, end), daemon=True)
    other.start()
    other.join(0.5)
    assert other.is_alive()
    holder.kill()
    assert pipe.poll(10) and f'process {other.pid} ' in (tmp_path / 'run.lock').read_text()
    other.kill()
    other.join()


def is_free(path):
    with open(path, 'rb') as file, contextlib.suppress(BlockingIOError):
        return files.lock(file, wait=False)


def test_data_worker_does_not_keep_the_lock(tmp_path):
    with files.reserved(tmp_path):
        worker = fork.Process(target=signal.pause, daemon=True)
        worker.start()
    wait_until(lambda: is_free(tmp_path / 'run.lock'), 5, 'the lock is free')
    assert worker.is_alive()
    worker.kill()
    worker.join()


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', refuse)
    with files.reserved(tmp_path), files.appending(tmp_path / 'a', bool):
        pass
    assert [record.message for record in caplog.records] == [
        f'the file system of {tmp_path} has no locks: see that no other run writes to it']
