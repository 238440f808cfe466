"""Remember what was found out about a model's tokens, as long as the model is built as it was."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from vit_explain_callback.vit.sites import Site
from vit_explain_callback.vit.tokens import TokenLayout

# What a module says of how it was built is of these types.
_WORDS = (str, bool, int, type(None))


@dataclass
class Memory:
    """What was found out about a model's tokens, as long as the model is built as it was.

    Attributes:
        built: Says how the model was built.
        layouts: The tokens by the size of images and the number of tokens.
        entries: Where the tokens enter the first block, and the tokens, by the size of images.
    """

    built: object = None
    layouts: dict[tuple[int, ...], TokenLayout] = field(default_factory=dict)
    entries: dict[tuple[int, ...], tuple[Site, TokenLayout]] = field(default_factory=dict)

    def of(self, model: nn.Module) -> Memory:
        """This memory, emptied if `model` is built otherwise than what it is of."""
        built = _built(model)
        if built != self.built:
            self.built = built
            self.layouts.clear()
            self.entries.clear()
        return self


def _built(model: nn.Module) -> object:
    """How a model is built: kinds of modules and what they say of themselves, but not their weights."""
    return tuple(
        (
            name,
            type(module),
            *[
                said
                for said in vars(module).items()
                if said[0][:1] != "_" and said[0] != "training" and isinstance(said[1], _WORDS)
            ],
        )
        for name, module in model.named_modules()
    )
