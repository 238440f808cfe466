"""Run work in a separate process, and abandon it when that process hangs or dies."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

import torch
from torch import Tensor

from vit_explain_callback.isolation.quarantine import isolate_fork, remove_temporary_directories, silence_output

PATIENCE = 60.0  # seconds without a sign of life
_REAPING = 5.0  # seconds until a killed process is left to the system: one that waits for a dead share ignores SIGKILL

Beat = Callable[[], None]


class Lost(Exception):
    """A process gave no result: it hung, died, or its result cannot be sent."""

    def __repr__(self) -> str:
        return str(self)


class Failed(Exception):
    """The work raised an error in its process; `repr` is that of the error, `str` its traceback."""

    def __init__(self, said: str, trace: str) -> None:
        super().__init__(trace)
        self._said = said

    def __repr__(self) -> str:
        return self._said


def can_fork() -> bool:
    """Whether forking is safe; not on macOS, whose libraries may not be forked."""
    return sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")


def in_fork(work: Callable[[Beat], Any]) -> Any:
    """Return the result of `work` from a forked process that cannot reach this one; only the result is pickled.

    Args:
        work: Receives a function to call as a sign of life. It keeps a reference to objects that must not be finalised.

    Raises:
        Lost: If there is no result.
        Failed: If `work` raises an error.
        OSError: If no further process can be started.
    """
    receiving, sending = Pipe(duplex=False)
    state = random.getstate()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # until the child has its own handlers
    process = -1
    with receiving, sending:
        try:
            process = _forked()
            if process == 0:
                try:
                    _become_child(sending.fileno(), state)
                    _serve(sending, work)
                finally:
                    os._exit(1)
            sending.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            message = _heard(receiving)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            ending = _reaped(process) if process > 0 else ""
    return _result(message, ending)


def in_spawn(work: Callable[[Beat], Any]) -> Any:
    """Return the result of `work`, which must be picklable, from a new Python process; it raises as `in_fork`.

    That process imports the main module again, as a DataLoader's worker does without fork.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sending, work))
    with receiving, sending:
        process.start()
        try:
            sending.close()
            message = _heard(receiving)
        finally:
            process.kill()
            process.join(_REAPING)
            ending = _ending(process.exitcode)
    with contextlib.suppress(ValueError):  # it still runs
        process.close()
    return _result(message, ending)


def _forked() -> int:
    """`os.fork` without its warning about threads; if warnings are errors, the child would be lost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def _become_child(descriptor: int, state: Any) -> None:
    os.setsid()  # what it starts is killed with it, and Ctrl-C is for the parent
    isolate_fork(descriptor)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    random.setstate(state)  # which a fork seeds anew


def _serve(connection: Connection, work: Callable[[Beat], Any]) -> NoReturn:
    """Send the result of `work`, and end without finalising anything."""
    silence_output()
    torch.set_num_threads(1)  # the threads of OpenMP are not forked, and waiting for them would not end
    try:
        value = work(lambda: connection.send_bytes(b""))
    except Exception as error:
        answer = pickle.dumps(("failed", repr(error), traceback.format_exc()))
        connection.send_bytes(answer)
        os._exit(0)
    remove_temporary_directories()
    try:
        answer = _pickled(("given", value))
    except Exception as error:
        answer = pickle.dumps(("lost", f"what they gave cannot be sent to the training process: {error!r}"))
    connection.send_bytes(answer)
    os._exit(0)


def _result(message: bytes, ending: str) -> Any:
    if not message:
        raise Lost(f"that process ended without a result ({ending})")
    try:
        kind, *rest = pickle.loads(message)
    except Exception as error:
        raise Lost(f"what they gave cannot be unpickled: {error!r}") from error
    if kind == "given":
        return rest[0]
    raise Lost(*rest) if kind == "lost" else Failed(*rest)


def _heard(connection: Connection) -> bytes:
    """The first message that is not a sign of life; empty if the process ends before."""
    with contextlib.suppress(EOFError, ConnectionError):
        while connection.poll(PATIENCE):
            if message := connection.recv_bytes():
                return message
        raise Lost(f"nothing was read in {PATIENCE:g} s")
    return b""


def _reaped(process: int) -> str:
    """Kill a forked process and its children, and say how it ended."""
    try:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(process, signal.SIGKILL)
        until = time.monotonic() + _REAPING
        while time.monotonic() < until:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return _ending(os.waitstatus_to_exitcode(status))
            time.sleep(0.001)
    except ChildProcessError:  # a handler of the user's has reaped it
        pass
    return _ending(None)


def _ending(code: int | None) -> str:
    if code is None:
        return "how is not known"
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class _Pickler(pickle.Pickler):
    def reducer_override(self, part: Any) -> Any:
        """Send only the values of a tensor, from the CPU; it may be a view of one that holds the whole data set."""
        if type(part) is not Tensor or part.layout is not torch.strided or part.is_quantized:
            return NotImplemented
        if part.is_cpu and part.untyped_storage().nbytes() == part.nbytes:
            return NotImplemented
        compact: Any = part.detach().cpu().clone()
        return compact.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()
