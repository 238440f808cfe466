"""Explanation drift of Vision Transformers, tracked while they are fine-tuned.

`ViTExplainCallback` goes into a Lightning `Trainer`; `ExplanationTracker` does the same in any other loop, and
`load_run` reads what either saved. `explain` gives the maps of one batch, `explain_targets` those for several classes
at once; `attention_rollout`, `gradient_rollout` and `attention_flow` are the mathematics on explicit attention
matrices.
"""

from typing import TYPE_CHECKING, Any

from vit_explain_callback import methods
from vit_explain_callback.system.lazy import lazy

if TYPE_CHECKING:
    from vit_explain_callback._explain import explain, explain_targets
    from vit_explain_callback.explainer import Explainer
    from vit_explain_callback.explanation import Explanation
    from vit_explain_callback.lightning.callback import ViTExplainCallback
    from vit_explain_callback.methods import *  # noqa: F403
    from vit_explain_callback.methods.functional import attention_flow, attention_rollout, gradient_rollout
    from vit_explain_callback.metrics.drift import DriftMetric, MapDrift
    from vit_explain_callback.tracker import ExplanationTracker
    from vit_explain_callback.tracking.probe import Probe
    from vit_explain_callback.tracking.run import Run, load_run
    from vit_explain_callback.tracking.settings import Checks, Detail
    from vit_explain_callback.tracking.writers import Writer

    __version__: str

__all__ = [
    "Checks",
    "Detail",
    "DriftMetric",
    "Explainer",
    "Explanation",
    "ExplanationTracker",
    "MapDrift",
    "Probe",
    "Run",
    "ViTExplainCallback",
    "Writer",
    "attention_flow",
    "attention_rollout",
    "explain",
    "explain_targets",
    "gradient_rollout",
    "load_run",
]
__all__ += methods.__all__
__all__.sort()

# Loaded at their first use: not everyone needs Lightning, and `vit-explain --help` needs nothing.
_HOMES = {
    **dict.fromkeys(methods.__all__, "methods"),
    "Checks": "tracking.settings",
    "Detail": "tracking.settings",
    "DriftMetric": "metrics.drift",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "ExplanationTracker": "tracker",
    "MapDrift": "metrics.drift",
    "Probe": "tracking.probe",
    "Run": "tracking.run",
    "ViTExplainCallback": "lightning.callback",
    "Writer": "tracking.writers",
    "attention_flow": "methods.functional",
    "attention_rollout": "methods.functional",
    "explain": "_explain",
    "explain_targets": "_explain",
    "gradient_rollout": "methods.functional",
    "load_run": "tracking.run",
}
_import_name, __dir__ = lazy(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    return _version() if name == "__version__" else _import_name(name)


def _version() -> str:
    """Version of the installed distribution; `0+unknown` where the sources are used without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vit-explain-callback")
    except PackageNotFoundError:
        return "0+unknown"
