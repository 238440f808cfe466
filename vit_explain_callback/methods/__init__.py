"""Explanation methods, one class a file, and the parts of a method of your own: `Method`, `Block`, `Fusion`.

The same mathematics on explicit attention matrices is in `methods.functional`.
"""

from typing import TYPE_CHECKING

from vit_explain_callback.system.lazy import lazy

if TYPE_CHECKING:
    from vit_explain_callback.methods.attention import Attention
    from vit_explain_callback.methods.attention_flow import AttentionFlow
    from vit_explain_callback.methods.attention_rollout import AttentionRollout
    from vit_explain_callback.methods.base import Block, Method
    from vit_explain_callback.methods.chefer import Chefer
    from vit_explain_callback.methods.gradient_attention import GradientAttention
    from vit_explain_callback.methods.gradient_rollout import GradientRollout
    from vit_explain_callback.methods.gradsam import GradSAM
    from vit_explain_callback.methods.heads import Fusion
    from vit_explain_callback.methods.legrad import LeGrad
    from vit_explain_callback.methods.map_function import MapFunction
    from vit_explain_callback.methods.names import method_from_name

BUILT_IN = {
    "AttentionRollout": "attention_rollout",
    "GradientRollout": "gradient_rollout",
    "AttentionFlow": "attention_flow",
    "Attention": "attention",
    "GradientAttention": "gradient_attention",
    "Chefer": "chefer",
    "GradSAM": "gradsam",
    "LeGrad": "legrad",
}
"""Module of each method's class. The names that `methods=` takes and the package's public names follow from it."""

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
    "method_from_name",
]

_HOMES = {
    **BUILT_IN,
    "Block": "base",
    "Fusion": "heads",
    "MapFunction": "map_function",
    "Method": "base",
    "method_from_name": "names",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)
