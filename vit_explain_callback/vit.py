"""What must be known of a Vision Transformer from outside: where it is, and what its tokens are.

Shapes: N tokens = `prefix` tokens (class, distillation, registers) + P patches, P = grid_h × grid_w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.capture import AttentionCall, AttentionRecorder


@dataclass(frozen=True)
class TokenLayout:
    """Which token is what.

    Attributes:
        prefix: Number of tokens before the patches.
        grid: Patches as (grid_h, grid_w).
        class_token: Index of the class token, or None.
        readout: Tokens whose mean the head reads; None where an attention-pooling head does the reading.
        pooled_prefix: Whether an attention-pooling head also sees the prefix tokens.
    """

    prefix: int
    grid: tuple[int, int]
    class_token: int | None
    readout: range | None
    pooled_prefix: bool = False

    @property
    def num_tokens(self) -> int:
        """N: prefix tokens and patches together."""
        return self.prefix + self.grid[0] * self.grid[1]

    def start_row(self, like: Tensor) -> Tensor:
        """(N,) row with which a rollout starts: the mean over the readout tokens, in the dtype and place of `like`."""
        if self.readout is None:
            raise RuntimeError("Expected a readout of tokens, but this model reads through an attention-pooling head.")
        row = torch.zeros(self.num_tokens, dtype=like.dtype, device=like.device)
        row[self.readout.start : self.readout.stop] = 1 / len(self.readout)
        return row

    def to_grid(self, row: Tensor) -> Tensor:
        """Keep the patches of a token row: (B, N) to (B, grid_h, grid_w)."""
        return row[:, self.prefix :].reshape(-1, *self.grid)


def find_vit(model: nn.Module, path: str | None = None) -> nn.Module:
    """The Vision Transformer inside `model`.

    Args:
        model: A ViT, or any module that holds exactly one.
        path: Attribute path of the ViT inside `model`, needed where there is more than one; `""` is `model` itself.

    Raises:
        ValueError: If `path` leads nowhere or not to a ViT, or if none or several are found.
    """
    if path is not None:
        try:
            found = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"Expected `vit` to be the path of a submodule, but got {path!r}: {error}.") from error
        if not _is_vit(found):
            raise ValueError(f"Expected `vit={path!r}` to be a Vision Transformer, but got {_described(found)}.")
        return found
    found_at: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _is_vit(module) and not any(name.startswith(f"{outer}." if outer else "") for outer in found_at):
            found_at[name] = module
    if not found_at:
        raise ValueError(f"Expected {type(model).__name__} to hold a Vision Transformer, but found {_inside(model)}.")
    if len(found_at) > 1:
        raise ValueError(
            f"Expected {type(model).__name__} to hold one Vision Transformer, but found {len(found_at)}: "
            f"{', '.join(found_at)}. Name the one to explain, as in `vit={next(iter(found_at))!r}`."
        )
    return next(iter(found_at.values()))


def token_layout(vit: nn.Module, image_shape: Sequence[int]) -> TokenLayout:
    """What the tokens of `vit` are for images of `image_shape` = (channels, height, width).

    The readout is the class token; class and distillation token together where the model averages their logits; the
    averaged tokens where it pools; an attention-pooling head where it has one.

    Raises:
        ValueError: If the model does not take images of this shape, or reads its tokens in a way that no row describes.
    """
    model: Any = vit
    name = type(vit).__name__
    channels, *size = image_shape
    wanted = next((p.shape[1] for p in model.patch_embed.parameters() if p.ndim == 4), channels)
    if channels != wanted:
        raise ValueError(f"Expected images of {wanted} channels for {name}, but got {channels}.")
    expected = getattr(model.patch_embed, "img_size", None)
    if expected is not None and list(expected) != size:
        raise ValueError(
            f"Expected images of {expected[0]}x{expected[1]} pixels (height x width) for {name}, but got "
            f"{size[0]}x{size[1]}. Resize them, or create the model with that `img_size`."
        )
    height, width = model.patch_embed.dynamic_feat_size(tuple(size))
    prefix = int(model.num_prefix_tokens)
    class_token = 0 if getattr(model, "cls_token", None) is not None else None
    tokens = prefix + height * width
    includes_prefix = bool(getattr(model, "pool_include_prefix", False))

    if getattr(model, "attn_pool", None) is not None:
        return TokenLayout(prefix, (height, width), class_token, None, includes_prefix or prefix == 0)
    pooling = model.global_pool
    if pooling == "token" and class_token is not None:
        distilled = getattr(model, "dist_token", None) is not None
        readout = range(2 if distilled else 1)
    elif pooling == "avg":
        readout = range(0 if includes_prefix else prefix, tokens)
    else:
        raise ValueError(
            f"Expected {name} to read its class token, the mean of its tokens or an attention pool, but its "
            f"`global_pool` is {pooling!r}: no single row of the rollout stands for its prediction."
        )
    return TokenLayout(prefix, (height, width), class_token, readout)


def split_calls(
    vit: nn.Module, recorder: AttentionRecorder, layout: TokenLayout
) -> tuple[list[AttentionCall], AttentionCall | None]:
    """Check that every block of `vit` was captured once, whole, and tell the blocks from the attention pool.

    Returns:
        The calls of the blocks, first block first, and that of an attention-pooling head, if there is one.

    Raises:
        ValueError: If a block was not captured, or not as attention over all tokens.
    """
    name = type(vit).__name__
    if changed := recorder.changed_after_softmax():
        raise ValueError(
            f"Expected the softmax in `{changed[0]}` of {name} to be multiplied with the values as it is, but it is "
            "changed in between or not used as attention: its map would not be the model's attention."
        )
    by_block: dict[int, list[AttentionCall]] = {}
    others: list[AttentionCall] = []
    for call in recorder.calls:
        container, _, rest = call.module.partition(".")
        index = rest.partition(".")[0]
        if container == "blocks" and index.isdigit():
            by_block.setdefault(int(index), []).append(call)
        else:
            others.append(call)

    blocks: list[AttentionCall] = []
    tokens = layout.num_tokens
    for block in range(num_blocks(vit)):
        calls = by_block.get(block, [])
        if len(calls) != 1:
            raise ValueError(
                f"Expected one attention operation in `blocks.{block}` of {name}, but captured {len(calls)}. Only "
                "`scaled_dot_product_attention` and a plain softmax times the values can be seen."
            )
        if calls[0].shape[2:] != (tokens, tokens):
            raise ValueError(
                f"Expected `{calls[0].module}` of {name} to attend over all {tokens} tokens ({layout.prefix} prefix + "
                f"{layout.grid[0]}x{layout.grid[1]} patches), but its attention is {calls[0].shape[2]}x"
                f"{calls[0].shape[3]}: there is no global attention to roll out."
            )
        blocks.append(calls[0])

    if layout.readout is not None and not others:
        return blocks, None
    pooled = tokens if layout.pooled_prefix else tokens - layout.prefix
    if layout.readout is None and len(others) == 1 and others[0].shape[3] == pooled:
        return blocks, others[0]
    raise ValueError(
        f"Expected no attention of {name} outside its blocks but that of a pooling head over its {pooled} tokens, but "
        f"captured {[(call.module, call.shape) for call in others]}."
    )


def normalisation(vit: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation with which the model's images were normalised, from its timm configuration.

    Raises:
        ValueError: If the model has no such configuration.
    """
    config = getattr(vit, "pretrained_cfg", None) or {}
    if "mean" not in config or "std" not in config:
        raise ValueError(
            f"Expected {type(vit).__name__} to carry a timm `pretrained_cfg` with `mean` and `std`, but it does not. "
            "Give `mean=` and `std=`, so that images can be shown."
        )
    return tuple(config["mean"]), tuple(config["std"])


def num_blocks(vit: nn.Module) -> int:
    """L: the number of blocks."""
    model: Any = vit
    return len(model.blocks)


def num_classes(vit: nn.Module) -> int:
    """C of the ViT's own head, 0 where it returns features."""
    model: Any = vit
    return int(model.num_classes)


def _is_vit(module: nn.Module) -> bool:
    """Blocks over one sequence of patch and prefix tokens, in the attribute names that timm gives all of its ViTs."""
    return (
        isinstance(getattr(module, "blocks", None), nn.ModuleList | nn.Sequential)
        and hasattr(getattr(module, "patch_embed", None), "dynamic_feat_size")
        and hasattr(module, "num_prefix_tokens")
        and hasattr(module, "global_pool")
    )


def _described(module: nn.Module) -> str:
    return (
        f"{type(module).__name__}, which is not a stack of blocks that all attend over one set of patch tokens "
        "(windowed, hierarchical and convolutional models have no global attention to roll out)"
    )


def _inside(model: nn.Module) -> str:
    timm_models = [module for module in model.modules() if getattr(module, "pretrained_cfg", None)]
    return _described(timm_models[0]) if timm_models else "no module with `patch_embed`, `blocks` and prefix tokens"
