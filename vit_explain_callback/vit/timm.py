"""Find the Vision Transformer in a model, and read the layout and normalisation of timm's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import nn

from vit_explain_callback.vit.tokens import TokenLayout, mean_of

ONLY_GLOBAL = "windowed, hierarchical and convolutional models have no global attention to roll out"

Normalisation: TypeAlias = tuple[Sequence[float], Sequence[float]] | None
"""Mean and standard deviation of each channel, or None if unknown."""


def find_vit(model: nn.Module, path: str | None = None) -> nn.Module:
    """Find the timm ViT inside `model`, or else return `model`, whose attention is found when it runs.

    Args:
        model: A ViT, or any module that holds exactly one.
        path: Attribute path of the ViT inside `model`, needed if there is more than one; `""` is `model` itself.

    Raises:
        ValueError: If `path` leads nowhere, if there are several timm ViTs, or if no module can attend.
    """
    if path is not None:
        try:
            model = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"Expected `vit` to be the path of a submodule, but got {path!r}: {error}.") from error
    vits: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_timm_vit(module) and not any(name.startswith(f"{outer}." if outer else "") for outer in vits):
            vits[name] = module
    if len(vits) > 1:
        raise ValueError(
            f"Expected {type(model).__name__} to hold one Vision Transformer, but found {len(vits)}: "
            f"{', '.join(vits)}. Name the one to explain, as in `vit={next(iter(vits))!r}`."
        )
    if vits:
        return next(iter(vits.values()))
    if not any(_may_attend(module) for module in model.modules()):
        raise ValueError(
            f"Expected {'the model' if path is None else f'`vit={path!r}`'} to be or hold a Vision Transformer, but "
            f"nothing in {type(model).__name__} can attend."
        )
    return model


def _may_attend(module: nn.Module) -> bool:
    """Whether a module might attend: `nn.MultiheadAttention`, and all that is not torch's own."""
    return isinstance(module, nn.MultiheadAttention) or type(module).__module__.split(".")[:2] != ["torch", "nn"]


def is_timm_vit(module: nn.Module) -> bool:
    """Whether a module has blocks over one sequence of patch and prefix tokens, under timm's attribute names."""
    return (
        "blocks" in module._modules  # first, as few modules have it, and a failing `getattr` is slow
        and isinstance(module.blocks, nn.ModuleList | nn.Sequential)
        and hasattr(getattr(module, "patch_embed", getattr(module, "embeds", None)), "dynamic_feat_size")
        and hasattr(module, "num_prefix_tokens")
        and hasattr(module, "global_pool")
    )


def timm_layout(vit: nn.Module, image_shape: Sequence[int], own_head: bool = True) -> TokenLayout | None:
    """Read the token layout of a timm ViT for images of `image_shape` = (channels, height, width).

    The readout is the class token; class and distillation token if the model averages their logits; the averaged tokens
    if it pools; None if it has an attention-pooling head.

    Args:
        vit: The model.
        image_shape: Shape of the images without the batch.
        own_head: Whether the model's own head makes the prediction, rather than a module around it that may read other
            tokens.

    Returns:
        The layout; None for other models, for NaFlexViT, and for a readout that only the module around it knows.

    Raises:
        ValueError: If the model does not take images of this shape, or reads its tokens in a way that no single row of
            the rollout stands for.
    """
    model: Any = vit
    if not is_timm_vit(vit) or not hasattr(vit, "patch_embed"):
        return None
    _check_image_shape(model, image_shape)
    height, width = model.patch_embed.dynamic_feat_size(tuple(image_shape[1:]))
    prefix = int(model.num_prefix_tokens)
    tokens = prefix + height * width
    class_token = 0 if getattr(model, "cls_token", None) is not None else None
    rows = _rows_read(model, prefix, tokens, class_token)
    has_pool = getattr(model, "attn_pool", None) is not None
    if rows is None and not has_pool:
        if not own_head:
            return None
        raise ValueError(
            f"Expected {type(vit).__name__} to read its class token, the mean of its tokens or an attention pool, but "
            f"its `global_pool` is {model.global_pool!r}: no single row of the rollout stands for its prediction. "
            "A `MapFunction` explains any classifier."
        )
    readout = None if has_pool or rows is None else mean_of(rows, tokens)
    return TokenLayout(tokens, prefix, (height, width), class_token, readout)


def _check_image_shape(model: Any, image_shape: Sequence[int]) -> None:
    """Refuse images, (C, H, W), that a timm ViT does not take."""
    name = type(model).__name__
    channels, *size = image_shape
    expected_channels = next((p.shape[1] for p in model.patch_embed.parameters() if p.ndim == 4), channels)
    if channels != expected_channels:
        raise ValueError(f"Expected images of {expected_channels} channels for {name}, but got {channels}.")
    expected_size = getattr(model.patch_embed, "img_size", None)
    is_strict = getattr(model.patch_embed, "strict_img_size", True)
    if expected_size is not None and list(expected_size) != size and is_strict:
        raise ValueError(
            f"Expected images of {expected_size[0]}x{expected_size[1]} pixels (height x width) for {name}, but got "
            f"{size[0]}x{size[1]}. Resize them, or create the model with that `img_size`."
        )


def _rows_read(model: Any, prefix: int, tokens: int, class_token: int | None) -> range | None:
    """Indices of the tokens that the head of a timm ViT averages; None for other poolings."""
    if model.global_pool == "token" and class_token is not None:
        return range(1 if getattr(model, "dist_token", None) is None else 2)
    if model.global_pool == "avg":
        return range(0 if getattr(model, "pool_include_prefix", False) else prefix, tokens)
    return None


def refuse_other_timm_models(model: nn.Module) -> None:
    """Refuse a model built on a timm model other than a ViT, before it is run.

    Raises:
        ValueError: If it is.
    """
    others = [module for module in model.modules() if getattr(module, "pretrained_cfg", None)]
    if others and not any(is_timm_vit(module) for module in model.modules()):
        raise ValueError(
            f"Expected {type(model).__name__} to hold a Vision Transformer, but found {type(others[0]).__name__}, "
            f"which is not a stack of blocks that all attend over one set of patch tokens ({ONLY_GLOBAL})."
        )


def normalisation(model: nn.Module) -> Normalisation:
    """Mean and standard deviation for images of a timm model, or of a module that holds one; None if unknown.

    None also if several models disagree.
    """
    configs: list[Any] = [vars(module).get("pretrained_cfg") or {} for module in model.modules()]
    pairs = {(tuple(config["mean"]), tuple(config["std"])) for config in configs if {"mean", "std"} <= set(config)}
    return next(iter(pairs)) if len(pairs) == 1 else None


def check_classifier(vit: nn.Module) -> None:
    """Refuse a ViT that returns features instead of logits.

    Raises:
        ValueError: If it has no classifier.
    """
    if getattr(vit, "num_classes", None) == 0:
        raise ValueError(
            f"Expected logits from {type(vit).__name__}, but it has no classifier (`num_classes` is 0). Explain the "
            "module whose forward turns images into logits, or give the model one with `reset_classifier`."
        )
