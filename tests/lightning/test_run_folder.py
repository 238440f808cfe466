"""Where a run's files go when its loggers give it no folder of its own, or one on another machine."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from tests.lightning.test_loggers import LikeMLflow, LikeWandb
from tests.runs import Classifier, fit, messages, quiet
from vit_explain_callback import ViTExplainCallback
from vit_explain_callback.tracking.run import load_run


def short(target: Any = "label") -> ViTExplainCallback:
    return quiet(["rollout"], num_images=2, target=target)


class SharesItsFolder(LikeWandb):
    """Gives every run the same folder, as `WandbLogger` does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder)


@pytest.mark.filterwarnings("ignore:.*no logger of this run shows pictures")
@pytest.mark.filterwarnings("ignore:.*Please add the following callbacks")  # `target` is part of the state's key
@pytest.mark.parametrize("kind", ["none", "wandb", "mlflow"])
def test_two_runs_whose_loggers_give_no_folder(tmp_path: Path, kind: str) -> None:
    def logger() -> Any:
        return {"none": False, "wandb": SharesItsFolder(tmp_path), "mlflow": LikeMLflow()}[kind]

    first = fit(short(), tmp_path, max_epochs=1, logger=logger())
    first.save_checkpoint(tmp_path / "first.ckpt")
    before = {path: path.read_bytes() for path in (tmp_path / "explanations").iterdir()}
    fit(short(), tmp_path, Classifier(lr=1e-3), max_epochs=1, logger=logger())
    assert {path: path.read_bytes() for path in (tmp_path / "explanations").iterdir()} == before
    assert [load_run(tmp_path / name).steps for name in ("explanations", "explanations_1")] == [[0, 4], [0, 4]]
    fit(short(), tmp_path, max_epochs=2, logger=logger(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert load_run(tmp_path / "explanations").steps == [0, 4, 8]
    assert load_run(tmp_path / "explanations_1").steps == [0, 4]
    with pytest.warns(UserWarning, match="are of another `target` than this run's, so a new baseline is taken"):
        other = fit(short(0), tmp_path, max_epochs=2, logger=logger(), ckpt_path=str(tmp_path / "first.ckpt"))
    assert load_run(tmp_path / "explanations").steps == [0, 4, 8]
    found = load_run(tmp_path / "explanations_2")
    assert found.steps == [4, 8]
    assert found.targets.tolist() == [0, 0]
    assert other.global_step == 8


@pytest.mark.parametrize("board", [True, False])
def test_a_folder_by_its_url(tmp_path: Path, board: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = (tmp_path / "logs").as_uri()
    logger = TensorBoardLogger(url) if board else CSVLogger(url)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(short(), url, max_epochs=1, logger=logger)
    assert [text for text in messages(caught) if "not on this machine" in text] == []
    (probe,) = tmp_path.rglob("probe.safetensors")
    assert tmp_path / "logs" in probe.parents
    assert load_run(probe.parent).steps == [0, 4]
    assert not list(tmp_path.glob("file:*"))


def test_a_folder_on_another_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"memory://runs.*, is not on this machine; the raw maps are in "):
        fit(short(), "memory://runs", max_epochs=1, logger=TensorBoardLogger("memory://runs"))
    assert load_run(tmp_path / "explanations").steps == [0, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["explanations"]
    assert fsspec.filesystem("memory").glob("/runs/**/events*")
