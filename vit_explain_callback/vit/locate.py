"""Run a model once with gradients to locate the ViT behind its outputs and the images that reach it."""

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
class LocatedViT:
    """The ViT behind a model's outputs.

    Attributes:
        outputs: Outputs of the run.
        images: The first images, (B, C, H, W), that reached the ViT, or else any module; None if none did. Tensors that
            depend on weights, such as a stem's features, are no images: they change as the model learns.
        feed: Path of the module that was called with them.
        vit: Path of the ViT; None for the model itself, and without attention.
        attends: Whether any attention was recorded.
    """

    outputs: Tensor
    images: Tensor | None
    feed: str
    vit: str | None
    attends: bool


def locate_vit(
    model: nn.Module,
    run: Callable[[], Tensor],
    vit: str | None = None,
    needs_vit: bool = True,
    weights: Sequence[Tensor] = (),
) -> LocatedViT:
    """Run a model once, and find the ViT and its images.

    Args:
        model: A twin.
        run: Runs it, and returns its outputs.
        vit: Path of the ViT, if the user names it.
        needs_vit: Whether the images are those that reach a ViT; else those that reach any module first.
        weights: Parameters of modules that run before the model.

    Raises:
        ValueError: If the outputs come from several ViTs, or not from the one at `vit`.
    """
    outputs, calls, images = _run(model, run, weights)
    read = _calls_read(calls, outputs)
    path = (_vit_path(model, read, images) if vit is None else vit) if needs_vit else None
    if vit is not None and read and not any(_within(call.module, vit) for call in read):
        raise ValueError(
            f"Expected the outputs to depend on the Vision Transformer at `vit={vit!r}`, but they come from "
            f"`{read[0].module}`. Leave `vit` out, or give the outputs that depend on it with `forward=`."
        )
    inside = [(fed, tensor) for fed, tensor in images if not path or _within(fed, path) or fed == path]
    feed, first = next(iter(inside or images), ("", None))
    return LocatedViT(outputs.detach(), first, feed, path, bool(calls))


def _run(
    model: nn.Module, run: Callable[[], Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[AttentionCall], list[tuple[str, Tensor]]]:
    """Outputs of a run, the attention in it, and the images that entered each module, with its path."""
    images: list[tuple[str, Tensor]] = []
    names = {module: name for name, module in model.named_modules()}
    lists = {name: _list_around(model, name) for name in names.values()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def record(part: Any) -> Any:
            if not isinstance(part, Tensor) or part.ndim != 4:
                return part
            name = names[module]
            if not flow.of(part) & WEIGHTS and not any(_within(call.module, lists[name]) for call in recorder.calls):
                images.append((name, part.detach().clone()))  # a copy, as it may be normalised in place
            # The graph begins here, as no parameter of a twin asks for a gradient.
            begins = part.is_floating_point() and not part.requires_grad
            return part.detach().requires_grad_().clone() if begins else part

        return tuple(map(record, args)), {name: record(part) for name, part in kwargs.items()}

    recorder, losses = AttentionRecorder(model, begins_graph=True), LossRecorder()
    flow = losses.flow
    flow.mark([*weights, *model.parameters()], WEIGHTS)
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in names]
    try:
        with torch.enable_grad(), recorder, losses:
            return run(), recorder.calls, images
    finally:
        for handle in handles:
            handle.remove()


def _calls_read(calls: list[AttentionCall], outputs: Tensor | None) -> list[AttentionCall]:
    """The attention that the outputs depend on; all of it if that cannot be told."""
    in_graph = [call for call in calls if call.output.requires_grad]
    if outputs is None or not outputs.requires_grad or not in_graph:
        return calls
    gradients = torch.autograd.grad(outputs.sum(), [call.output for call in in_graph], allow_unused=True)
    return [call for call, gradient in zip(in_graph, gradients, strict=True) if gradient is not None] or calls


def _vit_path(model: nn.Module, calls: list[AttentionCall], images: list[tuple[str, Tensor]]) -> str | None:
    """Path of the ViT that ran this attention: a timm ViT, or the innermost module called with images."""
    timm_vits = {name for name, module in model.named_modules() if is_timm_vit(module)}
    fed = {path for path, _ in images}
    owners: dict[str, None] = {}
    for call in calls:
        parts = call.module.split(".")
        around = [".".join(parts[:depth]) for depth in range(len(parts))]
        innermost_fed = max((path for path in around if path in fed), default="", key=len)
        owners[next((path for path in around if path in timm_vits), innermost_fed)] = None
    innermost = [path for path in owners if not any(other != path and _within(other, path) for other in owners)]
    if len(innermost) > 1:
        raise ValueError(
            f"Expected the outputs of {model.__class__.__name__} to come from one Vision Transformer, but they come "
            f"from {len(innermost)}: {', '.join(innermost)}. Name the one to explain, as in `vit={innermost[0]!r}`."
        )
    return innermost[0] or None if innermost else None


def _list_around(model: nn.Module, path: str) -> str:
    """Path of the innermost list around a module, else its own: images reach no further than the first block."""
    parts = path.split(".")
    around = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    lists = [outer for outer in around if isinstance(model.get_submodule(outer), nn.ModuleList | nn.Sequential)]
    return lists[-1] if lists else path


def _within(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(f"{outer}.")
