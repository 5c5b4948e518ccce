"""Freed memory of the host: kept for the next step, or given back to the system tensor by tensor.

glibc gives every large block back to the system when it is freed, so that a step's tensors get new pages, zeroed one by
one, again and again. Inside `kept` the process keeps them. Numbers do not change. Read `kept`.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's `mallopt(3)`."""
NEVER = -1
MOST_BLOCKS, LARGE = 65_536, 32 << 20
"""glibc's own: so many mapped blocks, and from so many bytes on, where a process has freed large ones before."""


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library; None where it is another one or cannot be told."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def can_be_kept() -> bool:
    """Whether this process's allocator can be told so."""
    return _glibc() is not None


@contextmanager
def kept(wanted: bool = True) -> Iterator[None]:
    """Inside, what is freed stays with the process; at the end it is given back, and large blocks are mapped anew as
    glibc does by itself. Holds for all threads of the process; nothing is changed where it is not wanted or not
    glibc. A block that was mapped before goes back when it is freed, as ever."""
    glibc = _glibc() if wanted else None
    if glibc is None:
        yield
        return
    glibc.mallopt(M_MMAP_MAX, 0)
    glibc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        glibc.mallopt(M_MMAP_MAX, MOST_BLOCKS)
        glibc.mallopt(M_MMAP_THRESHOLD, LARGE)
        glibc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE)
        glibc.malloc_trim(0)
