"""What a model does not say about itself: the options that `explain`, `Explainer` and the callback share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias, TypedDict

from torch import Tensor, nn

from vit_explain_callback.options.rules import CLASS_NAMES, FORWARD, GRID_SIZE, NONE, PATH, integer

LogitsOf: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""Gets logits (B, C) from a model and images (B, C, H, W)."""


class ViTOptions(TypedDict, total=False):
    """What a model does not say about itself, for the callback too; all of it can be omitted.

    Attributes:
        vit: Attribute path of the ViT inside the model, needed if it holds several.
        forward: How to get logits (B, C) from the model and images, if not by `model(images)`.
        prefix_tokens: Number of tokens before the patches, if the layout of the tokens cannot be inferred.
        grid_size: Patches as (grid_h, grid_w), likewise.
    """

    vit: Annotated[str | None, PATH]
    forward: Annotated[LogitsOf | None, FORWARD]
    prefix_tokens: Annotated[int | None, integer(0) | NONE]
    grid_size: Annotated[tuple[int, int] | None, GRID_SIZE]


class ModelOptions(ViTOptions, total=False):
    """What a model does not say about itself; all of it can be omitted.

    Attributes:
        class_names: Name of each class, for captions.
    """

    class_names: Annotated[Sequence[str] | None, CLASS_NAMES]
