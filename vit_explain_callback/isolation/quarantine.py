"""Isolate a forked process from its parent, with which it shares more than a memory image.

Files share their offset, sockets and pipes their stream, shared memory its bytes; what is printed or logged would
appear twice, and a finaliser would delete a file or directory that the parent still uses. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import mmap
import os
import signal
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

_MOST_SHARED = 1 << 28  # bytes of shared memory that are copied; what lies beyond can be read, but not written
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_held: list[Any] = []


def isolate_fork(descriptor: int) -> None:
    """Leave this process, just forked, one file descriptor as its only connection to its parent.

    It ends by `os._exit`, so that no exit handler, finaliser or buffer of the parent's runs in it.
    """
    _finalise_nothing()
    _use_default_signals()
    _replace_descriptors(descriptor)
    _replace_shared_memory()


def remove_temporary_directories() -> None:
    """Remove the temporary directories that this process made and whose finalisers will not run."""
    for one in gc.get_objects():  # of this process only: those of the parent are frozen
        if type(one) is tempfile.TemporaryDirectory:
            with contextlib.suppress(OSError):
                one.cleanup()


def _finalise_nothing() -> None:
    gc.disable()
    _held.append(gc.get_objects())  # also when the last reference is replaced, as `self.data = Data()` does
    gc.freeze()


def _use_default_signals() -> None:
    """Handlers are the parent's: one that requeues a job, for example, is to run once."""
    libc = ctypes.CDLL(None)
    libc.prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(OSError, ValueError):  # of SIGKILL and the like there is no choice
                signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # where memory runs out, this process is to go, not the training
        Path("/proc/self/oom_score_adj").write_text("1000")


def _replace_descriptors(descriptor: int) -> None:
    null, dead = os.open(os.devnull, os.O_RDWR), os.open("/", os.O_PATH)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number in (descriptor, null, dead):
            continue
        try:
            replacement = _replaced(number, null, dead)
            if replacement is not None:
                os.dup2(replacement, number, os.get_inheritable(number))
        except OSError:  # that of the listing, closed by now
            continue
        if replacement not in (null, dead, None):
            os.close(replacement)


def _replaced(number: int, null: int, dead: int) -> int | None:
    """What a descriptor becomes: files are opened anew to be read, writing goes nowhere, and reading a stream fails."""
    import fcntl  # not on Windows

    mode, flags = os.fstat(number).st_mode, fcntl.fcntl(number, fcntl.F_GETFL)
    if flags & os.O_PATH:
        return None
    if number in (1, 2) or flags & os.O_ACCMODE == os.O_WRONLY or os.isatty(number):
        return null
    if stat.S_ISCHR(mode):  # random numbers, zeros
        return None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISBLK(mode)):
        return dead
    try:
        replacement = os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return dead
    os.lseek(replacement, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
    return replacement


def _replace_shared_memory() -> None:
    """Replace shared memory that can be written by a private copy, where it is small, or make it read-only."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    left = _MOST_SHARED
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if rights[:2] != "rw" or rights[3] != "s" or not path or _is_device(path[0]):
            continue
        first, end = (int(edge, 16) for edge in span.split("-"))
        size = end - first
        if size > left:
            libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.PROT_READ)
            continue
        left -= size
        held = ctypes.string_at(first, size)
        place = (ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE)
        fixed = 0x10  # MAP_FIXED
        libc.mmap(*place, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, ctypes.c_long(0))
        ctypes.memmove(first, held, size)


def _is_device(path: str) -> bool:
    """Whether memory is that of a device, such as a GPU; anonymous shared memory is named like a device too."""
    return not path.startswith("/") or (path.startswith("/dev/") and not path.startswith(("/dev/shm/", "/dev/zero")))


def silence_output() -> None:
    """Print and log nothing; a notebook's streams and a logger's connections would still reach the user."""
    _held.extend((sys.stdin, sys.stdout, sys.stderr))  # else they are closed, with what they hold written
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable()
