"""Explain a Vision Transformer's predictions: any number of methods from one forward and one backward pass.

Shapes: B images, C channels of the image or classes of the logits, N tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vit_explain_callback.capture import AttentionCall, AttentionRecorder
from vit_explain_callback.checks import check_classifier, check_images, check_start_layers, check_target
from vit_explain_callback.experiment import observed_layout, tokens_read
from vit_explain_callback.fold import fold
from vit_explain_callback.isolation import undisturbed
from vit_explain_callback.layout import StatedLayout, TokenLayout
from vit_explain_callback.methods import GradRollout, Method, resolve_methods
from vit_explain_callback.stack import Stack, find_stack
from vit_explain_callback.vit import find_vit, refuse_other_timm_models, timm_layout

LogitsOf: TypeAlias = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found for a batch.

    Attributes:
        maps: Relevance of each patch by method name, (B, grid_h, grid_w), raw: patches and prefix tokens together sum
            to 1. Float32, or float64 for a float64 model.
        logits: (B, C).
        target: Class whose logit the gradients are of, (B,).
    """

    maps: dict[str, Tensor]
    logits: Tensor
    target: Tensor


def explain(
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str | Method] = ("rollout", "grad_rollout"),
    target: int | Tensor | None = None,
    batch_size: int | None = None,
    *,
    vit: str | None = None,
    forward: LogitsOf | None = None,
    prefix_tokens: int | None = None,
    grid_size: tuple[int, int] | None = None,
) -> Explanation:
    """Explain the predictions of a Vision Transformer with attention rollout and gradient rollout.

    The model runs in evaluation mode and outside autocast, with its own attention kernel, and is left as it was found:
    training flags, gradients, buffers and random streams included.

    Args:
        model: A ViT, or any module that holds exactly one and returns logits for a batch of images.
        images: (B, C, H, W), normalised as the model expects. Moved to the model's device and dtype.
        methods: Names (`"rollout"`, `"grad_rollout"`, `"rollout_max_0.9"`, …) or `Rollout` and `GradRollout` objects.
        target: Class to explain: None for the predicted one, one index for all images, or (B,) integer indices.
        batch_size: Images per pass; None takes all at once. It changes memory, not results.
        vit: Attribute path of the ViT inside `model`, needed where it holds several.
        forward: How to get logits (B, C) from `model` and images, if not by `model(images)`.
        prefix_tokens: Number of tokens before the patches, where the layout of the tokens cannot be told.
        grid_size: Patches as (grid_h, grid_w), likewise.

    A head with one logit z counts as two classes with the logits -z/2 and z/2, so that their softmax is the sigmoid of
    z. With several labels an image, `target` names the one to explain.

    Returns:
        Maps, logits and targets, on the model's device.

    Raises:
        TypeError: If images, target, methods or the model's output are of the wrong type.
        ValueError: If they are of the wrong shape or range, or if the model's attention cannot be rolled out.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> explanation = explain(model, torch.zeros(1, 3, 224, 224), ["rollout", "grad_rollout_max"])
        >>> {name: tuple(maps.shape) for name, maps in explanation.maps.items()}
        {'rollout': (1, 14, 14), 'grad_rollout_max': (1, 14, 14)}
    """
    resolved = resolve_methods(methods)
    found = find_vit(model, vit)
    check_images(images)
    refuse_other_timm_models(found)
    if model is found and any(isinstance(method, GradRollout) for method in resolved):
        check_classifier(found)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"Expected `batch_size` of at least 1, or None, but got {batch_size}.")
    targets = _as_targets(target, len(images))
    parameter = next(found.parameters())
    subject = _Subject(model, found, forward or _call, StatedLayout(prefix_tokens, grid_size))
    with undisturbed(model):
        parts = [
            _explain_batch(subject, part.to(parameter, copy=True), resolved, part_targets)
            for part, part_targets in _batches(images, targets, batch_size or len(images))
        ]
    return Explanation(
        maps={name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps},
        logits=torch.cat([part.logits for part in parts]),
        target=torch.cat([part.target for part in parts]),
    )


def _as_targets(target: int | Tensor | None, count: int) -> Tensor | None:
    if target is None:
        return None
    if isinstance(target, int):
        return torch.full((count,), target)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        raise TypeError(f"Expected `target` to be None, an int or an integer tensor, but got {target!r}.")
    if target.shape != (count,):
        raise ValueError(f"Expected `target` of shape ({count},), one per image, but got {tuple(target.shape)}.")
    return target.long()


def _batches(images: Tensor, targets: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(images), size):
        yield images[start : start + size], None if targets is None else targets[start : start + size]


@dataclass(frozen=True)
class _Subject:
    """The model to explain, the ViT in it, and what the user says of them."""

    model: nn.Module
    vit: nn.Module
    forward: LogitsOf
    stated: StatedLayout

    def logits(self, images: Tensor) -> Tensor:
        """(B, C)."""
        return _logits(self.forward(self.model, images), len(images))

    def known_layout(self, image_shape: Sequence[int]) -> TokenLayout | None:
        """The layout of the tokens as timm has it, unless the user says something else."""
        return timm_layout(self.vit, image_shape, self.model is self.vit) if self.stated == StatedLayout() else None

    def layout(self, known: TokenLayout | None, stack: Stack, images: Tensor) -> TokenLayout:
        """The known layout if the logits agree that it is what they read, else what an experiment finds."""
        if known is not None and (self.model is self.vit or self._is_read(known, stack, images)):
            return known
        pooled = stack.pool is not None
        with torch.no_grad():
            seen = observed_layout(self.logits, stack.entry, stack.exit, stack.tokens, images, pooled, self.stated)
        return seen if known is None else replace(seen, class_token=known.class_token)

    def _is_read(self, known: TokenLayout, stack: Stack, images: Tensor) -> bool:
        if known.readout is None or known.tokens != stack.tokens:
            return stack.pool is not None
        read = tokens_read(self.logits, stack.exit, stack.tokens, images[:1].detach())
        return read is None or read == known.readout.nonzero().flatten().tolist()


def _explain_batch(subject: _Subject, images: Tensor, methods: Sequence[Method], target: Tensor | None) -> Explanation:
    known = subject.known_layout(images.shape[1:])
    with_gradients = any(isinstance(method, GradRollout) for method in methods)
    with torch.set_grad_enabled(with_gradients):
        # The input carries the graph through a frozen backbone; the parameters' flags are left alone.
        images = images.detach().requires_grad_(with_gradients)
        with AttentionRecorder(subject.vit, through_no_grad=with_gradients) as recorder:
            logits = subject.logits(images)
        stack = find_stack(subject.vit, recorder, len(images))
        recorder.calls.clear()
        check_start_layers(methods, len(stack.calls))
        target = logits.detach().argmax(dim=1) if target is None else target.to(logits.device)
        check_target(target, logits.shape[1])
        layout = subject.layout(known, stack, images)
        if layout is not known and layout.readout is not None:
            stack = replace(stack, pool=None)  # no logit depends on it
        _check_tokens(stack, layout)
        calls = stack.calls if stack.pool is None else [*stack.calls, stack.pool]
        gradients: list[Tensor | None] = [None] * len(calls)
        if with_gradients:
            gradients = _output_gradients(logits, target, calls)
        del calls
    with torch.no_grad():
        rows = fold(methods, stack, gradients, layout)
    maps = {method.name: layout.to_grid(row) for method, row in rows.items()}
    return Explanation(maps, logits.detach(), target)


def _check_tokens(stack: Stack, layout: TokenLayout) -> None:
    patches = layout.grid[0] * layout.grid[1]
    if stack.tokens != layout.tokens:
        raise ValueError(
            f"Expected `{stack.calls[0].module}` to attend over all {layout.tokens} tokens ({layout.tokens - patches} "
            f"prefix + {layout.grid[0]}x{layout.grid[1]} patches), but its attention is {stack.tokens}x{stack.tokens}: "
            "there is no global attention to roll out."
        )
    if (stack.pool is None) == (layout.readout is None) or (
        stack.pool is not None and stack.pool.shape[3] not in (layout.tokens, patches)
    ):
        seen = "none" if stack.pool is None else f"`{stack.pool.module}` with {stack.pool.shape[3]} keys"
        raise ValueError(
            f"Expected {'an' if layout.readout is None else 'no'} attention-pooling head over the tokens after the "
            f"blocks, but saw {seen}."
        )


def _call(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def _logits(output: object, count: int) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"Expected the model to return a tensor of logits, (B, C), but got {type(output).__name__}. Say how to get "
            "them: `forward=lambda model, images: …`."
        )
    if output.shape in ((count,), (count, 1)):
        half = output.reshape(count, 1) / 2
        output = torch.cat([-half, half], dim=1)
    if output.ndim != 2 or len(output) != count or output.shape[1] == 0:
        raise ValueError(f"Expected the model to return logits of shape ({count}, C), but got {tuple(output.shape)}.")
    return output


def _output_gradients(logits: Tensor, target: Tensor, calls: Sequence[AttentionCall]) -> list[Tensor | None]:
    """∂y_c/∂O of each call. Images do not mix in evaluation mode, so one pass serves the whole batch."""
    outputs = [call.output for call in calls]
    reached: Sequence[Tensor | None] = [None] * len(calls)
    if logits.requires_grad and all(output.requires_grad for output in outputs):
        chosen = logits.gather(1, target[:, None])
        reached = torch.autograd.grad(chosen.sum(), outputs, allow_unused=True)
    for call, gradient in zip(calls, reached, strict=True):
        if gradient is None:
            raise ValueError(
                f"Expected gradients to reach `{call.module}`, but its output is cut off from the logits. Take "
                "`detach()` out of the model's forward (freeze parameters with `requires_grad` instead), or leave out "
                "gradient rollout."
            )
    return list(reached)
