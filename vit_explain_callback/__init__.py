"""Explanation drift of Vision Transformers, tracked while they are fine-tuned.

`ViTExplainCallback` goes into a Lightning `Trainer`; `ExplanationTracker` does the same in any other loop, and
`load_run` reads what either saved. `explain` gives the maps of one batch, `explain_targets` for several classes at
once; `attention_rollout`, `gradient_rollout` and `attention_flow` are the mathematics on explicit attention matrices.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_explain_callback.explainer import Explainer, explain, explain_targets
    from vit_explain_callback.explanation import Explanation
    from vit_explain_callback.lightning.callback import ViTExplainCallback
    from vit_explain_callback.methods.attention import Attention
    from vit_explain_callback.methods.attention_flow import AttentionFlow
    from vit_explain_callback.methods.attention_rollout import AttentionRollout
    from vit_explain_callback.methods.chefer import Chefer
    from vit_explain_callback.methods.functional import attention_flow, attention_rollout, gradient_rollout
    from vit_explain_callback.methods.gradient_attention import GradientAttention
    from vit_explain_callback.methods.gradient_rollout import GradientRollout
    from vit_explain_callback.methods.gradsam import GradSAM
    from vit_explain_callback.methods.legrad import LeGrad
    from vit_explain_callback.methods.map_function import MapFunction
    from vit_explain_callback.metrics.drift import DriftMetric, MapDrift
    from vit_explain_callback.tracker import ExplanationTracker
    from vit_explain_callback.tracking.probe import Probe
    from vit_explain_callback.tracking.run import Run, load_run
    from vit_explain_callback.tracking.settings import Checks, Detail
    from vit_explain_callback.tracking.writers import Writer

# Loaded at their first use: not everyone needs Lightning, and `vit-explain --help` needs nothing.
_HOME = {
    "Attention": "methods.attention",
    "AttentionFlow": "methods.attention_flow",
    "AttentionRollout": "methods.attention_rollout",
    "Checks": "tracking.settings",
    "Chefer": "methods.chefer",
    "Detail": "tracking.settings",
    "DriftMetric": "metrics.drift",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "ExplanationTracker": "tracker",
    "GradSAM": "methods.gradsam",
    "GradientAttention": "methods.gradient_attention",
    "GradientRollout": "methods.gradient_rollout",
    "LeGrad": "methods.legrad",
    "MapDrift": "metrics.drift",
    "MapFunction": "methods.map_function",
    "Probe": "tracking.probe",
    "Run": "tracking.run",
    "ViTExplainCallback": "lightning.callback",
    "Writer": "tracking.writers",
    "attention_flow": "methods.functional",
    "attention_rollout": "methods.functional",
    "explain": "explainer",
    "explain_targets": "explainer",
    "gradient_rollout": "methods.functional",
    "load_run": "tracking.run",
}

__all__ = [
    "Attention",
    "AttentionFlow",
    "AttentionRollout",
    "Checks",
    "Chefer",
    "Detail",
    "DriftMetric",
    "Explainer",
    "Explanation",
    "ExplanationTracker",
    "GradSAM",
    "GradientAttention",
    "GradientRollout",
    "LeGrad",
    "MapDrift",
    "MapFunction",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
