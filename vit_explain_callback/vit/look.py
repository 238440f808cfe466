"""Watch a model run once: what it was fed; of a ViT, which of several the outputs come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.capture import AttentionCall, AttentionRecorder
from vit_explain_callback.vit.losses import Loss, LossWatcher
from vit_explain_callback.vit.timm import is_timm_vit


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        losses: Those with a row of outputs for each image, losses of classes first.
        fed: The first images, (B, C, H, W), that reached the ViT, or any module; None if none did.
        feed: Path of the module that was called with them.
        vit: Path of the ViT; None where it is no model of timm's, and nothing else says which module it is.
        called: What the model itself was called with and gave, if it was called.
        error: What stopped the run, if anything did.
    """

    losses: list[Loss]
    fed: Tensor | None
    feed: str
    vit: str | None
    called: list[tuple[tuple[Any, ...], Any]]
    error: Exception | None


def look(model: nn.Module, run: Callable[[], object], vit: str | None = None) -> Look:
    """Watch a model while `run` runs it.

    Args:
        model: A twin.
        run: Runs it.
        vit: Path of the ViT, where the user says it.

    Raises:
        ValueError: If the outputs come from several ViTs.
    """
    images: list[tuple[str, Tensor]] = []
    called: list[tuple[tuple[Any, ...], Any]] = []
    names = {module: name for name, module in model.named_modules()}
    lists = {name: _list_around(model, name) for name in names.values()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def noted(part: Any) -> Any:
            if not isinstance(part, Tensor) or part.ndim != 4:
                return part
            name = names[module]
            if not any(_within(call.module, lists[name]) for call in recorder.calls):
                images.append((name, part.detach().clone()))  # a copy, as it may be normalised in place
            # The graph begins here, as no parameter of a twin asks for a gradient.
            begins = part.is_floating_point() and not part.requires_grad
            return part.detach().requires_grad_().clone() if begins else part

        return tuple(map(noted, args)), {name: noted(part) for name, part in kwargs.items()}

    recorder = AttentionRecorder(model, begins_graph=True)
    with recorder:
        losses, error = _watched(model, run, enter, called)
    outputs = losses[0].outputs if losses else _first_tensor([output for _, output in called])
    found = _vit(model, _read(recorder.calls, outputs), images, vit)
    inside = [(path, given) for path, given in images if f"{path}.".startswith(f"{found}." if found else "")]
    feed, fed = inside[0] if inside else ("", None)
    of_images = [loss for loss in losses if fed is not None and loss.is_of(len(fed))]
    return Look(of_images, None if fed is None else fed.detach(), feed, found, called, error)


def look_at_any(model: nn.Module, run: Callable[[], object]) -> Look:
    """Watch any model while `run` runs it: its images are the first floating-point (B, C, H, W) that a module is given.

    Args:
        model: A twin.
        run: Runs it.
    """
    images: list[tuple[str, Tensor]] = []
    called: list[tuple[tuple[Any, ...], Any]] = []
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for part in () if images else (*args, *kwargs.values()):
            if isinstance(part, Tensor) and part.ndim == 4 and part.is_floating_point() and not images:
                images.append((names[module], part.detach().clone()))  # a copy, as it may be normalised in place

    losses, error = _watched(model, run, enter, called)
    feed, fed = images[0] if images else ("", None)
    of_images = [loss for loss in losses if fed is not None and loss.is_of(len(fed))]
    return Look(of_images, fed, feed, None, called, error)


def _watched(
    model: nn.Module, run: Callable[[], object], enter: Callable[..., Any], called: list[tuple[tuple[Any, ...], Any]]
) -> tuple[list[Loss], Exception | None]:
    """Run a model with `enter` before every module, and note what the model itself was `called` with, and gave.

    Returns:
        Every loss, and what stopped the run, if anything did.
    """
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    handles.append(model.register_forward_hook(lambda _, args, output: called.append((args, output))))
    error: Exception | None = None
    with torch.enable_grad(), LossWatcher() as watcher:
        try:
            run()
        except Exception as raised:
            error = raised
    for handle in handles:
        handle.remove()
    return watcher.losses, error


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
            f"Expected the outputs of {type(model).__name__} to come from one Vision Transformer, but they come from "
            f"{len(innermost)}: {', '.join(innermost)}. Name the one to explain, as in `vit={innermost[0]!r}`."
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


def _first_tensor(outputs: list[Any]) -> Tensor | None:
    candidates = (getattr(output, "logits", output) for output in outputs)
    return next((output for output in candidates if isinstance(output, Tensor)), None)
