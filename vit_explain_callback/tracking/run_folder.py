"""Give each run, and each branch of a run, a folder of its own, and stop writing before the disk is full."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import uuid
from pathlib import Path

from vit_explain_callback.system.files import whole_file
from vit_explain_callback.tracking.errors import warn

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_MARK = "run.txt"
SPARE_BYTES = 64 * 2**20
_STEP = re.compile(r"step_(\d+)\.safetensors")


class RunFolder:
    """The folder of one run: the first free one of `preferred`, `preferred_1`, …, so that runs do not mix.

    A file `run.txt` in it names the run. A folder is free if it does not exist, is empty, or names this run.

    A run that is resumed continues in its folder. Snapshots beyond the step at which it is resumed belong to another
    branch of the run, or to steps that were lost when it died. They stay as they are, and the later branch starts a
    folder of its own with copies of the snapshots up to that step.

    Args:
        preferred: Path of the folder if it is free.
        run: Name of the run; default: a new unique name.

    Attributes:
        preferred: Path of the folder if it is free.
        run: Name of the run, or of the branch once that has a folder.
    """

    def __init__(self, preferred: Path, run: str | None = None) -> None:
        self.preferred = preferred
        self.run = run or uuid.uuid4().hex  # from the system, not from a random stream of the user's
        self._resumed_at: int | None = None
        self._branch: RunFolder | None = None
        self._path: Path | None = None
        self._place = ""

    def __str__(self) -> str:
        return str(self._path or self.preferred)

    @property
    def is_made(self) -> bool:
        """Whether the folder exists."""
        return self._path is not None

    def resume(self, run: str, step: int) -> None:
        """Continue a run at a step; only before `path` is used."""
        self.run, self._resumed_at = run, step

    @property
    def path(self) -> Path:
        """The folder, created and marked on first use; use it before every write.

        Raises:
            OSError: If it cannot be created, or if it, or a folder above it, has been replaced by a link.
        """
        if self._path is None:
            self._path = self._created()
            self._place = os.path.realpath(self._path)
        if os.path.realpath(self._path) != self._place:
            raise OSError(f"{self._path} leads to another place than at the start of the run: nothing is written there")
        return self._path

    def _created(self) -> Path:
        names = itertools.chain([""], (f"_{number}" for number in itertools.count(1)))
        folders = (self.preferred.with_name(f"{self.preferred.name}{name}") for name in names)
        folder = next(folder for folder in folders if self._is_own(folder))
        step = self._resumed_at
        matches = filter(None, map(_STEP.fullmatch, os.listdir(folder)))
        steps = {int(match[1]): folder / match[0] for match in matches}
        if step is None or max(steps, default=step) <= step:
            return folder
        self._branch = self._branch or RunFolder(self.preferred)
        for number, file in steps.items():
            if number <= step and not file.is_symlink():
                with whole_file(self._branch.path / file.name) as copy:
                    shutil.copyfile(file, copy)
        warn(
            f"{folder} holds snapshots up to step {max(steps)} of another branch of this run, which is resumed at step "
            f"{step}; this branch is written to {self._branch.path}, with copies of the snapshots up to there."
        )
        self.run = self._branch.run
        return self._branch.path

    def _is_own(self, folder: Path) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / _MARK
        if not any(folder.iterdir()):
            try:
                with mark.open("x", encoding="utf-8") as file:  # only one of two processes succeeds
                    file.write(f"{self.run}\n")
            except FileExistsError:
                return False
            return True
        if mark.is_symlink() or not mark.is_file():
            return False
        with mark.open(encoding="utf-8", errors="replace") as file:
            return file.read(1000).strip() == self.run


def check_space(folder: Path) -> None:
    """Refuse to write if fewer than `SPARE_BYTES` are left, which are reserved for the run's own files.

    Args:
        folder: The folder to write to; it need not exist.

    Raises:
        OSError: If the disk is nearly full, or if the largest file there is near the limit of file sizes.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    room = shutil.disk_usage(existing).free
    limit = None if resource is None else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit is not None and limit != resource.RLIM_INFINITY:
        room = min(room, limit - max((file.stat().st_size for file in existing.iterdir() if file.is_file()), default=0))
    if room < SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{max(0, room) / 2**20:.1f} MB can be written to {existing}, and the last {SPARE_BYTES // 2**20} MB are "
            "reserved for the run itself, so nothing more is added. Free some space, or log elsewhere",
        )
