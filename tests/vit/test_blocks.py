"""However blocks are held and called, each attention counts once, in the order in which it ran; or it is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models import CLASSES, random_images, tiny_vit
from tests.plain_vits import DEPTH, SIZE, WIDTH, Attention, Block, PlainViT, built, check, matrices
from vit_explain_callback import explain
from vit_explain_callback.explainer import Explainer


class Attributes(PlainViT):
    def hold(self, blocks: list[Block]) -> None:
        self.block1, self.block2, self.block3 = blocks

    def layers(self) -> list[Any]:
        return [self.block1, self.block2, self.block3]


class Dictionary(PlainViT):
    def hold(self, blocks: list[Block]) -> None:
        self.parts = nn.ModuleDict({f"block{number}": block for number, block in enumerate(blocks)})

    def layers(self) -> list[Any]:
        return list(self.parts.values())


class Backwards(PlainViT):
    """The first to run is the last in the list."""

    def layers(self) -> list[Any]:
        return list(self.blocks)[::-1]


class Shared(PlainViT):
    """ALBERT: one block, called again and again."""

    def hold(self, blocks: list[Block]) -> None:
        self.block = blocks[0]

    def layers(self) -> list[Any]:
        return [self.block] * DEPTH


class SharedInAList(PlainViT):
    """Two blocks that take turns, the first of them twice in a list."""

    def hold(self, blocks: list[Block]) -> None:
        self.blocks = nn.ModuleList([blocks[0], blocks[1], blocks[0]])

    def layers(self) -> list[Any]:
        return [self.blocks[0], self.blocks[1], self.blocks[0]]


class Registered(PlainViT):
    """A plain list, whose elements are registered one by one."""

    def hold(self, blocks: list[Block]) -> None:
        for number, block in enumerate(blocks):
            self.add_module(f"layer_{number}", block)

    def layers(self) -> list[Any]:
        return [getattr(self, f"layer_{number}") for number in range(DEPTH)]


class Stages(PlainViT):
    """Stages of different depth, one of them a list in a list."""

    def hold(self, blocks: list[Block]) -> None:
        self.stages = nn.ModuleList(
            [nn.Sequential(blocks[0]), nn.Sequential(nn.Identity(), nn.Sequential(*blocks[1:]))]
        )

    def layers(self) -> list[Any]:
        first, second = self.stages
        return [first[0], *second[1]]  # type: ignore[index]

    def run(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Wrapper(nn.Module):
    """As a checkpoint wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self._inner, x, use_reentrant=False)


class Wrapped(PlainViT):
    """Wrapped blocks in a sequence with names, between layers that do not attend."""

    def hold(self, blocks: list[Block]) -> None:
        named: list[tuple[str, nn.Module]] = [(f"b{number}", Wrapper(block)) for number, block in enumerate(blocks)]
        self.encoder = nn.Sequential(OrderedDict([("dropout", nn.Dropout(0.5)), *named, ("out", nn.Identity())]))

    def layers(self) -> list[Any]:
        return [module._inner for module in self.encoder if isinstance(module, Wrapper)]

    def run(self, x: Tensor) -> Any:
        return self.encoder(x)


class Tower(nn.Module):
    """Attention, norms and MLPs side by side; no module is a block."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        for number, block in enumerate(blocks):
            for name, part in block.named_children():
                self.add_module(f"{name}_{number}", part)

    def layer(self, number: int) -> Any:
        names = ("norm1", "attn", "norm2", "mlp")
        return SimpleNamespace(**{name: getattr(self, f"{name}_{number}") for name in names})

    def forward(self, x: Tensor) -> Tensor:
        for number in range(DEPTH):
            block = self.layer(number)
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return x


class Siblings(PlainViT):
    """The whole encoder is one module."""

    def hold(self, blocks: list[Block]) -> None:
        self.encoder = Tower(blocks)

    def layers(self) -> list[Any]:
        return [self.encoder.layer(number) for number in range(DEPTH)]

    def run(self, x: Tensor) -> Any:
        return self.encoder(x)


class Flat(Siblings):
    """The whole model is one module."""

    def run(self, x: Tensor) -> Any:
        return Tower.forward(self.encoder, x)


class FlatWithoutNorm(Flat):
    def hold(self, blocks: list[Block]) -> None:
        super().hold(blocks)
        self.norm = nn.Identity()  # type: ignore[assignment]


FORMS = [
    *(Attributes, Dictionary, Backwards, Shared, SharedInAList, Registered, Stages, Wrapped, Siblings, Flat),
    FlatWithoutNorm,
]
BLOCKS = [form for form in FORMS if form not in (Siblings, Flat, FlatWithoutNorm)]


@pytest.mark.parametrize("form", FORMS)
def test_each_attention_counts_once_in_the_order_in_which_it_ran(form: Callable[[], Any]) -> None:
    check(built(form), random_images(2, SIZE))


def separate(block: Any) -> Block:
    made = Block(block.attn)
    made.norm1, made.norm2, made.mlp = block.norm1, block.norm2, block.mlp
    return copy.deepcopy(made)


@pytest.mark.parametrize("form", FORMS)
def test_every_other_method_works_or_refuses_plainly(form: Callable[[], Any]) -> None:
    """LeGrad needs blocks as modules; the others do not."""
    images = random_images(2, SIZE)
    plain = built(PlainViT)
    plain.hold([separate(block) for block in built(form).layers()])
    plain.load_state_dict({**built(form).state_dict(), **plain.blocks.state_dict(prefix="blocks.")}, strict=False)
    methods = ["chefer", "flow", "gradsam", "grad_attention", "attention_block2_head3"]
    plain.norm = built(form).norm
    model, expected = built(form), explain(plain, images, [*methods, "legrad"])
    for name, maps in explain(model, images, methods).maps.items():
        torch.testing.assert_close(maps, expected.maps[name], rtol=1e-9, atol=1e-12)
    if form in BLOCKS:
        found = explain(model, images, ["legrad"]).maps["legrad"]
        torch.testing.assert_close(found, expected.maps["legrad"], rtol=1e-9, atol=1e-12)
    else:
        with pytest.raises(ValueError, match="modules that are called one after another, so that the logit of each"):
            explain(model, images, ["legrad"])


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_left_out_where_they_enter(form: Callable[[], Any]) -> None:
    model, images = built(form), random_images(2, SIZE).double()
    explainer = Explainer(model, ["rollout"])
    explainer(images)
    taken = torch.zeros(2, 3, 4, dtype=torch.bool)
    taken[0, 1, 2] = taken[1, 2, 3] = True
    kept = torch.stack([torch.arange(13)[torch.arange(13) != 7], torch.arange(12)])
    tokens = model.tokens(images).gather(1, kept[:, :, None].expand(-1, -1, WIDTH))
    expected = model.head(model.read(model.run(tokens)))
    torch.testing.assert_close(explainer.logits_without(images, taken), expected.detach(), rtol=1e-9, atol=1e-9)


def test_blocks_of_timm_that_are_one_and_the_same() -> None:
    """By name they are one block that attended three times."""
    model, images = tiny_vit().double(), random_images(2)
    separate = copy.deepcopy(model)
    separate.blocks = nn.Sequential(*(copy.deepcopy(model.blocks[0]) for _ in range(3)))
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    methods = ["rollout", "grad_rollout", "legrad", "chefer"]
    expected = explain(separate, images, methods)
    for name, maps in explain(model, images, methods).maps.items():
        torch.testing.assert_close(maps, expected.maps[name], rtol=1e-9, atol=1e-12)


def test_two_attentions_in_one_block_are_two_layers() -> None:
    class Double(PlainViT):
        def run(self, x: Tensor) -> Tensor:
            for block in self.layers():
                x = x + block.attn(block.norm1(x))
                x = x + block.attn(block.norm2(x))
            return x

    class Attending(nn.Module):
        def __init__(self, norm: nn.Module, attn: nn.Module) -> None:
            super().__init__()
            self.norm1, self.attn, self.norm2, self.mlp = norm, attn, nn.Identity(), Nothing()

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    model, images = built(Double), random_images(2, SIZE)
    as_layers = built(PlainViT)
    norms = [(block, norm) for block in model.blocks for norm in (block.norm1, block.norm2)]
    as_layers.layers = lambda: [Attending(norm, block.attn) for block, norm in norms]
    check(model, images, matrices(as_layers, images.double()))


def refusal(model: nn.Module, images: Tensor | None = None) -> str:
    with pytest.raises(ValueError, match="Expected") as caught:
        explain(model, random_images(2, SIZE) if images is None else images, ["rollout"])
    return str(caught.value)


class TwoCrops(Shared):
    """One encoder, two views of each image; the classifier reads both."""

    def forward(self, images: Tensor) -> Any:
        views = (images, images.flip(3))
        return self.head(sum(self.read(self.run(self.tokens(view))) for view in views))


class TwoCropsOneBlock(TwoCrops):
    def layers(self) -> list[Any]:
        return [self.block]


class TwoPasses(PlainViT):
    """The first pass is thrown away."""

    def forward(self, images: Tensor) -> Any:
        self.run(self.tokens(images))
        return super().forward(images)


class BothCropsAtOnce(PlainViT):
    def forward(self, images: Tensor) -> Any:
        both = super().forward(torch.cat([images, images.flip(3)]))
        return both[: len(images)] + both[len(images) :]


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = PlainViT(), PlainViT()

    def forward(self, images: Tensor) -> Any:
        return self.left(images) + self.right(images)


class Glimpses(Shared):
    """What the first pass said decides on what the second sees."""

    def layers(self) -> list[Any]:
        return [self.block]

    def forward(self, images: Tensor) -> Any:
        said = super().forward(images).mean(dim=1)
        return super().forward(images * said[:, None, None, None])


class Convolved(PlainViT):
    """A convolution over the patches between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def run(self, x: Tensor) -> Tensor:
        for block in self.layers():
            x = block(x)
            x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x


class WithoutOne(PlainViT):
    """A block whose attention cannot be seen."""

    def hold(self, blocks: list[Block]) -> None:
        blocks[1].attn = Unseen()
        super().hold(blocks)


class Unseen(Attention):
    def forward(self, x: Tensor) -> Any:
        q, k, v = self.parts(x)
        weights = torch.sigmoid(q @ k.mT)  # no probabilities
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Parallel(PlainViT):
    """Blocks side by side, whose outputs are added."""

    def run(self, x: Tensor) -> Tensor:
        return x + torch.stack([block(x) for block in self.layers()]).sum(dim=0)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (TwoCrops, "in `block` of TwoCrops, but captured 6"),
        (TwoCropsOneBlock, "in `block` of TwoCropsOneBlock, but captured 2"),
        (TwoPasses, "in `blocks.0` of TwoPasses, but captured 2: the output of attention 3, `blocks.2.attn`, never"),
        (BothCropsAtOnce, "each of 2 images, but its attention is (B, H, N, N) = (4, 3, 13, 13)"),
        (TwoTowers, "found left, right: the output of attention 3, `left.blocks.2.attn`, never reaches attention 4"),
        (Glimpses, "to enter the first one as 13 tokens, (2, 13, D), but part of it bypasses them"),
        (Convolved, "Expected attention alone to mix the tokens of Convolved"),
        (WithoutOne, "Expected attention alone to mix the tokens of WithoutOne"),
        (Parallel, "never reaches attention 2"),
    ],
)
def test_what_is_no_single_stack_is_refused(form: Callable[[], Any], reason: str) -> None:
    assert reason in refusal(built(form))


def left(model: Any, images: Tensor) -> Any:
    return model.left(images)


def test_a_run_that_counts_can_be_said() -> None:
    """The cure that the refusals name."""
    images = random_images(2, SIZE)
    crops, passes, towers = built(TwoCrops), built(TwoPasses), built(TwoTowers)
    check(crops, images, forward=lambda model, images: model.head(model.read(model.run(model.tokens(images)))))
    check(passes, images, forward=lambda model, images: PlainViT.forward(model, images))
    check(towers.left, images)
    expected = explain(towers.left, images)
    found = explain(towers, images, vit="left", forward=left)
    for name, maps in expected.maps.items():
        torch.testing.assert_close(found.maps[name], maps)


def test_a_soft_mixture_with_as_many_slots_as_tokens_is_no_block() -> None:
    class SoftMixture(nn.Module):
        def __init__(self, product: Callable[..., Tensor]) -> None:
            super().__init__()
            self.slots, self.expert = nn.Linear(WIDTH, 13), nn.Linear(WIDTH, WIDTH)
            self.product = product

        def forward(self, x: Tensor) -> Tensor:
            scores = self.slots(x)  # (B, N, S) with S = N
            return self.product(scores.softmax(dim=1), scores.softmax(dim=2), x, self.expert)

    def by_einsum(dispatch: Tensor, combine: Tensor, x: Tensor, expert: nn.Module) -> Tensor:
        return torch.einsum("bns,bsd->bnd", combine, expert(torch.einsum("bns,bnd->bsd", dispatch, x)))

    def by_matmul(dispatch: Tensor, combine: Tensor, x: Tensor, expert: nn.Module) -> Tensor:
        return combine @ expert(dispatch.mT @ x)

    for product in (by_einsum, by_matmul):
        for only_last in (False, True):
            model = built(PlainViT)
            for block in list(model.blocks)[2 if only_last else 0 :]:
                block.mlp = SoftMixture(product).double()
            assert "the slots of a soft mixture" in refusal(model)


def test_classes_as_many_as_tokens_are_no_attention() -> None:
    """A softmax over experts that picks for each token is none among tokens."""

    class Mixture(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, experts)
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))

        def forward(self, x: Tensor) -> Tensor:
            each = torch.stack([expert(x) for expert in self.experts], dim=2)
            return (self.gate(x).softmax(dim=-1).unsqueeze(2) @ each).squeeze(2)

    for experts in (4, 13):
        model = built(PlainViT)
        for block in model.blocks:
            block.mlp = Mixture(experts).double()
        if experts == 4:
            check(model, random_images(2, SIZE))
        else:
            refusal(model)


def test_of_a_sequence_from_patches_to_logits() -> None:
    class Embed(nn.Module):
        def __init__(self, vit: PlainViT) -> None:
            super().__init__()
            self.own = [vit]
            self.patches, self.position, self.class_token = vit.patches, vit.position, vit.class_token

        def forward(self, images: Tensor) -> Tensor:
            patches = self.patches(images).flatten(2).transpose(1, 2)
            return torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.position

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0]

    vit = built(PlainViT)
    model = nn.Sequential(Embed(vit), *vit.blocks, vit.norm, First(), vit.head)
    images = random_images(2, SIZE)
    check(model, images, matrices(vit, images.double()))
    assert explain(model, images).logits.shape == (2, CLASSES)
