"""The Lightning callback: collects a probe batch, explains it on schedule, and logs what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from vit_explain_callback._lightning import Callback, LightningModule, Trainer, is_overridden
from vit_explain_callback.checks import check_classifier, check_counts, check_images, check_start_layers
from vit_explain_callback.explained import explain_together, explained_module, forward_of
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.methods import Method, resolve_methods
from vit_explain_callback.probe import ProbeBatch
from vit_explain_callback.ranks import Ranks
from vit_explain_callback.report import Report
from vit_explain_callback.snapshot import History, Snapshot
from vit_explain_callback.subject import LogitsOf
from vit_explain_callback.validation import class_names, collect_probe
from vit_explain_callback.vit import (
    find_vit,
    is_timm_vit,
    normalisation,
    num_blocks,
    refuse_other_timm_models,
    timm_layout,
)
from vit_explain_callback.writer import Writer


class ViTExplainCallback(Callback):
    """Explains the same validation images again and again while a Vision Transformer is fine-tuned.

    A snapshot is taken before the first optimiser step (the baseline), on schedule, and at the end of fit. It logs, for
    every method, to TensorBoard:

    - `explain_filmstrip/{method}`: image, baseline, earlier snapshots, now; a row for each shown image.
    - `explain_overlay/{method}/{i}`: the map of shown image i.
    - `explain_diff/{method}/{i}`: now minus baseline (from the second snapshot on).
    - `drift_baseline/{method}/{metric}`, `drift_previous/{method}/{metric}`: `spearman`, `jensen_shannon`, `top10_iou`,
      `centroid_shift`; the baseline is compared with itself.
    - `map_stats/{method}/{stat}`: `entropy`, `top10_mass`, `patch_mass`, `degenerate`.
    - `probe/target_probability`, `probe/accuracy` (with labels), `probe/changed_predictions` (since the baseline).

    Every scalar is in `trainer.callback_metrics` too, for `ModelCheckpoint(monitor=…)` and `EarlyStopping`. Raw maps go
    to `explanations/step_{step}.safetensors` in the run's folder. Training is left as it was: no random stream,
    gradient, buffer or training flag differs after a snapshot. Under several processes each explains a share.

    Args:
        methods: Names (`"rollout"`, `"grad_rollout"`, `"rollout_max_0.9"`, …) or `Rollout` and `GradRollout` objects.
        every_n_epochs: Epochs between snapshots. `"auto"` is 1, unless `every_n_steps` is given.
        every_n_steps: Optimiser steps between snapshots, instead of `every_n_epochs`.
        num_images: Images taken from the start of the validation set; drift is averaged over them.
        images: Images to explain instead, (B, C, H, W) normalised for the model; or the pair (images, labels).
        num_shown: Images drawn, the first of them.
        target: Class whose logit gradient rollout follows: `"label"` is the image's label where the batch has one and
            else the prediction at the baseline; `"prediction"` is always the latter; or one class index. It stays
            fixed over the run.
        vit: Attribute path of the ViT inside the LightningModule, needed where it holds several.
        class_names: Names for the captions. Default: the `classes` of the validation dataset, if it has them.
        mean: Mean with which images were normalised, to undo it for display. Default: the timm model's own, or, where
            there is none, the range of the images is stretched.
        std: Standard deviation, likewise.
        forward: How to get logits (B, C) from the LightningModule and images, if not by its own `forward(images)`.
        prefix_tokens: Number of tokens before the patches, where the layout of the tokens cannot be told.
        grid_size: Patches as (grid_h, grid_w), likewise.
        batch_size: Images explained in one pass; None takes all at once.
        save_maps: Whether to save the raw maps of every snapshot.
        on_error: What becomes of a snapshot that fails during training: `"warn"` says so and goes on, `"raise"` stops.

    Raises:
        TypeError: If methods or images are of the wrong type.
        ValueError: If an argument is outside its range; when fit starts, also if the LightningModule holds no supported
            ViT or several, if there is nothing to explain, or if images, labels or methods do not fit the model.
    """

    def __init__(
        self,
        methods: Sequence[str | Method] = ("rollout", "grad_rollout"),
        every_n_epochs: int | Literal["auto"] | None = "auto",
        every_n_steps: int | None = None,
        num_images: int = 16,
        images: Tensor | tuple[Tensor, Tensor] | None = None,
        num_shown: int = 6,
        target: Literal["label", "prediction"] | int = "label",
        vit: str | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        forward: LogitsOf | None = None,
        prefix_tokens: int | None = None,
        grid_size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        save_maps: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        self.methods = resolve_methods(methods)
        if every_n_epochs == "auto":
            every_n_epochs = 1 if every_n_steps is None else None
        if (every_n_epochs is None) == (every_n_steps is None):
            raise ValueError(
                "Expected one schedule, `every_n_epochs` or `every_n_steps`, but got "
                f"{'neither' if every_n_steps is None else 'both'}."
            )
        check_counts(every_n_epochs=every_n_epochs, every_n_steps=every_n_steps)
        check_counts(num_images=num_images, num_shown=num_shown, batch_size=batch_size)
        if isinstance(target, str) and target not in ("label", "prediction"):
            raise ValueError(f"Expected `target` to be 'label', 'prediction' or a class index, but got {target!r}.")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"Expected `on_error` to be 'warn' or 'raise', but got {on_error!r}.")
        if (mean is None) != (std is None):
            raise ValueError("Expected both `mean` and `std`, or neither, but got one of them.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.num_images = num_images
        self.num_shown = num_shown
        self.target = target
        self.vit = vit
        self.class_names = class_names
        self.mean = mean
        self.std = std
        self.forward = forward
        self.prefix_tokens = prefix_tokens
        self.grid_size = grid_size
        self.batch_size = batch_size
        self.save_maps = save_maps
        self.on_error = on_error
        self._given = None if images is None else ProbeBatch.from_batch(images)
        if self._given is not None:
            check_images(self._given.images)
        self._history = History()
        self._fingerprint: str | None = None
        self._last_step = 0
        self._report: Report | None = None
        self._said_degenerate: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that everything asked for can work."""
        if stage == "fit":
            self._check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the probe batch and take the baseline, unless a checkpoint brought one."""
        self._start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Take a snapshot every `every_n_steps` optimiser steps."""
        if self.every_n_steps and trainer.global_step // self.every_n_steps > self._last_step // self.every_n_steps:
            self._snapshot(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a snapshot every `every_n_epochs` epochs."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last snapshot, unless the schedule has just done so."""
        self._snapshot(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The history of snapshots, baseline included, and the fingerprint of the probe batch."""
        return {"fingerprint": self._fingerprint, "history": self._history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the history of the run that is resumed."""
        self._fingerprint = state_dict["fingerprint"]
        self._history.load_state_dict(state_dict["history"])

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._history, self._fingerprint = History(), None
        if self._given is None and not trainer.enable_validation:
            raise ValueError(
                "Expected a validation loader (and a `validation_step`) to take the probe images from, but there is "
                "none. Give the images yourself: `ViTExplainCallback(images=(images, labels))`."
            )
        if is_overridden("configure_model", pl_module):
            return  # which may be what makes the model; it runs after this
        vit = find_vit(pl_module, self.vit)
        if is_timm_vit(vit):
            check_start_layers(self.methods, num_blocks(vit))
        refuse_other_timm_models(vit)
        if explained_module(pl_module, self.vit, self.forward) is vit:
            check_classifier(vit)
        if self._given is not None:
            timm_layout(vit, self._given.images.shape[1:], own_head=False)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "explanations"  # log_dir needs every rank
        self._ranks = Ranks.of(trainer)
        model = explained_module(pl_module, self.vit, self.forward)
        self._explainer = Explainer(
            model,
            self.methods,
            vit=self.vit if model is pl_module else None,
            forward=self.forward or (forward_of(trainer) if model is pl_module else None),
            prefix_tokens=self.prefix_tokens,
            grid_size=self.grid_size,
        )
        self._report = None
        if trainer.is_global_zero:
            no_files = getattr(trainer, "fast_dev_run", False)
            self._writer = Writer(trainer.loggers, None if no_files else folder, self.save_maps, self.on_error)
        self._last_step = trainer.global_step
        self._attempt(trainer, pl_module, self._begin, always_raised=(TypeError, ValueError))

    def _snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._attempt(trainer, pl_module, self._take)

    def _attempt(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        work: Callable[[Trainer, LightningModule], None],
        always_raised: tuple[type[Exception], ...] = (),
    ) -> None:
        """Do what a snapshot needs; a failure stops training only if it is to, or if it is one of `always_raised`."""
        try:
            work(trainer, pl_module)
        except Exception as error:
            if self.on_error == "raise" or isinstance(error, always_raised):
                raise
            rank_zero_warn(
                f"ViTExplainCallback: the snapshot at step {trainer.global_step} failed, and training goes on: "
                f"{error!r}. Pass `on_error='raise'` to stop here and see where."
            )

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the baseline; in a resumed run, the snapshot that was due after its checkpoint was written."""
        report = self._prepared(trainer, pl_module)
        if not self._history.count or self._is_overdue(trainer):
            self._take(trainer, pl_module)
        else:
            trainer.callback_metrics.update(_tensors(report.scalars(self._history)))

    def _prepared(self, trainer: Trainer, pl_module: LightningModule) -> Report:
        """The report on the probe batch, which is collected the first time this is called."""
        if self._report is None:
            probe = self._given or collect_probe(trainer, pl_module, self.num_images, self._ranks)
            check_images(probe.images)
            if self._history.count and not self._continues(probe):
                rank_zero_warn(
                    "ViTExplainCallback: the checkpoint's explanations are of other images or methods than this run's, "
                    "so a new baseline is taken."
                )
                self._history = History()
            self._fingerprint = probe.fingerprint
            given = (self.mean, self.std) if self.mean and self.std else None
            normalised = given or normalisation(find_vit(pl_module, self.vit))
            self._report = Report.of(probe, self.num_shown, normalised, self.class_names or class_names(trainer))
        return self._report

    def _is_overdue(self, trainer: Trainer) -> bool:
        """Whether a checkpoint was written at a step of the schedule, but before the snapshot."""
        last = self._history.snapshots[-1].step
        if self.every_n_steps:
            return trainer.global_step // self.every_n_steps > last // self.every_n_steps
        # Lightning does not end an epoch again whose last batch is done; the next one is then the current one.
        ended = trainer.is_last_batch and trainer.current_epoch % (self.every_n_epochs or 1) == 0
        return ended and trainer.global_step > last

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = self._prepared(trainer, pl_module)
        target = self._history.baseline.target if self._history.count else self._first_target(report.probe)
        found = explain_together(self._ranks, self._explainer, report.probe.images, target, self.batch_size)
        snapshot = Snapshot(trainer.global_step, found.maps, found.logits, found.target)
        self._history.add(snapshot)
        scalars = report.scalars(self._history)
        trainer.callback_metrics.update(_tensors(scalars))  # for `ModelCheckpoint` and `EarlyStopping`, on every rank
        if trainer.is_global_zero:
            self._say_degenerate(scalars)
            self._writer.write(snapshot, scalars, list(report.figures(self._history)))

    def _first_target(self, probe: ProbeBatch) -> int | Tensor | None:
        if isinstance(self.target, int):
            return self.target
        return probe.labels if self.target == "label" else None

    def _continues(self, probe: ProbeBatch) -> bool:
        same_methods = set(self._history.baseline.maps) == {method.name for method in self.methods}
        return same_methods and self._fingerprint == probe.fingerprint

    def _say_degenerate(self, scalars: Mapping[str, float]) -> None:
        shares = {method.name: scalars[f"map_stats/{method.name}/degenerate"] for method in self.methods}
        for name in [name for name, share in shares.items() if share > 0 and name not in self._said_degenerate]:
            self._said_degenerate.add(name)
            rank_zero_warn(
                f"ViTExplainCallback: {shares[name]:.0%} of the `{name}` maps are degenerate (flat, zero or not "
                "finite); their drift is NaN. `map_stats` counts them from here on."
            )


def _tensors(scalars: Mapping[str, float]) -> dict[str, Tensor]:
    return {tag: torch.tensor(value) for tag, value in scalars.items()}
