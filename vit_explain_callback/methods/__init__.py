"""Explanation methods, one class a file, and what a method of one's own is made of: `Method`, `Block`, `Fusion`."""

from vit_explain_callback.methods.attention import Attention
from vit_explain_callback.methods.attention_flow import AttentionFlow
from vit_explain_callback.methods.attention_rollout import AttentionRollout
from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.chefer import Chefer
from vit_explain_callback.methods.functional import attention_flow, attention_rollout, gradient_rollout
from vit_explain_callback.methods.gradient_attention import GradientAttention
from vit_explain_callback.methods.gradient_rollout import GradientRollout
from vit_explain_callback.methods.gradsam import GradSAM
from vit_explain_callback.methods.heads import Fusion
from vit_explain_callback.methods.legrad import LeGrad
from vit_explain_callback.methods.map_function import MapFunction
from vit_explain_callback.methods.names import method_from_name, resolve_methods

__all__ = [
    "Attention",
    "AttentionFlow",
    "AttentionRollout",
    "Block",
    "Chefer",
    "Fusion",
    "GradSAM",
    "GradientAttention",
    "GradientRollout",
    "LeGrad",
    "MapFunction",
    "Method",
    "attention_flow",
    "attention_rollout",
    "gradient_rollout",
    "method_from_name",
    "resolve_methods",
]
