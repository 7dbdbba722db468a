"""Notice processes that ended: a parent by the kernel, a rank by an idle TCP connection to rank 0, which breaks with it.

gloo notices in the middle of a collective only, and the launcher of one machine knows nothing of those of another.
"""
import ctypes
import hmac
import ipaddress
import multiprocessing
import os
import secrets
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Callable, Optional, cast

_libc = ctypes.CDLL(None)

TOKEN, RANK = 16, 4                                 # bytes of a caller's message
BACKLOG = 1024                                      # connections that wait to be accepted

lines: dict[int, socket.socket] = {}                # on rank 0 {rank: connection}, elsewhere {0: connection}


def connect(rank: int, world_size: int, host: str, broadcast: Callable, gather: Callable, patience: float = 10) -> list[int]:
    """Tie the processes to rank 0, which listens on a free port of `host`; returns the ranks that did not reach it.

    broadcast(value of rank 0) -> that value, gather(value) -> the values of all ranks: how the processes talk to each other.
    Rank 0 takes only callers that send the token of this run, which goes to the ranks by `broadcast`.
    """
    lines.clear()
    listener = listen(host) if rank == 0 else None
    port, token = broadcast(listener and (listener.getsockname()[1], secrets.token_bytes(TOKEN)))
    if rank:
        try:
            lines[0] = watched(socket.create_connection((host, port), patience))
            lines[0].sendall(token + rank.to_bytes(RANK, 'big'))
        except OSError:
            lines.clear()
    missing = {other for other, reached in enumerate(gather(rank == 0 or 0 in lines)) if not reached}
    if listener:
        with listener:
            accept(listener, token, set(range(1, world_size)) - missing, patience)
        missing = set(range(1, world_size)) - set(lines)
    return sorted(broadcast(missing))


def host(endpoints: Sequence[str]) -> str:
    """Return where rank 0 listens: on one machine the loopback, else the host of the first of the 'host:port' endpoints."""
    hosts = [endpoint.rpartition(':')[0].strip('[]') for endpoint in endpoints]
    return hosts[0] if len(set(hosts)) > 1 else '127.0.0.1'


def listen(host: str) -> socket.socket:
    """Listen on the address of `host` alone; on all where others would not reach that.

    Debian gives a machine's own name the address 127.0.1.1; one behind a translated address cannot bind to that.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(address[0]).is_loopback and host != address[0]:
            address = ('', 0)
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError:
        return socket.create_server(('', 0), backlog=BACKLOG)


def accept(listener: socket.socket, token: bytes, callers: set[int], patience: float) -> None:
    """Keep the connections of the ranks `callers` in `lines`, and close all others.

    All are read at once: one that sends nothing delays nobody.
    """
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while callers and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    with suppress(OSError):         # a caller that has gone already
                        line, _ = listener.accept()
                        line.setblocking(False)
                        selector.register(line, selectors.EVENT_READ, bytearray())
                    continue
                line = cast(socket.socket, key.fileobj)
                if received(line, key.data):
                    selector.unregister(line)
                    keep(line, caller_of(key.data, token), callers)
        for key in selector.get_map().values():
            if key.fileobj is not listener:
                cast(socket.socket, key.fileobj).close()


def received(line: socket.socket, message: bytearray) -> bool:
    """Add to `message` what a caller has sent. True if it is complete, or nothing more will come."""
    try:
        data = line.recv(TOKEN + RANK - len(message))
    except OSError:
        data = b''
    message += data
    return not data or len(message) == TOKEN + RANK


def caller_of(message: bytes, token: bytes) -> Optional[int]:
    """The rank in a caller's message; None without the token of this run."""
    known = len(message) == TOKEN + RANK and hmac.compare_digest(message[:TOKEN], token)
    return int.from_bytes(message[TOKEN:], 'big') if known else None


def keep(line: socket.socket, caller: Optional[int], callers: set[int]) -> None:
    """Keep the connection of one of the `callers` that are waited for, and close any other."""
    if caller in callers:
        callers.remove(caller)
        lines[caller] = watched(line)
    else:
        line.close()


def watched(line):
    """The connection, set to end by itself within a minute where the other machine does not answer any more."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (('TCP_KEEPIDLE', 20), ('TCP_KEEPINTVL', 10), ('TCP_KEEPCNT', 3)):
        if hasattr(socket, option):                 # not on every system
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return line


def ended():
    """The ranks at the other end of a connection of this process that have ended, so far as it notices."""
    poll = select.poll()
    ranks = {line.fileno(): rank for rank, line in lines.items()}
    for descriptor in ranks:
        poll.register(descriptor, select.POLLIN)    # nobody ever sends anything: what comes is the end
    return sorted(ranks[descriptor] for descriptor, _ in poll.poll(0))


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, however that ends (Linux; elsewhere no-op)."""
    parent = os.getppid()
    if sys.platform == 'linux':
        _libc.prctl(1, signal.SIGKILL)              # 1 is PR_SET_PDEATHSIG
    known = multiprocessing.parent_process()
    if os.getppid() != parent or known and not known.is_alive():
        os._exit(1)                                 # it ended before the call
