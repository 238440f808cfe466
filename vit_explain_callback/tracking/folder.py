"""Keep the files of each run in a folder of its own."""

from __future__ import annotations

import itertools
import uuid
from functools import cached_property
from pathlib import Path

_MARK = "run.txt"


class RunFolder:
    """The folder of one run, which is not added to another's: of `wanted`, `wanted_1`, … the first that is free.

    A file `run.txt` in it names the run. A folder is free if it is not there or is empty, or if it names this run.

    Args:
        wanted: Where the files should be.
        run: Name of the run; default: a new one, unlike all others.

    Attributes:
        wanted: Where the files should be.
        run: Name of the run; to be changed only before there is a `path`.
    """

    def __init__(self, wanted: Path, run: str | None = None) -> None:
        self.wanted = wanted
        self.run = run or uuid.uuid4().hex  # of the system, not of a random stream of the user's

    def __str__(self) -> str:
        return str(self.__dict__.get("path", self.wanted))

    @property
    def is_made(self) -> bool:
        """Whether the folder is there."""
        return "path" in self.__dict__

    @cached_property
    def path(self) -> Path:
        """The folder, made and marked when it is first asked for.

        Raises:
            OSError: If it cannot be made.
        """
        names = itertools.chain([""], (f"_{number}" for number in itertools.count(1)))
        folders = (self.wanted.with_name(f"{self.wanted.name}{name}") for name in names)
        return next(folder for folder in folders if self._is_own(folder))

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
