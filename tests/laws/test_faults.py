"""What goes wrong in a snapshot, and what becomes of the run.

| fault | asserted |
|---|---|
| the model's forward raises under explanation | one warning each time; no snapshot; weights as without the callback |
| a fault in our own code at the baseline | one warning; weights as without the callback |
| no memory for the batch | explained in halves, the same maps, nothing said |
| no memory for one image | one warning; no snapshot; weights as without the callback |
| NaN or Inf in weights | maps NaN, said once; drift NaN; the run goes on |
| a logger that raises | said once; the other loggers and the folder get everything |
| a full disk, a folder that cannot be made | said once; loggers get everything; no half file is left |
| the validation loader dies | one warning each time; the first snapshot that finds images is the baseline |
| Ctrl-C in the middle of a snapshot | the run ends as Lightning ends it; nothing of ours is left in the model |
| `SIGKILL` between snapshots | `test_resume.py` |
| one of several processes fails, or is short of memory | `test_many_processes.py` |
| `target` of numpy, of torch, a boolean, a float | named or refused: `test_targets.py` |
| another `target` after resuming; two runs, one folder; folders by URL | `test_run_folder.py`, `test_folder.py` |
| another readout or another ViT in mid-run; a grid that is not the model's | `test_changed_models.py` |
| 1,000 edited run folders, 1,000 edited states; states without a version | `test_edited_files.py` |
| files that are symbolic links | `test_folder.py` |
| `experiment`, `log_hyperparams`, `save_dir` raise; `log_image` takes other arguments | `test_faulty_loggers.py` |
| hyperparameters that are secret, or logged by the user | not written; his pane as it was: the same |
| standard output in ascii, in cp1252, or gone | the same |
| a disk that fills, a log that may not grow (`RLIMIT_FSIZE`) | said once; the same weights and log: the same |
| 500 snapshots | memory, handles, threads flat: `python -m tests.benchmarks.leak` |
"""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from tests.laws.test_nothing_left_behind import traces
from tests.lightning.test_loggers import LikeWandb
from tests.runs import Classifier, Pictures, events, fit, loader, messages, quiet, saved
from vit_explain_callback import ViTExplainCallback


def ending(callback: ViTExplainCallback | None, folder: Path, module: pl.LightningModule, **options: Any) -> Any:
    """A run's trainer, its weights, and what the callback said in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(callback, folder, module, **options)
    return trainer, [parameter.detach().clone() for parameter in module.parameters()], messages(caught)


def assert_trained_alike(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))


class Failing(Classifier):
    """Raises under explanation at some steps, for more than some number of images."""

    def __init__(self, error: Exception, steps: tuple[int, ...], most_images: int = 0) -> None:
        super().__init__()
        self.error, self.steps, self.most_images = error, steps, most_images
        self.net.register_forward_pre_hook(self.fail)

    def fail(self, net: Any, args: tuple[Tensor]) -> None:
        if not net.training and self.global_step in self.steps and len(args[0]) > self.most_images:
            net.blocks[0](net._pos_embed(net.patch_embed(args[0])))  # some of the way
            raise self.error


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to …"),
]


@pytest.mark.parametrize("error", [RuntimeError("the model cannot"), KeyError("x"), OUT_OF_MEMORY[0]])
def test_a_forward_that_raises(tmp_path: Path, error: Exception) -> None:
    _, plain, _ = ending(None, tmp_path, Classifier())
    trainer, weights, said = ending(quiet(every_n_steps=1), tmp_path, Failing(error, (4, 5)))
    assert_trained_alike(weights, plain)
    (only,) = said  # of two
    assert f"the snapshot at step 4 failed: {error!r}" in only
    assert [snapshot.step for snapshot in saved(trainer)] == [0, 1, 2, 3, 6, 7, 8]
    with pytest.raises(type(error)):
        fit(quiet(every_n_steps=1, on_error="raise"), tmp_path, Failing(error, (4, 5)))


def test_a_fault_of_ours_at_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain, _ = ending(None, tmp_path, Classifier())
    nowhere = SimpleNamespace(map_statistic=lambda *_: "nowhere")
    monkeypatch.setattr("vit_explain_callback.tracking.notices.tags", nowhere)  # a KeyError
    _, weights, said = ending(quiet(), tmp_path, Classifier())
    assert_trained_alike(weights, plain)
    assert len(said) == 1
    assert "the snapshot at step 0 failed: KeyError" in said[0]


CHECKED: dict[str, Any] = {"every_n_snapshots": 20, "block_statistics": True}
"""Checks and statistics of blocks as by default: they fail with the rest."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in which nothing fails."""
    return ending(quiet(**CHECKED), tmp_path_factory.mktemp("whole"), Classifier())


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_memory_does_not_suffice_for_is_explained_in_halves(
    tmp_path: Path, error: Exception, whole: Any
) -> None:
    trainer, plain, _ = whole
    halves, weights, said = ending(quiet(**CHECKED), tmp_path, Failing(error, (4,), most_images=3))
    assert_trained_alike(weights, plain)
    assert said == []
    for one, other in zip(saved(halves), saved(trainer), strict=True):
        for name, maps in one.maps.items():
            torch.testing.assert_close(maps, other.maps[name])


def test_a_batch_is_not_halved_for_another_error(tmp_path: Path) -> None:
    error = RuntimeError("the model cannot")
    trainer, _, said = ending(quiet(), tmp_path, Failing(error, (4,), most_images=3))
    assert len(said) == 1
    assert [snapshot.step for snapshot in saved(trainer)] == [0, 8]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    class Diverges(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 3:
                with torch.no_grad():
                    self.net.blocks[0].attn.qkv.weight.fill_(value)

    trainer, _, said = ending(quiet(every_n_steps=1, detail="full", **CHECKED), tmp_path, Diverges())
    assert len(said) == 2
    assert "100% of the `rollout` maps are degenerate" in said[0]
    assert "100% of the `grad_rollout` maps are degenerate" in said[1]
    drift = [event.value for event in events(trainer).Scalars("explain/drift/baseline_rank_correlation/rollout")]
    assert np.isfinite(drift[:4]).all()
    assert np.isnan(drift[4:]).all()
    assert len(drift) == 9
    assert all(maps.isnan().all() for maps in saved(trainer)[-1].maps.values())
    assert events(trainer).Scalars("explain/statistics/map/rollout/degenerate")[-1].value == 1


def test_a_logger_that_raises(tmp_path: Path) -> None:
    class Broken(LikeWandb):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            raise ConnectionError("no network")

    board = TensorBoardLogger(str(tmp_path))
    logger: Any = [Broken(), board, LikeWandb()]
    _, plain, _ = ending(None, tmp_path, Classifier())
    trainer, weights, said = ending(quiet(["rollout"]), tmp_path, Classifier(), logger=logger)
    assert_trained_alike(weights, plain)
    (only,) = said
    assert "cannot write to Broken (logger 0): ConnectionError('no network')" in only
    assert [event.step for event in events(trainer, board.log_dir).Scalars("explain/probe/accuracy")] == [0, 4, 8]
    assert logger[2].pictures["explain/filmstrip/rollout"] == [0, 4, 8, 8]
    assert len(list(tmp_path.rglob("step_*.safetensors"))) == 3
    with pytest.raises(ConnectionError):
        fit(quiet(["rollout"], on_error="raise"), tmp_path, logger=[Broken()])


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".safetensors" not in path.name:
            return write(path, content)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    trainer, _, said = ending(quiet(["rollout"], every_n_steps=1, page=True), tmp_path, Classifier())
    (only,) = said
    assert "cannot write to the folder" in only
    assert "No space left on device" in only
    assert list(tmp_path.rglob("step_*")) == []
    assert len(events(trainer).Scalars("explain/drift/baseline_rank_correlation/rollout")) == 9


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    Path(logger.log_dir).mkdir(parents=True)
    Path(logger.log_dir, "explanations").write_text("a file is in the way", encoding="utf-8")
    callback = quiet(["rollout"], every_n_steps=1, page=True)
    trainer, _, said = ending(callback, tmp_path, Classifier(), logger=logger)
    (only,) = said
    assert "cannot write to the folder" in only
    assert len(events(trainer).Scalars("explain/drift/baseline_rank_correlation/rollout")) == 9
    assert events(trainer).Images("explain/filmstrip/rollout")[-1].step == 8


class Dying(Pictures):
    """Cannot be read the first times, whoever reads, in whatever process."""

    def __init__(self, deaths: int, folder: Path) -> None:
        super().__init__()
        self.left = folder / "deaths"
        self.left.write_text(str(deaths))

    def __getitem__(self, index: int) -> Any:
        if (deaths := int(self.left.read_text())) > 0:
            self.left.write_text(str(deaths - 1))
            raise OSError("the share is gone")
        return super().__getitem__(index)


def test_a_validation_loader_that_dies(tmp_path: Path) -> None:
    _, plain, _ = ending(None, tmp_path, Classifier())
    options = {"check_val_every_n_epoch": 9}  # else the run itself would die
    trainer, weights, said = ending(
        quiet(["rollout"], every_n_epochs=1),
        tmp_path,
        Classifier(),
        validation=loader(Dying(1, tmp_path)),
        **options,
    )
    assert_trained_alike(weights, plain)
    assert len(said) == 1, said
    only = said[0]
    assert "the snapshot at step 0 failed" in only
    assert "Reading the probe images failed: OSError('the share is gone')" in only
    assert [snapshot.step for snapshot in saved(trainer)] == [4, 8]
    drift = events(trainer).Scalars("explain/drift/baseline_rank_correlation/rollout")
    assert drift[0].value == pytest.approx(1)  # step 4 is the baseline
    trainer, weights, said = ending(
        quiet(["rollout"]), tmp_path, Classifier(), validation=loader(Dying(99, tmp_path)), **options
    )
    assert_trained_alike(weights, plain)
    assert len(said) == 1  # the same is not said again
    assert saved(trainer) == []


def test_ctrl_c_in_the_middle_of_a_snapshot(tmp_path: Path) -> None:
    class Interrupted(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.blocks[0].register_forward_hook(self.interrupt)

        def interrupt(self, block: nn.Module, *_: Any) -> None:
            if not block.training and self.global_step == 4:
                raise KeyboardInterrupt

    module, plain = Interrupted(), Interrupted()
    fit(None, tmp_path / "plain", plain, max_epochs=1)
    before = traces(plain)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(quiet(every_n_epochs=1), tmp_path, module)  # else within validation, in evaluation mode
    assert_trained_alike(list(module.parameters()), list(plain.parameters()))
    after = traces(module)
    assert [key for key in after if key not in ("random", "hooks") and after[key] != before[key]] == []
    assert len(module.net.blocks[0]._forward_hooks) == 1  # of the module's own, whose number is another
    assert [path.name for path in sorted(tmp_path.rglob("step_*"))] == ["step_00000000.safetensors"]
