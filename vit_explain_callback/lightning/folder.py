"""Find a folder on this machine for the files of a run."""

from __future__ import annotations

from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vit_explain_callback.lightning._compat import Trainer
from vit_explain_callback.tracking.folder import RunFolder
from vit_explain_callback.tracking.guard import Guard
from vit_explain_callback.tracking.warning import warn


def run_folder(trainer: Trainer, guard: Guard) -> RunFolder:
    """The folder `explanations` in that of the logger, or else of the trainer; to be asked for on every process.

    Where both are on another machine, as `s3://…`, it is in the working directory, which is said.
    """
    found = guard.attempt("cannot ask the logger for its folder", lambda: trainer.log_dir)
    directories = [*filter(None, [found]), trainer.default_root_dir]
    local = next((path for directory in directories if (path := local_path(directory)) is not None), Path.cwd())
    # All processes name the run as the first one does.
    folder = RunFolder(local / "explanations", trainer.strategy.broadcast(RunFolder(local).run))
    if local_path(directories[0]) is None:
        warn(f"the run's folder, {directories[0]}, is not on this machine; the raw maps are in {folder}.")
    return folder


def local_path(directory: str | Path) -> Path | None:
    """A folder on this machine by its path or URL; None if it is on another, or of a kind that is not known here."""
    try:
        system, path = url_to_fs(str(directory))
    except (ImportError, ValueError):
        return None
    return Path(path) if isinstance(system, LocalFileSystem) else None
