"""The model that is explained: how it turns images into logits, and what its tokens are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.infer_tokens import observed_layout, tokens_read
from vit_explain_callback.vit.stack import Stack
from vit_explain_callback.vit.timm import timm_layout
from vit_explain_callback.vit.tokens import StatedLayout, TokenLayout

LogitsOf: TypeAlias = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """The model to explain, the ViT in it, and what the user says of them.

    What is found out about the tokens is remembered for each size of image.

    Attributes:
        model: Turns images into logits.
        vit: The ViT inside it, or the model itself.
        forward: How to get logits from the model and images; None calls it.
        stated: What the user says of the tokens.
    """

    model: nn.Module
    vit: nn.Module
    forward: LogitsOf | None
    stated: StatedLayout
    _known: dict[tuple[int, ...], TokenLayout | None] = field(default_factory=dict, repr=False)
    _found: dict[tuple[int, ...], TokenLayout] = field(default_factory=dict, repr=False)
    _entries: dict[tuple[int, ...], tuple[nn.Module, TokenLayout]] = field(default_factory=dict, repr=False)

    def logits(self, images: Tensor) -> Tensor:
        """(B, C) of (B, C, H, W) images; a head with one logit gives two classes.

        Raises:
            TypeError: If the model does not return a tensor, or something that carries `logits`.
            ValueError: If it is not (B, C).
        """
        output: object = self.model(images) if self.forward is None else self.forward(self.model, images)
        return _checked(output, len(images))

    def known_layout(self, image_shape: Sequence[int]) -> TokenLayout | None:
        """The layout of the tokens as timm has it, unless the user says something else.

        Raises:
            ValueError: If the model does not take images of this shape, (C, H, W).
        """
        shape = tuple(image_shape)
        if shape not in self._known:
            stated = self.stated != StatedLayout()
            self._known[shape] = None if stated else timm_layout(self.vit, shape, self.model is self.vit)
        return self._known[shape]

    def layout(self, stack: Stack, images: Tensor) -> TokenLayout:
        """The known layout if the logits agree that it is what they read, else what an experiment finds.

        Raises:
            ValueError: If it cannot be told.
        """
        key = (*images.shape[1:], stack.tokens)
        if key not in self._found:
            self._found[key] = self._find_layout(stack, images)
            self._entries[tuple(images.shape[1:])] = (stack.entry, self._found[key])
        return self._found[key]

    @contextmanager
    def without_tokens(self, images: Tensor, taken: Tensor) -> Iterator[None]:
        """Keep the tokens of some patches, (B, grid_h, grid_w) boolean, from entering the first block.

        Raises:
            ValueError: If the layout of the tokens is not known yet, or is another.
        """
        entry, layout = self._entries.get(tuple(images.shape[1:]), (None, None))
        if entry is None or layout is None or taken.shape[1:] != layout.grid:
            raise ValueError(
                f"Expected images of shape {tuple(images.shape[1:])} with {tuple(taken.shape[1:])} patches to have "
                "been explained before tokens are left out, but they have not."
            )
        kept = torch.ones(len(images), layout.tokens, dtype=torch.bool, device=images.device)
        kept[:, layout.patches] = ~taken.flatten(1)
        index = kept.nonzero()[:, 1].view(len(images), -1, 1)

        def drop(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens = args[0]
            return (tokens.gather(1, index.expand(-1, -1, tokens.shape[2])), *args[1:])

        handle = entry.register_forward_pre_hook(drop)
        try:
            yield
        finally:
            handle.remove()

    def _find_layout(self, stack: Stack, images: Tensor) -> TokenLayout:
        known = self.known_layout(images.shape[1:])
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


def _checked(output: object, count: int) -> Tensor:
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
