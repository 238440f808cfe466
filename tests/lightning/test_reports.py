"""The page and the summary of a run, at the loggers that keep files: the real ones where they run offline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.loggers import MLFlowLogger, WandbLogger

from tests.lightning.test_loggers import Spy
from tests.runs import fit
from vit_explain_callback import Detail, ViTExplainCallback


def tracked(tmp_path: Path, logger: Any, **options: Any) -> tuple[str, str]:
    """The page and the summary of a run with a logger."""
    fit(ViTExplainCallback(["rollout"], on_error="raise", **options), tmp_path, logger=logger, max_epochs=1)
    (folder,) = tmp_path.rglob("explanations")
    page = folder / "report.html"
    text = (folder / "summary.txt").read_text(encoding="utf-8").removesuffix("\n")
    return page.read_text(encoding="utf-8") if page.is_file() else "", text


@pytest.mark.filterwarnings("ignore")  # of the logger's packages
def test_weights_and_biases_has_a_panel_an_artifact_and_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    artifacts: list[Any] = []
    log_artifact = logger.experiment.log_artifact
    monkeypatch.setattr(logger.experiment, "log_artifact", lambda one: artifacts.append(log_artifact(one)))
    page, text = tracked(tmp_path, logger)
    assert logger.experiment.summary["explain/summary"] == text
    logger.experiment.finish()
    (panel,) = tmp_path.rglob("media/html/explain/report_*.html")
    assert panel.read_text(encoding="utf-8") == page
    (artifact,) = artifacts
    assert artifact.type == "report"
    assert list(artifact.manifest.entries) == ["report.html"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_both_as_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more packages
    store = tmp_path / "store"
    page, text = tracked(tmp_path, MLFlowLogger(tracking_uri=store.as_uri(), save_dir=str(tmp_path)))
    (folder,) = store.glob("*/*/artifacts/explain")
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    assert (folder / "summary.txt").read_text(encoding="utf-8") == text


class Keeping(Spy):
    """Also keeps what the calls of its experiment are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Any] = {}


class CometLogger(Keeping):
    """Comet's, with its documented calls."""

    @property
    def experiment(self) -> Any:
        def log_text(text: str, step: int | None = None, metadata: Any = None) -> None:
            self.calls["text"] = (text, step)

        def log_asset(file_data: str, file_name: str | None = None, step: int | None = None) -> None:
            self.calls[file_name or ""] = (Path(file_data).read_text(encoding="utf-8"), step)

        return SimpleNamespace(log_text=log_text, log_asset=log_asset)


class NeptuneLogger(Keeping):
    """Neptune's of older versions of Lightning: an experiment is a table of fields."""

    @property
    def experiment(self) -> Any:
        calls = self.calls

        class Fields:
            def __getitem__(self, key: str) -> Any:
                return SimpleNamespace(upload=lambda path: calls.update({key: Path(path).read_text(encoding="utf-8")}))

            def __setitem__(self, key: str, value: str) -> None:
                calls[key] = value

        return Fields()


# As Lightning's own are known by.
CometLogger.__module__ = NeptuneLogger.__module__ = "pytorch_lightning.loggers"


@pytest.mark.filterwarnings("ignore:.*no logger of this run shows pictures")
def test_comet_and_neptune_are_called_as_they_document_it(tmp_path: Path) -> None:
    comet = CometLogger()
    page, text = tracked(tmp_path / "comet", comet)
    assert comet.calls == {"text": (text, 4), "explain/report.html": (page, 4)}
    neptune = NeptuneLogger()
    page, text = tracked(tmp_path / "neptune", neptune)
    assert neptune.calls == {"explain/summary": text, "explain/report": page}


@pytest.mark.filterwarnings("ignore:.*no logger of this run shows pictures")
def test_without_a_page_there_is_the_summary_alone(tmp_path: Path) -> None:
    comet = CometLogger()
    _, text = tracked(tmp_path, comet, detail=Detail(page=False))
    assert comet.calls == {"text": (text, 4)}
