"""Write files that appear whole or not at all; read safetensors files, and check what they hold."""

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
    """Write a whole file of UTF-8 text; what is none is spelt out."""
    write_bytes(path, savable(content).encode("utf-8"))


def savable(text: str) -> str:
    r"""The text with what is no UTF-8 spelt out, as in names of files of another encoding.

    Example:
        >>> savable("caf\udce9")
        'caf\\udce9'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file of tensors and text by name."""
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata=dict(metadata)))  # `save_file` would keep it from the user's group


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the text that `write_tensors` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if savable(str(path)) != str(path):  # which `safe_open` does not take
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return load(content), header.get("__metadata__", {})
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"Expected {path} to be a safetensors file, but it cannot be read: {error}") from error


def check_tensors(path: str | Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[str, ...]]) -> None:
    """Check that a file held the tensors of some names, of any size but none empty.

    Args:
        path: The file, or what else held them, for the error.
        tensors: What it held.
        shapes: A letter for each dimension by name; a letter is of one size in all of them.

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
    """Check the dtype of a tensor that a file held.

    Raises:
        ValueError: If it is none of `allowed`.
    """
    if tensors[name].dtype not in allowed:
        raise ValueError(f"Expected `{name}` in {path} of dtype {allowed[0]} or alike, but got {tensors[name].dtype}.")


def read_json(path: str | Path, metadata: Mapping[str, str], name: str) -> object:
    """A value from the text that a file held.

    Raises:
        ValueError: If it is missing, or no JSON.
    """
    if name not in metadata:
        raise ValueError(f"Expected {path} to hold `{name}`, but it does not.")
    try:
        value: object = json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected `{name}` in {path} to be JSON, but it is not: {error}.") from error
    return value
