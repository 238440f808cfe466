"""Chefer's relevance against full products of float64 matrices, and its laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.methods.agreement import assert_maps_equal, of_pool
from tests.models import FAMILIES, Family, random_images, tiny_vit
from vit_explain_callback import Chefer, explain
from vit_explain_callback.methods import Method


def relevance(family: Family, attentions: list[Tensor], gradients: list[Tensor], method: Method) -> Tensor:
    assert isinstance(method, Chefer)
    blocks = len(attentions) - (family.readout == "pool")
    whole = torch.eye(family.tokens, dtype=torch.float64)
    for layer in range(method.layers(blocks)[0] - 1, blocks):
        whole = whole + oracle.positive_product(attentions[layer], gradients[layer]) @ whole
    if family.readout == "pool":
        return of_pool(family, oracle.positive_product(attentions[-1], gradients[-1])) @ whole
    return family.start_row() @ whole


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_equal_the_oracle(name: str) -> None:
    assert_maps_equal(name, [Chefer(), Chefer(2), Chefer(-1)], relevance)


def test_it_depends_on_the_class_and_is_never_negative() -> None:
    model, images = tiny_vit(), random_images(2)
    maps = [explain(model, images, ["chefer"], target).maps["chefer"] for target in (0, 1)]
    assert not maps[0].equal(maps[1])
    assert all((each >= 0).all() for each in maps)
