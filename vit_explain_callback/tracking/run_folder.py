"""Keep the files of each run, and of each branch of a run, in a folder of its own, while there is room on the disk."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import uuid
from pathlib import Path

from vit_explain_callback._files import whole_file
from vit_explain_callback.tracking.errors import warn

_MARK = "run.txt"
_STEP = re.compile(r"step_(\d+)\.safetensors")


class RunFolder:
    """The folder of one run, which is not added to another's: of `wanted`, `wanted_1`, … the first that is free.

    A file `run.txt` in it names the run. A folder is free if it is not there or is empty, or if it names this run.

    A run that is resumed goes on in its folder. Where this holds snapshots beyond the step at which it is resumed, they
    are of another branch of the run, or of what was lost when it died: they stay as they are, and the later branch
    starts a folder of its own with copies of the snapshots up to that step.

    Args:
        wanted: Where the files should be.
        run: Name of the run; default: a new one, unlike all others.

    Attributes:
        wanted: Where the files should be.
        run: Name of the run, or of the branch once that has a folder.
    """

    def __init__(self, wanted: Path, run: str | None = None) -> None:
        self.wanted = wanted
        self.run = run or uuid.uuid4().hex  # of the system, not of a random stream of the user's
        self._resumed_at: int | None = None
        self._branch: RunFolder | None = None
        self._path: Path | None = None
        self._place = ""

    def __str__(self) -> str:
        return str(self._path or self.wanted)

    @property
    def is_made(self) -> bool:
        """Whether the folder is there."""
        return self._path is not None

    def resume(self, run: str, step: int) -> None:
        """Go on with a run at a step; only before there is a `path`."""
        self.run, self._resumed_at = run, step

    @property
    def path(self) -> Path:
        """The folder, made and marked when it is first asked for; to be asked for before every write.

        Raises:
            OSError: If it cannot be made, or if a link has taken its place, or that of a folder above it, since.
        """
        if self._path is None:
            self._path = self._made()
            self._place = os.path.realpath(self._path)
        if os.path.realpath(self._path) != self._place:
            raise OSError(f"{self._path} leads to another place than at the start of the run: nothing is written there")
        return self._path

    def _made(self) -> Path:
        names = itertools.chain([""], (f"_{number}" for number in itertools.count(1)))
        folders = (self.wanted.with_name(f"{self.wanted.name}{name}") for name in names)
        folder = next(folder for folder in folders if self._is_own(folder))
        step = self._resumed_at
        found = filter(None, map(_STEP.fullmatch, os.listdir(folder)))
        steps = {int(match[1]): folder / match[0] for match in found}
        if step is None or max(steps, default=step) <= step:
            return folder
        self._branch = self._branch or RunFolder(self.wanted)
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
                with mark.open("x", encoding="utf-8") as file:  # of two processes only one succeeds
                    file.write(f"{self.run}\n")
            except FileExistsError:
                return False
            return True
        if mark.is_symlink() or not mark.is_file():
            return False
        with mark.open(encoding="utf-8", errors="replace") as file:
            return file.read(1000).strip() == self.run


try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

SPARE_BYTES = 64 * 2**20


def check_space(folder: Path) -> None:
    """Refuse to write where fewer than `SPARE_BYTES` could be written, so that they are left to the run's own files.

    Args:
        folder: Of the files; it need not be there yet.

    Raises:
        OSError: If the disk is nearly full, or if its largest file is near the largest size that is allowed.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    room = shutil.disk_usage(there).free
    limit = None if resource is None else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit is not None and limit != resource.RLIM_INFINITY:
        room = min(room, limit - max((file.stat().st_size for file in there.iterdir() if file.is_file()), default=0))
    if room < SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{max(0, room) / 2**20:.1f} MB can be written to {there}, and the last {SPARE_BYTES // 2**20} MB are left "
            "to the run itself, so that nothing more is added. Free some space, or log elsewhere",
        )
