"""Explanation methods, one class a file, and what a method of one's own is made of: `Method`, `Block`, `Fusion`."""

from vit_explain_callback.methods.attention import Attention
from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.chefer import Chefer
from vit_explain_callback.methods.flow import AttentionFlow
from vit_explain_callback.methods.functional import attention_flow, attention_rollout, gradient_rollout
from vit_explain_callback.methods.grad_attention import GradAttention
from vit_explain_callback.methods.grad_rollout import GradRollout
from vit_explain_callback.methods.gradsam import GradSAM
from vit_explain_callback.methods.heads import Fusion
from vit_explain_callback.methods.legrad import LeGrad
from vit_explain_callback.methods.map_function import MapFunction
from vit_explain_callback.methods.names import method_from_name, resolve_methods
from vit_explain_callback.methods.rollout import Rollout

__all__ = [
    "Attention",
    "AttentionFlow",
    "Block",
    "Chefer",
    "Fusion",
    "GradAttention",
    "GradRollout",
    "GradSAM",
    "LeGrad",
    "MapFunction",
    "Method",
    "Rollout",
    "attention_flow",
    "attention_rollout",
    "gradient_rollout",
    "method_from_name",
    "resolve_methods",
]
