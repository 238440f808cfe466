"""Work on a batch in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TypeAlias, TypeVar

from torch import Tensor

from vit_explain_callback.vit.adapter import Subject

T = TypeVar("T")
Agreement: TypeAlias = Callable[[bool], bool]
"""Told after each part whether memory did not suffice for it, says whether it did not on any process."""
_agreement: ContextVar[Agreement] = ContextVar("_agreement", default=bool)


class OutOfMemoryElsewhere(BaseException):
    """Memory did not suffice for this part on another process; no `Exception`, as a model might catch it."""


@contextmanager
def agreeing(agreement: Agreement) -> Iterator[None]:
    """Inside, all processes work in parts of the same sizes."""
    token = _agreement.set(agreement)
    try:
        yield
    finally:
        _agreement.reset(token)


def in_parts(
    subject: Subject, images: Tensor, size: int, first: int, work: Callable[[Subject, slice, Tensor], T]
) -> list[T]:
    """Do `work` on copies of a few images at a time; on fewer where memory does not suffice.

    Args:
        subject: What is run.
        images: (B, C, H, W), copied onto the model's device and into its precision.
        size: Images at a time, at least 1.
        first: Place of the first image in the probe.
        work: Given the subject, the place of the images in the batch, and the copies.

    Returns:
        What `work` gave for each part, in order.
    """
    weights = list(subject.vit.parameters())
    device = next((part.device for part in weights), images.device)
    dtype = next((part.dtype for part in weights if part.is_floating_point()), images.dtype)
    parts: list[T] = []
    start = 0
    while start < len(images):
        part = slice(start, start + size)
        own = images[part]
        own = own.to(device, dtype if own.is_floating_point() else own.dtype, copy=True)
        try:
            found = work(replace(subject, first=first + start), part, own)
            too_large = _agreement.get()(False)
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            too_large = _agreement.get()(True)
        except OutOfMemoryElsewhere:
            too_large = True
        if too_large:
            size = (size + 1) // 2
        else:
            parts.append(found)
            start += size
    return parts


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says so; only CUDA has an exception of its own for it."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "can't allocate memory", "not enough memory"))
