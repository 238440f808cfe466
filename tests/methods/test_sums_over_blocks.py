"""GradSAM and its signed form against float64 sums, row by row, and their laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.methods.agreement import assert_maps_equal, of_pool, start_row
from tests.models import FAMILIES, Family, random_images, tiny_vit
from vit_explain_callback import GradientAttention, GradSAM, explain
from vit_explain_callback.methods import Method


def summed(family: Family, attentions: list[Tensor], gradients: list[Tensor], method: Method) -> Tensor:
    product = oracle.positive_product if isinstance(method, GradSAM) else oracle.signed_product
    blocks = len(attentions) - (family.readout == "pool")
    read = start_row(family, attentions)
    total = torch.zeros(family.tokens, dtype=torch.float64)
    for layer in range(blocks):
        if layer + 1 in method.layers(blocks):
            matrix = product(attentions[layer], gradients[layer])
            for token, weight in enumerate(read):
                total = total + weight * matrix[token]
    if family.readout == "pool":
        total = total + of_pool(family, product(attentions[-1], gradients[-1]))
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_equal_the_oracle(name: str) -> None:
    assert_maps_equal(name, [GradSAM(), GradSAM(-2), GradientAttention(), GradientAttention(3)], summed)
    assert_maps_equal(name, [GradSAM(), GradientAttention()], summed, target=3)


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.model(images)


@pytest.mark.parametrize("name", ["gradsam", "grad_attention", "legrad"])
def test_a_gradient_k_times_as_large_gives_a_map_k_times_as_large(name: str) -> None:
    model, images = tiny_vit().double(), random_images(2)
    plain = explain(model, images, [name], 1).maps[name]
    torch.testing.assert_close(explain(Scaled(model, 100.0), images, [name], 1).maps[name], 100 * plain)


def test_the_signed_sum_has_both_signs_and_changes_them_with_the_logit() -> None:
    model, images = tiny_vit().double(), random_images(2)
    maps = explain(model, images, ["grad_attention"], 1).maps["grad_attention"]
    assert (maps > 0).any()
    assert (maps < 0).any()
    torch.testing.assert_close(
        explain(Scaled(model, -1.0), images, ["grad_attention"], 1).maps["grad_attention"], -maps
    )
    positive = explain(model, images, ["gradsam"], 1).maps["gradsam"]
    assert (positive >= maps).all()  # heads cancel one another before they can be dropped
