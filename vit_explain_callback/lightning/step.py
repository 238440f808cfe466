"""Run a LightningModule the way its user does: through its own step, on a twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_overridden
from vit_explain_callback.lightning.batches import cloned, images_and_labels, picked
from vit_explain_callback.lightning.evaluation import StepName, evaluating, run_step, transferred
from vit_explain_callback.vit.adapter import LogitsOf
from vit_explain_callback.vit.isolation import preserved_random_state
from vit_explain_callback.vit.look import Look, look, look_at_any
from vit_explain_callback.vit.losses import LossWatcher
from vit_explain_callback.vit.twin import Twin

_CURE = (
    "Say how: `ViTExplainCallback(forward=lambda module, images: …)` gives logits (B, C) of images, `images=` gives "
    "the images themselves, and `vit=` the path of the ViT."
)


@dataclass
class LightningAdapter:
    """Runs a LightningModule on a twin: by its step with a batch of the user's, or by calling a part of it.

    Attributes:
        model: The LightningModule.
        trainer: Its trainer.
        vit: Path of the ViT in it.
        regression: Whether its outputs are quantities.
        forward: How the user gets logits from the module and images.
        part: Path of the module that turns the ViT's images into logits by itself; None where only the step does.
        step: The step to run where no part does.
        batch: The batch that it is run with, on the module's device, after every transfer hook.
        count: Images in the batch.
        feed: Path of the module that is called with images: given others, it makes the step explain those.
        has_loss: Whether the step computes a loss, the first of which has the logits; else the module's own output has.
    """

    model: LightningModule
    trainer: Trainer
    vit: str | None
    regression: bool = False
    forward: LogitsOf | None = None
    part: str | None = ""
    step: StepName = "validation_step"
    batch: Any = None
    count: int = 0
    feed: str = ""
    has_loss: bool = True

    @contextmanager
    def evaluating(self) -> Iterator[Twin]:
        """A twin whose trainer can be asked but not used."""
        with evaluating(self.model, self.trainer) as twin:
            yield twin

    def outputs(self, twin: nn.Module, images: Tensor, first: int) -> object:
        """What the twin makes of images, (B, C, H, W), of which the first is image `first` of the batch."""
        if self.forward is not None:
            return self.forward(twin, images)
        if self.part is not None:
            return twin.get_submodule(self.part)(images)
        rows = [(first + place) % self.count for place in range(len(images))]
        fed = iter([images])

        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def other(given: Any) -> Any:
                of_images = isinstance(given, Tensor) and given.ndim == 4
                return next(fed, given) if of_images else given

            return tuple(map(other, args)), {name: other(given) for name, given in kwargs.items()}

        given: list[Any] = []
        handles = [
            twin.get_submodule(self.feed).register_forward_pre_hook(feed, with_kwargs=True, prepend=True),
            twin.register_forward_hook(lambda _, args, output: given.append(output)),
        ]
        with LossWatcher() as watcher:
            try:
                run_step(twin, self.step, picked(self.batch, rows, self.count))
            except Exception:
                if not self.has_loss or not watcher.losses:
                    raise  # else it failed after the loss, as a step that optimises by hand does
            finally:
                for handle in handles:
                    handle.remove()
        if not self.has_loss:
            return given[0]
        return next(loss.outputs for loss in watcher.losses if loss.is_of(len(images)))


Watcher: TypeAlias = Callable[[nn.Module, Callable[[], object]], Look]
"""Watches a twin while something runs it."""


@dataclass(frozen=True)
class Seen:
    """What is known of a batch of probe images after a step of the user's own was watched.

    Attributes:
        adapter: How to run the module on them.
        images: As they reach the ViT, (B, C, H, W), on the CPU.
        labels: (B,), -1 where an image has none; None where none has.
        notice: What the user should know of it, or None.
    """

    adapter: LightningAdapter
    images: Tensor
    labels: Tensor | None
    notice: str | None = None


def watch(
    module: LightningModule, trainer: Trainer, batch: Any, vit: str | None, is_ready: bool, needs_vit: bool = True
) -> Seen:
    """Run a step of the user's own on a twin with a batch, and find out how the module is to be run.

    Args:
        module: The LightningModule.
        trainer: Its trainer.
        batch: Probe images in the user's own form.
        vit: Path of the ViT, if the user says it.
        is_ready: Whether the batch has been through the transfer hooks.
        needs_vit: Whether images are those that reach a ViT; else those that reach any module first.

    Raises:
        ValueError: If no step shows how images become logits.
    """
    if is_ready:
        batch = apply_to_collection(batch, Tensor, lambda part: part.to(module.device))
    else:
        batch = transferred(module, trainer, batch)
    watched: Watcher = partial(look, vit=vit) if needs_vit else look_at_any
    looks = _looks(module, trainer, batch, watched)
    fed = [seen for seen in looks if seen[1].fed is not None]
    best = next((seen for seen in fed if seen[1].losses), fed[0] if fed else None)
    failed = next((seen.error for _, seen in looks if seen.error is not None), None)
    if failed is not None and (best is None or not best[1].losses):
        raise RuntimeError(
            f"A step of {type(module).__name__} failed with probe images: {failed!r}. {_CURE}"
        ) from failed
    if best is None:
        what = "a Vision Transformer" if needs_vit else "a module of its own"
        raise ValueError(f"Expected a step of {type(module).__name__} to give images to {what}, but none did. {_CURE}")
    seen = _seen(module, trainer, batch, *best)
    shown = fed[0][1].fed
    if shown is None or shown.shape != seen.images.shape or _plain(shown).equal(seen.images):
        return seen
    # The training step alone computes a loss, of images that it changed, or mixed and their labels with them.
    again = _look(module, trainer, batch, watched, best[0], seed=1)
    labels = again.losses[0].labels if again.losses else None
    is_sure = labels is not None and seen.labels is not None and _plain(labels).equal(seen.labels)
    return replace(seen, images=_plain(shown), labels=seen.labels if is_sure else _labels(batch, len(shown)))


def _looks(module: LightningModule, trainer: Trainer, batch: Any, watched: Watcher) -> list[tuple[StepName, Look]]:
    """What was seen of each step, validation first, until one computes a loss of what the model was fed."""
    looks: list[tuple[StepName, Look]] = []
    names: tuple[StepName, ...] = ("validation_step", "training_step")
    for name in names:
        if not is_overridden(name, module):
            continue
        looks.append((name, _look(module, trainer, batch, watched, name)))
        if looks[-1][1].losses:
            break
    return looks


def _look(
    module: LightningModule, trainer: Trainer, batch: Any, watched: Watcher, step: StepName, seed: int | None = None
) -> Look:
    with evaluating(module, trainer) as twin, preserved_random_state(seed):
        return watched(twin.module, partial(run_step, twin.module, step, cloned(batch)))


def _seen(module: LightningModule, trainer: Trainer, batch: Any, step: StepName, found: Look) -> Seen:
    assert found.fed is not None
    images, count = found.fed, len(found.fed)
    loss = found.losses[0] if found.losses else None
    outputs = loss.outputs if loss is not None else _own_output(found, count)
    if outputs is None:
        raise ValueError(
            f"Expected `{step}` of {type(module).__name__} to compute a loss of logits (B, C) or (B,), a row for each "
            f"of {count} images, but no such loss was seen. {_CURE}"
        )
    labels = loss.labels if loss is not None else None
    if labels is None and (loss is None or not loss.regression):
        labels = _labels(batch, count)
    adapter = LightningAdapter(
        module,
        trainer,
        found.vit,
        regression=loss is not None and loss.regression,
        part=None,
        step=step,
        batch=batch,
        count=count,
        feed=found.feed,
        has_loss=loss is not None,
    )
    notice = _notice(step, found) if loss is not None else None
    adapter.part = _part(adapter, images, outputs.detach())
    if adapter.part is None:
        _check_rows(adapter, images, outputs.detach())
    if adapter.part != "" and not found.called and is_overridden("forward", module):
        notice = (
            f"`forward` gives other outputs than the loss of `{step}` is computed of; the loss's are explained. "
            "`forward=lambda module, images: module(images)` explains the others."
        )
    return Seen(adapter, _plain(images), None if labels is None else _plain(labels), notice)


def _check_rows(adapter: LightningAdapter, images: Tensor, outputs: Tensor) -> None:
    """Refuse a step whose outputs for an image depend on the other images of the batch."""
    alone: object = None
    with adapter.evaluating() as twin, torch.no_grad(), suppress(ValueError, IndexError):
        alone = adapter.outputs(twin.module, images[:1], 0)
    row = outputs[:1]
    if (
        not isinstance(alone, Tensor)
        or alone.shape != row.shape
        or not torch.allclose(alone.float(), row.float(), rtol=1e-2, atol=1e-3)
    ):
        raise ValueError(
            f"Expected the outputs of `{adapter.step}` of {type(adapter.model).__name__} for an image to depend on it "
            f"alone, but they depend on the rest of the batch, as those of a contrastive loss do. {_CURE}"
        )


def _part(adapter: LightningAdapter, images: Tensor, outputs: Tensor) -> str | None:
    """Path of a module that gives the same outputs for the images that reach the ViT, and so can be called alone."""
    with adapter.evaluating() as twin, torch.no_grad():
        for path in dict.fromkeys(["", adapter.vit or "", adapter.feed]):
            try:
                found = twin.module.get_submodule(path)(images.clone())
            except Exception:  # it takes something else than images
                continue
            found = getattr(found, "logits", found)
            same = isinstance(found, Tensor) and found.numel() == outputs.numel()
            if same and torch.allclose(found.flatten().float(), outputs.flatten().float(), rtol=1e-3, atol=1e-4):
                return path
    return None


def _own_output(found: Look, count: int) -> Tensor | None:
    """What the module itself gave for the images, where that looks like logits."""
    outputs = [getattr(output, "logits", output) for _, output in found.called]
    alike = [output for output in outputs if isinstance(output, Tensor) and output.ndim == 2 and len(output) == count]
    return alike[0] if len(alike) == 1 else None


def _notice(step: StepName, found: Look) -> str | None:
    first = found.losses[0]
    others = [loss for loss in found.losses[1:] if loss.name != "softmax" and loss.outputs is not first.outputs]
    if not others:
        return None
    return (
        f"`{step}` computes {1 + len(others)} losses of different outputs; the outputs of the first, `{first.name}`, "
        "are explained. `forward=` chooses others."
    )


def _labels(batch: Any, count: int) -> Tensor | None:
    try:
        _, labels = images_and_labels(batch)
    except (TypeError, ValueError):  # of another form: there are none that one can be sure of
        return None
    return labels if labels is not None and len(labels) == count else None


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().as_subclass(Tensor)
