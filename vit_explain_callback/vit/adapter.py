"""Run a model on images: how it is called, where its ViT is, and what its tokens are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.isolation.undisturbed import undisturbed

LogitsOf: TypeAlias = Callable[[nn.Module, Tensor], Tensor]


class Adapter(Protocol):
    """How a model is run, again and again, each time on a twin of what it is then.

    Attributes:
        model: The user's own; it is not run.
        vit: Path of the ViT in it, None to look for it.
        regression: Whether its outputs are quantities, and not the logits of classes.
    """

    @property
    def model(self) -> nn.Module: ...  # noqa: D102

    @property
    def vit(self) -> str | None: ...  # noqa: D102

    @property
    def regression(self) -> bool: ...  # noqa: D102

    def evaluating(self) -> AbstractContextManager[Twin]:
        """A twin to run."""

    def outputs(self, twin: nn.Module, images: Tensor, rows: range) -> object:
        """Run the twin on images, (B, C, H, W), which stand at `rows` of all images to be explained."""


@dataclass
class PlainAdapter:
    """Runs a model by calling it.

    Attributes:
        model: The model.
        vit: Path of the ViT in it, None to look for it.
        forward: How to get logits from the model and images; None calls it.
        regression: Whether its outputs are quantities.
    """

    model: nn.Module
    vit: str | None = None
    forward: LogitsOf | None = None
    regression: bool = False

    def evaluating(self) -> AbstractContextManager[Twin]:
        """A twin to run."""
        return undisturbed(self.model)

    def outputs(self, twin: nn.Module, images: Tensor, rows: range) -> object:
        """Run the twin on images, wherever they stand."""
        return twin(images) if self.forward is None else self.forward(twin, images)
