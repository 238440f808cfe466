"""A process of its own cannot reach the one that started it, and is given up where it hangs or dies."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from vit_explain_callback.isolation import child
from vit_explain_callback.isolation.child import Failed, Lost, in_fork, in_spawn

pytestmark = pytest.mark.skipif(not child.can_fork(), reason="needs fork and /proc")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Neither a process, dead or alive, nor a thread, nor a descriptor."""
    resource_tracker.ensure_running()  # that of Python, and the memory that it never gives back
    kept = multiprocessing.Value("i", 0)
    before = now_there()
    yield
    assert now_there() == before
    del kept


def now_there() -> Any:
    gc.collect()
    processes = [process.pid for process in psutil.Process().children()]
    return sorted(os.listdir("/proc/self/fd")), sorted(processes), threading.active_count()


def asked(work: Callable[[], Any]) -> Any:
    return in_fork(lambda _: work())


def test_only_the_result_comes_back() -> None:
    held = {"a": 1}

    def work() -> Any:
        held["a"] = 2
        return {"images": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "held": held}

    found = asked(work)
    assert found["images"].equal(torch.arange(6.0).reshape(2, 3))
    assert found["half"].dtype == torch.bfloat16
    assert (found["held"], held) == ({"a": 2}, {"a": 1})


def test_a_result_of_many_megabytes() -> None:
    assert asked(lambda: torch.ones(20_000_000)).sum() == 20_000_000


def test_a_row_is_sent_without_the_rest() -> None:
    found = asked(lambda: torch.arange(1_000_000).reshape(1000, 1000)[3])
    assert found.tolist() == list(range(3000, 4000))
    assert found.untyped_storage().nbytes() == 8000


@pytest.mark.parametrize("many", [1, 300], ids=["read at once", "read through a buffer"])
def test_the_offset_of_an_open_file_stays(many: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)) * 1000)
    path, buffering = tmp_path / "file", 0 if many == 1 else -1
    with open(path, "rb", buffering=buffering) as file, open(path, "r+b") as both:
        file.seek(7)
        both.seek(9)
        assert asked(lambda: (file.read(many)[0], both.read(many)[0], file.seek(50), file.read(1))) == (7, 9, 50, b"2")
        assert (file.read(1), both.read(1)) == (bytes([7]), bytes([9]))


def test_the_offset_of_a_file_that_was_deleted_stays() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"abcdef")
        file.seek(2)
        assert asked(lambda: file.read()) == b"cdef"
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) in (2, 6)
        assert file.read() == b"cdef"


def test_the_place_in_an_open_directory_stays(tmp_path: Path) -> None:
    for name in range(2000):
        (tmp_path / str(name)).touch()
    with os.scandir(tmp_path) as entries:
        first = next(entries).name
        assert len(asked(lambda: [entry.name for entry in entries])) == 1999
        assert len({first, *(entry.name for entry in entries)}) == 2000


def test_a_file_open_for_writing_is_not_written(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as log, open(tmp_path / "data", "w+b", buffering=0) as data:
        log.write("held back; ")

        def work() -> None:
            print("from the child", file=log, flush=True)
            data.write(b"1")

        with pytest.raises(Failed, match="Bad file descriptor"):
            asked(work)
        log.write("done")
    assert (tmp_path / "log").read_text() == "held back; done"
    assert (tmp_path / "data").read_bytes() == b""


def test_streams_are_not_read() -> None:
    one, other = socket.socketpair()
    reading, writing = os.pipe()
    with one, other, open(reading, "rb", buffering=0) as pipe, open(writing, "wb", buffering=0) as end:
        other.sendall(b"abc")
        end.write(b"abc")
        for work in (lambda: one.recv(3), lambda: one.sendall(b"x"), lambda: pipe.read(3)):
            with pytest.raises(Failed):
                asked(work)  # type: ignore[arg-type]
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.recv(1)
        assert (one.recv(9), pipe.read(9)) == (b"abc", b"abc")


def counted() -> Any:
    return multiprocessing.Value("i", 3)


def shared_array() -> Any:
    return torch.full((1,), 3).share_memory_()


def anonymous() -> Any:
    return ctypes.c_int.from_buffer(mmap.mmap(-1, 4096))


def mapped() -> Any:
    with tempfile.NamedTemporaryFile() as file:
        return np.memmap(file.name, np.int32, "w+", shape=(1,))


@pytest.mark.parametrize("made", [counted, shared_array, anonymous, mapped])
@pytest.mark.parametrize("most", [1 << 28, 0], ids=["copied", "read-only"])
def test_shared_memory_is_not_written(made: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_explain_callback.isolation.quarantine._MOST_SHARED", most)
    shared = made()
    name = "value" if hasattr(shared, "value") else None

    def get() -> int:
        return int(shared.value if name else shared[0])

    def put(value: int) -> int:
        if name:
            shared.value = value
        else:
            shared[0] = value
        return get()

    put(5)
    if most:
        assert asked(lambda: (get(), put(6))) == (5, 6)
    else:
        with pytest.raises(Lost, match="SIGSEGV"):
            asked(lambda: put(6))
        if made is not counted:  # its lock is shared memory too
            assert asked(get) == 5
    assert get() == 5


def test_a_lock_that_a_killed_process_holds_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PATIENCE", 0.3)
    lock = multiprocessing.Lock()
    with pytest.raises(Lost, match=r"nothing was read in 0\.3 s"):
        asked(lambda: lock.acquire() and threading.Event().wait())
    assert lock.acquire(timeout=1)
    lock.release()


class Deleting:
    def __init__(self, path: Path) -> None:
        self.path, self.itself = path, self

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


def test_nothing_is_finalised(tmp_path: Path) -> None:
    def made(name: str) -> Any:
        (tmp_path / name).touch()
        return Deleting(tmp_path / name)

    held = [made("replaced")]
    garbage = made("garbage")
    del garbage  # refers to itself
    finalised = made("weak")
    weakref.finalize(finalised, (tmp_path / "weak").unlink)

    def replace() -> None:
        held[0] = None
        finalised.itself = None
        gc.collect()

    gc.disable()
    try:
        asked(replace)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["garbage", "replaced", "weak"]
    finally:
        gc.enable()


def test_no_exit_handler_runs(tmp_path: Path) -> None:
    handler = atexit.register((tmp_path / "handled").touch)
    try:
        asked(lambda: None)
        with pytest.raises(Lost, match="exit status 1"):
            asked(lambda: sys.exit(0))
    finally:
        atexit.unregister(handler)
    assert not (tmp_path / "handled").exists()


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        print("by print" * 100_000)
        os.write(1, b"by the descriptor")
        os.write(2, b"by the descriptor")
        subprocess.run(["echo", "by another program"], check=True)
        sys.__stdout__.write("by the first stream")  # type: ignore[union-attr]
        warnings.warn("a warning", stacklevel=1)

    sys.stdout.write("held back; ")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        asked(work)
    sys.stdout.write("done")
    assert capfd.readouterr() == ("held back; done", "")


def test_no_signal_handler_runs(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: (tmp_path / "handled").touch())
    try:
        with pytest.raises(Lost, match="SIGUSR1"):
            asked(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not (tmp_path / "handled").exists()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_random_streams_go_on_as_they_stand_and_stay() -> None:
    random.seed(3)
    np.random.seed(3)

    def drawn() -> Any:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert asked(drawn) == drawn()


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (lambda: os._exit(3), "exit status 3"),
        (lambda: sys.exit(3), "exit status 1"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: ctypes.string_at(0), "SIGSEGV"),
        (os.abort, "SIGABRT"),
    ],
)
def test_a_process_that_dies(die: Any, how: str) -> None:
    with pytest.raises(Lost, match=f"ended without a result .*{how}"):
        asked(die)


def test_a_process_that_hangs_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "PATIENCE", 0.5)

    def work() -> None:
        started = subprocess.Popen(["sleep", "60"])
        (tmp_path / "started").write_text(str(started.pid))
        threading.Event().wait()

    with pytest.raises(Lost, match=r"nothing was read in 0\.5 s"):
        asked(work)
    number = (tmp_path / "started").read_text()
    until = time.monotonic() + 5
    while time.monotonic() < until and running(number):
        time.sleep(0.01)
    assert not running(number)


def running(number: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    return False


def test_a_process_that_is_slow_but_alive_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PATIENCE", 2.0)

    def work(beat: Callable[[], None]) -> str:
        for _ in range(5):
            time.sleep(0.7)
            beat()
        return "done"

    assert in_fork(work) == "done"


def test_an_error_is_told() -> None:
    def work() -> None:
        raise OSError("the share is gone")

    with pytest.raises(Failed, match="in work") as caught:
        asked(work)
    assert repr(caught.value) == "OSError('the share is gone')"


@pytest.mark.parametrize("result", [lambda: lambda: None, lambda: threading.Lock(), lambda: Deleting.__del__.__code__])
def test_a_result_that_cannot_be_sent(result: Any) -> None:
    with pytest.raises(Lost, match="cannot be sent to the training process"):
        asked(result)


def test_temporary_directories_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held: list[Any] = []
    with tempfile.TemporaryDirectory() as own:
        asked(lambda: held.append(tempfile.TemporaryDirectory()))
        assert [str(path) for path in tmp_path.iterdir()] == [own]


def test_the_warning_of_a_process_with_threads_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def warning_fork() -> int:
        process = fork()
        if process:
            warnings.warn("This process is multi-threaded", DeprecationWarning, stacklevel=2)
        return process

    monkeypatch.setattr(os, "fork", warning_fork)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(lambda: 3) == 3


def test_among_threads_that_never_rest() -> None:
    rest = threading.Event()

    def work() -> None:
        while not rest.is_set():
            torch.rand(64, 64) @ torch.rand(64, 64)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert [asked(lambda: float(torch.ones(300, 300).matmul(torch.ones(300, 300))[0, 0])) for _ in range(5)] == [
            300
        ] * 5
    finally:
        rest.set()
        for thread in threads:
            thread.join()


def test_from_a_thread_that_is_not_the_first() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(asked(lambda: 3)))
    thread.start()
    thread.join()
    assert found == [3]


def test_ctrl_c_while_it_is_waited_for() -> None:
    """For the parent alone, which leaves no process behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            asked(threading.Event().wait)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_reaps_every_child() -> None:
    def reap(*_: Any) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    before = signal.signal(signal.SIGCHLD, reap)
    try:
        assert asked(lambda: 3) == 3
        with pytest.raises(Lost, match="ended without a result"):
            asked(lambda: os._exit(3))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_further_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(BlockingIOError):
        asked(lambda: 3)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def spawned(kind: str, beat: Callable[[], None]) -> Any:
    beat()
    print("from the child")
    if kind == "dies":
        os._exit(3)
    if kind == "fails":
        raise OSError("the share is gone")
    return torch.arange(3)


@pytest.mark.parametrize(("kind", "error"), [("gives", None), ("dies", Lost), ("fails", Failed)])
def test_a_new_process(kind: str, error: Any, capfd: pytest.CaptureFixture[str]) -> None:
    if error is None:
        assert in_spawn(partial(spawned, kind)).tolist() == [0, 1, 2]
    else:
        with pytest.raises(error, match=r"exit status 3|the share is gone"):
            in_spawn(partial(spawned, kind))
    assert capfd.readouterr().out == ""
