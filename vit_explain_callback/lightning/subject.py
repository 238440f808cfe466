"""Find what a run explains: its probe images, and how its module is run on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from vit_explain_callback._checks import check_classifier
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.lightning._compat import LightningModule, Trainer
from vit_explain_callback.lightning.batches import Watched, images_and_labels
from vit_explain_callback.lightning.data import class_names, probe_batch, validation_loader
from vit_explain_callback.lightning.evaluation import evaluating, transferred
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.lightning.step import LightningAdapter, watch
from vit_explain_callback.lightning.strategy import explained_module, forward_of
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.warning import warn
from vit_explain_callback.vit.adapter import Adapter, PlainAdapter
from vit_explain_callback.vit.timm import find_vit, normalisation, refuse_other_timm_models
from vit_explain_callback.vit.wrappers import is_sharded


@dataclass(frozen=True)
class Subject:
    """What a run explains.

    Attributes:
        explainer: Of its module.
        probe: The images.
        is_first: Whether they are the first that validation gave, as others could not be had.
    """

    explainer: Explainer
    probe: Probe
    is_first: bool = False

    @classmethod
    def of(
        cls, settings: Settings, trainer: Trainer, module: LightningModule, ranks: Ranks, watched: Watched
    ) -> Subject | None:
        """Take the images that the user gives, or validation images; None where these must be watched first.

        Raises:
            TypeError: If there are no images to be found in a batch.
            ValueError: If the module cannot be explained.
            RuntimeError: If reading the images fails.
        """
        vit = settings.model.get("vit")
        if settings.needs_vit:
            refuse_other_timm_models(module if vit is None else find_vit(module, vit))
        if settings.given is not None:
            images, labels = settings.given
            return cls._made(settings, trainer, module, _called(settings, trainer, module), images, labels)
        # The first process collects, and gives the images to all.
        work = partial(_collected, trainer, settings.num_images, watched)
        batch, is_ready = ranks.together(lambda: work() if ranks.rank == 0 else (None, False))[0]
        if batch is None:
            return None
        if settings.model.get("forward") is not None or is_sharded(module):
            images, labels = images_and_labels(_on_device(trainer, module, batch, is_ready))
            adapter = _called(settings, trainer, module)
            return cls._made(settings, trainer, module, adapter, images, labels, is_first=is_ready)
        try:
            seen = watch(module, trainer, batch, vit, is_ready, settings.needs_vit)
        except RuntimeError:  # the step may be given another form: that of several loaders at once
            if is_ready or watched.batch is None or ranks.count > 1:
                raise
            seen, is_ready = watch(module, trainer, watched.batch, vit, True, settings.needs_vit), True
        if seen.notice is not None:
            warn(seen.notice)
        return cls._made(settings, trainer, module, seen.adapter, seen.images, seen.labels, is_first=is_ready)

    @classmethod
    def _made(
        cls,
        settings: Settings,
        trainer: Trainer,
        module: LightningModule,
        adapter: Adapter,
        images: Tensor,
        labels: Tensor | None,
        is_first: bool = False,
    ) -> Subject:
        display, wanted = settings.display, settings.num_images
        if settings.given is None:
            images, labels = images[:wanted], None if labels is None else labels[:wanted]
            if len(images) < wanted:
                warn(
                    f"give `images=` to explain more: `num_images={wanted}`, but {_given(trainer, len(images))}. These "
                    "are used."
                )
        vit = find_vit(adapter.model, adapter.vit) if settings.needs_vit else adapter.model
        probe = Probe.of(
            images,
            labels,
            regions=settings.regions,
            class_names=display.class_names or class_names(trainer),
            regression=adapter.regression,
            normalisation=display.normalisation or normalisation(vit),
            num_shown=display.num_shown,
        )
        options = settings.model
        explainer = Explainer.of(
            adapter,
            settings.methods,
            prefix_tokens=options.get("prefix_tokens"),
            grid_size=options.get("grid_size"),
        )
        return cls(explainer, probe, is_first)


def _collected(trainer: Trainer, num_images: int, watched: Watched) -> tuple[Any, bool]:
    """A batch of validation images, and whether it has been through the transfer hooks; None if there is none yet.

    Images that were watched are the first of the data, and often of one class: they serve where no others can be had.
    """
    try:
        batch = probe_batch(trainer, num_images)
    except RuntimeError as error:
        if watched.batch is None:
            raise
        warn(
            "give `images=(images, labels)` to explain others than the first validation images, as a copy of the "
            f"validation data cannot be read: {error.__cause__!r}."
        )
        batch = None
    return (watched.batch, True) if batch is None else (batch, False)


def _given(trainer: Trainer, used: int) -> str:
    """How many images validation gave, where fewer than all of them can be explained."""
    loader = validation_loader(trainer)
    try:
        total = len(loader.dataset) if loader.batch_sampler is not None else used
    except (AttributeError, TypeError):  # a stream, or no loader of torch's
        total = used
    if total <= used:
        return f"the validation set gave {used}"
    return f"of the {total} in the validation set {used} can be explained: those of one size that reach the model"


def _on_device(trainer: Trainer, module: LightningModule, batch: Any, is_ready: bool) -> Any:
    if is_ready:
        return batch
    if is_sharded(module):
        return trainer.strategy.batch_to_device(batch, module.device)
    with evaluating(module, trainer) as twin:
        return transferred(twin.module, trainer, batch, module.device)


def _called(settings: Settings, trainer: Trainer, module: LightningModule) -> Adapter:
    """The module, run by calling it, its ViT or the user's `forward`."""
    vit, forward = settings.model.get("vit"), settings.model.get("forward")
    model = explained_module(module, vit, forward, settings.needs_vit)
    if is_sharded(module):
        return PlainAdapter(model, vit if model is module else None, forward or forward_of(trainer))
    if model is not module:
        check_classifier(model)
    path = "" if model is module else next(name for name, child in module.named_modules() if child is model)
    return LightningAdapter(module, trainer, vit, part=path, forward=forward)
