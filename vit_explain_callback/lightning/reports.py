"""Give the summary and the page of a run to loggers that keep text and files, each by its own calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_explain_callback.lightning._compat import Logger, is_kind


def report(logger: Logger, prefix: str, summary: str, page: Path | None, step: int) -> None:
    """Give a logger the summary of a run in words, and the page as a file; nothing where it keeps neither.

    Args:
        logger: Any logger of Lightning but TensorBoard's, whose writer has a way of its own.
        prefix: What the names of ours begin with, as `explain/`.
        summary: Of the run.
        page: The HTML file, or None.
        step: Of the last snapshot.
    """
    for kind, way in _WAYS.items():
        if is_kind(logger, kind):
            way(logger, prefix, summary, page, step)


def _wandb(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    """A panel of the page, which is an artifact as well; the text is a value of the run's summary."""
    import wandb

    run = logger.experiment
    run.summary[f"{prefix}summary"] = summary
    if page is not None:
        panel = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        logger.log_metrics({f"{prefix}report": panel}, step=step)
        artifact = wandb.Artifact(f"{prefix.strip('/')}-{run.id}", type="report")
        artifact.add_file(str(page))
        run.log_artifact(artifact)


def _mlflow(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    """Artifacts of the run, which MLflow's page of it opens."""
    folder = prefix.strip("/")
    logger.experiment.log_text(logger.run_id, summary, f"{folder}/summary.txt")
    if page is not None:
        logger.experiment.log_artifact(logger.run_id, str(page), folder)


def _comet(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    logger.experiment.log_text(summary, step=step)
    if page is not None:
        logger.experiment.log_asset(str(page), file_name=f"{prefix}{page.name}", step=step)


def _neptune(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    logger.experiment[f"{prefix}summary"] = summary
    if page is not None:
        logger.experiment[f"{prefix}report"].upload(str(page))


_WAYS: dict[str, Callable[[Any, str, str, Path | None, int], None]] = {
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
    "NeptuneLogger": _neptune,
}
