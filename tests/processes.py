"""Python in a process of its own, forked from one that has imported what takes seconds: torch and what Lightning needs.

Nothing of this package, of the tests or of Lightning is imported before the fork, so that a program runs as it would by
itself, and can say which Lightning it means. Where nothing can be forked, a process is started as usual.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
_IMPORTED = ["torchmetrics", "timm", "torch.utils.tensorboard", "matplotlib.figure"]


def context() -> BaseContext:
    """Starts processes that have done nothing before, but for imports."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED)
    return found


def python(
    *arguments: str, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python as with these arguments: `-c` and a program, `-m` and a module, or a script, and what it is given."""
    (done,) = pythons([arguments], cwd, [environment or {}], seconds)
    return done


def pythons(
    several: Sequence[Sequence[str]], cwd: Path, environments: Sequence[Mapping[str, str]], seconds: float
) -> list[subprocess.CompletedProcess[str]]:
    """Run several at once; when one fails, or when the time is over, those that still run are killed."""
    started: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder) / f"{index}.{name}" for name in ("out", "err")] for index in range(len(several))]
        for arguments, environment, files in zip(several, environments, outputs, strict=True):
            known = {**os.environ, **environment}
            started.append(context().Process(target=_run, args=(list(arguments), cwd, known, files)))  # type: ignore[attr-defined]
            started[-1].start()
        _wait(started, seconds)
        said = [[file.read_text(encoding="utf-8") if file.exists() else "" for file in files] for files in outputs]
    return [
        subprocess.CompletedProcess(arguments, process.exitcode or 0, out, err)
        for arguments, process, (out, err) in zip(several, started, said, strict=True)
    ]


def _wait(started: Sequence[BaseProcess], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(process.exitcode is None for process in started):
        if any(process.exitcode for process in started) or time.monotonic() > end:
            for process in started:
                process.kill()
        for process in started:
            process.join(0.05)


def _run(arguments: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that forks ignores it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.modules.pop("__mp_main__", None)
    # The tests' own path has more than that of a Python that is started by itself.
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [path for path in sys.path if path in given or Path(path) != ROOT / "examples"]
    kind, *rest = arguments
    if kind == "-c":
        sys.path.insert(0, str(cwd))
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path.insert(0, str(cwd))
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str((cwd / kind).parent))
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
