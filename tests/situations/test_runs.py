"""What stands around the module: averaged weights, several callbacks, schedules, Fabric, and two Lightnings."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tests import oracle
from tests.models import CLASSES
from tests.processes import python
from tests.runs import events, fit, messages, quiet, saved
from tests.situations.check import (
    Run,
    check_explanations,
    check_maps,
    found_places,
    oracle_maps,
    reference,
    run,
)
from tests.situations.project import LABELS, Project, loader, pictures, training
from tests.situations.situation import NO_THREAD, RIGHT, Situation
from vit_explain_callback import ViTExplainCallback, explain
from vit_explain_callback.tracking.snapshot import Snapshot

PLAIN = Situation(NO_THREAD, RIGHT, Project)
UNSEEN: dict[str, Any] = {"detail": {"page": False}, "num_shown": 1}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from zip(pictures(seed=6), LABELS, strict=True)


def averaging(name: str) -> pl.Callback:
    if name == "EMA":
        return pl.callbacks.EMAWeightAveraging(decay=0.5)
    return pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)


@pytest.mark.parametrize("name", ["EMA", "SWA"])
@pytest.mark.parametrize("first", ["ours first", "theirs first"])
def test_the_last_maps_are_of_the_weights_one_keeps(name: str, first: str, tmp_path: Path) -> None:
    """lightning#20545: both copy the average into the module when training ends."""
    ours, module = quiet(), Project()
    callbacks = [ours, averaging(name)] if first == "ours first" else [averaging(name), ours]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(None, tmp_path, module, loader(), training(), more_callbacks=callbacks, max_epochs=3)
    if any("averag" in text for text in messages(caught)):
        return  # the issue: or it is said
    any_ours: Any = ours
    places = found_places(any_ours.tracker.probe.images, pictures())
    assert len(places) == 16
    check_maps(PLAIN, saved(trainer)[-1], reference(PLAIN, module.state_dict()), pictures()[places], places)


@pytest.mark.parametrize(
    "options",
    [({"methods": ["rollout"]}, {"methods": ["grad_rollout"]}), ({}, {"target": "prediction"})],
    ids=["other methods", "same methods, other target"],
)
def test_two_callbacks_in_one_trainer(options: Any, tmp_path: Path) -> None:
    callbacks: list[Any] = [ViTExplainCallback(**UNSEEN, **each) for each in options]
    trainer = fit(None, tmp_path, Project(), loader(), training(), more_callbacks=callbacks)
    assert callbacks[0].state_key != callbacks[1].state_key
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert {callback.state_key for callback in callbacks} <= torch.load(tmp_path / "end.ckpt")["callbacks"].keys()
    files = sorted(Path(trainer.log_dir or "").glob("**/step_*.safetensors"))
    assert len({file.parent for file in files}) == 2
    written = {file.parent: Snapshot.load(file) for file in reversed(files)}
    for callback in callbacks:
        baseline = callback.tracker.history.baseline
        same = [
            w for w in written.values() if w.maps.keys() == baseline.maps.keys() and w.target.equal(baseline.target)
        ]
        assert len(same) == 1
    board = events(trainer)
    for tag in board.Tags()["scalars"]:
        steps = [event.step for event in board.Scalars(tag)]
        assert len(steps) == len(set(steps)), f"both wrote {tag}"


def test_endless_epochs_are_followed_by_their_validations(tmp_path: Path) -> None:
    """lightning#2150: no epoch ever ends, so by default a snapshot is taken with each validation."""
    situation = Situation(
        "lightning#2150",
        "two snapshots, first and last",
        Project,
        train=lambda: DataLoader(Endless(), 5),
        trainer={"max_epochs": -1, "max_steps": 6, "val_check_interval": 2},
    )
    found = run(situation, tmp_path, quiet())
    assert [snapshot.step for snapshot in saved(found.trainer)] == [0, 2, 4, 6]
    check_explanations(situation, found)


class WithATest(Project):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.step(batch), batch_size=1)


def test_validation_before_and_after_the_fit(tmp_path: Path) -> None:
    """`trainer.validate` and `trainer.test` are no part of the fit: they run as without the callback."""
    callback, module = quiet(), WithATest()
    new = pl.Trainer(callbacks=[callback], logger=False, enable_progress_bar=False, enable_checkpointing=False)
    new.validate(module, loader(), verbose=False)
    trainer = fit(callback, tmp_path, module, loader(), training(), max_epochs=1)
    explained = [snapshot.step for snapshot in saved(trainer)]
    for other in (trainer, new):
        assert "val_loss" in other.validate(module, loader(), verbose=False)[0]
        assert "test_loss" in other.test(module, loader(), verbose=False)[0]
    assert [snapshot.step for snapshot in saved(trainer)] == explained == [0, 2]


class LastBlocks(Project):
    """A linear head on the class tokens of the last two of three blocks."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(96, CLASSES)

    def forward(self, images: Tensor) -> Any:
        layers = self.vit.get_intermediate_layers(images, n=2, return_prefix_tokens=True, norm=True)
        return self.head(torch.cat([prefix[:, 0] for _, prefix in layers], dim=1))


LAST_BLOCKS = Situation("dinov2#483", "explained the last block's row alone", LastBlocks, loader, pictures, LABELS)


def test_a_head_on_the_class_tokens_of_several_blocks(tmp_path: Path) -> None:
    """The rows of those blocks, each as much as any other, or a refusal that names a way out."""
    try:
        found = run(LAST_BLOCKS, tmp_path, quiet())
    except ValueError as refused:
        message = str(refused)
    else:
        check_rows_of_last_blocks(found)
        return
    assert "`forward=" in message
    cure = {"forward": lambda module, images: module.vit.forward_features(images)[:, 0]}
    assert saved(run(LAST_BLOCKS, tmp_path / "cured", quiet(**cure)).trainer)  # type: ignore[arg-type]


def check_rows_of_last_blocks(found: Run) -> None:
    baseline = saved(found.trainer)[0]
    places = found_places(found.callback.tracker.probe.images, pictures())
    model = reference(LAST_BLOCKS).module
    matrices = oracle.matrices(model, pictures()[places], baseline.target.tolist())  # type: ignore[arg-type]
    start = torch.zeros(17, dtype=torch.float64)
    start[0] = 1
    for method, maps in baseline.maps.items():
        for image in range(len(places)):
            blocks = [block[image] for block in matrices.attentions]
            slopes = [block[image] for block in matrices.gradients] if method == "grad_rollout" else None
            rows = [oracle.rollout(blocks[:n], slopes and slopes[:n], start)[1:].reshape(4, 4) for n in (2, 3)]
            torch.testing.assert_close(maps[image].double(), (rows[0] + rows[1]) / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrapped", ["ViT", "LightningModule"])
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-mixed", 0.05), ("bf16-true", 0.05)])
def test_a_fabric_module(wrapped: str, precision: Any, tolerance: float) -> None:
    """lightning#19447: Fabric's wrapper lets nobody but Fabric go backward through it, where precision needs that."""
    module = Project().eval()
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = fabric.setup_module(module.vit if wrapped == "ViT" else module)
    explanation = explain(model, pictures()[:4], target=1)
    exact = Project().to(torch.bfloat16 if precision == "bf16-true" else torch.float32).float()
    matrices = oracle.matrices(exact.vit, pictures()[:4], [1] * 4)
    for method, expected in oracle_maps(PLAIN, matrices, (32, 32)).items():
        error = (explanation.maps[method].double() - expected).norm() / expected.norm()
        assert error < tolerance, method


SCRIPT = """
    import sys
    {imports}
    from torch.utils.data import DataLoader
    from tests.models import random_images, tiny_vit
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import torch

    class Module({package}.LightningModule):
        def __init__(self):
            super().__init__()
            self.vit = tiny_vit().train()

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.vit(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-2)

    data = DataLoader([(image, index % 5) for index, image in enumerate(random_images(16))], 8)
    logger = {package}.loggers.TensorBoardLogger(sys.argv[1])
    callback = ViTExplainCallback(on_error="raise")
    trainer = {package}.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=[callback], enable_checkpointing=False
    )
    trainer.fit(Module(), data, data)
    trainer.save_checkpoint(sys.argv[1] + "/end.ckpt")
    board = EventAccumulator(trainer.log_dir)
    board.Reload()
    assert any(tag.startswith("explain") for tag in board.Tags()["images"]), board.Tags()["images"]
    assert len(callback.tracker.history.snapshots) == 2
    print("explained")
"""

OURS = "from vit_explain_callback import ViTExplainCallback"


@pytest.mark.parametrize(
    ("package", "imports"),
    [
        ("lightning", f"{OURS}; import lightning.pytorch as lightning"),
        ("pl", f"import lightning.pytorch; {OURS}; import pytorch_lightning as pl"),
    ],
    ids=["ours, then lightning, used", "lightning, ours, then pytorch_lightning, used"],
)
def test_the_trainer_that_comes_decides_which_lightning_it_is(package: str, imports: str, tmp_path: Path) -> None:
    """lightning#17485."""
    script = textwrap.dedent(SCRIPT).format(package=package, imports=imports)
    done = python("-c", f"import warnings; warnings.simplefilter('ignore')\n{script}", str(tmp_path))
    assert done.stdout.strip().endswith("explained"), done.stderr
