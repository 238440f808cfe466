"""Explanation drift of Vision Transformers, tracked while they are fine-tuned.

`ViTExplainCallback` goes into a Lightning `Trainer`; `explain` gives the same maps without one, `explain_targets` for
several classes at once; `attention_rollout`, `gradient_rollout` and `attention_flow` are the mathematics on explicit
attention matrices.
"""

from vit_explain_callback.explainer import explain, explain_targets
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.lightning.callback import ViTExplainCallback
from vit_explain_callback.methods import (
    Attention,
    AttentionFlow,
    Chefer,
    GradAttention,
    GradRollout,
    GradSAM,
    LeGrad,
    Rollout,
    attention_flow,
    attention_rollout,
    gradient_rollout,
)
from vit_explain_callback.metrics.metric import MapDrift

__all__ = [
    "Attention",
    "AttentionFlow",
    "Chefer",
    "Explanation",
    "GradAttention",
    "GradRollout",
    "GradSAM",
    "LeGrad",
    "MapDrift",
    "Rollout",
    "ViTExplainCallback",
    "attention_flow",
    "attention_rollout",
    "explain",
    "explain_targets",
    "gradient_rollout",
]
