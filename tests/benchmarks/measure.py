"""Measure time and peak memory of one call, and describe the machine.

Memory on the CPU is the highest resident set of the process during the call, above what is resident before it. Every
call is measured in a process of its own, since what an allocator keeps for later depends on what ran before. There:

- Linux keeps the high-water mark itself (`VmHWM`), to the page, and sets it back on request (`/proc/self/clear_refs`).
- `ru_maxrss` is of no use: it cannot be set back, so that it holds the building of the model too, and a process started
  by a larger one inherits the parent's. It is in kB on Linux and in bytes on macOS.
- macOS and Windows have only marks that cannot be set back, so a thread samples the resident set (psutil) every
  millisecond; the peak may be missed by what is allocated and freed within one.

Memory on CUDA is the allocator's own peak, and time is measured by events.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import psutil
import torch

from tests.processes import context

T = TypeVar("T")
Clock: TypeAlias = Literal["wall", "process"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def seconds(run: Callable[[], object], device: str = "cpu", clock: Clock = "wall") -> float:
    """Time of one call; by the clock on the wall, or CPU time of the process's threads together."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()  # type: ignore[no-untyped-call]
        run()
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000  # type: ignore[no-untyped-call]
    now = time.perf_counter if clock == "wall" else time.process_time
    begun = now()
    run()
    return now() - begun


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory in use during one call, above what was in use before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    _give_back_freed_memory()
    if not _CLEAR_REFS.exists():
        return _sampled_peak(run)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = psutil.Process().memory_info().rss
    run()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("Expected `VmHWM` in /proc/self/status, but there is none.")


def _sampled_peak(run: Callable[[], object]) -> int:
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return peak - before


def _give_back_freed_memory() -> None:
    """Else what the allocator kept of earlier calls would be reused, and not be seen as growth."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """What glibc counts; in `uordblks` what is allocated and not freed, in `hblkhd` the same of large blocks."""

    _before = ("arena", "ordblks", "smblks", "hblks")
    _after = ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in (*_before, "hblkhd", *_after))


def live_bytes() -> int | None:
    """Bytes that are allocated and not freed, as the allocator counts them; None where it does not.

    Unlike the resident set they hold nothing that was freed and is kept for later. CPU tensors and arrays are among
    them, and with `PYTHONMALLOC=malloc` every Python object too.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if _has_glibc() else None
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks) + int(found.hblkhd)


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def in_new_process(work: Callable[..., T], *args: Any, environment: Mapping[str, str] | None = None) -> T:
    """Call a function of a module in a process that has done nothing before, but for its imports.

    Args:
        work: The function.
        args: Its arguments.
        environment: Variables that Python reads when it starts, so that no process is forked.
    """
    if environment is None:
        with ProcessPoolExecutor(1, mp_context=context()) as pool:
            return pool.submit(work, *args).result()
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def machine(threads: int, packages: tuple[str, ...] = ("torch", "timm", "numpy")) -> dict[str, Any]:
    """What a measurement depends on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "load_before": psutil.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
