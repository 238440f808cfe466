"""Write files atomically; read safetensors files and check their contents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a partial file that replaces `path` at the end, but not after an error or if the process is killed.

    Raises:
        OSError: If `path` is a symbolic link, which may point out of its folder.
    """
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link and is not overwritten; delete it first.")
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically; what UTF-8 cannot encode is escaped."""
    write_bytes(path, savable(content).encode("utf-8"))


def savable(text: str) -> str:
    r"""Escape what UTF-8 cannot encode, as in file names of another encoding.

    Example:
        >>> savable("caf\udce9")
        'caf\\udce9'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and text to a safetensors file, atomically."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata=dict(metadata)))  # `save_file` would deny the user's group access


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the text of a safetensors file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if savable(str(path)) != str(path):  # `safe_open` refuses such paths
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return load(content), header.get("__metadata__", {})
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"Expected {path} to be a safetensors file, but it cannot be read: {error}") from error


def check_tensors(path: str | Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[str, ...]]) -> None:
    """Check that a file contains tensors of these names and shapes, none of them empty.

    Args:
        path: The file, or another source of the tensors, for the error.
        tensors: Its tensors by name.
        shapes: A letter for each dimension, by name; a letter stands for one size in all tensors.

    Raises:
        ValueError: If one is missing or has another shape.
    """
    sizes: dict[str, int] = {}
    for name, letters in shapes.items():
        if name not in tensors:
            raise ValueError(f"Expected {path} to hold `{name}`, but it does not.")
        shape = tuple(tensors[name].shape)
        expected = [f"{letter} = {sizes[letter]}" if letter in sizes else letter for letter in letters]
        same = len(shape) == len(letters) and 0 not in shape
        if not same or any(sizes.setdefault(letter, size) != size for letter, size in zip(letters, shape, strict=True)):
            raise ValueError(f"Expected `{name}` in {path} of shape ({', '.join(expected)}), but got {shape}.")


def check_dtype(path: str | Path, tensors: Mapping[str, Tensor], name: str, allowed: tuple[torch.dtype, ...]) -> None:
    """Check the dtype of a tensor from a file.

    Raises:
        ValueError: If it is not one of `allowed`.
    """
    if tensors[name].dtype not in allowed:
        raise ValueError(f"Expected `{name}` in {path} of dtype {allowed[0]} or alike, but got {tensors[name].dtype}.")


def read_json(path: str | Path, metadata: Mapping[str, str], name: str) -> object:
    """Parse a JSON value from the text of a file.

    Raises:
        ValueError: If it is missing or not JSON.
    """
    if name not in metadata:
        raise ValueError(f"Expected {path} to hold `{name}`, but it does not.")
    try:
        value: object = json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected `{name}` in {path} to be JSON, but it is not: {error}.") from error
    return value
