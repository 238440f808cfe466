"""Write files that appear whole or not at all, and read safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; after an error, or if the process is killed, nothing does.

    Raises:
        OSError: If `path` is a symbolic link, which would lead out of its folder.
    """
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link and is not written through; delete it first.")
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole file of UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file of tensors and text by name."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(whole, partial, metadata=dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the text that `write_tensors` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"Expected {path} to be a safetensors file, but it cannot be read: {error}") from error
