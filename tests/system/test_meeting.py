"""utils.meet and utils.on_rank_0, with stand-ins for the key-value store and the other rank."""
import itertools

from system import lifeline, stopping
import utils

import paddle
import pytest


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


def test_late_process_is_reported_after_the_timeout(store, monkeypatch):
    monkeypatch.setattr(utils, 'PATIENCE', 0.1)
    with pytest.raises(stopping.Failure, match='1 of 2 processes did not come within 0.1 s'):
        utils.meet()


def test_ended_process_is_reported_at_once(store, monkeypatch):
    monkeypatch.setattr(lifeline, 'ended', lambda: [1])
    with pytest.raises(stopping.Failure, match='process 1 has ended'):
        utils.meet()


def test_failure_of_another_process_is_raised(store):
    store.update({'halonet/meet/1': 1, 'halonet/meet/2': 1, 'halonet/meet/2/failed': 1})
    utils.meet()
    with pytest.raises(stopping.Failure, match='another process failed'):
        utils.meet()


def test_mistake_of_another_process_is_a_mistake_here(store):
    """So that no machine starts again, and waits for one that does not."""
    store.update({'halonet/meet/1': 1, 'halonet/meet/1/failed': stopping.MISTAKE})
    with pytest.raises(ValueError, match='another process failed') as error:
        utils.meet()
    assert stopping.exit_code(error.value) == stopping.MISTAKE


@pytest.mark.parametrize('error, code', [
    (ValueError('in use'), stopping.MISTAKE), (OSError(28, 'full'), stopping.FAILURE)])
def test_failing_process_reports_its_exit_code(store, error, code):
    store['halonet/meet/1'] = 1

    def fail():
        raise error
    with pytest.raises(type(error)):
        utils.on_rank_0(fail)
    assert store['halonet/meet/1/failed'] == code


def test_failing_process_raises_its_own_error(store):
    store['halonet/meet/1'] = 1
    with pytest.raises(OSError, match='full'):
        utils.on_rank_0(lambda: (_ for _ in ()).throw(OSError(28, 'full')))
    assert store['halonet/meet/1/failed'] == 1


TCP = '(at /paddle/paddle/phi/core/distributed/store/tcp_utils.h:'
GLOO = '[/paddle/third_party/gloo/gloo/transport/tcp/pair.cc:'


@pytest.mark.parametrize('error', [
    ValueError(f'(InvalidArgument) TCP connection reset by peer. Details: Success. {TCP}111)'),
    ValueError('(InvalidArgument) TCP send error. Details: Broken pipe.\n  [Hint: Expected byte_sent > 0, '
               f'but received byte_sent:-1 <= 0:0.] {TCP}85)\n'),
    RuntimeError(f'{GLOO}584] TIMEOUT self_rank = 0 pair_rank = 1 peer_str = [127.0.0.1]:7575'),
    RuntimeError(f'{GLOO}534] Connection closed by peer [127.0.0.1]:35561')])
def test_lost_connection_is_a_failure_in_one_line(error, capsys, monkeypatch):
    """No mistake, after which nothing would restart, and no traceback: the other process has the reason."""
    monkeypatch.setattr(utils.log, 'handlers', [])
    with pytest.raises(SystemExit) as stop, utils.plain_errors():
        raise error
    assert stop.value.code == stopping.FAILURE
    message = 'error: another process has ended or does not answer; its own message tells why\n'
    assert capsys.readouterr().err == message


PADDLE_ON_A_GPU = ('\n\n--------------------------------------\nC++ Traceback:\n...\n'
                   'ResourceExhaustedError: \n\nOut of memory error on GPU 1. Cannot allocate 2.441406GB '
                   'memory on GPU 1, 78.2GB memory has been allocated and available memory is only 915MB.\n')


@pytest.mark.parametrize('text, where', [
    (PADDLE_ON_A_GPU, ' on GPU 1, which cannot give another 2.441406GB; '), ('', '; ')], ids=['GPU', 'host'])
def test_out_of_memory_is_a_mistake_in_one_line(text, where, capsys, monkeypatch):
    """Another start would run out of memory again, so nothing restarts."""
    monkeypatch.setattr(utils.log, 'handlers', [])
    with pytest.raises(SystemExit) as stop, utils.plain_errors():
        raise MemoryError(text)
    assert stop.value.code == stopping.MISTAKE
    message = capsys.readouterr().err
    assert message.startswith(f'error: out of memory{where}lower DATA.BATCH_SIZE')
    assert message.count('\n') == 1
    for option in ('TRAIN.ACCUM_ITER', 'TRAIN.RECOMPUTE', 'MODEL.ATTENTION'):
        assert option in message
