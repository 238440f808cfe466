"""One twin that is run: its ViT, its logits and its tokens; and a batch run in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.vit.adapter import Adapter, PlainAdapter
from vit_explain_callback.vit.blocks import Stack
from vit_explain_callback.vit.infer_tokens import DETACHED, observed_layout, tokens_read
from vit_explain_callback.vit.ports import Ports, find_ports
from vit_explain_callback.vit.sites import changing
from vit_explain_callback.vit.timm import find_vit, timm_layout
from vit_explain_callback.vit.tokens import Memory, StatedLayout, TokenLayout


@dataclass(frozen=True)
class Session:
    """A twin to explain, the ViT in it, and what the user says of them.

    Attributes:
        adapter: How it is run.
        twin: A twin of the adapter's model.
        stated: What the user says of the tokens.
        memory: What was found out before.
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
        """A session; without a ViT in it, its module stands for one."""
        vit = find_vit(twin.module, adapter.vit) if has_vit else twin.module
        return cls(adapter, twin, stated, memory, vit, first_row)

    @property
    def is_bare(self) -> bool:
        """Whether the ViT itself turns images into logits, and no module around it."""
        return self.vit is self.twin.module and isinstance(self.adapter, PlainAdapter) and self.adapter.forward is None

    def logits(self, images: Tensor) -> Tensor:
        """(B, C) of (B, C, H, W) images; a head with one logit gives two classes.

        Raises:
            TypeError: If the model does not return a tensor, or something that carries `logits`.
            ValueError: If it is not (B, C).
        """
        rows = range(self.first_row, self.first_row + len(images))
        outputs = self.adapter.outputs(self.twin.module, images, rows)
        return _checked(outputs, len(images), self.adapter.regression)

    @contextmanager
    def giving_logits(self) -> Iterator[nn.Module]:
        """The twin's module; called with images inside, it gives `logits`, and gradients of these reach all of it.

        No parameter of a twin asks for gradients, so the graph begins at the images.
        """
        module, inside = self.twin.module, False
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or kwargs or len(args) != 1:
                return own(*args, **kwargs)  # the model calls itself to give the logits
            images = args[0]
            inside = True
            try:
                return self.logits(images if images.requires_grad else images.detach().requires_grad_().clone())
            finally:
                inside = False

        module.forward = forward
        try:
            yield module
        finally:
            module.forward = own

    def known_layout(self, image_shape: Sequence[int]) -> TokenLayout | None:
        """The layout of the tokens as timm has it, unless the user says something else.

        Raises:
            ValueError: If the model does not take images of this shape, (C, H, W), or if what the user says
                contradicts it.
        """
        known = timm_layout(self.vit, image_shape, self.is_bare)
        if known is not None and self.stated != StatedLayout():
            stated = self.stated.first_patch_and_grid(known.tokens, *image_shape[1:])
            if stated != (known.first_patch, known.grid):
                raise ValueError(
                    f"Expected no `grid_size` or `prefix_tokens`, or those of {type(self.vit).__name__}, "
                    f"{known.grid[0]}x{known.grid[1]} patches after {known.first_patch} tokens, but they say {stated}."
                )
        return known

    def layout(self, stack: Stack, images: Tensor, read: bool = True) -> TokenLayout:
        """The known layout if the logits agree that it is what they read, else what an experiment finds.

        Args:
            stack: The blocks.
            images: As the ViT is fed them, (B, C, H, W).
            read: Whether it matters what the classifier reads.

        Raises:
            ValueError: If it cannot be told.
        """
        memory = self.memory.of(self.adapter.model)
        key = (*images.shape[1:], stack.tokens, int(read), *stack.places)
        if key not in memory.layouts:
            ports = stack.ports or self._ports(stack, images)
            memory.layouts[key] = self._find_layout(stack, ports, images, read)
            if ports is not None:
                memory.entries[tuple(images.shape[1:])] = (ports.entry, memory.layouts[key])
        return memory.layouts[key]

    @contextmanager
    def fed(self, with_gradients: bool) -> Iterator[list[Tensor]]:
        """Note the images, (B, C, H, W), that reach the ViT, and refuse what it does not take.

        They are what the first of its modules is called with: `forward_features` calls its parts alone.

        Args:
            with_gradients: Whether they ask for gradients: no parameter of a twin does, so that this is where the graph
                begins.
        """
        seen: list[Tensor] = []

        def leaf(given: Any) -> Any:
            if seen or not isinstance(given, Tensor) or given.ndim != 4:
                return given
            self.known_layout(given.shape[1:])
            seen.append(given.detach().clone())
            # A clone, as a leaf could not be normalised in place.
            floats = given.is_floating_point() and with_gradients
            return given.detach().requires_grad_().clone() if floats else given

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if seen else (tuple(map(leaf, args)), {name: leaf(given) for name, given in kwargs.items()})

        handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in _outside_lists(self.vit)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def explained_layout(self, images: Tensor) -> TokenLayout | None:
        """The layout of images of this shape, (B, C, H, W), None where none were explained before."""
        _, layout = self.memory.of(self.adapter.model).entries.get(tuple(images.shape[1:]), ("", None))
        return layout

    @contextmanager
    def without_tokens(self, images: Tensor, taken: Tensor) -> Iterator[None]:
        """Keep the tokens of some patches, (B, grid_h, grid_w) boolean, from entering the first block.

        Raises:
            ValueError: If the layout of the tokens is not known yet, or is another.
        """
        layout = self.explained_layout(images)
        if layout is None or taken.shape[1:] != layout.grid:
            raise ValueError(
                f"Expected images of shape {tuple(images.shape[1:])} with {tuple(taken.shape[1:])} patches to have "
                "been explained before tokens are left out, but they have not."
            )
        with self.entered_by(images, layout.kept(taken.flatten(1))):
            yield

    @contextmanager
    def entered_by(self, images: Tensor, index: Tensor) -> Iterator[None]:
        """Let the first block have only some of its tokens, in this order: (B, n) indices of those of each image.

        What else it is given, a mask say, stays as it is. The images were explained before.
        """
        entry, _ = self.memory.of(self.adapter.model).entries[tuple(images.shape[1:])]

        def choose(tokens: Tensor) -> Tensor:
            return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))

        with changing(self.vit, entry, choose):
            yield

    def _ports(self, stack: Stack, images: Tensor) -> Ports | None:
        """Where tokens enter and leave the blocks, found with two images; None if the logits are detached."""

        def forward(noise: Tensor) -> Tensor:
            with self.fed(True):
                # No leaf, as it may be normalised in place; what is no (B, C, H, W) to the ViT begins a graph here.
                return self.logits(noise.requires_grad_().clone() if noise.is_floating_point() else noise)

        noise = torch.randn(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
        return find_ports(forward, self.vit, stack.places, stack.tokens, noise, self.twin.state, stack.pool_place)

    def _find_layout(self, stack: Stack, ports: Ports | None, images: Tensor, read: bool) -> TokenLayout:
        known = self.known_layout(images.shape[1:])
        if known is not None and (self.is_bare or self._is_read(known, stack, ports, images)):
            return known
        if ports is None:
            raise ValueError(DETACHED)
        with torch.no_grad():
            seen = observed_layout(self.logits, self.vit, ports, stack.tokens, images, self.stated, read)
        return seen if known is None else replace(seen, class_token=known.class_token)

    def _is_read(self, known: TokenLayout, stack: Stack, ports: Ports | None, images: Tensor) -> bool:
        if known.readout is None or known.tokens != stack.tokens or ports is None:
            return stack.pool is not None or ports is None
        read = tokens_read(self.logits, self.vit, ports, images[:1].detach())
        return read is None or read == known.readout.nonzero().flatten().tolist()


def _outside_lists(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those in it that images may reach: all but the elements of lists, as blocks are."""
    yield module
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        for child in module.children():
            yield from _outside_lists(child)


def _checked(output: object, count: int, regression: bool) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"Expected the model to return a tensor of logits, (B, C), but got {type(output).__name__}. Say how to get "
            "them: `forward=lambda model, images: …`."
        )
    if regression and output.shape == (count,):
        output = output[:, None]
    elif output.shape in ((count,), (count, 1)) and not regression:
        half = output.reshape(count, 1) / 2
        output = torch.cat([-half, half], dim=1)
    if output.ndim != 2 or len(output) != count or output.shape[1] == 0:
        raise ValueError(f"Expected the model to return logits of shape ({count}, C), but got {tuple(output.shape)}.")
    return output


T = TypeVar("T")
Agreement: TypeAlias = Callable[[bool], bool]
"""Told after each part whether memory did not suffice for it, says whether it did not on any process."""
_agreement: ContextVar[Agreement] = ContextVar("_agreement", default=bool)


class OutOfMemoryElsewhere(BaseException):
    """Memory did not suffice for this part on another process; no `Exception`, as a model might catch it."""


@contextmanager
def agreeing(agreement: Agreement) -> Iterator[None]:
    """Inside, all processes work in parts of the same sizes."""
    token = _agreement.set(agreement)
    try:
        yield
    finally:
        _agreement.reset(token)


def in_parts(session: Session, images: Tensor, size: int, work: Callable[[Session, slice, Tensor], T]) -> list[T]:
    """Do `work` on copies of a few images at a time; on fewer where memory does not suffice.

    Args:
        session: What is run.
        images: (B, C, H, W), copied onto the model's device and into its precision.
        size: Images at a time, at least 1.
        work: Given the session, the place of the images in the batch, and the copies.

    Returns:
        What `work` gave for each part, in order.
    """
    weights = list(session.vit.parameters())
    device = next((part.device for part in weights), images.device)
    dtype = next((part.dtype for part in weights if part.is_floating_point()), images.dtype)
    parts: list[T] = []
    start = 0
    while start < len(images):
        part = slice(start, start + size)
        own = images[part]
        own = own.to(device, dtype if own.is_floating_point() else own.dtype, copy=True)
        try:
            found = work(replace(session, first_row=session.first_row + start), part, own)
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
            parts.append(found)
            start += size
    return parts


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says so; only CUDA has an exception of its own for it."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "can't allocate memory", "not enough memory"))
