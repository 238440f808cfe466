"""One fit: when snapshots are taken, of which images, and by which processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_kind
from vit_explain_callback.lightning.batches import BatchBuffer
from vit_explain_callback.lightning.discover import Discovered, discover, ranks_of
from vit_explain_callback.lightning.loggers import LoggerWriter
from vit_explain_callback.lightning.run_folder import run_folder
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.lightning.steps import FirstStepWatcher
from vit_explain_callback.lightning.weights import sample_weights
from vit_explain_callback.system.terminal import announce, quoted
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.errors import Guard, is_refusal, warn
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run_folder import RunFolder
from vit_explain_callback.tracking.tags import PREFIX, with_prefix
from vit_explain_callback.tracking.writers import FolderWriter, Writer

_CURE = (
    "If the model cannot be copied or run here, explain the checkpoints of the run instead: "
    "`explain(module.part, images)`, where `part` turns images into logits."
)


class Fit:
    """Takes the snapshots of one fit.

    Args:
        settings: The options of the callback.
        trainer: The trainer, at the start of training.
        pl_module: The module that it trains.
        state: State of the run that is resumed, or None.
        buffer: The validation images seen so far.
        step: The first validation step, as far as it was watched.
        guard: Reports failures.
        place: Index of this callback among several in one trainer; each has its own tags and folder.
        previous: The previous fit of this callback, if any.

    Attributes:
        tracker: Holds the snapshots; None until there are probe images.
    """

    def __init__(
        self,
        settings: Settings,
        trainer: Trainer,
        pl_module: LightningModule,
        state: Mapping[str, Any] | None,
        buffer: BatchBuffer,
        step: FirstStepWatcher,
        guard: Guard,
        place: int = 0,
        previous: Fit | None = None,
    ) -> None:
        self.tracker: ExplanationTracker | None = None
        self._settings, self._trainer, self._module, self._state = settings, trainer, pl_module, state
        self._buffer, self._step = buffer, step
        self._guard = guard
        self._ids = (id(trainer), id(pl_module))
        self._logged = -1 if previous is None else previous.logged_by(trainer)
        self._last_step = trainer.global_step
        self._published: dict[str, Tensor] = {}
        self._explained_weights: Tensor | None = None
        self._greeting: Callable[[], str] | None = None
        self._prefix = f"explain_{place + 1}/" if place else PREFIX

    def begin(self) -> None:
        """Take the baseline, or, if a checkpoint holds one, the snapshot that was due when it was written.

        Raises:
            Exception: If we refuse the configuration; training has not begun yet.
        """
        try:
            self._begin()
        except Exception as error:
            if is_refusal(error):
                raise
            self._failed(error, _CURE)

    def after_step(self) -> None:
        """Take a snapshot if one is due after this optimiser step."""
        if self._settings.schedule.steps_passed(self._last_step, self._trainer.global_step):
            self._take_unless_done()

    def after_validation(self) -> None:
        """Take a snapshot if one is due with each validation, or the baseline if there were no images before."""
        if self.tracker is None and self._buffer.batch is not None:
            self._attempt(self._begin)
        elif self._settings.schedule.with_validation:
            self._take_unless_done()

    def after_epoch(self) -> None:
        """Take a snapshot if one is due after this epoch."""
        schedule = self._settings.schedule
        unvalidated = schedule.with_validation and not self._trainer.enable_validation
        if unvalidated or schedule.epochs_passed(self._trainer.current_epoch + 1):
            self._take_unless_done()

    def end(self) -> None:
        """Take the last snapshot, unless the schedule has just taken it, and print the summary.

        It is taken again if weights were replaced since, as callbacks that average weights do when training ends.
        """
        self._take_unless_done()
        then = self._explained_weights
        now = None if then is None else self._sample()
        # Weights of another size are not replaced but freed.
        replaced = then is not None and now is not None and len(now) == len(then) and not now.equal(then)
        if self._trainer.strategy.reduce_boolean_decision(replaced, all=False):  # by all processes or none
            self._attempt(self._take)
        self._guard.attempt("cannot conclude", self._conclude)

    def release(self) -> None:
        """Drop the references to trainer and module; the tracker keeps its snapshots."""
        if self.tracker is not None:
            self.tracker.release()
        del self._trainer, self._module

    def state_for(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        """State for the next fit if the same trainer continues with the same module, else None."""
        is_same = trainer.global_step > 0 and self._ids == (id(trainer), id(pl_module))
        return self.tracker.state_dict() if is_same and self.tracker is not None else None

    def logged_by(self, trainer: Trainer) -> int:
        """The last step that the loggers of this trainer have values of; -1 if there is none."""
        tracker, is_same = self.tracker, trainer.global_step > 0 and self._ids[0] == id(trainer)
        return -1 if tracker is None or not is_same or not tracker.history.count else tracker.history.now.step

    @property
    def watches(self) -> bool:
        """Whether validation batches are still needed."""
        return self.tracker is None

    def _begin(self) -> None:
        tracker = self._ready()
        if tracker is None:
            warn(
                "the validation data cannot be read before training (a stream, or data that cannot be copied), so the "
                "baseline is taken at the first validation. Pass `images=` to take it before training."
            )
        elif not tracker.history.count or self._is_overdue(tracker.history.now.step):
            self._take()
        else:
            self._publish(tracker.scalars())
            self._greet()

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failed(error)

    def _take_unless_done(self) -> None:
        if self._trainer.global_step != self._last_step:
            self._last_step = self._trainer.global_step
            self._attempt(self._take)

    def _failed(self, error: Exception, cure: str = "") -> None:
        self._guard.failed(f"the snapshot at step {self._trainer.global_step} failed", error, cure=cure)

    def _sample(self) -> Tensor | None:
        return self._guard.attempt("cannot tell whether weights are replaced", partial(sample_weights, self._module))

    def _take(self) -> None:
        tracker = self._ready()
        if tracker is not None:
            self._publish(tracker.observe(self._trainer.global_step))
            self._explained_weights = self._sample()
            self._greet()

    def _ready(self) -> ExplanationTracker | None:
        """The tracker, created once there are images to explain."""
        if self.tracker is None:
            settings, ranks = self._settings, ranks_of(self._trainer)
            trace = self._step.trace
            discovered = discover(settings, self._trainer, self._module, ranks, self._buffer, trace)
            if discovered is None:
                return None
            if discovered.probe.images is not None:
                settings.display.check_channels(discovered.probe.images.shape[1])
            folder = run_folder(self._trainer, self._guard)
            tracker = ExplanationTracker(
                discovered.explainer,
                discovered.probe,
                folder=folder if settings.save_maps and not self._leaves_no_files else None,
                target=self._first_target(discovered.probe),
                checks=settings.checks,
                metrics=settings.metrics,
                detail=settings.detail,
                batch_size=settings.model["batch_size"],
                progress=self._trainer.progress_bar_callback is not None,
                on_error=settings.on_error,
                ranks=ranks,
            )
            if self._state:
                tracker.load_state_dict(self._state, self._trainer.global_step)
            tracker.output.writers = self._writers(folder)
            self.tracker = tracker
            self._greeting = partial(self._greeting_text, discovered, folder)
        return self.tracker

    def _greet(self) -> None:
        """Print once what is watched, after the first snapshot."""
        if self._greeting is not None and self._trainer.is_global_zero:
            announce(self._greeting())
        self._greeting = None

    def _greeting_text(self, discovered: Discovered, folder: RunFolder) -> str:
        """What is watched, when, and how to look at it."""
        settings, labels = self._settings, discovered.probe.labels
        classes = 0 if labels is None or (labels < 0).any() else len(set(labels.tolist()))
        images = f"{len(discovered.probe)} images" + (f" of {classes} class{'es' * (classes > 1)}" if classes else "")
        images += " (the first of the validation; choose others with `images=`)" if discovered.is_first else ""
        methods = ", ".join(method.name for method in settings.methods)
        board = next((logger for logger in self._trainer.loggers if is_kind(logger, "TensorBoardLogger")), None)
        where = [] if board is None else [f"tensorboard --logdir {quoted(board.save_dir)}"]
        if settings.save_maps and folder.is_made:
            where.append(f"vit-explain report {quoted(folder)}")
        look = f"; to see them: {' or '.join(where)}" if where else ""
        what = f" ({discovered.description})" if discovered.description else ""
        watched = f"ViTExplainCallback watches {discovered.explainer.name}{what}"
        return f"{watched}: {methods} of {images}, {settings.schedule}{look}"

    def _writers(self, folder: RunFolder) -> tuple[Writer, ...]:
        """A writer for each logger, and a folder if no logger shows pictures; only on the first process."""
        if not self._trainer.is_global_zero:
            return ()
        settings, detail = self._settings, self._settings.detail
        has_charts = detail.margin_charts and detail.level == "full"  # only it logs what they show
        charts = [method.name for method in settings.methods] if has_charts else []
        loggers: list[LoggerWriter] = []
        for index, logger in enumerate(self._trainer.loggers):
            what = f"cannot write to {type(logger).__name__} (logger {index})"
            create = partial(LoggerWriter, logger, index, charts, detail.max_pictures_mb, self._prefix, self._logged)
            writer = self._guard.attempt(what, create)
            loggers += [] if writer is None else [writer]
        if self._leaves_no_files or any(logger.shows_pictures for logger in loggers):
            return tuple(loggers)
        self._guard.attempt(f"cannot make the folder {folder}", lambda: folder.path)
        if not folder.is_made:
            return tuple(loggers)
        warn(
            f"no logger of this run shows pictures, so the latest of each is a PNG file in {folder}. Add a "
            "`TensorBoardLogger` to see them all."
        )
        return (*loggers, FolderWriter(folder))

    @property
    def _leaves_no_files(self) -> bool:
        return bool(getattr(self._trainer, "fast_dev_run", False))

    def _is_overdue(self, last: int) -> bool:
        """Whether the checkpoint was written at a scheduled step, but before its snapshot."""
        step, schedule = self._trainer.global_step, self._settings.schedule
        if schedule.every_n_steps:
            return schedule.steps_passed(last, step)
        # Lightning does not repeat the end of an epoch whose last batch is done; the next epoch is then current.
        due = schedule.with_validation or schedule.epochs_passed(self._trainer.current_epoch)
        return step > last and self._trainer.is_last_batch and due

    def _publish(self, values: Mapping[str, float]) -> None:
        """Put scalars into `callback_metrics` on every rank, for `ModelCheckpoint`; the user's keys stay."""
        metrics = self._trainer.callback_metrics
        for name, value in values.items():
            tag = with_prefix(name, self._prefix)
            if tag not in metrics or metrics[tag] is self._published.get(tag):
                metrics[tag] = self._published[tag] = torch.tensor(value)

    def _conclude(self) -> None:
        tracker = self.tracker
        if tracker is None or not tracker.history.count or tracker.history.now.step != self._trainer.global_step:
            return  # the final model was not explained
        text = tracker.finish()
        self._publish(tracker.scalars())
        if self._trainer.is_global_zero:
            announce(text)

    def _first_target(self, probe: Probe) -> int | Tensor | None:
        if isinstance(self._settings.target, int):
            return self._settings.target
        if probe.regression:
            return 0
        return probe.labels if self._settings.target == "label" else None
