"""Explain a model's predictions: any number of methods share one forward pass and one backward pass.

Shapes: B images, C channels of the image or classes of the logits, N tokens, H heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from vit_explain_callback._explain_batch import explain_batch, function_maps, logits_without_tokens
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.map_function import (
    AnyMethod,
    MapFunction,
    check_functions,
    check_vit_options,
    of_attention,
    of_functions,
)
from vit_explain_callback.methods.names import resolve_methods
from vit_explain_callback.metrics.faithfulness import removed_counts
from vit_explain_callback.options.images import as_target, check_images
from vit_explain_callback.options.model import ModelOptions
from vit_explain_callback.options.rules import COUNT, NONE, checked, checked_options, rules_of
from vit_explain_callback.vit.adapter import Adapter, PlainAdapter
from vit_explain_callback.vit.session import Session, in_parts
from vit_explain_callback.vit.timm import (
    check_classifier,
    find_vit,
    normalisation,
    refuse_other_timm_models,
)
from vit_explain_callback.vit.token_set import treats_tokens_as_set
from vit_explain_callback.vit.tokens import Memory, StatedLayout

T = TypeVar("T")


class Explainer:
    """Explains one model repeatedly and remembers the layout of its tokens.

    Args:
        model: As for `explain`, or an `Adapter` for a model that is not run by calling it.
        methods: Names or objects.
        **options: As for `explain`; an adapter brings its own `vit` and `forward`.

    Raises:
        TypeError: If methods or options are of the wrong type.
        ValueError: If the model is recognised not to be a ViT, or not to be a classifier.
    """

    def __init__(
        self,
        model: nn.Module | Adapter,
        methods: Sequence[str | AnyMethod],
        **options: Unpack[ModelOptions],
    ) -> None:
        options = cast(ModelOptions, checked_options(options, rules_of(ModelOptions)))
        self.methods = resolve_methods(methods)
        self.class_names = options.get("class_names")
        self._attention, self._functions = of_attention(self.methods), of_functions(self.methods)
        self._adapter = _adapted(model, self.methods, options) if isinstance(model, nn.Module) else model
        self._stated = StatedLayout(options.get("prefix_tokens"), options.get("grid_size"))
        self._memory = Memory()
        self._first_row = 0

    @property
    def name(self) -> str:
        """Class of the ViT, or of the model where no method needs one, and its path in the model if it has one."""
        model = self._adapter.model
        vit = find_vit(model, self._adapter.vit) if self._attention else model
        path = next((path for path, module in model.named_modules() if module is vit), "")
        return f"{type(vit).__name__} at `{path}`" if path else type(vit).__name__

    def starting_at(self, row: int) -> Explainer:
        """This explainer for images that begin with image `row` of the probe.

        It matters to a model that runs on a batch of the user's, of which the images are only a part.
        """
        explainer = copy.copy(self)
        explainer._first_row = row
        return explainer

    def __call__(
        self,
        images: Tensor,
        target: int | Tensor | None = None,
        *,
        batch_size: int | None = None,
        block_statistics: bool = False,
        query: tuple[int, int] | None = None,
        keep_images: bool = True,
    ) -> Explanation:
        """Explain a batch, `batch_size` images at a time; fewer if they do not fit into memory.

        Args:
            images: As for `explain`, like the others.
            target: None, one index, or (B,) integer indices.
            batch_size: Images per pass.
            block_statistics: Whether to compute what each block attends to.
            query: Patch to start from, as (row, column).
            keep_images: Whether the explanation refers to the images.

        Raises:
            TypeError: If images, target or the model's output are of the wrong type.
            ValueError: If they are of the wrong shape or range, or if the model's attention cannot be rolled out.
            RuntimeError: If a `MapFunction` fails.
        """
        options: Any = {"batch_size": batch_size, "block_statistics": block_statistics, "query": query}
        return self.for_targets(images, [target], keep_images=keep_images, **options)[0]

    def attribute(
        self,
        images: Tensor,
        target: int | Tensor | None = None,
        *,
        batch_size: int | None = None,
        query: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Maps of a batch by method name, (B, grid_h, grid_w) each; arguments and errors are those of a call."""
        return self(images, target, batch_size=batch_size, query=query).maps

    def for_targets(
        self,
        images: Tensor,
        targets: Sequence[int | Tensor | None],
        *,
        batch_size: int | None = None,
        block_statistics: bool = False,
        query: tuple[int, int] | None = None,
        keep_images: bool = True,
    ) -> list[Explanation]:
        """Explain a batch for several targets: one forward pass, and one backward pass for each target.

        The explanations share what does not depend on the target. Arguments and errors are those of a call.

        Raises:
            ValueError: Also if there is no target.
        """
        check_images(images)
        check_functions(self._functions, self._adapter.model, query)
        if not targets:
            raise ValueError("Expected `targets` to hold at least one target, but got none.")
        classes = [_as_classes(target, len(images)) for target in targets]

        def explain_part(session: Session, part: slice, part_images: Tensor) -> list[Explanation]:
            part_classes = [None if target is None else target[part] for target in classes]
            explained = explain_batch(session, part_images, self._attention, part_classes, block_statistics, query)
            about: Any = {"normalisation": normalisation(session.vit), "class_names": self.class_names}
            return [replace(explanation, **about) for explanation in explained]

        parts = self._in_parts(images, batch_size, explain_part)
        explanations = [Explanation.joined(of_target) for of_target in zip(*parts, strict=True)]
        by_function = self._function_maps(images, [each.target for each in explanations], batch_size)
        held = images if keep_images else None
        return [
            replace(explanation, maps=self._in_order({**explanation.maps, **maps}), images=held)
            for explanation, maps in zip(explanations, by_function, strict=True)
        ]

    def _in_order(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {method.name: maps[method.name] for method in self.methods}

    def _function_maps(
        self, images: Tensor, targets: Sequence[Tensor], batch_size: int | None
    ) -> list[dict[str, Tensor]]:
        """Maps of the functions by name, for each target; each function gets a fresh twin."""
        maps: list[dict[str, Tensor]] = [{} for _ in targets]
        for function in self._functions:

            def work(session: Session, part: slice, copied: Tensor, function: MapFunction = function) -> list[Tensor]:
                return function_maps(session, copied, function, [target[part] for target in targets])

            parts = self._in_parts(images, batch_size, work)
            for of_target, pieces in zip(maps, zip(*parts, strict=True), strict=True):
                of_target[function.name] = torch.cat(pieces)
        return maps

    def logits(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Logits (B, C) of images (B, C, H, W), explained before or not."""
        with torch.no_grad():
            parts = self._in_parts(images, batch_size, lambda session, _, copied: session.logits(copied))
        return torch.cat(parts)

    def logits_without(self, images: Tensor, removed: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Logits (B, C) when the tokens of some patches never enter the first block.

        For images that were explained before, and models that give tokens their position before the blocks; see
        `can_leave_out_tokens`.

        Args:
            images: (B, C, H, W).
            removed: Patches to leave out, (B, grid_h, grid_w) boolean, as many of each image.
            batch_size: Images per pass.

        Raises:
            ValueError: If the model fails without them; not always where blocks need to know where tokens are.
        """

        def work(session: Session, part: slice, copied: Tensor) -> Tensor:
            return logits_without_tokens(session, copied, removed[part])

        with torch.no_grad():
            return torch.cat(self._in_parts(images, batch_size, work))

    def can_leave_out_tokens(self, images: Tensor, grid: tuple[int, int]) -> bool | None:
        """Whether `logits_without` takes nothing but the tokens away: the blocks do not know where tokens are.

        It is tested in 13 passes of the first two images; see `vit.token_set`.

        Args:
            images: (B, C, H, W) that were explained before.
            grid: Patches as (grid_h, grid_w).

        Returns:
            None where the logits cannot show it, such as those of a classifier whose weights are zero.

        Raises:
            Exception: What the model raises for whole images.
        """
        counts = removed_counts(math.prod(grid))

        def work(session: Session, part: slice, copied: Tensor) -> bool | None:
            layout = session.explained_layout(copied)
            if layout is None or layout.grid != grid:
                return False
            return treats_tokens_as_set(session, copied, layout, counts)

        answers = self._in_parts(images[:2], None, work)
        return None if None in answers and False not in answers else all(answers)

    def _in_parts(
        self,
        images: Tensor,
        batch_size: int | None,
        work: Callable[[Session, slice, Tensor], T],
    ) -> list[T]:
        """Do `work` on copies of a few images at a time, undisturbed; on fewer if they do not fit into memory."""
        size = min(checked("batch_size", batch_size, COUNT | NONE) or len(images), len(images))
        with self._adapter.evaluating() as twin:
            has_vit = bool(self._attention)
            session = Session.of(self._adapter, twin, self._stated, self._memory, has_vit, self._first_row)
            return in_parts(session, images, size, work)


def _adapted(model: nn.Module, methods: Sequence[AnyMethod], options: ModelOptions) -> Adapter:
    """An adapter that calls the model; a model that is recognised as unsuitable for the methods is refused."""
    check_vit_options(methods, options)
    adapter = PlainAdapter(model, options.get("vit"), options.get("forward"))
    vit = model
    if of_attention(methods):
        vit = find_vit(model, adapter.vit)
        refuse_other_timm_models(vit)
    if adapter.forward is None and model is vit and any(method.needs_target for method in methods):
        check_classifier(model)
    return adapter


def _as_classes(target: int | Tensor | None, count: int) -> Tensor | None:
    classes = as_target(target, count)
    return torch.full((count,), classes) if isinstance(classes, int) else classes
