"""How much memory this machine or container has, in bytes."""
from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path('/sys/fs/cgroup')                     # of this container, version 2
INFO = Path('/proc/meminfo')


def total() -> int:
    """Return the memory of this machine, or the limit of this container."""
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return min([size, *_container_limit()])


def available() -> int:
    """Return the memory that processes can still get without swapping."""
    found = [total()]
    with suppress(OSError):
        fields = dict(line.split(':') for line in _lines(INFO))
        found.append(1024 * int(fields['MemAvailable'].split()[0]))
    with suppress(OSError):
        for limit in _container_limit():
            fields = dict(line.split() for line in _lines(CGROUP / 'memory.stat'))
            cached = int(fields['inactive_file'])   # files that the kernel drops where memory is wanted
            found.append(limit + cached - int(_lines(CGROUP / 'memory.current')[0]))
    return min(found)


def used_in_session(leader: int) -> int:
    """Return what the processes in the session of the process `leader` use. What they share counts once."""
    used = 0
    for folder in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):                     # it has ended
            state, parent, group, session = (folder / 'stat').read_text().rpartition(')')[2].split()[:4]
            if int(session) == leader:
                fields = dict(line.split(':') for line in _lines(folder / 'smaps_rollup')[1:])
                used += 1024 * int(fields['Pss'].split()[0])
    return used


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding='ascii').splitlines()


def _container_limit() -> list[int]:
    """Return the limit of this container in a list, which is empty without one."""
    with suppress(OSError, ValueError):             # without a limit the file holds 'max'
        return [int(_lines(CGROUP / 'memory.max')[0])]
    return []
