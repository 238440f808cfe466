"""Explain the predictions for one batch of images, for one class or for several."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import Unpack

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.map_function import (
    AnyMethod,
)
from vit_explain_callback.options.model import ModelOptions


def explain(
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str | AnyMethod] = ("rollout", "grad_rollout"),
    target: int | Tensor | None = None,
    *,
    batch_size: int | None = None,
    block_statistics: bool = False,
    query: tuple[int, int] | None = None,
    **options: Unpack[ModelOptions],
) -> Explanation:
    """Explain which patches the predictions of a Vision Transformer draw on, by one method or several.

    With `MapFunction`s alone, the model can be any classifier.

    The model runs in evaluation mode and outside autocast, and is left unchanged, training flags, gradients, buffers
    and random streams included. Attention runs in the model's own kernel, except with few tokens on a CPU where no
    method depends on the class: there it is computed explicitly, and logits and maps differ in the last bits.

    Args:
        model: A ViT, or any module that holds exactly one and returns logits for a batch of images. For functions
            alone, any module that returns logits.
        images: (B, C, H, W), normalised as the model expects. Moved to the model's device and dtype.
        methods: Names (`"rollout"`, `"grad_rollout_max_0.9"`, `"chefer"`, `"attention_block12_head3"`, …) or objects
            (`AttentionRollout()`, `Chefer()`, `MapFunction("mine", function)`, …).
        target: Class to explain: None for the predicted one, one index for all images, or (B,) integer indices.
        batch_size: Images per pass; None takes all at once. It changes memory, not results.
        block_statistics: Whether to compute what each block attends to; see `BlockStatistics`.
        query: Patch as (row, column), counted from 0, whose attention is followed instead of the classifier's. For
            methods that do not depend on the class.
        **options: Facts about the model; see `ModelOptions`.

    A head with one logit z counts as two classes with the logits -z/2 and z/2, so that their softmax is the sigmoid of
    z. If an image has several labels, `target` names the one to explain.

    Returns:
        Maps, logits and targets, on the model's device. In a notebook it is shown as a figure.

    Raises:
        TypeError: If images, target, methods or the model's output are of the wrong type.
        ValueError: If they are of the wrong shape or range, or if the model's attention cannot be rolled out.
        RuntimeError: If a `MapFunction` fails, or does not return maps.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> explanation = explain(model, torch.zeros(1, 3, 224, 224), ["rollout", "grad_rollout_max"])
        >>> {name: tuple(maps.shape) for name, maps in explanation.maps.items()}
        {'rollout': (1, 14, 14), 'grad_rollout_max': (1, 14, 14)}
    """
    explainer = Explainer(model, methods, **options)
    return explainer(images, target, batch_size=batch_size, block_statistics=block_statistics, query=query)


def explain_targets(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int | Tensor | None],
    *,
    methods: Sequence[str | AnyMethod] = ("rollout", "grad_rollout"),
    batch_size: int | None = None,
    **options: Unpack[ModelOptions],
) -> list[Explanation]:
    """Explain the same images for several targets, from one forward pass and one backward pass for each target.

    Args:
        model: As for `explain`, like the others.
        images: (B, C, H, W).
        targets: Each as `explain` takes one: None, one index, or (B,) integer indices.
        methods: Names or objects.
        batch_size: Images per pass.
        **options: As for `explain`.

    Returns:
        One explanation for each target; they share the maps of methods that do not depend on it.

    Raises:
        TypeError: As `explain`.
        ValueError: As `explain`, and if there is no target.
    """
    return Explainer(model, methods, **options).for_targets(images, targets, batch_size=batch_size)
