"""One fit as the callback sees it: the probe batch, the snapshots of it, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from vit_explain_callback._checks import check_images
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.lightning._compat import LightningModule, Trainer
from vit_explain_callback.lightning.data import class_names, collect_probe
from vit_explain_callback.lightning.loggers import Writer
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.lightning.strategy import check_together, explain_together, explained_module, forward_of
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.notices import Notices
from vit_explain_callback.tracking.probe import ProbeBatch
from vit_explain_callback.tracking.report import Report
from vit_explain_callback.tracking.snapshot import Checks, History, Snapshot
from vit_explain_callback.tracking.summary import verdict
from vit_explain_callback.vit.timm import find_vit, normalisation


class Observation:
    """Takes the snapshots of one fit.

    Args:
        settings: What the user asks for.
        history: Of the run so far; snapshots are added to it.
        trainer: At the start of training.
        pl_module: What it trains.
    """

    def __init__(self, settings: Settings, history: History, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "explanations"  # log_dir needs every rank
        self._settings = settings
        self._history = history
        self._trainer = trainer
        self._module = pl_module
        self._ranks = Ranks.of(trainer)
        model = explained_module(pl_module, settings.vit, settings.forward)
        self._explainer = Explainer(
            model,
            settings.methods,
            vit=settings.vit if model is pl_module else None,
            forward=settings.forward or (forward_of(trainer) if model is pl_module else None),
            prefix_tokens=settings.prefix_tokens,
            grid_size=settings.grid_size,
        )
        self._last_step = trainer.global_step
        self._probe: ProbeBatch | None = None
        self._report: Report | None = None
        self._writer: Writer | None = None
        if trainer.is_global_zero:
            no_files = getattr(trainer, "fast_dev_run", False)
            self._writer = Writer(trainer.loggers, None if no_files else folder, settings)
        self._notices = Notices([method.name for method in settings.methods])

    def begin(self) -> None:
        """Take the baseline, unless a checkpoint brought one; then, the snapshot that was due after it was written."""
        self._attempt(self._begin, always_raised=(TypeError, ValueError))

    def after_step(self) -> None:
        """Take a snapshot if one is due after this optimiser step."""
        every, step = self._settings.every_n_steps, self._trainer.global_step
        if every and step // every > self._last_step // every:
            self._take_unless_done()

    def after_epoch(self) -> None:
        """Take a snapshot if one is due after this epoch."""
        every = self._settings.every_n_epochs
        if every and (self._trainer.current_epoch + 1) % every == 0:
            self._take_unless_done()

    def end(self) -> None:
        """Take the last snapshot, unless the schedule has just done so, and say what the run shows."""
        self._take_unless_done()
        self._attempt(self._conclude)

    def _attempt(self, work: Callable[[], None], always_raised: tuple[type[Exception], ...] = ()) -> None:
        """Do what a snapshot needs; a failure stops training only if it is to, or if it is one of `always_raised`."""
        try:
            work()
        except Exception as error:
            if self._settings.on_error == "raise" or isinstance(error, always_raised):
                raise
            rank_zero_warn(
                f"ViTExplainCallback: the snapshot at step {self._trainer.global_step} failed, and training goes on: "
                f"{error!r}. Pass `on_error='raise'` to stop here and see where."
            )

    def _begin(self) -> None:
        _, report = self._prepared()
        if not self._history.count or self._is_overdue():
            self._take()
        else:
            self._trainer.callback_metrics.update(_tensors(report.scalars(self._history)))

    def _take_unless_done(self) -> None:
        if self._trainer.global_step != self._last_step:
            self._last_step = self._trainer.global_step
            self._attempt(self._take)

    def _prepared(self) -> tuple[ProbeBatch, Report]:
        """The probe batch, which is collected the first time this is called, and the report on it."""
        settings, history = self._settings, self._history
        if self._probe is None or self._report is None:
            probe = settings.given or collect_probe(self._trainer, self._module, settings.num_images, self._ranks)
            check_images(probe.images)
            settings.check_regions(len(probe))
            if history.count and not self._continues(probe):
                rank_zero_warn(
                    "ViTExplainCallback: the checkpoint's explanations are of other images or methods than this run's, "
                    "so a new baseline is taken."
                )
                history.clear()
            history.fingerprint = probe.fingerprint
            given = (settings.mean, settings.std) if settings.mean and settings.std else None
            normalised = given or normalisation(find_vit(self._module, settings.vit))
            names = settings.class_names or class_names(self._trainer)
            self._probe = probe
            self._report = Report.of(probe, settings.num_shown, normalised, names, settings.regions)
            if self._writer is not None:
                self._writer.begin(self._report)
        return self._probe, self._report

    def _continues(self, probe: ProbeBatch) -> bool:
        same_methods = set(self._history.baseline.maps) == {method.name for method in self._settings.methods}
        return same_methods and self._history.fingerprint == probe.fingerprint

    def _is_overdue(self) -> bool:
        """Whether a checkpoint was written at a step of the schedule, but before the snapshot."""
        last, step = self._history.now.step, self._trainer.global_step
        if every := self._settings.every_n_steps:
            return step // every > last // every
        # Lightning does not end an epoch again whose last batch is done; the next one is then the current one.
        ended = self._trainer.is_last_batch and self._trainer.current_epoch % (self._settings.every_n_epochs or 1) == 0
        return ended and step > last

    def _take(self) -> None:
        probe, report = self._prepared()
        settings, history = self._settings, self._history
        target = history.baseline.target if history.count else self._first_target(probe)
        found = explain_together(
            self._ranks, self._explainer, probe.images, target, settings.batch_size, settings.block_statistics
        )
        every = settings.check_every_n_snapshots
        checks = self._checks(probe, found.maps, found.target) if every and history.count % every == 0 else None
        history.add(Snapshot(self._trainer.global_step, found.maps, found.logits, found.target, found.blocks, checks))
        scalars = self._scalars(report)
        if self._writer is not None:
            for notice in self._notices.of(scalars):
                rank_zero_warn(f"ViTExplainCallback: {notice}")
            self._writer.write(history.now, scalars, list(report.figures(history)))

    def _checks(self, probe: ProbeBatch, maps: Mapping[str, Tensor], target: Tensor) -> Checks:
        settings = self._settings
        return check_together(
            self._ranks, self._explainer, probe.images, maps, target, settings.batch_size, settings.removal
        )

    def _scalars(self, report: Report) -> dict[str, float]:
        """Of the latest snapshot; on every rank, for `ModelCheckpoint` and `EarlyStopping`."""
        scalars = report.scalars(self._history)
        self._trainer.callback_metrics.update(_tensors(scalars))
        return scalars

    def _conclude(self) -> None:
        history = self._history
        if not history.count or history.now.step != self._trainer.global_step:
            return  # nothing was seen of the model that training ended with
        probe, report = self._prepared()
        if self._settings.check_every_n_snapshots and history.now.checks is None:
            history.update_latest(self._checks(probe, history.now.maps, history.now.target))
        scalars = self._scalars(report)
        if self._writer is not None:
            text = verdict(history, report.labels, report.regions, report.class_names)
            self._writer.conclude(history.now, scalars, text, report.animations(history))

    def _first_target(self, probe: ProbeBatch) -> int | Tensor | None:
        if isinstance(self._settings.target, int):
            return self._settings.target
        return probe.labels if self._settings.target == "label" else None


def _tensors(scalars: Mapping[str, float]) -> dict[str, Tensor]:
    return {tag: torch.tensor(value) for tag, value in scalars.items()}
