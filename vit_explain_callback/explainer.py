"""Explain a Vision Transformer's predictions: any number of methods from one forward and one backward pass.

Shapes: B images, C channels of the image or classes of the logits, N tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vit_explain_callback.capture import AttentionCall, AttentionRecorder
from vit_explain_callback.experiment import observed_layout
from vit_explain_callback.isolation import undisturbed
from vit_explain_callback.layout import TokenLayout
from vit_explain_callback.methods import GradRollout, Method, resolve_methods
from vit_explain_callback.rollout import HeadFuser, discard_lowest, rollout_step
from vit_explain_callback.stack import Stack, find_stack
from vit_explain_callback.vit import find_vit, is_timm_vit, num_classes, refuse_other_timm_models, timm_layout

# Attention entries alive at once: 128 MiB in float32, and as much again for their gradients.
_CHUNK_ENTRIES = 2**25


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
    if not is_timm_vit(found):
        refuse_other_timm_models(found)
    if model is found and any(isinstance(method, GradRollout) for method in resolved):
        check_classifier(found)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"Expected `batch_size` of at least 1, or None, but got {batch_size}.")
    targets = _as_targets(target, len(images))
    parameter = next(found.parameters())
    with undisturbed(model):
        parts = [
            _explain_batch(model, found, part.to(parameter, copy=True), resolved, part_targets)
            for part, part_targets in _batches(images, targets, batch_size or len(images))
        ]
    return Explanation(
        maps={name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps},
        logits=torch.cat([part.logits for part in parts]),
        target=torch.cat([part.target for part in parts]),
    )


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of normalised images.

    Raises:
        TypeError: If `images` is not a floating-point tensor.
        ValueError: If it is not (B, C, H, W) with B >= 1, holds NaN or Inf, or looks like bytes.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"Expected `images` to be a floating-point tensor, normalised for the model, but got {got}.")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"Expected `images` of shape (B, C, H, W) with B >= 1, but got {tuple(images.shape)}.")
    if not images.isfinite().all():
        raise ValueError("Expected `images` to be finite, but they hold NaN or Inf.")
    if images.abs().max() > 50:
        raise ValueError(
            f"Expected `images` normalised as the model expects, but got values up to {images.abs().max():.0f}, as of "
            "bytes. Divide by 255, subtract the mean and divide by the standard deviation."
        )


def check_classifier(vit: nn.Module) -> None:
    """Refuse a ViT that returns features, where its output is to be taken for logits.

    Raises:
        ValueError: If it has no classifier.
    """
    if num_classes(vit) == 0:
        raise ValueError(
            f"Expected logits from {type(vit).__name__}, but it has no classifier (`num_classes` is 0). Explain the "
            "module whose forward turns images into logits, or give the ViT one with `reset_classifier`."
        )


def check_start_layers(methods: Sequence[Method], blocks: int) -> None:
    """Refuse methods that start past the last block.

    Raises:
        ValueError: If one does.
    """
    for method in methods:
        if method.start_layer > blocks:
            raise ValueError(
                f"Expected `start_layer` in 1 … {blocks} (the model's blocks), but {method.name} has "
                f"{method.start_layer}."
            )


def check_target(target: Tensor, classes: int) -> None:
    """Refuse classes that the model's head does not have.

    Raises:
        ValueError: If an entry of `target`, (B,), lies outside 0 … classes - 1.
    """
    if ((target < 0) | (target >= classes)).any():
        raise ValueError(
            f"Expected `target` classes in 0 … {classes - 1} (the model's logits), but got {target.tolist()}."
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


def _explain_batch(
    model: nn.Module, vit: nn.Module, images: Tensor, methods: Sequence[Method], target: Tensor | None
) -> Explanation:
    layout = timm_layout(vit, images.shape[1:]) if is_timm_vit(vit) else None
    with_gradients = any(isinstance(method, GradRollout) for method in methods)
    with torch.set_grad_enabled(with_gradients):
        # The input carries the graph through a frozen backbone; the parameters' flags are left alone.
        images = images.detach().requires_grad_(with_gradients)
        with AttentionRecorder(vit) as recorder:
            logits = _logits(model(images), len(images))
        stack = find_stack(vit, recorder, len(images))
        recorder.calls.clear()
        check_start_layers(methods, len(stack.calls))
        target = logits.detach().argmax(dim=1) if target is None else target.to(logits.device)
        check_target(target, logits.shape[1])
        if layout is None:
            layout = _observed(model, stack, images)
            stack = stack if layout.readout is None else replace(stack, pool=None)  # a pool that no logit depends on
        _check_tokens(stack, layout)
        blocks, pool = stack.calls, stack.pool
        gradients: list[Tensor | None] = [None] * len(blocks)
        if with_gradients:
            gradients = _output_gradients(logits, target, blocks if pool is None else [*blocks, pool])
    with torch.no_grad():
        pool_gradient = gradients.pop() if len(gradients) > len(blocks) else None
        rows = {method: _start_row(method, layout, blocks[-1], pool, pool_gradient) for method in methods}
        _fold(rows, blocks, gradients, layout.class_token)
    maps = {method.name: layout.to_grid(row) for method, row in rows.items()}
    return Explanation(maps, logits.detach(), target)


def _observed(model: nn.Module, stack: Stack, images: Tensor) -> TokenLayout:
    def forward(images: Tensor) -> Tensor:
        return _logits(model(images), len(images))

    with torch.no_grad():
        return observed_layout(forward, stack.blocks[0], stack.blocks[-1], stack.tokens, images, stack.pool is not None)


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


def _logits(output: object, count: int) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected the model to return a tensor of logits, (B, C), but got {type(output).__name__}.")
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
                "`torch.no_grad()` or `detach()` out of the model's forward (freeze parameters with `requires_grad` "
                "instead), or leave out gradient rollout."
            )
    return list(reached)


def _start_row(
    method: Method, layout: TokenLayout, last: AttentionCall, pool: AttentionCall | None, gradient: Tensor | None
) -> Tensor:
    """(B, N) relevance of the last block's output tokens."""
    example = last.attention(slice(0, 1), slice(0, 1))
    if pool is None:
        assert layout.readout is not None
        return layout.readout.to(example).repeat(last.shape[0], 1)
    fused = _fused(pool, gradient, slice(None), {method})[method].mean(dim=1)
    row = fused.new_zeros(fused.shape[0], layout.tokens)
    row[:, layout.patches if fused.shape[1] < layout.tokens else slice(None)] = fused / fused.sum(dim=1, keepdim=True)
    return row


def _fold(
    rows: dict[Method, Tensor], calls: list[AttentionCall], gradients: list[Tensor | None], class_token: int | None
) -> None:
    """Carry `rows` (B, N) from the last block to the first, in place; a block's tensors are let go once it is done."""
    while calls:
        layer = len(calls)
        call, gradient = calls.pop(), gradients.pop()
        active = {method for method in rows if method.start_layer <= layer}
        batch, heads, tokens, _ = call.shape
        step = max(1, _CHUNK_ENTRIES // (heads * tokens * tokens))
        for start in range(0, batch, step):
            images = slice(start, min(start + step, batch))
            for method, fused in _fused(call, gradient, images, active).items():
                kept = discard_lowest(fused, method.discard_ratio, class_token)
                rows[method][images] = rollout_step(rows[method][images], kept)


def _fused(call: AttentionCall, gradient: Tensor | None, images: slice, methods: set[Method]) -> dict[Method, Tensor]:
    """F of some images for each method, (b, N, M); methods that differ only later share one tensor."""
    fusers = {(method.kind, method.head_fusion): HeadFuser(method.head_fusion) for method in methods}
    _, heads, queries, keys = call.shape
    step = max(1, _CHUNK_ENTRIES // (queries * keys))
    for start in range(0, heads, step):
        chunk = slice(start, min(start + step, heads))
        attention = call.attention(images, chunk)
        for (kind, _), fuser in fusers.items():
            if kind == "rollout":
                fuser.add(attention)
        if any(kind == "grad_rollout" for kind, _ in fusers):
            assert gradient is not None
            weighted = call.attention_gradient(gradient, images, chunk).mul_(attention)
            for (kind, _), fuser in fusers.items():
                if kind == "grad_rollout":
                    fuser.add(weighted)
    fused = {
        (kind, fusion): fuser.result() if kind == "rollout" else fuser.result().relu_()
        for (kind, fusion), fuser in fusers.items()
    }
    return {method: fused[method.kind, method.head_fusion] for method in methods}
