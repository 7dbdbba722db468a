"""Which processes have ended: an idle TCP connection of each to rank 0, closed by the kernel when its process ends.

gloo notices in the middle of a collective only, and the launcher of one machine knows nothing of those of another.
"""
import select
import socket

lines = {}                                          # on rank 0 {rank: connection}, elsewhere {0: connection}


def connect(rank, world_size, host, broadcast, gather, patience=10):
    """Tie the processes to rank 0, which listens on a free port of `host`; returns the ranks that did not reach it.

    broadcast(value of rank 0) -> that value, gather(value) -> the values of all ranks: how the processes talk to each other.
    """
    lines.clear()
    listener = socket.create_server(('', 0), backlog=world_size) if rank == 0 else None
    port = broadcast(listener and listener.getsockname()[1])
    if rank:
        try:
            lines[0] = watched(socket.create_connection((host, port), patience))
            lines[0].sendall(rank.to_bytes(4, 'big'))
        except OSError:
            lines.clear()
    missing = {other for other, reached in enumerate(gather(rank == 0 or 0 in lines)) if not reached}
    if listener:
        with listener:
            accept(listener, set(range(1, world_size)) - missing, patience)
        missing = set(range(1, world_size)) - set(lines)
    return sorted(broadcast(missing))


def accept(listener, callers, patience):
    """Take the connections of the ranks `callers`; what does not say that it is one of them is let go."""
    listener.settimeout(patience)
    while callers:
        try:
            line, _ = listener.accept()
        except socket.timeout:                      # another name of TimeoutError, but not in Python 3.9
            return
        try:
            line.settimeout(patience)
            caller = int.from_bytes(line.recv(4, socket.MSG_WAITALL), 'big')
        except OSError:
            continue
        if caller in callers:
            callers.remove(caller)
            lines[caller] = watched(line)


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
