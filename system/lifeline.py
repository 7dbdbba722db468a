"""Notice processes that have ended: a parent by the kernel, a rank by its idle TCP connection to rank 0.

The connection breaks with the process. gloo notices only during a collective, NCCL never, and the launcher
of one machine does not watch the processes of another.
"""
import ctypes
import hmac
import ipaddress
import multiprocessing
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Callable, Optional, cast

_libc = ctypes.CDLL(None)

TOKEN, RANK = 16, 4                                 # bytes of the message of a rank: token, number
BACKLOG = 1024                                      # connections that wait to be accepted

GOODBYE = b'.'                                      # sent by a rank that has done its work
LOOK = 1.0                                          # seconds between two looks of `watch`
GRACE = 10.0                                        # seconds that this process gets to notice by itself

lines: dict[int, socket.socket] = {}                # by rank: all others on rank 0, elsewhere 0
_broken: set[int] = set()                           # the ranks that `ended` has found
_looking = threading.Lock()                         # `ended` is called by `watch`, too


def connect(rank: int, world_size: int, host: str, broadcast: Callable, gather: Callable,
            patience: float = 10) -> list[int]:
    """Connect the ranks to rank 0, which listens on a free port of `host`. Returns the unconnected ranks.

    broadcast(value of rank 0) -> that value; gather(value) -> the values of all ranks.
    Connections that do not send the token of this run, which the ranks get by `broadcast`, are closed.
    """
    lines.clear()
    _broken.clear()
    listener = listen(host) if rank == 0 else None
    port, token = broadcast(listener and (listener.getsockname()[1], secrets.token_bytes(TOKEN)))
    if rank:
        try:
            line = socket.create_connection((host, port), patience)
            line.sendall(token + rank.to_bytes(RANK, 'big'))
            lines[0] = watched(line)
        except OSError:
            lines.clear()
    reached = gather(rank == 0 or 0 in lines)
    missing = {other for other, ok in enumerate(reached) if not ok}
    if listener:
        with listener:
            accept(listener, token, set(range(1, world_size)) - missing, patience)
        missing = set(range(1, world_size)) - set(lines)
    return sorted(broadcast(missing))


def host(endpoints: Sequence[str]) -> str:
    """Return the host where rank 0 listens, for the 'host:port' endpoints of all ranks.

    It is the loopback for a run on one machine, else the host of the first endpoint.
    """
    hosts = [endpoint.rpartition(':')[0].strip('[]') for endpoint in endpoints]
    return hosts[0] if len(set(hosts)) > 1 else '127.0.0.1'


def listen(host: str) -> socket.socket:
    """Listen on the address of `host` only, or on all addresses if other machines would not reach it.

    Debian gives a machine's own name the address 127.0.1.1. A machine behind a translated address cannot
    bind to that address.
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

    All connections are polled together: one that sends nothing delays no other.
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
    """Return the rank in the message of a caller, or None if it lacks the token of this run."""
    known = len(message) == TOKEN + RANK and hmac.compare_digest(message[:TOKEN], token)
    return int.from_bytes(message[TOKEN:], 'big') if known else None


def keep(line: socket.socket, caller: Optional[int], callers: set[int]) -> None:
    """Keep the connection of one of the expected `callers`, and close any other."""
    if caller in callers:
        callers.remove(caller)
        lines[caller] = watched(line)
    else:
        line.close()


def watched(line: socket.socket) -> socket.socket:
    """Let a connection break within a minute if the other machine stops answering; return it.

    Nothing waits for it from now on.
    """
    line.setblocking(False)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (('TCP_KEEPIDLE', 20), ('TCP_KEEPINTVL', 10), ('TCP_KEEPCNT', 3)):
        if hasattr(socket, option):                 # not on every system
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return line


def ended() -> list[int]:
    """Return the ranks that have ended without `say_goodbye`: on rank 0 any, elsewhere rank 0."""
    with _looking:
        for rank, line in list(lines.items()):
            try:
                data = line.recv(len(GOODBYE))
            except BlockingIOError:
                continue                            # it lives, and has nothing to say
            except OSError:
                data = b''
            if data == GOODBYE:
                lines.pop(rank).close()
            else:
                _broken.add(rank)
        return sorted(_broken & lines.keys())


def say_goodbye() -> None:
    """Tell the ranks at the other end of the connections that this one has done its work and may end."""
    with _looking:
        for line in lines.values():
            with suppress(OSError):                 # the other one has ended already
                line.send(GOODBYE)


def watch(leave: Callable[[int], None]) -> None:
    """Look every second, in a thread, whether a rank has ended; call `leave(rank)` if this process hangs.

    A collective of NCCL that waits for an ended process never returns. Paddle releases the interpreter's
    lock while it waits, so the thread runs. The process first gets GRACE seconds to notice by itself.
    """
    def look() -> None:
        since = None
        while True:
            time.sleep(LOOK)
            broken = ended()
            if not broken:
                continue
            since = since or time.monotonic()
            if time.monotonic() - since >= GRACE:
                leave(broken[0])
                return

    threading.Thread(target=look, daemon=True).start()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, in whatever way. No-op outside of Linux."""
    parent = os.getppid()
    if sys.platform == 'linux':
        _libc.prctl(1, signal.SIGKILL)              # 1 is PR_SET_PDEATHSIG
    known = multiprocessing.parent_process()
    if os.getppid() != parent or known and not known.is_alive():
        os._exit(1)                                 # it ended before the call
