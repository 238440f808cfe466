"""Locate the ViT behind the outputs of an adapter, in one of its parts or in the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from vit_explain_callback.lightning.adapter import LightningAdapter
from vit_explain_callback.lightning.steps import CURE
from vit_explain_callback.vit.locate import LocatedViT, locate_vit


def locate_vit_of(adapter: LightningAdapter, inputs: Tensor, needs_vit: bool) -> LocatedViT:
    """Run a twin of the adapter's module, and see which ViT its outputs come from and which images reach it.

    Args:
        adapter: Runs the module; its `vit` is the path that the user names, or None.
        inputs: Inputs of the first part, (B, …); they are ignored if the step runs.
        needs_vit: Whether the images are those that reach a ViT; else those that reach any module first.

    Returns:
        The ViT and its images, with paths from the module.

    Raises:
        ValueError: If the outputs come from several ViTs, or from another than the one that the user names.
    """
    for path in _candidates(adapter):
        located = _locate_in(adapter, path, inputs, needs_vit)
        if located.attends or not needs_vit:
            break
    if located.images is None and adapter.parts:
        located = replace(located, images=inputs, feed=adapter.parts[0])  # earlier parts turn them into features
    else:
        located = replace(located, feed=_joined(path, located.feed))
    return replace(located, vit=_joined(path, located.vit or "") or None)


def _candidates(adapter: LightningAdapter) -> list[str]:
    """The parts that may hold the ViT.

    Raises:
        ValueError: If the user's `vit` lies in none of them.
    """
    vit, parts = adapter.vit, adapter.parts or ("",)
    candidates = [path for path in parts if vit is None or _is_inside(vit, path) or _is_inside(path, vit)]
    if not candidates:
        raise ValueError(
            f"Expected `vit` to name the ViT that the loss depends on, inside `{parts[0]}`, but got {vit!r}. {CURE}"
        )
    return candidates


def _locate_in(adapter: LightningAdapter, path: str, inputs: Tensor, needs_vit: bool) -> LocatedViT:
    """Locate the ViT in the part at `path`, with paths from that part."""
    with adapter.evaluating() as twin:
        root = twin.module
        copied = inputs.to(adapter.model.device, copy=True)

        def run() -> Any:
            if adapter.parts:
                return adapter.of_parts(root, copied)
            return adapter.of_step(root, list(range(adapter.count)))

        parts = [root.get_submodule(part) for part in adapter.parts if part]
        weights = [weight for part in parts for weight in part.parameters()]
        return locate_vit(root.get_submodule(path), run, _inside_part(adapter.vit, path), needs_vit, weights)


def _inside_part(vit: str | None, path: str) -> str | None:
    """Path of the user's `vit` inside the part at `path`; None if the part lies inside it."""
    if vit is None or vit == path:
        return None if vit is None else ""
    return vit.removeprefix(f"{path}." if path else "") if _is_inside(vit, path) else None


def _is_inside(path: str, outer: str) -> bool:
    return not outer or f"{path}.".startswith(f"{outer}.")


def _joined(*paths: str) -> str:
    return ".".join(filter(None, paths))
