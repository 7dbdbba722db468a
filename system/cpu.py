"""Facts about the processor, and the memory that the C library keeps. Only this file reads /proc/cpuinfo."""
import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Optional


@functools.lru_cache(None)
def facts() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo, such as 'flags'; {} without the file."""
    try:
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8')
    except OSError:
        return {}
    fields = {}
    for line in text.partition('\n\n')[0].splitlines():
        name, _, value = line.partition(':')
        fields[name.strip()] = value.strip()
    return fields


def model_name() -> str:
    """Return the name of the processor, or its architecture if it has no name, as on many ARM."""
    return facts().get('model name') or platform.machine()


def is_amd() -> bool:
    """True for a processor by AMD."""
    return facts().get('vendor_id') == 'AuthenticAMD'


def instructions() -> set[str]:
    """Return the names of the instruction set's extensions, such as 'avx2'."""
    return set(facts().get('flags', facts().get('Features', '')).split())


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def user_threads() -> Optional[str]:
    """Return the OMP_NUM_THREADS that this process was started with, or None.

    Paddle's import sets the variable to 1 where the user has not set it.
    """
    for entry in Path('/proc/self/environ').read_bytes().split(b'\0'):
        name, _, value = entry.partition(b'=')
        if name == b'OMP_NUM_THREADS':
            return value.decode()
    return None


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for later ones. No-op with another C library.

    Its default returns each large block to the kernel, which hands it out again page by page, cleared.
    That takes a third of the time of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(-4, 0)                              # M_MMAP_MAX: no separate mappings for large tensors
        mallopt(-8, 1)                              # M_ARENA_MAX: one heap for all threads
        mallopt(-1, 2 ** 31 - 1)                    # M_TRIM_THRESHOLD: keep 2 GiB at the end of the heap
