"""system/lifeline.py: noticing which process has ended, on which address, among strangers."""
import multiprocessing
import signal
import socket
import time
from contextlib import suppress

from system import lifeline

import pytest
from runs import wait_until


def live(rank, host, pipe):
    def gather(value):
        pipe.send(value)
        return [value]
    lifeline.connect(rank, 4, host, broadcast=lambda _: pipe.recv(), gather=gather)
    pipe.send(lifeline.ended())
    signal.pause()


@pytest.mark.parametrize('greeting', [b'', b'GET / HTTP/1.1\r\n\r\n', bytes(16) + b'\0\0\0\1', b'\0\0\0\1'])
def test_ended_ranks_are_noticed(monkeypatch, greeting):
    """Ranks 1 and 2 of 4 are killed one after the other; rank 3 cannot connect, and strangers do.

    The strangers send nothing, or a rank without the token, before and beside the ranks.
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

    def gather(value):
        return [value] + [pipe.recv() for _, pipe in pipes]

    try:
        missing = lifeline.connect(0, 4, '127.0.0.1', broadcast, gather, patience=60)
        assert missing == [3] and lifeline.ended() == [] and sorted(lifeline.lines) == [1, 2]
        assert [pipe.recv() for _, pipe in pipes] == [[], [], []]    # nor have they found an ended one
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
def test_host_of_rank_0(endpoints, expected):
    assert lifeline.host(endpoints) == expected


@pytest.mark.parametrize('host, address, bound', [
    ('127.0.0.1', '127.0.0.1', '127.0.0.1'), ('own-name', '127.0.1.1', '0.0.0.0'),
    ('other-name', '127.0.0.1', '0.0.0.0'), ('192.0.2.1', '192.0.2.1', '0.0.0.0'),
    ('unknown', None, '0.0.0.0')])
def test_listens_on_one_address_only(monkeypatch, host, address, bound):
    """On all only where others would not reach it: Debian's own name, a foreign address, an unknown name."""
    def resolve(name, port, **options):
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (address, port))]
    monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    with lifeline.listen(host) as listener:
        assert listener.getsockname()[0] == bound


@pytest.fixture
def line(monkeypatch):
    """The other end of a watched connection to rank 7, and the ranks for which this process was to leave."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    monkeypatch.setattr(lifeline, 'lines', {7: lifeline.watched(ours)})
    monkeypatch.setattr(lifeline, '_broken', set())
    monkeypatch.setattr(lifeline, 'LOOK', 0.01)
    monkeypatch.setattr(lifeline, 'GRACE', 0.3)
    left = []
    lifeline.watch(left.append)
    yield theirs, left
    theirs.close()
    wait_until(lambda: left or not lifeline.lines, 5, 'the thread ends')


def test_watch_ends_a_process_that_waits_for_an_ended_rank(line):
    theirs, left = line
    time.sleep(0.1)
    assert left == [] and lifeline.ended() == []
    theirs.close()
    wait_until(lambda: lifeline.ended() == [7], 5, 'noticed at once')
    assert left == []                               # this process may notice by itself, with a better message
    wait_until(lambda: left == [7], 5, 'left')


def test_rank_that_says_goodbye_has_not_failed(line):
    theirs, left = line
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lifeline, 'lines', {0: theirs})
        lifeline.say_goodbye()
    theirs.close()
    wait_until(lambda: not lifeline.lines, 5, 'the goodbye is heard')
    time.sleep(0.5)
    assert lifeline.ended() == [] and left == []
