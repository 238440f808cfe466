"""The folder of results: portable file names, and no file overwritten that the command did not write."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from vit_explain_callback.system.files import write_bytes

INDEX = "explanations.json"
_LONGEST = 120  # bytes of a name; file systems allow 143 to 255, and the method follows


def result_name(path: PurePath) -> str:
    """Name an image's results after its path, with `_` for unprintable characters and long parts cut."""
    return "/".join(_printable_part(part) for part in path.parts)


def _printable_part(part: str) -> str:
    printable = "".join(letter if letter.isprintable() else "_" for letter in part)
    return printable.encode()[:_LONGEST].decode(errors="ignore")


class ResultFolder:
    """A folder of results, with an index, `explanations.json`.

    The index lists under `files` what the command wrote here, in this run and earlier ones. Only these files are
    overwritten: never an explained image, nor the target of a symbolic link. An unlisted file that already has the
    content to write, as after a run that was killed, counts as written.

    Args:
        path: The folder, created if it does not exist.
        inputs: Files that are never overwritten.

    Raises:
        OSError: If the folder cannot be created or contains a foreign `explanations.json`.
    """

    def __init__(self, path: Path, inputs: Iterable[Path] = ()) -> None:
        self.path = path
        self._inputs = {_identity(file) for file in inputs} - {None}
        self._index = _read_index(path / INDEX)
        self._files = {name for name in self._index.pop("files") if os.path.lexists(path / name)}
        path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: bytes) -> Path:
        """Write a file atomically under this name, with `/` between folders.

        Raises:
            OSError: If it cannot be written, or exists and was not written by the command.
        """
        path = self.path / name
        root, parent = os.path.realpath(self.path), os.path.realpath(path.parent)
        if os.path.commonpath([root, parent]) != root:
            raise OSError(f"{path.parent} leads out of {self.path} and is not written to; delete that symbolic link.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign(path, name, content)
        write_bytes(path, content)
        self._files.add(name)
        return path

    def write_index(self, entries: Mapping[str, Any]) -> Path:
        """Write the index, replacing its entries by `entries`; numbers that are not finite become null.

        Raises:
            OSError: If it cannot be written.
        """
        self._index |= _finite(entries)
        index = {**self._index, "files": sorted(self._files)}
        text = json.dumps(index, ensure_ascii=False, allow_nan=False, indent=1)
        # Bytes of a file name that are not UTF-8 become \udc80 to \udcff, which survive reading the JSON.
        write_bytes(self.path / INDEX, (text + "\n").encode("utf-8", "backslashreplace"))
        return self.path / INDEX

    def _refuse_foreign(self, path: Path, name: str, content: bytes) -> None:
        if path.is_symlink() or not path.exists():
            return  # `write_bytes` refuses links
        if _identity(path) in self._inputs:
            raise FileExistsError(f"{path} is an image to explain and is not overwritten; choose another --output.")
        if name not in self._files and path.read_bytes() != content:
            raise FileExistsError(
                f"{path} is not listed in {INDEX} and is not overwritten; move it, or choose another --output."
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """Identify a file whatever its name; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read_index(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {"files": []}
    try:
        index = None if path.is_symlink() else json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        index = None
    if isinstance(index, dict):
        files = index.get("files")
        if isinstance(files, list) and all(isinstance(name, str) for name in files):
            return index
    raise FileExistsError(
        f"{path} is not an index of vit-explain and is not overwritten; move it, or choose another --output."
    )


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON cannot represent, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
