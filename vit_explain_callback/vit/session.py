"""Run a twin of the model, a few images at a time: its logits, the images that reach its ViT, and its token layout.

`Session` is one twin with the ViT in it; `in_parts` runs it on a batch in parts that fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.vit.adapter import Adapter, as_logits
from vit_explain_callback.vit.blocks import Stack
from vit_explain_callback.vit.infer_tokens import DETACHED, observed_layout, tokens_read
from vit_explain_callback.vit.ports import Ports, find_ports
from vit_explain_callback.vit.sites import changing, trace_of
from vit_explain_callback.vit.timm import find_vit, timm_layout
from vit_explain_callback.vit.tokens import Memory, StatedLayout, TokenLayout

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """A twin to explain, the ViT in it, and what the user states about its tokens.

    Attributes:
        adapter: Runs the twin.
        twin: A twin of the adapter's model.
        stated: What the user states about the tokens.
        memory: Layouts found in earlier sessions.
        vit: The ViT in the twin, or the twin's module itself.
        first_row: Row of the first image among all images to be explained.
    """

    adapter: Adapter
    twin: Twin
    stated: StatedLayout
    memory: Memory
    vit: nn.Module
    first_row: int = 0

    @classmethod
    def of(
        cls, adapter: Adapter, twin: Twin, stated: StatedLayout, memory: Memory, has_vit: bool, first_row: int = 0
    ) -> Session:
        """A session whose `vit` is the ViT in the twin, or the twin's module if no method needs one."""
        vit = find_vit(twin.module, adapter.vit) if has_vit else twin.module
        return cls(adapter, twin, stated, memory, vit, first_row)

    @property
    def is_bare(self) -> bool:
        """Whether the ViT itself turns images into logits, with no module around it."""
        return self.vit is self.twin.module and self.adapter.calls_model

    def logits(self, images: Tensor) -> Tensor:
        """Compute the logits, (B, C), of images, (B, C, H, W); a head with one logit gives two classes.

        Raises:
            TypeError: If the model does not return a tensor, or something with `logits`.
            ValueError: If the logits are not (B, C).
        """
        rows = range(self.first_row, self.first_row + len(images))
        outputs = self.adapter.outputs(self.twin.module, images, rows)
        return as_logits(outputs, len(images), self.adapter.regression)

    @contextmanager
    def giving_logits(self) -> Iterator[nn.Module]:
        """Let the twin's module, called with images, return `logits` whose gradients reach all of it.

        No parameter of a twin asks for gradients, so the graph begins at the images.
        """
        module, is_running = self.twin.module, False
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_running
            if is_running or kwargs or len(args) != 1:
                return original(*args, **kwargs)  # the model calls itself to compute the logits
            images = args[0]
            is_running = True
            try:
                return self.logits(images if images.requires_grad else images.detach().requires_grad_().clone())
            finally:
                is_running = False

        module.forward = forward
        try:
            yield module
        finally:
            module.forward = original

    @contextmanager
    def fed(self, with_gradients: bool) -> Iterator[list[Tensor]]:
        """Record the images, (B, C, H, W), that reach the ViT, and refuse those that it does not take.

        They are the first four-dimensional argument of any of its modules: `forward_features` calls its parts directly.

        Args:
            with_gradients: Whether the images ask for gradients. No parameter of a twin does, so the graph begins here.
        """
        images: list[Tensor] = []

        def record(argument: Any) -> Any:
            if images or not isinstance(argument, Tensor) or argument.ndim != 4:
                return argument
            self.layout_by_timm(argument.shape[1:])
            images.append(argument.detach().clone())
            if not with_gradients or not argument.is_floating_point():
                return argument
            return argument.detach().requires_grad_().clone()  # a clone, as a leaf could not be normalised in place

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if images else (tuple(map(record, args)), {name: record(part) for name, part in kwargs.items()})

        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in _outside_lists(self.vit)]
        try:
            yield images
        finally:
            for handle in handles:
                handle.remove()

    def layout(self, stack: Stack, images: Tensor, needs_readout: bool = True) -> TokenLayout:
        """Timm's layout if the logits depend on exactly those tokens, else the layout that an experiment finds.

        Args:
            stack: The blocks.
            images: As the ViT is fed them, (B, C, H, W).
            needs_readout: Whether it matters what the classifier reads.

        Raises:
            ValueError: If it cannot be told.
        """
        memory = self.memory.of(self.adapter.model)
        key = (*images.shape[1:], stack.tokens, int(needs_readout), *stack.places)
        if key not in memory.layouts:
            ports = stack.ports or self._find_ports(stack, images)
            memory.layouts[key] = self._find_layout(stack, ports, images, needs_readout)
            if ports is not None:
                memory.entries[tuple(images.shape[1:])] = (ports.entry, memory.layouts[key])
        return memory.layouts[key]

    def layout_by_timm(self, image_shape: Sequence[int]) -> TokenLayout | None:
        """The layout according to timm; None for other models.

        Raises:
            ValueError: If the model does not take images of this shape, (C, H, W), or if the user states another
                layout.
        """
        layout = timm_layout(self.vit, image_shape, self.is_bare)
        if layout is not None and self.stated != StatedLayout():
            stated = self.stated.first_patch_and_grid(layout.tokens, *image_shape[1:])
            if stated != (layout.first_patch, layout.grid):
                raise ValueError(
                    f"Expected no `grid_size` or `prefix_tokens`, or those of {type(self.vit).__name__}, "
                    f"{layout.grid[0]}x{layout.grid[1]} patches after {layout.first_patch} tokens, but got {stated}."
                )
        return layout

    def explained_layout(self, images: Tensor) -> TokenLayout | None:
        """The layout of images of this shape, (B, C, H, W), None if none were explained before."""
        _, layout = self.memory.of(self.adapter.model).entries.get(tuple(images.shape[1:]), ("", None))
        return layout

    @contextmanager
    def without_tokens(self, images: Tensor, removed: Tensor) -> Iterator[None]:
        """Keep the tokens of some patches, (B, grid_h, grid_w) boolean, from entering the first block.

        Raises:
            ValueError: If no images of this shape were explained before, or their grid is another.
        """
        layout = self.explained_layout(images)
        if layout is None or removed.shape[1:] != layout.grid:
            raise ValueError(
                f"Expected images of shape {tuple(images.shape[1:])} with {tuple(removed.shape[1:])} patches to have "
                "been explained before tokens are left out, but they have not."
            )
        with self.entered_by(images, layout.remaining(removed.flatten(1))):
            yield

    @contextmanager
    def entered_by(self, images: Tensor, index: Tensor) -> Iterator[None]:
        """Let only some tokens of each image enter the first block, in this order: (B, n) indices.

        Its other arguments, such as a mask, stay as they are. The images were explained before.
        """
        entry, _ = self.memory.of(self.adapter.model).entries[tuple(images.shape[1:])]

        def choose(tokens: Tensor) -> Tensor:
            return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))

        with changing(self.vit, entry, choose):
            yield

    def _find_ports(self, stack: Stack, images: Tensor) -> Ports | None:
        """Where tokens enter and leave the blocks, found with two images; None if the logits are detached."""

        def forward(noise: Tensor) -> Tensor:
            with self.fed(True):
                # No leaf, as it may be normalised in place; unless the ViT is fed (B, C, H, W), a graph begins here.
                return self.logits(noise.requires_grad_().clone() if noise.is_floating_point() else noise)

        noise = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
        with torch.enable_grad():
            trace = trace_of(forward, self.vit, stack.places, stack.tokens, noise, self.twin.state, stack.pool_place)
            return find_ports(trace, stack.places)

    def _find_layout(self, stack: Stack, ports: Ports | None, images: Tensor, needs_readout: bool) -> TokenLayout:
        by_timm = self.layout_by_timm(images.shape[1:])
        if by_timm is not None and (self.is_bare or self._is_read(by_timm, stack, ports, images)):
            return by_timm
        if ports is None:
            raise ValueError(DETACHED)
        with torch.no_grad():
            layout = observed_layout(self.logits, self.vit, ports, stack.tokens, images, self.stated, needs_readout)
        return layout if by_timm is None else replace(layout, class_token=by_timm.class_token)

    def _is_read(self, layout: TokenLayout, stack: Stack, ports: Ports | None, images: Tensor) -> bool:
        """Whether the logits depend on exactly the tokens of a layout's readout, as far as that can be told."""
        if layout.readout is None or layout.tokens != stack.tokens or ports is None:
            return stack.pool is not None or ports is None
        read = tokens_read(self.logits, self.vit, ports, images[:1].detach())
        return read is None or read == layout.readout.nonzero().flatten().tolist()


def _outside_lists(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that images may reach: all except the elements of lists, such as blocks."""
    yield module
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        for child in module.children():
            yield from _outside_lists(child)


Agreement: TypeAlias = Callable[[bool], bool]
"""Told after each part whether this process ran out of memory, returns whether any process did."""
_agreement: ContextVar[Agreement] = ContextVar("_agreement", default=bool)


class OutOfMemoryElsewhere(BaseException):
    """Another process ran out of memory on this part; no `Exception`, as a model might catch it."""


@contextmanager
def agreeing(agreement: Agreement) -> Iterator[None]:
    """Let all processes work in parts of the same sizes."""
    token = _agreement.set(agreement)
    try:
        yield
    finally:
        _agreement.reset(token)


def in_parts(session: Session, images: Tensor, size: int, work: Callable[[Session, slice, Tensor], T]) -> list[T]:
    """Do `work` on copies of a few images at a time; on fewer when memory runs out.

    Args:
        session: The session; `work` gets one whose `first_row` is that of the part.
        images: (B, C, H, W), copied to the model's device and into its precision.
        size: Images at a time, at least 1.
        work: Called with the session, the slice of the batch, and the copies.

    Returns:
        What `work` returns for each part, in order.
    """
    weights = list(session.vit.parameters())
    device = next((weight.device for weight in weights), images.device)
    dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), images.dtype)
    outputs: list[T] = []
    start = 0
    while start < len(images):
        part = slice(start, start + size)
        copies = images[part].to(device, dtype if images.is_floating_point() else images.dtype, copy=True)
        try:
            output = work(replace(session, first_row=session.first_row + start), part, copies)
            too_large = _agreement.get()(False)
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            too_large = _agreement.get()(True)
        except OutOfMemoryElsewhere:
            too_large = True
        if too_large:
            size = (size + 1) // 2
        else:
            outputs.append(output)
            start += size
    return outputs


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error means that memory ran out; only CUDA has its own exception for it."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "can't allocate memory", "not enough memory"))
