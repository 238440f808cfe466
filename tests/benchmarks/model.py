"""Fit the cost of a snapshot as a formula to measurements, and check it against a held-out one.

Images are n, ranks r (processes that each hold the model), cores c; blocks L, heads H, tokens N, width of a head d,
variants v.

    seconds = ceil(n / r) · max(1, r / c) · (a · F + b · v · L · H · N²) + e + f · v · n
    F = 2 · L · (24 · N · (H d)² + 4 · N² · H d)

The first part is explaining: F counts the operations of one forward pass and one backward pass to the input, a is the
time of one operation, and b that of one entry of an attention matrix in one variant. Processes beyond the number of
cores share them, and are no faster. The second is what a snapshot costs at least, gathering included; the third,
scalars, measured on 2,000 maps by themselves, as they do not show beside the first in a few images. Pictures cost the
same however many images are explained: `python -m tests.benchmarks.snapshot` shows them.

    bytes above the weights = ceil(n / r) · L · N · H d · w · g + h

with w bytes a value, and all images of a rank in one pass; `batch_size` stands for ceil(n / r) where it is smaller.

    python -m tests.benchmarks.model
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed
import torch.multiprocessing
from numpy.typing import NDArray
from scipy.optimize import nnls

from tests.benchmarks.contenders import FIVE
from tests.benchmarks.measure import in_new_process, peak_bytes, seconds
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.tracking.distributed import Ranks, explain_together
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.scalars import scalars
from vit_explain_callback.tracking.snapshot import Snapshot

METHODS = ("grad_rollout", "rollout", *(name for name in FIVE if name not in ("rollout", "grad_rollout")))


@dataclass(frozen=True)
class Case:
    """A snapshot to predict; a model of L blocks, H heads, N tokens and heads of width d, in float32."""

    images: int
    ranks: int
    variants: int
    blocks: int
    heads: int
    grid: int
    width: int = 64

    @property
    def tokens(self) -> int:
        return self.grid**2 + 1

    @property
    def share(self) -> int:
        return math.ceil(self.images / self.ranks)

    def time_terms(self, cores: int) -> list[float]:
        """What the coefficients a, b, e are multiplied with."""
        embedding = self.heads * self.width
        operations = 2 * self.blocks * (24 * self.tokens * embedding**2 + 4 * self.tokens**2 * embedding)
        entries = self.variants * self.blocks * self.heads * self.tokens**2
        turns = self.share * max(1, self.ranks / cores)
        return [turns * operations, turns * entries, 1]

    def memory_terms(self) -> list[float]:
        """What the coefficients g, h are multiplied with."""
        return [self.share * self.blocks * self.tokens * self.heads * self.width * 4, 1]

    def model(self) -> torch.nn.Module:
        shape: dict[str, Any] = {"depth": self.blocks, "num_heads": self.heads, "embed_dim": self.heads * self.width}
        model = timm.create_model("vit_tiny_patch16_224", img_size=16 * self.grid, num_classes=10, **shape)
        return model.eval()

    def inputs(self) -> torch.Tensor:
        return torch.randn(self.images, 3, 16 * self.grid, 16 * self.grid, generator=torch.Generator().manual_seed(0))


FITTED = [
    Case(8, 1, 2, 12, 3, 14),
    Case(16, 1, 2, 12, 3, 14),
    Case(16, 2, 2, 12, 3, 14),
    Case(16, 4, 2, 12, 3, 14),
    Case(8, 1, 5, 12, 3, 14),
    Case(8, 1, 1, 12, 6, 14),
    Case(2, 1, 2, 12, 3, 32),
    Case(4, 2, 5, 12, 3, 32),
]
UNSEEN = Case(12, 2, 3, 12, 6, 18)
PAPER = {
    "10,000 images on 256 ranks, ViT-S/16 224": (Case(10_000, 256, 2, 12, 6, 14), 256),
    "8 images on one, ViT-g/14 518": (Case(8, 1, 2, 40, 24, 37), 2),
}


def measured_seconds(case: Case, repeats: int) -> float:
    """Explaining on all ranks; the fastest of the repeats, by the clock of rank zero."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, (case, repeats, port, queue), case.ranks)  # type: ignore[attr-defined]
    return min(queue.get())


def _rank(
    rank: int, case: Case, repeats: int, port: int, queue: torch.multiprocessing.SimpleQueue[list[float]]
) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=case.ranks)
    ranks, images = Ranks(rank, case.ranks), case.inputs()
    explainer = Explainer(case.model(), METHODS[: case.variants])
    taken = []
    for _ in range(repeats + 1):
        torch.distributed.barrier()
        begun = time.perf_counter()
        explain_together(ranks, explainer, images, None, None)
        taken.append(time.perf_counter() - begun)
    if rank == 0:
        queue.put(taken[1:])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def scalar_seconds(images: int = 2000, variants: int = 2) -> float:
    """Of one map of 14 × 14 patches."""
    maps = {name: torch.rand(images, 14, 14) for name in METHODS[:variants]}
    snapshots = [
        Snapshot(step, Explanation(maps, torch.randn(images, 10), torch.zeros(images).long())) for step in range(3)
    ]
    return seconds(lambda: scalars(History(snapshots=snapshots, count=3), Probe(None, []))) / (images * variants)


def measured_bytes(case: Case) -> int:
    """Above the weights, on one rank with its share."""
    torch.set_num_threads(1)
    images, explainer = case.inputs()[: case.share], Explainer(case.model(), METHODS[: case.variants])
    explainer(images[:1])
    return peak_bytes(lambda: explainer(images), "cpu")


def fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> NDArray[np.float64]:
    """Coefficients, none negative, with the least squared relative error.

    Example:
        >>> fit([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]], [5.0, 8.0, 14.0]).round(6).tolist()
        [3.0, 2.0]
    """
    weighted = np.array(terms) / np.array(values)[:, None]
    scale = weighted.max(axis=0)
    found: NDArray[np.float64] = nnls(weighted / scale, np.ones(len(values)))[0] / scale
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    times = [measured_seconds(case, args.repeats) for case in [*FITTED, UNSEEN]]
    memory = [float(in_new_process(measured_bytes, case)) for case in [*FITTED, UNSEEN]]
    of_time = fit([case.time_terms(cores) for case in FITTED], times[:-1])
    of_memory = fit([case.memory_terms() for case in FITTED], memory[:-1])
    of_scalars = scalar_seconds()
    print("a, b, e, f = " + ", ".join(f"{value:.3g}" for value in (*of_time, of_scalars)) + " s")
    print(f"g = {of_memory[0]:.3g}, h = {of_memory[1] / 1e6:.3g} MB")
    for case, taken, size in zip([*FITTED, UNSEEN], times, memory, strict=True):
        predicted, held = of_time @ case.time_terms(cores), of_memory @ case.memory_terms()
        print(
            f"{'not fitted: ' if case is UNSEEN else ''}{case}: {predicted:.2f} s predicted, {taken:.2f} s measured; "
            f"{held / 1e6:.0f} MB predicted, {size / 1e6:.0f} MB measured"
        )
    for name, (case, own_cores) in PAPER.items():
        predicted = of_time @ case.time_terms(own_cores) + of_scalars * case.variants * case.images
        held = of_memory @ case.memory_terms()
        print(f"on paper, {name}: {predicted:.1f} s at this core's speed, {held / 2**30:.2f} GiB a rank")


if __name__ == "__main__":
    main()
