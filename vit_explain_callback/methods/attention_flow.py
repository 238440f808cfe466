"""Attention flow (Abnar & Zuidema 2020, arXiv:2005.00928): how much can flow from the readout down to each token.

The tokens before and after each block are the nodes of a graph; the edge from token i after block l to token j before
it has the capacity Ā^l[i, j], with Ā = rownorm(F + I) as in attention rollout. The flow of token j is the maximum flow
from the readout, which can give each token after the last block as much as its share, to token j before block s.

Two cuts bound it: what the readout gives, and what token j can receive, the column sum of Ā^s at j. A flow in part of
the graph is one in the whole graph. So the strongest edges of each row are tried first: a flow through them that
reaches the bound is proven to be the largest there is. Only where none does, the whole graph decides.

Shapes: B images, L blocks, H heads, N tokens, S sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_explain_callback.methods.base import Block, FusedMethod
from vit_explain_callback.vit.tokens import TokenLayout

_UNIT = 2**50  # of the solver, which counts in integers; N times as much fits its 64 bits
_STRONGEST = (16, 64, None)  # edges kept of each row, tried in turn; None: all
_TOLERANCE = 1e-9


class AttentionFlow(FusedMethod):
    """Attention flow (Abnar & Zuidema 2020, arXiv:2005.00928): how much can flow to a patch, whatever the class.

    Exact, and slow; it hardly differs from the attention that a patch receives in the first block that takes part (see
    `attention_flow`), and `start_block` makes that another block.

    Raises:
        ImportError: If OR-Tools is not installed.
        ValueError: If an option is outside its range.

    Example:
        >>> AttentionFlow(start_block=9).name
        'flow_from9'
    """

    kind = "flow"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_solver()

    def start(self, readout: Tensor, pool: Tensor | None) -> list[Tensor]:
        """No matrices yet."""
        return []

    def step(self, relevance: list[Tensor], block: Block) -> list[Tensor]:
        """The matrices (b, N, N) so far and that of this block: all of them are needed at once."""
        return [*relevance, self.without_lowest(block)]

    def finish(self, relevance: list[Tensor], readout: Tensor, layout: TokenLayout) -> Tensor:
        """(b, N) maximum flow from the readout to each patch; NaN for other tokens."""
        flows = torch.full_like(readout, torch.nan)
        sinks = range(*layout.patches.indices(layout.tokens))
        # On the CPU, where the solver is: not every device has float64.
        fused = [matrix.cpu() for matrix in reversed(relevance)]
        for image, row in enumerate(readout.cpu()):
            matrices = [row_normalised(matrix[image]) for matrix in fused]
            flows[image, layout.patches] = maximum_flow(matrices, row, sinks).values.to(flows)
        return flows


@dataclass(frozen=True)
class Flow:
    """Maximum flows from a readout to some tokens.

    Attributes:
        values: (S,) in float64, each in [0, 1] for a readout that sums to 1; NaN where the capacities are not finite.
        certified: Share of the sinks whose flow reached the bound in a part of the graph.
    """

    values: Tensor
    certified: float


def require_solver() -> None:
    """Refuse to go on without a maximum-flow solver.

    Raises:
        ImportError: If OR-Tools is not installed.
    """
    if find_spec("ortools") is None:
        raise ImportError(
            "Attention flow needs OR-Tools, which is not installed: pip install 'vit-explain-callback[flow]'."
        )


def maximum_flow(matrices: Sequence[Tensor], readout: Tensor, sinks: Sequence[int]) -> Flow:
    """Maximum flow from the readout to each of some tokens, exact to 1e-9.

    Args:
        matrices: Ā of each block that takes part, first block first, each (N, N).
        readout: Share of each token after the last block, (N,).
        sinks: S indices of tokens before the first block.

    Raises:
        ImportError: If OR-Tools is not installed.
    """
    require_solver()
    capacities = [matrix.double().cpu().numpy() for matrix in matrices]
    shares = readout.double().cpu().numpy()
    if not all(np.isfinite(part).all() for part in (*capacities, shares)):
        return Flow(torch.full((len(sinks),), torch.nan, dtype=torch.float64), 0.0)
    inflow = capacities[0]
    bound = np.minimum(inflow.sum(axis=0), shares.sum())
    flows = np.zeros(len(inflow))
    left = list(sinks)
    certified = 0
    for edges_per_row in _STRONGEST:
        graph = _Graph(capacities[1:], shares, edges_per_row)
        for sink in left:
            flows[sink] = graph.flow_to(inflow[:, sink])
        if edges_per_row is not None:
            left = [sink for sink in left if flows[sink] < bound[sink] - _TOLERANCE]
            certified = len(sinks) - len(left)
        if not left:
            break
    return Flow(torch.from_numpy(flows[list(sinks)]), certified / len(sinks))


class _Graph:
    """The blocks above the first; the edges of the first block lead to one sink at a time.

    Args:
        capacities: Ā of those blocks, lowest first, each (N, N); may be none.
        shares: What the readout gives to each token after the last block, (N,).
        edges_per_row: Edges of each row, the strongest, or None for all.
    """

    def __init__(
        self, capacities: Sequence[NDArray[np.float64]], shares: NDArray[np.float64], edges_per_row: int | None
    ) -> None:
        from ortools.graph.python.max_flow import SimpleMaxFlow

        tokens = len(shares)
        top = len(capacities) * tokens
        self._source, self._sink = top + tokens, top + tokens + 1
        self._solver = SimpleMaxFlow()
        read_tokens = shares.nonzero()[0]
        self._add(np.full(len(read_tokens), self._source), top + read_tokens, shares[read_tokens])
        for index, matrix in enumerate(capacities):
            is_top = index == len(capacities) - 1
            rows, columns = _edges(matrix, edges_per_row, shares if is_top else np.zeros(tokens))
            self._add((index + 1) * tokens + rows, index * tokens + columns, matrix[rows, columns])
        self._last = self._add(np.arange(tokens), np.full(tokens, self._sink), np.zeros(tokens))

    def flow_to(self, inflow: NDArray[np.float64]) -> float:
        """Maximum flow to a token that receives at most `inflow`, (N,), from each token after the first block.

        Raises:
            RuntimeError: If the solver fails.
        """
        self._solver.set_arcs_capacity(self._last, _in_units(inflow))
        status = self._solver.solve(self._source, self._sink)
        if status != self._solver.OPTIMAL:
            raise RuntimeError(f"Expected a maximum flow from OR-Tools, but its solver says {status}.")
        return float(self._solver.optimal_flow()) / _UNIT

    def _add(
        self, tails: NDArray[np.int64], heads: NDArray[np.int64], capacity: NDArray[np.float64]
    ) -> NDArray[np.int32]:
        arcs: NDArray[np.int32] = self._solver.add_arcs_with_capacity(
            tails.astype(np.int32), heads.astype(np.int32), _in_units(capacity)
        )
        return arcs


def _in_units(capacity: NDArray[np.float64]) -> NDArray[np.int64]:
    return (capacity * _UNIT).astype(np.int64)


def _edges(
    matrix: NDArray[np.float64], edges_per_row: int | None, through: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the strongest edges of each row, and of all where those cannot carry `through`, (N,)."""
    keep = matrix > 0
    if edges_per_row is not None and edges_per_row < len(matrix):
        strong = matrix >= np.partition(matrix, -edges_per_row, axis=1)[:, -edges_per_row, None]
        carries = (matrix * strong).sum(axis=1) >= through
        keep &= strong | ~carries[:, None]
    rows, columns = keep.nonzero()
    return rows, columns


def row_normalised(fused: Tensor) -> Tensor:
    """Ā = rownorm(F + I) in float64: (…, N, N) fused attention with the residual, each row divided by its sum."""
    with_residual = fused.double() + torch.eye(fused.shape[-1], dtype=torch.float64, device=fused.device)
    return with_residual / with_residual.sum(dim=-1, keepdim=True)
