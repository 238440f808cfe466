"""Measure whether a model's blocks treat their tokens as a set, so that tokens of patches can be left out.

Tokens that got their position before the first block can enter it in any order: the logits stay the same. Blocks that
know positions themselves (rotary embeddings, relative biases, convolutions, masks) give other logits, and mistake
positions when tokens are missing, without raising anything. So the order is changed both with all tokens and with as
many left out as will be.

Shapes: B images, N tokens, n of them remaining, P patches, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vit_explain_callback.isolation.undisturbed import preserved_random_state
from vit_explain_callback.vit.session import Session, is_out_of_memory
from vit_explain_callback.vit.tokens import TokenLayout

_TOLERANCE = 0.01
"""Largest change of the logits by the order of tokens, relative to the change by leaving tokens out."""
_ROUNDINGS = 8
"""The same in half precision, in units of its epsilon. A change this small relative to the logits proves nothing."""
_ORDERS = 2


def treats_tokens_as_set(session: Session, images: Tensor, layout: TokenLayout, counts: Sequence[int]) -> bool | None:
    """Whether the logits, (B, C), of images that were explained before are independent of the order of patches.

    The same is then asked with each of `counts` patches left out, from the beginning, the middle, the end or anywhere.
    Each count takes two passes, and the whole images three.

    Returns:
        None if it cannot be told: the logits are not finite, or do not depend on the tokens, as with a classifier that
        is all zero, or the order changes them by no more than rounding does.

    Raises:
        Exception: Whatever the model raises for whole images, and out-of-memory errors.
    """
    generator = torch.Generator().manual_seed(0)
    whole = _logits(session, images, None)
    if not whole.isfinite().all():
        return None
    none = torch.zeros(len(images), layout.grid[0] * layout.grid[1], dtype=torch.bool)
    changes, errors = [0.0], []  # of the logits, by leaving tokens out and by their order
    try:
        for removed in [none] * _ORDERS + list(_removed(none, counts, generator)):
            in_order = _logits(session, images, layout.remaining(removed)) if removed.any() else whole
            changes.append(_distance(in_order, whole))
            errors.append(_distance(_logits(session, images, _shuffled(layout, removed, generator)), in_order))
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False  # blocks that take only the full number of tokens
    if max(changes) == 0:
        return None
    rounding = _ROUNDINGS * torch.finfo(whole.dtype).eps
    if all(error <= max(_TOLERANCE, rounding) * max(changes) for error in errors):  # not so for NaN
        return True
    return None if all(error <= rounding * whole.double().pow(2).mean().sqrt() for error in errors) else False


def _logits(session: Session, images: Tensor, index: Tensor | None) -> Tensor:
    """The logits, (B, C), in the precision of the model, with the tokens at `index`, (B, n), or with all."""
    with torch.no_grad(), preserved_random_state(seed=0):
        if index is None:
            return session.logits(images.clone()).cpu()
        with session.entered_by(images, index.to(images.device)):
            return session.logits(images.clone()).cpu()


def _removed(none: Tensor, counts: Sequence[int], generator: torch.Generator) -> Iterator[Tensor]:
    """Patches to leave out, (B, P) boolean, for each of `counts` in another part of the image."""
    patches = none.shape[1]
    for place, count in enumerate(counts):
        if place < 3:
            start = (0, (patches - count) // 2, patches - count)[place]
            yield none.index_fill(1, torch.arange(start, start + count), True)
        else:
            yield torch.rand(none.shape, generator=generator).argsort(dim=1) < count


def _shuffled(layout: TokenLayout, removed: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of the remaining tokens, (B, n), the patches among them in another order for each image."""
    index = layout.remaining(removed)
    first, count = layout.first_patch, int((~removed[0]).sum())
    order = torch.rand(len(index), count, generator=generator).argsort(dim=1)
    index[:, first : first + count] = index[:, first : first + count].gather(1, order)
    return index


def _distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference."""
    return (one.double() - other.double()).pow(2).mean().sqrt().item()
