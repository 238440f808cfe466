"""Methods of one's own, and what a fold keeps alive."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.models import FAMILIES, random_images, tiny_vit
from vit_explain_callback import AttentionRollout, explain
from vit_explain_callback.methods import Block, Fusion, Method
from vit_explain_callback.vit.blocks import find_stack


class Undefined(Method):
    """A method that says nothing of what it does with a block."""

    kind = "undefined"


class Unnamed(Method):
    """A method without a kind."""

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        return relevance


@dataclass(frozen=True)
class LastBlocks(Method):
    """Readout row of the mean attention, weighted by its gradient if asked, added up over the last `count` blocks."""

    count: int = 1
    of_class: bool = False

    kind = "last_blocks"

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.count}{'_of_class' * self.of_class}"

    @property
    def fusion(self) -> Fusion:
        return Fusion(of="weighted", positive="after") if self.of_class else Fusion()

    def layers(self, blocks: int) -> range:
        return range(blocks - self.count + 1, blocks + 1)

    def start(self, readout: Tensor, pool: Tensor | None) -> Tensor:
        return torch.zeros_like(readout)

    def step(self, relevance: Tensor, block: Block) -> Tensor:
        return relevance + torch.einsum("bi,bij->bj", block.readout, block.fused)


def test_a_method_of_ones_own_that_does_nothing_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Undefined.*step"):
        Undefined()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="Expected the method Unnamed to have a `kind`"):
        Unnamed()


@pytest.mark.parametrize("family", ["vit", "vit_gap"])
def test_a_method_of_ones_own_gives_its_own_maps_beside_others(family: str) -> None:
    kind = FAMILIES[family]
    model, images = kind.create(), random_images(2)
    found = oracle.matrices(model, images)
    methods = [AttentionRollout(), LastBlocks(1), LastBlocks(2, of_class=True)]
    maps = explain(model, images, methods).maps
    assert list(maps) == ["rollout", "last_blocks_1", "last_blocks_2_of_class"]
    for image in range(2):
        plain = [oracle.fused_matrix(a[image], None, "mean") for a in found.attentions]
        both = zip(found.attentions, found.gradients, strict=True)
        weighted = [oracle.fused_matrix(a[image], g[image], "mean") for a, g in both]
        for name, expected in {
            "last_blocks_1": kind.start_row() @ plain[-1],
            "last_blocks_2_of_class": kind.start_row() @ (weighted[-1] + weighted[-2]),
        }.items():
            patches = expected[kind.prefix :].reshape(kind.grid)
            torch.testing.assert_close(maps[name][image].double(), patches, rtol=1e-4, atol=1e-6)
    # Alone it needs no gradients, so that attention is formed in the open: the same but for the last bits.
    torch.testing.assert_close(maps["rollout"], explain(model, images, ["rollout"]).maps["rollout"], rtol=1e-5, atol=0)


def test_the_tensors_of_a_block_are_let_go_once_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    references: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def seen_stack(*args: Any) -> Any:
        stack = find_stack(*args)
        references.extend(weakref.ref(tensor) for call in stack.calls for tensor in (call.output, call.value))
        return stack

    class Watching(AttentionRollout):
        def step(self, relevance: Tensor, block: Block) -> Tensor:
            alive.append(sum(reference() is not None for reference in references))
            return super().step(relevance, block)

    monkeypatch.setattr("vit_explain_callback._explain_batch.find_stack", seen_stack)
    explain(tiny_vit(), random_images(2), [Watching(), "grad_rollout"])
    assert alive == [6, 4, 2]
