"""Choose the folder of a run: beside the logs, if these are on this machine."""

from __future__ import annotations

from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vit_explain_callback.lightning._compat import Trainer
from vit_explain_callback.tracking.errors import Guard, warn
from vit_explain_callback.tracking.run_folder import RunFolder


def run_folder(trainer: Trainer, guard: Guard) -> RunFolder:
    """The folder `explanations` beside the logs, else in the trainer's root directory; call it on every process.

    If both are on another machine, such as `s3://…`, it is in the working directory, with a warning.
    """
    log_dir = guard.attempt("cannot ask the logger for its folder", lambda: trainer.log_dir)
    directories = [*filter(None, [log_dir]), trainer.default_root_dir]
    local = next((path for directory in directories if (path := local_path(directory)) is not None), Path.cwd())
    # All processes use the run name of the first one.
    folder = RunFolder(local / "explanations", trainer.strategy.broadcast(RunFolder(local).run))
    if local_path(directories[0]) is None:
        warn(f"the run's folder, {directories[0]}, is not on this machine; the raw maps are in {folder}.")
    return folder


def local_path(directory: str | Path) -> Path | None:
    """The path of a folder on this machine, from its path or URL; None if it is elsewhere or its scheme is unknown."""
    try:
        system, path = url_to_fs(str(directory))
    except (ImportError, ValueError):
        return None
    return Path(path) if isinstance(system, LocalFileSystem) else None
