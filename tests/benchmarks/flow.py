"""Time attention flow at the size of real Vision Transformers, relative to other solvers, and see what it shows.

One image, flow to every patch, on the attention of DINOv2 ViT-S/14 where `VIT_EXPLAIN_WEIGHTS` names its weights, else
of random ones. The other solvers run on the whole graph for a few patches; their time for an image is extrapolated.

    VIT_EXPLAIN_WEIGHTS=dinov2_vits14.safetensors python -m tests.benchmarks.flow photograph.png
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import networkx as nx
import numpy as np
import timm
import torch
from networkx.algorithms.flow import preflow_push
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow as scipy_flow
from torch import Tensor

from tests import oracle
from vit_explain_callback.cli.weights import Weights
from vit_explain_callback.methods.attention_flow import _Graph, maximum_flow, row_normalised
from vit_explain_callback.methods.heads import HEAD_FUSIONS, discard_lowest, fuse_heads

T = TypeVar("T")


def attentions(size: int, picture: Path | None) -> list[Tensor]:
    """A of each block of ViT-S/14 for one image, each (1, H, N, N)."""
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=10)
    if weights := os.environ.get("VIT_EXPLAIN_WEIGHTS"):
        Weights.read(Path(weights)).load_into(model)
    image = torch.randn(3, size, size)
    if picture is not None:
        pixels = np.asarray(Image.open(picture).convert("RGB").resize((size, size)))
        image = (torch.tensor(pixels).permute(2, 0, 1) / 255 - 0.45) / 0.23
    return oracle.matrices(model, image[None]).attentions


def normalised(blocks: Sequence[Tensor], fusion: Any, ratio: float) -> list[Tensor]:
    return [row_normalised(discard_lowest(fuse_heads(block, fusion), ratio))[0] for block in blocks]


def whole_graph(matrices: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    """Tail, head and capacity of every edge; token i of level l is node l · N + i."""
    tokens = len(matrices[0])
    tails, heads, capacities = [], [], []
    for level, matrix in enumerate(matrices):
        rows, columns = matrix.numpy().nonzero()
        tails.append((level + 1) * tokens + rows)
        heads.append(level * tokens + columns)
        capacities.append(matrix.numpy()[rows, columns])
    return np.concatenate(tails), np.concatenate(heads), np.concatenate(capacities)


def by_scipy(matrices: Sequence[Tensor]) -> Callable[[int], float]:
    unit, top = 2**28, len(matrices) * len(matrices[0])
    tails, heads, capacities = whole_graph(matrices)
    size = top + len(matrices[0])
    graph = coo_array(((capacities * unit).astype(np.int32), (tails, heads)), (size, size)).tocsr()
    graph.eliminate_zeros()
    return lambda sink: scipy_flow(graph, top, sink).flow_value / unit


def by_networkx(matrices: Sequence[Tensor]) -> Callable[[int], float]:
    unit, top = 2**40, len(matrices) * len(matrices[0])
    graph = nx.DiGraph()
    for tail, head, capacity in zip(*(part.tolist() for part in whole_graph(matrices)), strict=True):
        graph.add_edge(tail, head, capacity=int(capacity * unit))
    return lambda sink: nx.maximum_flow_value(graph, top, sink, flow_func=preflow_push) / unit


def by_ortools(matrices: Sequence[Tensor]) -> Callable[[int], float]:
    capacities = [matrix.numpy() for matrix in matrices]
    graph = _Graph(capacities[1:], np.eye(len(capacities[0]))[0], None)
    return lambda sink: graph.flow_to(capacities[0][:, sink])


def timed_call(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds taken, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 336])
    parser.add_argument("--fusions", nargs="+", choices=HEAD_FUSIONS, default=["mean", "max"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networkx", action="store_true", help="one patch takes minutes")
    args = parser.parse_args()
    for size in args.sizes:
        blocks = attentions(size, args.picture)
        tokens = blocks[0].shape[-1]
        patches = range(1, tokens)
        readout = torch.eye(tokens, dtype=torch.float64)[0]
        print(f"\n{size} x {size} pixels, N = {tokens}, {len(blocks)} blocks")
        print("fusion discard | s an image (min – max) | certified | equal to the capped column sum")
        for fusion, ratio in product(args.fusions, (0.0, 0.9)):
            matrices = normalised(blocks, fusion, ratio)
            rounds = [timed_call(partial(maximum_flow, matrices, readout, patches)) for _ in range(args.rounds)]
            taken, found = [round_[0] for round_ in rounds], rounds[0][1]
            gap = (found.values - matrices[0].sum(dim=0).clamp(max=1)[1:]).abs()
            print(
                f"{fusion:6s} {ratio:7g} | {statistics.median(taken):6.2f} ({min(taken):.2f} – {max(taken):.2f})"
                f" | {found.certified:.1%} | {(gap < 1e-6).double().mean():.1%} (largest gap {gap.max():.1e})"
            )
        matrices = normalised(blocks, "mean", 0.0)
        exact = maximum_flow(matrices, readout, patches).values
        solvers = {"OR-Tools": (by_ortools, 8), "SciPy": (by_scipy, 2)}
        if args.networkx:
            solvers["networkx preflow-push"] = (by_networkx, 1)
        for name, (make, count) in solvers.items():
            solve = make(matrices)
            sinks = list(patches)[:: max(1, len(patches) // count)][:count]
            timed = [timed_call(partial(solve, sink)) for sink in sinks]
            each = statistics.median(taken for taken, _ in timed)
            furthest = max(abs(value - exact[sink - 1].item()) for sink, (_, value) in zip(sinks, timed, strict=True))
            print(
                f"{name}, whole graph: {each:.3g} s a patch, so about {each * len(patches):.0f} s an image "
                f"(extrapolated from {len(sinks)}); differs by {furthest:.0e} at most"
            )


if __name__ == "__main__":
    main()
