"""Run a model once with gradients: which of its modules is the ViT behind its outputs, and what that is fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.losses import WEIGHTS, LossRecorder
from vit_explain_callback.vit.recorder import AttentionCall, AttentionRecorder
from vit_explain_callback.vit.timm import is_timm_vit


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        outputs: What the run gave.
        fed: The first images, (B, C, H, W), that reached the ViT, or else any module; None if none did. What weights
            have a share in, such as a stem's features, are no images: they change as the model learns.
        feed: Path of the module that was called with them.
        attends: Whether attention was seen.
        vit: Path of the ViT; None where it is no model of timm's, and nothing else says which module it is.
    """

    outputs: Tensor
    fed: Tensor | None
    feed: str
    vit: str | None
    attends: bool


def look(
    model: nn.Module,
    run: Callable[[], Tensor],
    vit: str | None = None,
    needs_vit: bool = True,
    weights: Sequence[Tensor] = (),
) -> Look:
    """Watch a model while `run` runs it.

    Args:
        model: A twin.
        run: Runs it, and gives its outputs.
        vit: Path of the ViT, where the user says it.
        needs_vit: Whether images are those that reach a ViT; else those that reach any module first.
        weights: Parameters, beside the model's own, of what runs before it.

    Raises:
        ValueError: If the outputs come from several ViTs, or not from the one at `vit`.
    """
    images: list[tuple[str, Tensor]] = []
    names = {module: name for name, module in model.named_modules()}
    lists = {name: _list_around(model, name) for name in names.values()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def noted(part: Any) -> Any:
            if not isinstance(part, Tensor) or part.ndim != 4:
                return part
            name = names[module]
            if not flow.of(part) & WEIGHTS and not any(_within(call.module, lists[name]) for call in recorder.calls):
                images.append((name, part.detach().clone()))  # a copy, as it may be normalised in place
            # The graph begins here, as no parameter of a twin asks for a gradient.
            begins = part.is_floating_point() and not part.requires_grad
            return part.detach().requires_grad_().clone() if begins else part

        return tuple(map(noted, args)), {name: noted(part) for name, part in kwargs.items()}

    recorder, losses = AttentionRecorder(model, begins_graph=True), LossRecorder()
    flow = losses.flow
    flow.mark([*weights, *model.parameters()], WEIGHTS)
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in names]
    try:
        with torch.enable_grad(), recorder, losses:
            outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    read = _read(recorder.calls, outputs)
    found = _vit(model, read, images, vit) if needs_vit else None
    if vit is not None and read and not any(_within(call.module, vit) for call in read):
        raise ValueError(
            f"Expected the outputs to depend on the Vision Transformer at `vit={vit!r}`, but they come from "
            f"`{read[0].module}`. Leave `vit` out, or give the outputs that depend on it with `forward=`."
        )
    inside = [(path, given) for path, given in images if f"{path}.".startswith(f"{found}." if found else "")]
    first = next(iter(inside or images), None)
    feed, fed = ("", None) if first is None else first
    return Look(outputs.detach(), fed, feed, found, bool(recorder.calls))


def _read(calls: list[AttentionCall], outputs: Tensor | None) -> list[AttentionCall]:
    """The attentions that the outputs depend on; all where that cannot be told."""
    within = [call for call in calls if call.output.requires_grad]
    if outputs is None or not outputs.requires_grad or not within:
        return calls
    gradients = torch.autograd.grad(outputs.sum(), [call.output for call in within], allow_unused=True)
    return [call for call, gradient in zip(within, gradients, strict=True) if gradient is not None] or calls


def _vit(
    model: nn.Module, calls: list[AttentionCall], images: list[tuple[str, Tensor]], asked: str | None
) -> str | None:
    """Path of the ViT that some attentions belong to: one of timm's, or the innermost module called with images."""
    if asked is not None:
        return asked
    known = [name for name, module in model.named_modules() if is_timm_vit(module)]
    fed = {path for path, _ in images}
    owners: dict[str, None] = {}
    for call in calls:
        parts = call.module.split(".")
        around = [".".join(parts[:depth]) for depth in range(len(parts))]
        owner = next((path for path in around if path in known), None)
        owners[owner if owner is not None else max((path for path in around if path in fed), default="", key=len)] = (
            None
        )
    innermost = [path for path in owners if not any(other != path and _within(other, path) for other in owners)]
    if len(innermost) > 1:
        raise ValueError(
            f"Expected the outputs of {model.__class__.__name__} to come from one Vision Transformer, but they come "
            f"from {len(innermost)}: {', '.join(innermost)}. Name the one to explain, as in `vit={innermost[0]!r}`."
        )
    return innermost[0] or None if innermost else None


def _list_around(model: nn.Module, path: str) -> str:
    """Path of the innermost list that a module lies in: images reach no further than its first block."""
    parts = path.split(".")
    around = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    lists = [outer for outer in around if isinstance(model.get_submodule(outer), nn.ModuleList | nn.Sequential)]
    return lists[-1] if lists else path


def _within(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(f"{outer}.")
