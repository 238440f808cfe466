"""Compare the maps of a method with those of an oracle, on every family and in both precisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests import oracle
from tests.models import FAMILIES, Family, random_images
from vit_explain_callback import explain
from vit_explain_callback.methods import Method

Expected = Callable[[Family, list[Tensor], list[Tensor], Method], Tensor]
"""Relevance of each token, (N,), of one image, from A and ∂y/∂A of its L attentions (H, N, M)."""


def assert_maps_equal(name: str, methods: Sequence[Method], expected: Expected, target: int | None = None) -> None:
    """`expected` is computed in float64; the maps must equal it to 1e-4 in float32 and to 1e-9 in float64."""
    family = FAMILIES[name]
    model, images = family.create(), random_images(2, family.image_size)
    found = oracle.matrices(model, images, None if target is None else [target] * 2)
    single = explain(model, images, methods, target)
    double = explain(copy.deepcopy(model).double(), images, methods, target)
    for method in methods:
        rows = [
            expected(family, [a[image] for a in found.attentions], [g[image] for g in found.gradients], method)
            for image in range(2)
        ]
        maps = torch.stack([row[family.prefix :].reshape(family.grid) for row in rows])
        assert maps.norm() > 0, method.name
        assert single.maps[method.name].dtype == torch.float32
        assert relative_error(single.maps[method.name], maps) < 1e-4, method.name
        assert relative_error(double.maps[method.name], maps) < 1e-9, method.name


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def start_row(family: Family, attentions: list[Tensor]) -> Tensor:
    """What the classifier reads of each token, (N,), summing to 1; the pool's mean attention where there is a pool."""
    if family.readout != "pool":
        return family.start_row()
    pool = sum(attentions[-1], torch.zeros_like(attentions[-1][0])) / len(attentions[-1])
    return of_pool(family, pool)


def of_pool(family: Family, matrix: Tensor) -> Tensor:
    """The mean row of a pool's matrix (Q, M) as (N,): a pool may read the patches alone."""
    row = matrix.mean(dim=0)
    return torch.cat([row.new_zeros(family.tokens - len(row)), row])
