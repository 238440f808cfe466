"""Where a snapshot goes: loggers of every kind, several at once, none, and Lightning's own callbacks."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from tests.runs import events, fit, messages, quiet


def test_without_a_logger_maps_are_still_saved_and_it_is_said_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(quiet(["rollout"], block_statistics=True), tmp_path, logger=False)
    assert len(messages(caught)) == 1
    assert "Add a `TensorBoardLogger` to see them all" in messages(caught)[0]
    assert len(list((tmp_path / "explanations").glob("step_*.safetensors"))) == 3
    pictures = {path.name for path in (tmp_path / "explanations").glob("*.png")}
    assert pictures == {"explain-filmstrip-rollout.png", "explain-heatmap-blocks.png"}
    with Image.open(tmp_path / "explanations" / "explain-filmstrip-rollout.png") as picture:
        assert picture.width >= 4 * 128


def test_another_logger_gets_the_scalars(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no logger of this run shows pictures"):
        trainer = fit(quiet(["rollout"]), tmp_path, logger=CSVLogger(str(tmp_path)))
    trainer.logger.save()  # type: ignore[union-attr]
    table = Path(trainer.log_dir or "", "metrics.csv").read_text(encoding="utf-8")
    assert "explain/drift/baseline_rank_correlation/rollout" in table


class Spy(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[int]] = {}
        self.pictures: dict[str, list[int]] = {}

    @property
    def name(self) -> str:
        return "spy"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for tag in metrics:
            self.scalars.setdefault(tag, []).append(step or 0)

    def keep(self, tag: str, picture: np.ndarray[Any, Any], step: int) -> None:
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        self.pictures.setdefault(tag, []).append(step)


class LikeWandb(Spy):
    """`log_image` as `WandbLogger` has it."""

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        for image in images:
            self.keep(key, image, step or 0)


class LikeMLflow(Spy):
    """An experiment as `MLFlowLogger` has it: `mlflow.tracking.MlflowClient`."""

    run_id = "f00"

    @property
    def experiment(self) -> Any:
        def log_image(run_id: str, image: Any, artifact_file: Any = None, *, key: str, step: int) -> None:
            assert run_id == "f00"
            assert artifact_file is None
            self.keep(key, image, step)

        return SimpleNamespace(log_image=log_image)


class LikeComet(Spy):
    """An experiment as `CometLogger` has it."""

    @property
    def experiment(self) -> Any:
        def log_image(image_data: Any, name: str | None = None, overwrite: bool = False, step: int = 0) -> None:
            self.keep(name or "", image_data, step)

        return SimpleNamespace(log_image=log_image)


@pytest.mark.parametrize("kind", [LikeWandb, LikeMLflow, LikeComet])
def test_loggers_that_take_pictures_another_way(tmp_path: Path, kind: type[Spy]) -> None:
    logger = kind()
    fit(quiet(["rollout"], block_statistics=True, detail="full"), tmp_path, logger=logger)
    assert logger.pictures == {
        "explain/filmstrip/rollout": [0, 4, 8, 8],
        "explain/heatmap/blocks": [0, 4, 8],
        "explain/overlay/rollout/0": [0, 4, 8],
        "explain/overlay_change/rollout/0": [4, 8],
    }
    assert logger.scalars["explain/drift/baseline_rank_correlation/rollout"] == [0, 4, 8]
    assert list(tmp_path.rglob("*.png")) == []


def test_several_loggers_each_get_everything(tmp_path: Path) -> None:
    spy = LikeWandb()
    board = TensorBoardLogger(str(tmp_path))
    table = CSVLogger(str(tmp_path), name="csv")
    trainer = fit(quiet(["rollout"], block_statistics=True), tmp_path, logger=[spy, board, table])
    table.save()
    written = events(trainer, board.log_dir)
    assert (
        [event.step for event in written.Scalars("explain/probe/accuracy")]
        == spy.scalars["explain/probe/accuracy"]
        == [0, 4, 8]
    )
    assert set(written.Tags()["images"]) == set(spy.pictures)
    assert "explain/probe/accuracy" in Path(table.log_dir, "metrics.csv").read_text(encoding="utf-8")


def test_drift_can_be_monitored_by_lightnings_own_callbacks(tmp_path: Path) -> None:
    tag = "explain/map/entropy/rollout"
    keeper = ModelCheckpoint(tmp_path, monitor=tag, mode="max", save_top_k=1)
    impatient = EarlyStopping(
        "explain/drift/previous_rank_correlation/rollout", mode="min", patience=1, check_on_train_epoch_end=True
    )
    # At the end of validation, and so before the first epoch's drift.
    first = EarlyStopping(tag, mode="max", patience=9, check_on_train_epoch_end=False)
    trainer = fit(
        quiet(["rollout"]),
        tmp_path,
        enable_checkpointing=True,
        max_epochs=6,
        more_callbacks=[first, impatient, keeper],
    )
    assert keeper.best_model_score is not None
    assert keeper.best_model_score > 0
    curve = {event.step: event.value for event in events(trainer).Scalars(tag)}
    assert trainer.callback_metrics[tag].item() == pytest.approx(curve[max(curve)])
    assert 8 <= max(curve) < 24  # stopped early


def test_drift_can_be_monitored_from_the_first_moment_of_a_resumed_run(tmp_path: Path) -> None:
    def patient() -> EarlyStopping:
        # Of the end of validation, which is before the resumed run's first snapshot.
        tag = "explain/drift/previous_rank_correlation/rollout"
        return EarlyStopping(tag, mode="max", patience=9, check_on_train_epoch_end=False)

    trainer = fit(quiet(["rollout"]), tmp_path, more_callbacks=[patient()])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(
        quiet(["rollout"]),
        tmp_path,
        max_epochs=3,
        ckpt_path=str(tmp_path / "half.ckpt"),
        more_callbacks=[patient()],
    )
    assert resumed.global_step == 12
