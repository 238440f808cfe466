"""Find the Vision Transformer in a model, and what timm says of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import nn

from vit_explain_callback.vit.tokens import TokenLayout, mean_of

ONLY_GLOBAL = "windowed, hierarchical and convolutional models have no global attention to roll out"

Normalisation: TypeAlias = tuple[Sequence[float], Sequence[float]] | None
"""Mean and standard deviation of each channel, or None where nothing says them."""


def find_vit(model: nn.Module, path: str | None = None) -> nn.Module:
    """The Vision Transformer inside `model`: the one of timm, or else `model` itself, to be seen when it runs.

    Args:
        model: A ViT, or any module that holds exactly one.
        path: Attribute path of the ViT inside `model`, needed where there is more than one; `""` is `model` itself.

    Raises:
        ValueError: If `path` leads nowhere, if there are several timm ViTs, or only timm models that are none.
    """
    if path is not None:
        try:
            model = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"Expected `vit` to be the path of a submodule, but got {path!r}: {error}.") from error
    found_at: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_timm_vit(module) and not any(name.startswith(f"{outer}." if outer else "") for outer in found_at):
            found_at[name] = module
    if len(found_at) > 1:
        raise ValueError(
            f"Expected {type(model).__name__} to hold one Vision Transformer, but found {len(found_at)}: "
            f"{', '.join(found_at)}. Name the one to explain, as in `vit={next(iter(found_at))!r}`."
        )
    if found_at:
        return next(iter(found_at.values()))
    if not any(_may_attend(module) for module in model.modules()):
        raise ValueError(
            f"Expected {'the model' if path is None else f'`vit={path!r}`'} to be or hold a Vision Transformer, but "
            f"nothing in {type(model).__name__} can attend."
        )
    return model


def _may_attend(module: nn.Module) -> bool:
    """Whether a module can attend, for all that can be seen: not torch's own layers, but for those that do."""
    return isinstance(module, nn.MultiheadAttention) or type(module).__module__.split(".")[:2] != ["torch", "nn"]


def is_timm_vit(module: nn.Module) -> bool:
    """Blocks over one sequence of patch and prefix tokens, in the attribute names that timm gives all of its ViTs."""
    return (
        "blocks" in module._modules  # asked first, as few modules have one, and `getattr` takes long to say so
        and isinstance(module.blocks, nn.ModuleList | nn.Sequential)
        and hasattr(getattr(module, "patch_embed", getattr(module, "embeds", None)), "dynamic_feat_size")
        and hasattr(module, "num_prefix_tokens")
        and hasattr(module, "global_pool")
    )


def timm_layout(vit: nn.Module, image_shape: Sequence[int], own_head: bool = True) -> TokenLayout | None:
    """What the tokens of a timm ViT are for images of `image_shape` = (channels, height, width), if it says so.

    The readout is the class token; class and distillation token together where the model averages their logits; the
    averaged tokens where it pools; an attention-pooling head where it has one.

    Args:
        vit: The model.
        image_shape: What it is to be given.
        own_head: Whether its own head makes the prediction, and not a module around it that may read other tokens.

    Returns:
        The layout; None for other models, for NaFlexViT, and for a readout that only the module around it knows.

    Raises:
        ValueError: If the model does not take images of this shape, or reads its tokens in a way that no row describes.
    """
    model: Any = vit
    if not is_timm_vit(vit) or not hasattr(vit, "patch_embed"):
        return None
    name = type(vit).__name__
    channels, *size = image_shape
    wanted = next((p.shape[1] for p in model.patch_embed.parameters() if p.ndim == 4), channels)
    if channels != wanted:
        raise ValueError(f"Expected images of {wanted} channels for {name}, but got {channels}.")
    expected = getattr(model.patch_embed, "img_size", None)
    if expected is not None and list(expected) != size and getattr(model.patch_embed, "strict_img_size", True):
        raise ValueError(
            f"Expected images of {expected[0]}x{expected[1]} pixels (height x width) for {name}, but got "
            f"{size[0]}x{size[1]}. Resize them, or create the model with that `img_size`."
        )
    height, width = model.patch_embed.dynamic_feat_size(tuple(size))
    prefix = int(model.num_prefix_tokens)
    tokens = prefix + height * width
    class_token = 0 if getattr(model, "cls_token", None) is not None else None
    readout = None
    if getattr(model, "attn_pool", None) is None:
        pooling = model.global_pool
        if pooling == "token" and class_token is not None:
            distilled = getattr(model, "dist_token", None) is not None
            readout = mean_of(range(2 if distilled else 1), tokens)
        elif pooling == "avg":
            includes_prefix = bool(getattr(model, "pool_include_prefix", False))
            readout = mean_of(range(0 if includes_prefix else prefix, tokens), tokens)
        elif not own_head:
            return None
        else:
            raise ValueError(
                f"Expected {name} to read its class token, the mean of its tokens or an attention pool, but its "
                f"`global_pool` is {pooling!r}: no single row of the rollout stands for its prediction. "
                "A `MapFunction` explains any classifier."
            )
    return TokenLayout(tokens, prefix, (height, width), class_token, readout)


def refuse_other_timm_models(model: nn.Module) -> None:
    """Refuse a model that is built on a timm model other than a ViT, before it is run.

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
    """Mean and standard deviation with which the model's images were normalised, if it is or holds one that says so.

    timm's models do; of several that say different things, none is believed.
    """
    configs: list[Any] = [vars(module).get("pretrained_cfg") or {} for module in model.modules()]
    said = {(tuple(config["mean"]), tuple(config["std"])) for config in configs if {"mean", "std"} <= set(config)}
    return next(iter(said)) if len(said) == 1 else None


def num_classes(vit: nn.Module) -> int | None:
    """C of the ViT's own head, 0 where it returns features, None where it does not say."""
    return getattr(vit, "num_classes", None)


def num_blocks(vit: nn.Module) -> int:
    """L, the number of blocks of a timm ViT."""
    model: Any = vit
    return len(model.blocks)


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
