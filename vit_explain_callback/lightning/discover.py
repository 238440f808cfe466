"""Find what a run explains: its probe images, and how its module is run on them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.isolation.wrappers import is_sharded
from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_kind, is_overridden
from vit_explain_callback.lightning.adapter import LightningAdapter, transferred
from vit_explain_callback.lightning.batches import BatchBuffer, images_and_labels
from vit_explain_callback.lightning.outputs import Discovery
from vit_explain_callback.lightning.probe_batch import class_names, probe_batch, validation_size
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.lightning.steps import Steps
from vit_explain_callback.lightning.trace import StepTrace
from vit_explain_callback.options.model import LogitsOf
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.errors import is_refusal, warn
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.vit.adapter import Adapter, PlainAdapter
from vit_explain_callback.vit.timm import check_classifier, find_vit, normalisation, refuse_other_timm_models


def ranks_of(trainer: Trainer) -> Ranks:
    """The processes of a trainer whose strategy is set up.

    Raises:
        ValueError: If its processes divide the heads of each attention among them.
    """
    strategy = trainer.strategy
    mesh = getattr(strategy, "_device_mesh", None)  # of `ModelParallelStrategy`, public only inside the module
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "Expected every process to compute all heads of an attention, but the strategy's `tensor_parallel_size`"
            f" is {mesh['tensor_parallel'].size()}: no process sees a whole attention matrix. Explain checkpoints "
            "of this run with `explain` instead."
        )
    whole_model = is_kind(strategy, "DDPStrategy") and not is_kind(strategy, "DeepSpeedStrategy")
    return Ranks(trainer.global_rank, trainer.world_size, trainer.world_size == 1 or whole_model)


def explained_module(
    pl_module: LightningModule, vit: str | None, forward: LogitsOf | None, needs_vit: bool
) -> nn.Module:
    """What turns images into logits: the LightningModule if it can, else the ViT itself.

    Raises:
        ValueError: If neither can.
    """
    if forward is not None or is_overridden("forward", pl_module):
        return pl_module
    if not needs_vit:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to define `forward(images)`, returning logits, but it does not. Say "
            "how to get them: `ViTExplainCallback(forward=lambda module, images: module.model(images))`."
        )
    found = find_vit(pl_module, vit)
    if found is pl_module:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to define `forward(images)`, returning logits, or `vit=` to name "
            "the attribute that holds its model, but got neither."
        )
    return found


def forward_of(trainer: Trainer) -> LogitsOf | None:
    """How the LightningModule is called by a trainer whose strategy needs more than that, else None."""
    if not is_kind(trainer.strategy, "FSDPStrategy"):
        return None
    # Parameters outside of every wrapped submodule are gathered by the outermost wrapper alone.
    outermost = trainer.strategy.model

    def forward(_: nn.Module, images: Tensor) -> Any:
        assert outermost is not None
        return outermost(images)

    return forward


_FEW = 16
"""Images that a step is run with, where its loss is all that is asked for."""


@dataclass(frozen=True)
class Subject:
    """What a run explains.

    Attributes:
        explainer: Of its module.
        probe: The images.
        is_first: Whether they are the first that validation gave, as others could not be had.
        words: What is explained.
    """

    explainer: Explainer
    probe: Probe
    is_first: bool = False
    words: str = ""

    @classmethod
    def of(
        cls,
        settings: Settings,
        trainer: Trainer,
        module: LightningModule,
        ranks: Ranks,
        watched: BatchBuffer,
        trace: StepTrace | None,
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
        discovery = Discovery(module, trainer, vit, settings.needs_vit, settings.model.get("task"))
        if settings.images is not None:
            return cls._of_given(settings, trainer, module, ranks, discovery, trace)
        # The first process collects, and gives the images to all.
        work = partial(_collected, trainer, settings.num_images, watched)
        gathered = ranks.together(lambda: (*work(), trace) if ranks.rank == 0 else (None, False, None))
        batch, is_ready, trace = gathered[0]
        if batch is None:
            return None
        if settings.model.get("forward") is not None or is_sharded(module):
            images, labels = images_and_labels(_on_device(trainer, module, batch, is_ready))
            adapter = _called(settings, trainer, module)
            return cls._made(settings, trainer, module, adapter, images, labels, is_first=is_ready)
        try:
            seen = ranks.alike(lambda: discovery.of(batch, is_ready, trace))
        except RuntimeError:  # the step may be given another form: that of several loaders at once
            if is_ready or watched.batch is None or ranks.count > 1:
                raise
            seen, is_ready = discovery.of(watched.batch, True, trace), True  # of one process alone
        if seen.notice is not None:
            warn(seen.notice)
        made = cls._made(settings, trainer, module, seen.adapter, seen.images, seen.labels, is_first=is_ready)
        return replace(made, words=seen.words)

    @classmethod
    def _of_given(
        cls,
        settings: Settings,
        trainer: Trainer,
        module: LightningModule,
        ranks: Ranks,
        discovery: Discovery,
        trace: StepTrace | None,
    ) -> Subject:
        assert settings.images is not None
        images, labels = settings.images
        first: StepTrace | None = None
        if settings.model.get("forward") is None and not is_sharded(module):
            first = ranks.together(lambda: trace)[0]
            if first is None or not first.seen:
                first = _seen_on_a_copy(trainer, module, ranks)
        if first is not None:
            try:
                seen = ranks.alike(lambda: discovery.of_images(images, labels, first))
                made = cls._made(settings, trainer, module, seen.adapter, seen.images, labels)
                return replace(made, words=seen.words)
            except Exception as error:
                if is_refusal(error):
                    raise
        # Or the module's parts do not take these images: it may itself, and else says what it takes.
        return cls._made(settings, trainer, module, _called(settings, trainer, module), images, labels)

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
        if settings.images is None:
            images, labels = images[:wanted], None if labels is None else labels[:wanted]
            if len(images) < wanted:
                warn(
                    f"`num_images={wanted}`, but {_given(trainer, len(images))}; these are used. Give others with "
                    "`images=`."
                )
        vit = find_vit(adapter.model, adapter.vit) if settings.needs_vit else adapter.model
        probe = Probe.of(
            images,
            labels,
            regions=settings.regions,
            class_names=display.class_names or class_names(trainer),
            regression=adapter.regression,
            multilabel=getattr(adapter, "task", None) == "multilabel",
            normalisation=display.normalisation or normalisation(vit),
            num_shown=display.num_shown,
        )
        options = settings.model
        explainer = Explainer(
            adapter,
            settings.methods,
            prefix_tokens=options.get("prefix_tokens"),
            grid_size=options.get("grid_size"),
        )
        return cls(explainer, probe, is_first)


def _collected(trainer: Trainer, num_images: int, watched: BatchBuffer) -> tuple[Any, bool]:
    """A batch of validation images, and whether it has been through the transfer hooks; None if there is none yet.

    Images that were watched are the first of the data, and often of one class: they serve where no others can be had.
    """
    try:
        batch = probe_batch(trainer, num_images)
    except RuntimeError as error:
        if watched.batch is None:
            raise
        warn(
            "give `images=(images, labels)` to explain others than the first validation images, as others cannot be "
            f"read in a process of its own: {error.__cause__!r}."
        )
        batch = None
    return (watched.batch, True) if batch is None else (batch, False)


def _seen_on_a_copy(trainer: Trainer, module: LightningModule, ranks: Ranks) -> StepTrace | None:
    """What a step computes its loss of with images of the data; None where that cannot be seen."""

    def read() -> Any:
        with suppress(RuntimeError):  # what cannot be read is not needed: the images are given
            return probe_batch(trainer, _FEW, any_items=True)

    batch = ranks.together(lambda: read() if ranks.rank == 0 else None)[0]
    if batch is None:
        return None

    def run() -> StepTrace | None:
        with suppress(Exception):  # nor is a step that runs
            seen = Steps(module, trainer).first_with_loss(transferred(module, trainer, batch))[2]
            return replace(seen, error=None)
        return None

    return ranks.together(run)[0]


def _given(trainer: Trainer, used: int) -> str:
    """How many images validation gave, where fewer than all of them can be explained."""
    total = validation_size(trainer) or used
    if total <= used:
        return f"the validation set gave {used}"
    return (
        f"of the {total} in the validation set {used} can be explained: those of one size, and with a label where the "
        "step needs one"
    )


def _on_device(trainer: Trainer, module: LightningModule, batch: Any, is_ready: bool) -> Any:
    if is_ready:
        return batch
    if is_sharded(module):
        return trainer.strategy.batch_to_device(batch, module.device)
    return transferred(module, trainer, batch)


def _called(settings: Settings, trainer: Trainer, module: LightningModule) -> Adapter:
    """The module, run by calling it, its ViT or the user's `forward`."""
    vit, forward, task = settings.model.get("vit"), settings.model.get("forward"), settings.model.get("task")
    model = explained_module(module, vit, forward, settings.needs_vit)
    if is_sharded(module):
        return PlainAdapter(
            model, vit if model is module else None, forward or forward_of(trainer), task == "regression"
        )
    if model is not module:
        check_classifier(model)
    path = "" if model is module else next(name for name, child in module.named_modules() if child is model)
    return LightningAdapter(module, trainer, vit, task or "classification", forward, (path,))
