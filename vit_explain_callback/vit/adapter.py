"""Adapters: how a model is run on images, and where its ViT is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.isolation.undisturbed import undisturbed
from vit_explain_callback.options.model import LogitsOf


class Adapter(Protocol):
    """Runs a model any number of times, each time on a twin of its current state.

    Attributes:
        model: The user's model, which itself is never run.
        vit: Path of the ViT in it, None to look for it.
        regression: Whether its outputs are quantities rather than the logits of classes.
        calls_model: Whether `outputs` is `model(images)` and nothing else.
    """

    @property
    def model(self) -> nn.Module: ...  # noqa: D102

    @property
    def vit(self) -> str | None: ...  # noqa: D102

    @property
    def regression(self) -> bool: ...  # noqa: D102

    @property
    def calls_model(self) -> bool: ...  # noqa: D102

    def evaluating(self) -> AbstractContextManager[Twin]:
        """Context manager that gives a twin to run."""

    def outputs(self, twin: nn.Module, images: Tensor, rows: range) -> object:
        """Run the twin on images, (B, C, H, W), which are at `rows` of all images to be explained."""


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

    @property
    def calls_model(self) -> bool:
        """Whether there is no `forward` of the user's."""
        return self.forward is None

    def evaluating(self) -> AbstractContextManager[Twin]:
        """Context manager that gives a twin to run."""
        return undisturbed(self.model)

    def outputs(self, twin: nn.Module, images: Tensor, rows: range) -> object:
        """Run the twin on images, wherever they are among all."""
        return twin(images) if self.forward is None else self.forward(twin, images)


def as_logits(output: object, count: int, regression: bool) -> Tensor:
    """Turn the output for `count` images into logits, (B, C); a head with one logit z gives -z/2 and z/2.

    Raises:
        TypeError: If the output is not a tensor, or something with `logits`.
        ValueError: If it is not (B, C).
    """
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
