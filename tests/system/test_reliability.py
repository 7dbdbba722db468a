"""Nothing lost when things break: exact resume, stopping on request, failing together, full disks, broken input."""
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from system import lifeline, stopping
import utils

import numpy as np
import paddle
import pytest
from runs import ROOT, TINY, make_images, options, processes, program, records, start, wait_for_step, wait_until

import halonet
from config import flatten, get_config
from halonet import build_halonet
from model import layers
from training import builders, checkpoint, engine, optim

DRAW = random.Random(4)                             # the steps at which runs are killed
CHANCE = ['TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.CUTMIX_ALPHA', 1.0, 'TRAIN.EMA_DECAY', 0.9, 'TRAIN.RANDOM_ERASE_PROB', 0.5,
          'TRAIN.AUTO_AUGMENT', 'rand-m9-mstd0.5-inc1', 'TRAIN.ACCUM_ITER', 2, 'DATA.BATCH_SIZE', 2, 'MODEL.DROPOUT', 0.2,
          'MODEL.DROPPATH', 0.2, 'TRAIN.GRAD_CLIP', 1.0, 'TRAIN.NUM_EPOCHS', 4, 'SAVE_KEEP', 100, 'REPORT_FREQ', 3]
STEPS = 20                                          # of such a run: 4 epochs of 5 steps of 2 x 2 of the 20 images


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images') / 'data')


def run(images, output, *opts, stop=None):
    return engine.run(get_config(None, [*TINY, 'DATA.DATA_PATH', images, 'OUTPUT', str(output), *opts]), stop)


def words(images, output, *opts):
    """The command line of such a run."""
    return ['-data_path', images, '-output', output, *options([*TINY, *opts])]


def told(folder):
    timed = ('images_per_s', 'data_wait')
    return [{key: value for key, value in record.items() if key not in timed} for record in records(folder)]


def assert_same_run(folder, expected):
    """The same weights to the byte, and the same records but for the speed."""
    for name in ('final.pdparams', 'final_ema.pdparams', 'best.pdparams', 'best_ema.pdparams'):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert told(folder) == told(expected)


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """A run with every source of chance on and a checkpoint after each step."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    run(images, folder, *CHANCE, 'SAVE_STEPS', 1)
    assert [os.path.basename(path) for path in checkpoint.steps(folder)] == [
        f'step_{step:08d}.pdckpt' for step in range(STEPS, 0, -1)]
    return folder


class StopAfter(stopping.Stop):
    """A wish to stop that comes with the `count`-th question."""

    def __init__(self, count):
        self.left = count

    @property
    def requested(self):
        self.left -= 1
        return 'SIGTERM' if self.left <= 0 else ''


# ---- exactness

@pytest.mark.parametrize('step', sorted(DRAW.sample(range(1, STEPS), 4)) + [STEPS])
def test_resuming_after_any_step_repeats_the_run_to_the_byte(images, whole, tmp_path, step):
    """With another number of data workers; and with the records and best weights that a later kill leaves behind."""
    shutil.copytree(whole, tmp_path / 'run')
    for path in checkpoint.steps(tmp_path / 'run')[:STEPS - step]:
        os.remove(path)
    for name in ('final.pdparams', 'final_ema.pdparams'):
        os.remove(tmp_path / 'run' / name)
    run(images, tmp_path / 'run', *CHANCE, 'SAVE_STEPS', 1, 'MODEL.RESUME', 'auto', 'DATA.NUM_WORKERS', step % 3)
    assert_same_run(tmp_path / 'run', whole)


def test_a_run_does_not_depend_on_its_checkpoints(images, whole, tmp_path):
    run(images, tmp_path / 'run', *CHANCE)
    assert len(checkpoint.steps(tmp_path / 'run')) == 4
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.parametrize('count', [1, 8, 16])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(images, whole, tmp_path, count):
    """The questions of an epoch: 5 after steps, 6 or less in each of 2 evaluations of 6 batches, 1 after each."""
    starts = 1
    while True:
        try:
            run(images, tmp_path, *CHANCE, 'MODEL.RESUME', 'auto', stop=StopAfter(count if starts < 4 else 10 ** 6))
            break
        except stopping.Stopped:
            starts += 1
    assert starts == 4
    assert_same_run(tmp_path, whole)


def test_a_stop_in_an_evaluation_keeps_the_epoch(images, whole, tmp_path):
    with pytest.raises(stopping.Stopped, match='evaluation'):
        run(images, tmp_path, *CHANCE, stop=StopAfter(8))
    state = checkpoint.load(checkpoint.newest(tmp_path))
    assert state['progress']['epoch'] == 0 and state['progress']['steps_of_epoch'] == state['progress']['step'] == 5
    assert state['optimizer'].keys() == checkpoint.load(checkpoint.steps(whole)[0])['optimizer'].keys()


def test_checkpoints_by_the_clock(images, tmp_path, monkeypatch):
    for module in (builders, engine):
        monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=lambda: clock.pop(0) if len(clock) > 1 else clock[0]))
    clock = [0, 30, 59, 60, 60, 119, 120, 120, 150]          # the start, then each question, and each checkpoint's time
    run(images, tmp_path, 'TRAIN.NUM_EPOCHS', 3, 'SAVE_MINUTES', 1.0, 'SAVE_FREQ', 3, 'SAVE_KEEP', 100)
    assert [os.path.basename(path)[5:13] for path in checkpoint.steps(tmp_path)] == ['00000006', '00000005', '00000003']


def test_accumulation_may_change_on_the_way(tmp_path):
    """8 images a step, in one pass and then in two: the same images, mixing and weights."""
    images = make_images(tmp_path / 'data', train=16)
    opts = ['MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.EMA_DECAY', 0.9, 'TRAIN.NUM_EPOCHS', 3, 'SAVE_STEPS', 1,
            'SAVE_KEEP', 100]
    run(images, tmp_path / 'one', *opts, 'DATA.BATCH_SIZE', 8)
    run(images, tmp_path / 'two', *opts, 'DATA.BATCH_SIZE', 4, 'TRAIN.ACCUM_ITER', 2,
        'MODEL.RESUME', checkpoint.steps(tmp_path / 'one')[3])               # after step 3 of 6, in the middle of an epoch
    assert [record['step'] for record in records(tmp_path / 'two', 'train')] == [4, 5, 6]
    compare(tmp_path / 'one', tmp_path / 'two')


def compare(one, other, tolerance=1e-5):
    for name in ('final.pdparams', 'final_ema.pdparams'):
        one_, other_ = paddle.load(str(one / name)), paddle.load(str(other / name))
        assert max(np.abs(one_[key].numpy() - other_[key].numpy()).max() for key in one_) < tolerance


# ---- other settings

FREE = {key for keys in checkpoint.FREE.values() for key in keys}


def test_every_free_option_exists():
    assert FREE <= flatten(get_config()).keys()


@pytest.mark.parametrize('key', flatten(get_config()))
def test_any_option_but_the_free_ones_decides_the_mathematics(key):
    before, after = flatten(get_config()), flatten(get_config())
    after[key] = 'another value'
    changes = checkpoint.differences(checkpoint.facts(before, images=8), checkpoint.facts(after, images=8))
    assert len(changes) == (key not in FREE | {'BASE'})
    assert all(change.startswith(f'{key} was ') and change.endswith('is another value') for change in changes)


def test_resuming_with_other_mathematics_is_refused_unless_forced(images, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    content = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*.*') if path.name != 'log.txt'}
    other = [*CHANCE, 'TRAIN.BASE_LR', 0.01, 'DATA.BATCH_SIZE', 4, 'TRAIN.HFLIP', 0.0, 'MODEL.RESUME', 'auto']
    with pytest.raises(ValueError) as error:
        run(images, tmp_path / 'run', *other)
    for text in ('step_00000020.pdckpt was written with other settings: ', 'TRAIN.BASE_LR was 0.001, is 0.01; ', 'was 4, is 8',
                 'TRAIN.HFLIP was 0.5, is 0.0', 'images per step', 'RESUME_FORCE True'):
        assert text in str(error.value)
    assert '\n' not in str(error.value) and 'NUM_EPOCHS' not in str(error.value)
    assert {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*.*') if path.name != 'log.txt'} == content
    run(images, tmp_path / 'run', *other, 'MODEL.RESUME_FORCE', True, 'TRAIN.NUM_EPOCHS', 5)
    assert {record['epoch'] for record in records(tmp_path / 'run', 'val')} == {1, 2, 3, 4, 5}
    assert os.path.basename(checkpoint.newest(tmp_path / 'run')) == 'step_00000023.pdckpt'       # three steps after the 20th


def test_another_list_of_images_is_refused(images, whole, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    path = tmp_path / 'data' / 'train_list.txt'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[1:] + lines[:1]))
    with pytest.raises(ValueError, match='train_list.txt was '):
        run(str(tmp_path / 'data'), tmp_path / 'run', *CHANCE, 'MODEL.RESUME', checkpoint.steps(whole)[0])


# ---- full disks

def test_a_full_disk_is_named_and_leaves_the_checkpoints(images, whole, tmp_path):
    size = os.path.getsize(checkpoint.steps(whole)[0])
    run(images, tmp_path / 'run', *CHANCE, 'TRAIN.NUM_EPOCHS', 4, 'SAVE_FREQ', 4)
    for path in checkpoint.steps(tmp_path / 'run'):
        os.remove(path)
    shutil.copy(checkpoint.steps(whole)[12], tmp_path / 'run' / 'checkpoints')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').rglob('*.pd*')}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))        # Python turns its signal into an error
    try:
        with pytest.raises(OSError, match='cannot write: File too large; what was there before is intact: .*step_00000009'):
            run(images, tmp_path / 'run', *CHANCE, 'SAVE_STEPS', 1, 'MODEL.RESUME', 'auto')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'run').rglob('*.pd*')} == before
    run(images, tmp_path / 'run', *CHANCE, 'MODEL.RESUME', 'auto')
    assert_same_run(tmp_path / 'run', whole)


def test_what_a_killed_writer_left_is_removed(images, tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'step_00000001.pdckpt.tmp1234').write_bytes(b'half')
    run(images, tmp_path, 'MODEL.RESUME', 'auto')
    assert not [name for name in os.listdir(tmp_path / 'checkpoints') if 'tmp' in name]


# ---- weights and losses that are not finite

def test_weights_that_are_not_finite_are_not_saved(images, tmp_path, monkeypatch):
    """The loss is finite, and the step makes the weights infinite."""
    clip = optim.clip_gradients

    def spoil(model, **kwargs):
        clip(model, **kwargs)
        if spoil.steps == 2:
            model.head.fc.bias.grad.set_value(paddle.full([4], float('nan')))
        spoil.steps += 1
    spoil.steps = 0
    monkeypatch.setattr(optim, 'clip_gradients', spoil)
    with pytest.raises(FloatingPointError, match='after step 3 the weights head.fc.bias are not finite'):
        run(images, tmp_path, 'SAVE_STEPS', 1, 'TRAIN.NUM_EPOCHS', 3)
    assert checkpoint.newest(tmp_path).endswith('step_00000002.pdckpt')


# ---- waiting for each other, with a store and a rank that are not there

class Store(dict):
    def add(self, key, value):
        self[key] = self.get(key, 0) + value
        return self[key]


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(utils, 'world_size', lambda: 2)
    monkeypatch.setattr(utils.dist, 'barrier', lambda: None)
    monkeypatch.setattr(paddle.base.core, 'create_or_get_global_tcp_store', lambda: store)
    monkeypatch.setattr(utils, '_meetings', itertools.count(1))
    return store


def test_a_process_that_does_not_come_is_told(store, monkeypatch):
    monkeypatch.setattr(utils, 'PATIENCE', 0.1)
    with pytest.raises(stopping.Failure, match='1 of 2 processes did not come within 0.1 s'):
        utils.meet()


def test_a_process_that_ended_is_told_at_once(store, monkeypatch):
    monkeypatch.setattr(lifeline, 'ended', lambda: [1])
    with pytest.raises(stopping.Failure, match='process 1 has ended'):
        utils.meet()


def test_the_failure_of_another_process_is_told(store):
    store.update({'halonet/meet/1': 1, 'halonet/meet/2': 1, 'halonet/meet/2/failed': 1})
    utils.meet()
    with pytest.raises(stopping.Failure, match='another process failed'):
        utils.meet()


def test_a_mistake_of_another_process_is_one_here(store):
    """So that no machine starts again, and waits for one that does not."""
    store.update({'halonet/meet/1': 1, 'halonet/meet/1/failed': stopping.MISTAKE})
    with pytest.raises(ValueError, match='another process failed') as error:
        utils.meet()
    assert stopping.exit_code(error.value) == stopping.MISTAKE


@pytest.mark.parametrize('error, code', [(ValueError('in use'), stopping.MISTAKE), (OSError(28, 'full'), stopping.FAILURE)])
def test_a_process_reports_how_it_failed(store, error, code):
    store['halonet/meet/1'] = 1

    def fail():
        raise error
    with pytest.raises(type(error)):
        utils.on_rank_0(fail)
    assert store['halonet/meet/1/failed'] == code


def test_a_process_that_failed_tells_the_others_and_raises_its_own_error(store):
    store['halonet/meet/1'] = 1
    with pytest.raises(OSError, match='full'):
        utils.on_rank_0(lambda: (_ for _ in ()).throw(OSError(28, 'full')))
    assert store['halonet/meet/1/failed'] == 1


def live(rank, host, pipe):
    lifeline.connect(rank, 4, host, broadcast=lambda _: pipe.recv(), gather=lambda value: pipe.send(value) or [value])
    signal.pause()


@pytest.mark.parametrize('greeting', [b'', b'GET / HTTP/1.1\r\n\r\n', bytes(16) + b'\0\0\0\1', b'\0\0\0\1'])
def test_a_lifeline_reports_which_process_has_ended(monkeypatch, greeting):
    """Ranks 1 and 2 of 4 are killed one after the other; rank 3 cannot connect, and strangers do, before and beside the ranks.

    They send nothing, or a rank without the token.
    """
    monkeypatch.setattr(lifeline, 'lines', {})
    pipes, strangers, waited = [multiprocessing.Pipe() for _ in range(3)], [], []
    children = [multiprocessing.get_context('fork').Process(
        target=live, args=(rank, '127.0.0.1' if rank < 3 else 'nowhere.invalid', pipe), daemon=True)
        for rank, (pipe, _) in enumerate(pipes, 1)]
    for child in children:
        child.start()

    def broadcast(value):
        if isinstance(value, tuple):
            for _ in range(3):
                strangers.append(socket.create_connection(('127.0.0.1', value[0])))
                strangers[-1].sendall(greeting)
        for _, pipe in pipes:
            pipe.send(value)
        waited.append(time.monotonic())
        return value

    try:
        missing = lifeline.connect(0, 4, '127.0.0.1', broadcast, lambda value: [value] + [pipe.recv() for _, pipe in pipes],
                                   patience=60)
        assert missing == [3] and lifeline.ended() == [] and sorted(lifeline.lines) == [1, 2]
        assert waited[1] - waited[0] < 30           # the silent ones were not waited for
        children[1].kill()
        assert wait_until(lifeline.ended, 5, 'noticed') == [2]
        children[0].kill()
        wait_until(lambda: lifeline.ended() == [1, 2], 5, 'both are noticed')
        for stranger in strangers:
            stranger.settimeout(5)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b''      # closed by rank 0
    finally:
        for child in children:
            child.kill()
            child.join()


@pytest.mark.parametrize('endpoints, expected', [
    (['10.0.0.1:80', '10.0.0.1:81'], '127.0.0.1'), (['10.0.0.1:80', '10.0.0.2:80'], '10.0.0.1'),
    (['node-a:80', 'node-b:80'], 'node-a'), (['[fd00::1]:80', '[fd00::2]:80'], 'fd00::1')])
def test_the_host_of_a_lifeline(endpoints, expected):
    assert lifeline.host(endpoints) == expected


@pytest.mark.parametrize('host, address, bound', [
    ('127.0.0.1', '127.0.0.1', '127.0.0.1'), ('own-name', '127.0.1.1', '0.0.0.0'), ('other-name', '127.0.0.1', '0.0.0.0'),
    ('192.0.2.1', '192.0.2.1', '0.0.0.0'), ('unknown', None, '0.0.0.0')])
def test_a_lifeline_listens_on_one_address(monkeypatch, host, address, bound):
    """On all only where others would not reach the one: Debian's own name, an address of another machine, an unknown name."""
    def resolve(name, port, **options):
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (address, port))]
    monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    with lifeline.listen(host) as listener:
        assert listener.getsockname()[0] == bound


# ---- signals

def in_a_fork(work):
    """The wait status of a forked process that calls `work`; 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work() or 0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_second_interrupt_ends_at_once():
    def work():
        stop = stopping.Stop().listen()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):       # what a terminal and a launcher send for one Ctrl-C
            os.kill(os.getpid(), signum)
        wait_until(lambda: stop.requested, 5, 'the first is noted')
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert in_a_fork(work) == 130


def test_a_forked_process_is_ended_by_a_signal_of_its_own_only():
    def work():
        stopping.Stop().listen()

        def worker():
            os.kill(os.getpid(), signal.SIGTERM)     # before: nobody listens in the fork, and it waits
            stopping.Stop.unlisten()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return -in_a_fork(worker)
    assert in_a_fork(work) == signal.SIGINT


# ---- batch norms that see the images of all processes

def test_synchronised_norms_keep_the_network(monkeypatch):
    """With a stand-in for the GPU's kernel: the same output, parameters and names, activations among it."""
    def kernel(x, mean, variance, weight, bias, is_test, momentum, epsilon, *rest):
        return paddle.nn.functional.batch_norm(x, mean, variance, weight, bias, not is_test, momentum, epsilon), *[None] * 5
    monkeypatch.setattr(paddle.nn.layer.norm._C_ops, 'sync_batch_norm_', kernel)
    config = get_config(None, TINY)
    plain, model = build_halonet(config), build_halonet(config)
    model.set_state_dict(plain.state_dict())
    layers.synchronise_norms(model)
    assert sum(isinstance(layer, paddle.nn.SyncBatchNorm) for layer in model.sublayers()) == 9
    x = paddle.randn([2, 3, 16, 16])
    for mode in ('train', 'eval'):
        getattr(plain, mode)(), getattr(model, mode)()
        np.testing.assert_allclose(model(x), plain(x), atol=1e-6)
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), plain.state_dict().items()):
        assert name == other
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_every_norm_is_synchronised_and_known_to_recomputation():
    model = build_halonet(get_config(None, [*TINY, 'MODEL.STAGES', ['conv lambda', 'halo bot'], 'MODEL.HEADS', [2, 2]]))
    layers.synchronise_norms(model)
    norms = [layer for layer in model.sublayers() if 'BatchNorm' in type(layer).__name__]
    assert len(norms) > 10 and all(isinstance(norm, paddle.nn.SyncBatchNorm) for norm in norms)
    with halonet.statistics_kept(model):
        assert {norm._momentum for norm in norms} == {1.0}
    assert {norm._momentum for norm in norms} == {0.9}


def test_frozen_parts_are_not_averaged(monkeypatch):
    """A third of three times a number is not always that number."""
    model = build_halonet(get_config(None, [*TINY, 'MODEL.FREEZE', 1]))
    before = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    monkeypatch.setattr(utils, 'world_size', lambda: 3)
    monkeypatch.setattr(utils, 'all_reduce', lambda value: value.set_value(value * 3 + 1))
    utils.average(layers.running_statistics(model).values())
    changed = {key for key, value in model.state_dict().items() if not np.array_equal(value.numpy(), before[key])}
    assert changed == {key for key in before if key.endswith(('._mean', '._variance')) and not key.startswith('stem.')}


def test_synchronised_norms_need_a_gpu(images, tmp_path, capsys):
    run(images, tmp_path, 'TRAIN.SYNC_BN', True, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0)
    assert 'TRAIN.SYNC_BN needs GPUs' in capsys.readouterr().out


# ---- processes that are stopped and killed

@pytest.fixture
def log(tmp_path):
    """The file for the output of started programs; none of their processes may be left at the end."""
    path = tmp_path / 'output.txt'
    yield path
    try:
        wait_until(lambda: not processes(path), 5, 'no process left')
    finally:
        for pid in processes(path):
            os.kill(pid, signal.SIGKILL)


def leaves(process, log, seconds=40):
    """The exit code of a program that must end within `seconds`, and with it all that it has started."""
    code = process.wait(seconds)
    wait_until(lambda: not processes(log), 10, f'no process left: {processes(log)}')
    return code


def test_killed_and_stopped_with_data_workers(images, whole, tmp_path, log):
    """SIGKILL somewhere, then SIGTERM to the whole process group: the run goes on and ends as the one that had none of it."""
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


TWO = [*CHANCE, 'SAVE_STEPS', 2, 'SAVE_KEEP', 3, 'DATA.NUM_WORKERS', 1, 'DATA.BATCH_SIZE', 1, 'TRAIN.NUM_EPOCHS', 6,
       'MODEL.RESUME', 'auto']                      # on two processes: 30 steps of 2 x 2 images


@pytest.fixture(scope='module')
def two(images, tmp_path_factory):
    """A whole run on two processes, each with its own batch-norm statistics."""
    folder = tmp_path_factory.mktemp('two') / 'run'
    program('main_multi_gpu.py', '-nprocs', 2, *words(images, folder, *TWO))
    return folder


def ranks(process, log):
    """The pids of the training processes below a spawning or launching one, rank 0 first."""
    def parent(pid):
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
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
    """Start a run of TWO once for each of `codes` {how to end it: exit codes}, at random steps, and then to its end."""
    steps = sorted(DRAW.sample(range(2, 26), len(codes)))
    for step, (how, code) in zip(steps, codes.items()):
        process = start_it()
        wait_for_step(folder, step, process)
        asked = time.monotonic()
        interrupt(process, log, how)
        assert leaves(process, log) in code, (how, log.read_text())
        assert 'Traceback (most recent call last):' not in log.read_text().splitlines()     # Paddle's own C++ one may be
        print(f'{how} at step {step}: all gone after {time.monotonic() - asked:.1f} s')
    assert start_it().wait(120) == 0, log.read_text()


@pytest.mark.slow
def test_two_spawned_processes_lose_nothing(images, two, tmp_path, log):
    folder = tmp_path / 'run'
    interrupted_run(lambda: start('main_multi_gpu.py', '-nprocs', 2, *words(images, folder, *TWO), log=log), folder, log,
                    {'kill rank 0': [1], 'SIGTERM': [75], 'kill rank 1': [1], 'kill all but the ranks': [-9], 'Ctrl-C': [75]})
    assert_same_run(folder, two)


@pytest.mark.slow
def test_two_launched_processes_lose_nothing(images, two, tmp_path, log):
    """The launcher ends with the number of the signal that it got, or the code of a rank that failed (241 is SIGTERM's)."""
    folder = tmp_path / 'run'
    launch = ['--nproc_per_node', 2, '--log_dir', tmp_path / 'launch', 'main_multi_gpu.py']
    interrupted_run(lambda: start('-mpaddle.distributed.launch', *launch, *words(images, folder, *TWO), log=log), folder, log,
                    {'kill rank 0': [1, 241, 247, 250], 'kill rank 1': [1, 241, 247, 250], 'SIGTERM': [15],
                     'kill all but the ranks': [-9]})
    assert_same_run(folder, two)


@pytest.mark.slow
def test_the_logged_accuracy_is_that_of_the_saved_file(images, two, tmp_path):
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
        assert [result[key] for key in ('acc1', 'acc5', 'loss')] == pytest.approx([last[key] for key in ('acc1', 'acc5', 'loss')],
                                                                                  rel=1e-6)


@pytest.mark.slow
def test_the_number_of_processes_may_change_on_the_way(tmp_path):
    """8 images a step on one process, then on two, then on one again; without dropout, which each process draws for itself."""
    images = make_images(tmp_path / 'data', train=16)
    opts = ['MODEL.FREEZE_NORM', True, 'TRAIN.MIXUP_ALPHA', 0.8, 'TRAIN.EMA_DECAY', 0.9, 'TRAIN.NUM_EPOCHS', 4, 'SAVE_STEPS', 1,
            'SAVE_KEEP', 100, 'REPORT_FREQ', 4]
    run(images, tmp_path / 'one', *opts)
    program('main_multi_gpu.py', '-nprocs', 2, *words(images, tmp_path / 'two', *opts, 'DATA.BATCH_SIZE', 4, 'MODEL.RESUME',
                                                      checkpoint.steps(tmp_path / 'one')[5]))        # after step 3 of 8
    run(images, tmp_path / 'again', *opts, 'MODEL.RESUME', checkpoint.steps(tmp_path / 'two')[3])    # after step 5
    for name, steps in (('two', [4, 6, 8]), ('again', [6, 8])):
        compare(tmp_path / 'one', tmp_path / name)
        ours, theirs = (records(tmp_path / folder, 'train') for folder in (name, 'one'))
        assert [record['step'] for record in ours] == steps
        for one, other in zip(ours, theirs[-len(ours):]):                    # the open log window went along
            assert one['acc1'] == other['acc1'] and one['loss'] == pytest.approx(other['loss'], rel=1e-5)


@pytest.mark.parametrize('error', [
    ValueError('(InvalidArgument) TCP connection reset by peer. Details: Success. (at /paddle/paddle/phi/core/distributed/store/'
               'tcp_utils.h:111)'),
    ValueError('(InvalidArgument) TCP send error. Details: Broken pipe.\n  [Hint: Expected byte_sent > 0, but received '
               'byte_sent:-1 <= 0:0.] (at /paddle/paddle/phi/core/distributed/store/tcp_utils.h:85)\n'),
    RuntimeError('[/paddle/third_party/gloo/gloo/transport/tcp/pair.cc:584] TIMEOUT self_rank = 0 pair_rank = 1 peer_str = '
                 '[127.0.0.1]:7575'),
    RuntimeError('[/paddle/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:35561')])
def test_a_lost_partner_is_a_failure_in_one_line(error, capsys, monkeypatch):
    """Not a mistake, after which nothing would start again, and no traceback: the process that died has the reason."""
    monkeypatch.setattr(utils.log, 'handlers', [])
    with pytest.raises(SystemExit) as stop, utils.plain_errors():
        raise error
    assert stop.value.code == stopping.FAILURE
    assert capsys.readouterr().err == 'error: another process has ended or does not answer; its own message tells why\n'


def launch_faulty(fault, tmp_path, *line):
    return program('-mpaddle.distributed.launch', '--nproc_per_node', 2, '--log_dir', tmp_path / 'launch',
                   'tests/helpers/faulty.py', fault, *line, check=False, timeout=240)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(images, tmp_path):
    done = launch_faulty('nan', tmp_path, *words(images, tmp_path / 'run', 'DATA.BATCH_SIZE', 2, 'REPORT_FREQ', 5,
                                                 'TRAIN.NUM_EPOCHS', 3))
    assert done.returncode == stopping.MISTAKE, done.stdout
    lines = [(tmp_path / 'run' / name).read_text() for name in ('log.txt', 'log_rank1.txt')]
    message = 'the loss is not finite: epoch 1, step 3, rank 1, learning rate '
    assert all(message in text for text in lines) and not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_a_full_disk_on_rank_0_stops_all(images, tmp_path):
    done = launch_faulty('full', tmp_path, *words(images, tmp_path / 'run', 'DATA.BATCH_SIZE', 4))
    assert done.returncode == stopping.FAILURE, done.stdout
    assert 'error: [Errno 28] cannot write: No space left' in done.stdout
    assert 'another process failed' in (tmp_path / 'run' / 'log_rank1.txt').read_text()


@pytest.mark.slow
def test_one_process_may_work_longer_than_gloo_waits(images, tmp_path):
    done = launch_faulty('slow', tmp_path, *words(images, tmp_path / 'run', 'DATA.BATCH_SIZE', 4, 'TRAIN.NUM_EPOCHS', 1,
                                                  'TRAIN.WARMUP_EPOCHS', 0))
    assert done.returncode == 0 and '(11 images)' in done.stdout, done.stdout


@pytest.mark.slow
def test_a_process_that_ends_on_another_machine_is_missed_at_once(images, tmp_path):
    """The launcher of rank 0 does not see it, and gloo would not: rank 0 waits for it, outside of a collective."""
    line = words(images, tmp_path / 'run', 'DATA.BATCH_SIZE', 4, 'SAVE_STEPS', 1)
    with socket.create_server(('127.0.0.1', 0)) as free:
        master = f'127.0.0.1:{free.getsockname()[1]}'
    nodes = [start('-mpaddle.distributed.launch', '--nnodes', 2, '--rank', rank, '--master', master, '--nproc_per_node', 1,
                   '--log_dir', tmp_path / f'launch{rank}', 'tests/helpers/faulty.py', 'lost', *line,
                   log=tmp_path / f'output{rank}.txt')
             for rank in (0, 1)]
    try:
        assert [node.wait(90) for node in nodes] == [stopping.FAILURE, 256 - signal.SIGKILL]
    finally:
        for pid in [pid for rank in (0, 1) for pid in processes(tmp_path / f'output{rank}.txt')]:
            os.kill(pid, signal.SIGKILL)
    assert 'error: process 1 has ended; its own message tells why' in (tmp_path / 'output0.txt').read_text()


# ---- the scripts

@pytest.fixture
def fake(tmp_path):
    """A Python that writes down how it is called and ends with the next of the `codes` in a file."""
    path = tmp_path / 'python'
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncode=$(head -n 1 {tmp_path}/codes)\n'
                    f'sed -i 1d {tmp_path}/codes\nexit $code\n')
    path.chmod(0o755)
    (tmp_path / 'sleep').write_text('#!/bin/sh\n')                           # no pause between two starts
    (tmp_path / 'sleep').chmod(0o755)

    def call(script, codes, **variables):
        (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in codes))
        environment = {'PYTHON': str(path), 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PRETRAINED': 'w', **variables}
        done = subprocess.run([f'./{script}', '-amp'], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
        calls = (tmp_path / 'calls').read_text().splitlines() if (tmp_path / 'calls').exists() else []
        return done.returncode, calls, done.stderr
    return call


@pytest.mark.parametrize('codes, restarts, code, calls', [
    ([0], 3, 0, 1), ([1], 0, 1, 1), ([1, 1, 0], 3, 0, 3), ([137, 1, 1], 2, 1, 3), ([1, 75], 3, 75, 2), ([2], 3, 2, 1)])
def test_the_script_starts_again_after_a_failure(fake, codes, restarts, code, calls):
    """And neither after a stop nor after a mistake."""
    status, lines, err = fake('run_train_multi.sh', codes, MAX_RESTARTS=str(restarts), OUTPUT='out')
    assert (status, len(lines)) == (code, calls), err
    assert [line.endswith('-amp -resume auto') for line in lines] == [False] + [True] * (calls - 1)
    assert err.count('starting again') == calls - 1


def test_an_evaluation_that_starts_again_is_the_same(fake):
    code, (first, second), _ = fake('run_eval_multi.sh', [1, 0], MAX_RESTARTS='1', OUTPUT='out')
    assert code == 0 and first == second


@pytest.mark.parametrize('variables, message', [
    ({'MAX_RESTARTS': '1'}, 'MAX_RESTARTS needs OUTPUT'), ({'NNODES': '2', 'NODE_RANK': '0'}, 'MASTER=host:port'),
    ({'NNODES': '2', 'MASTER': 'a:1'}, 'NODE_RANK=0..')])
def test_the_script_names_what_is_missing(fake, variables, message):
    code, calls, err = fake('run_train_multi.sh', [0], **variables)
    assert (code, calls) == (2, []) and message in err


def test_the_script_on_several_machines_and_processes(fake):
    _, (call,), _ = fake('run_train_multi.sh', [0], NNODES='2', NODE_RANK='1', MASTER='host:8000', NPROCS='4', OUTPUT='out')
    assert call.startswith('-m paddle.distributed.launch --nnodes 2 --rank 1 --master host:8000 --log_dir out/launch_1 '
                           f'--nproc_per_node 4 {ROOT}/main_multi_gpu.py -cfg ')
    _, calls, _ = fake('run_train_multi.sh', [0], NPROCS='4')
    assert ' -nprocs 4 -amp' in calls[1] and 'launch' not in calls[1]


@pytest.mark.parametrize('nodes, ended, code', [
    ('1', 75, 75), ('1', 2, 2), ('1', 0, 0), ('1', 143, 75), ('2', 15, 75), ('1', 1, 1)])
def test_a_stopped_script_passes_it_on_and_does_not_start_again(tmp_path, log, nodes, ended, code):
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/bash\ntrap "exit {ended}" TERM\ntouch {tmp_path}/up\nwhile :; do read -t 0.1 <> <(:); done\n')
    python.chmod(0o755)
    process = start('run_train_multi.sh', log=log, PYTHON=str(python), OUTPUT='out', MAX_RESTARTS='3', NNODES=nodes,
                    NODE_RANK='0', MASTER='host:1')
    wait_until((tmp_path / 'up').exists, 20, 'the program is up')
    process.terminate()
    assert leaves(process, log) == code and 'starting again' not in log.read_text()


@contextmanager
def machines():
    """(address, network interface, command that runs another there) of two machines: network namespaces joined by a cable."""
    names = [f'halonet{os.getpid()}{i}' for i in 'ab']
    addresses = ['10.77.31.1', '10.77.31.2']
    commands = [f'netns add {names[0]}', f'netns add {names[1]}',
                f'link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}']
    commands += [f'-n {name} {command}' for name, address in zip(names, addresses)
                 for command in (f'addr add {address}/24 dev {name}', f'link set {name} up', 'link set lo up')]
    found = [(address, name, ['ip', 'netns', 'exec', name]) for name, address in zip(names, addresses)]
    try:
        for command in commands:
            subprocess.run(['ip', *command.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f'no network namespaces here ({error}): both machines are this one')
        found = [('127.0.0.1', 'lo', [])] * 2
    try:
        yield found
    finally:
        for name in names if shutil.which('ip') else ():
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


@pytest.mark.slow
def test_two_machines_lose_nothing_when_one_loses_a_process(images, two, tmp_path):
    """One process in each of two network namespaces, or else two on the loopback; both scripts start again by themselves."""
    folder, logs = tmp_path / 'run', [tmp_path / f'output{i}.txt' for i in (0, 1)]
    (tmp_path / 'tiny.yaml').write_text(get_config(None, [*TINY, *TWO]).dump())
    variables = {'CFG': str(tmp_path / 'tiny.yaml'), 'OUTPUT': str(folder), 'DATA': images, 'NNODES': '2', 'NPROCS': '1',
                 'MAX_RESTARTS': '1'}
    with machines() as nodes_, socket.create_server(('', 0)) as free:
        variables['MASTER'] = f'{nodes_[0][0]}:{free.getsockname()[1]}'
        free.close()
        nodes = [start('run_train_multi.sh', log=log, prefix=prefix, NODE_RANK=str(i), POD_IP=address,
                       GLOO_SOCKET_IFNAME=interface, **variables)
                 for i, (log, (address, interface, prefix)) in enumerate(zip(logs, nodes_))]
        try:
            wait_for_step(folder, 10, nodes[0], 120)
            trainer = min(pid for pid, command in processes(logs[1]).items()      # and then its data worker
                          if 'main_multi_gpu.py' in command and 'launch' not in command)
            os.kill(trainer, signal.SIGKILL)
            assert [node.wait(200) for node in nodes] == [0, 0], [log.read_text() for log in logs]
        finally:
            for pid in [pid for log in logs for pid in processes(log)]:
                os.kill(pid, signal.SIGKILL)
    assert all('starting again (1 of 1)' in log.read_text() for log in logs)
    assert 'resumed from' in (folder / 'log_rank1.txt').read_text()
    assert_same_run(folder, two)
