"""Refuse images, models and options that cannot be explained, before a model is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vit_explain_callback._files import INTEGERS
from vit_explain_callback._options import class_index
from vit_explain_callback.methods.base import Method
from vit_explain_callback.methods.map_function import AnyMethod, MapFunction, of_attention
from vit_explain_callback.vit.timm import num_classes
from vit_explain_callback.vit.wrappers import has_twin


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of normalised images.

    Raises:
        TypeError: If `images` is not a floating-point tensor.
        ValueError: If it is not (B, C, H, W) with B >= 1, holds NaN or Inf, or looks like bytes.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"Expected `images` to be a floating-point tensor, normalised for the model, but got {got}.")
    if images.layout is not torch.strided or images.is_meta:
        raise TypeError(
            f"Expected `images` to be a dense tensor with values, but got {images.layout} on {images.device}."
        )
    if images.ndim != 4 or images.numel() == 0:
        cure = (
            " Give the slices of a volume as channels, `images.flatten(1, 2)`, with "
            "`forward=lambda model, images: model(images.unflatten(1, (C, D)))` and `grid_size=` of their patches "
            "below one another."
        )
        raise ValueError(
            f"Expected `images` of shape (B, C, H, W) with B >= 1, but got {tuple(images.shape)}."
            f"{cure if images.ndim == 5 else ''}"
        )
    largest = max(abs(extreme.item()) for extreme in images.aminmax())
    if not math.isfinite(largest):
        raise ValueError("Expected `images` to be finite, but they hold NaN or Inf.")
    if largest > 50:
        raise ValueError(
            f"Expected `images` normalised as the model expects, but got values up to {largest:.0f}, as of bytes. "
            "Divide by 255, subtract the mean and divide by the standard deviation."
        )


def check_classifier(vit: nn.Module) -> None:
    """Refuse a ViT that returns features, where its output is to be taken for logits.

    Raises:
        ValueError: If it has no classifier.
    """
    if num_classes(vit) == 0:
        raise ValueError(
            f"Expected logits from {type(vit).__name__}, but it has no classifier (`num_classes` is 0). Explain the "
            "module whose forward turns images into logits, or give the model one with `reset_classifier`."
        )


def check_layers(methods: Sequence[Method], blocks: int) -> None:
    """Refuse methods with an option that names a block which the model does not have.

    Raises:
        ValueError: If there is one.
    """
    for method in methods:
        method.layers(blocks)


def check_heads(methods: Sequence[Method], heads: Sequence[int]) -> None:
    """Refuse methods with an option that names a head which a block does not have.

    Args:
        methods: Methods.
        heads: H of each block, first block first.

    Raises:
        ValueError: If there is one.
    """
    for method in methods:
        layers, head = method.layers(len(heads)), method.fusion.head
        for layer, count in enumerate(heads, start=1):
            if layer in layers and head is not None and head > count:
                raise ValueError(f"Expected `head` in 1 … {count} (the heads of block {layer}), but got {method.name}.")


def check_functions(functions: Sequence[MapFunction], model: nn.Module, query: tuple[int, int] | None) -> None:
    """Refuse functions for what they cannot be asked.

    Raises:
        ValueError: If the model has no copy for them to work on, or relevance is to start from a patch.
    """
    names = ", ".join(f"`{function.name}`" for function in functions)
    if functions and not has_twin(model):
        raise ValueError(
            f"Expected a model that can be copied for {names}, but {type(model).__name__} is scripted, or its "
            "parameters are spread over processes. Leave the functions out, or explain checkpoints of the run with "
            "`explain`."
        )
    if functions and query is not None:
        raise ValueError(
            f"Expected no `query` for {names}: functions are given images and classes. Ask for `attention` or "
            "`rollout`."
        )


def check_vit_options(methods: Sequence[AnyMethod], options: Mapping[str, object]) -> None:
    """Refuse those of a model's options that say something of a ViT, where no method needs one.

    Raises:
        ValueError: If one is not None.
    """
    given = [f"`{name}`" for name in ("vit", "prefix_tokens", "grid_size") if options.get(name) is not None]
    if given and not of_attention(methods):
        raise ValueError(
            f"Expected no {' or '.join(given)} for {', '.join(method.name for method in methods)} alone, as functions "
            "look for no ViT: leave it out. `forward` says how to get logits."
        )


def check_removal(removal: str, methods: Sequence[AnyMethod]) -> None:
    """Refuse to leave tokens out for maps whose grid need not be that of the tokens.

    Raises:
        ValueError: If that is asked for.
    """
    names = [f"`{method.name}`" for method in methods if isinstance(method, MapFunction)]
    if removal == "tokens" and names:
        raise ValueError(
            f"Expected `removal='mean_colour'` for {', '.join(names)}, whose cells are no tokens, but got 'tokens'."
        )


def check_query(query: tuple[int, int], methods: Sequence[Method], grid: tuple[int, int]) -> None:
    """Refuse a query that is no patch, and methods that cannot start from a patch.

    Raises:
        ValueError: If `query`, (row, column) counted from 0, lies outside the grid, or a method needs a target.
    """
    if len(query) != 2 or not all(0 <= place < size for place, size in zip(query, grid, strict=True)):
        raise ValueError(
            f"Expected `query` to be a (row, column) in 0 … {grid[0] - 1} and 0 … {grid[1] - 1}, but got {query}."
        )
    of_target = [method.name for method in methods if method.needs_target]
    if of_target:
        raise ValueError(
            f"Expected no `query` for {', '.join(of_target)}: gradients are of a class, and say nothing about what a "
            "patch attends to. Ask for `attention` or `rollout`."
        )


def as_target(target: object, images: int) -> int | Tensor | None:
    """A target as it is used: None, an int, or (B,) integers on whatever device they are.

    Raises:
        TypeError: If it is something else.
        ValueError: If there is not one for each image.
    """
    index = class_index(target)
    if target is None or index is not None:
        return index
    if not isinstance(target, Tensor) or target.dtype not in INTEGERS:
        raise TypeError(f"Expected `target` to be None, an int or an integer tensor, but got {target!r:.80}.")
    if target.shape != (images,):
        raise ValueError(f"Expected `target` of shape ({images},), one per image, but got {tuple(target.shape)}.")
    return target.long()


def check_target(target: Tensor, classes: int) -> None:
    """Refuse classes that the model's head does not have.

    Raises:
        ValueError: If an entry of `target`, (B,), lies outside 0 … classes - 1.
    """
    if ((target < 0) | (target >= classes)).any():
        raise ValueError(
            f"Expected `target` classes in 0 … {classes - 1} (the model's logits), but got {target.tolist()}. In the "
            "callback, `target=` names one class or `'prediction'`, and `task=` says what the outputs are if they are "
            "not the logits of classes."
        )
