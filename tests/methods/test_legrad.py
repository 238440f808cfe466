"""LeGrad against float64 gradients of each block's own logit, and that it leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from tests import oracle
from tests.laws.test_oracle import assert_same, mixed_state_model, whole_state
from tests.methods.agreement import relative_error
from tests.models import FAMILIES, Family, random_images, randomised, tiny_vit
from tests.vit.test_beyond_timm import Plain, hugging_face
from vit_explain_callback import Chefer, LeGrad, explain, explain_targets


def expected_maps(family: Family, gradients: list[Tensor], first: int) -> Tensor:
    """(B, grid_h, grid_w), entry by entry."""
    count = len(gradients[0])
    rows = torch.zeros(count, family.tokens, dtype=torch.float64)
    for gradient in gradients[first - 1 :]:
        _, heads, queries, keys = gradient.shape
        for image in range(count):
            for head in range(heads):
                for query in range(queries):
                    row = gradient[image, head, query]
                    rows[image, family.tokens - keys :] += torch.where(row > 0, row, 0.0) / (heads * queries)
    return rows[:, family.prefix :].reshape(count, *family.grid)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_equal_the_oracle(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.create(), random_images(2, family.image_size)
    targets = [torch.tensor([1, 4]), torch.tensor([0, 0])]
    methods = [LeGrad(), LeGrad(3), LeGrad(-2)]
    single = explain_targets(model, images, targets, methods=methods)
    double = explain_targets(copy.deepcopy(model).double(), images, targets, methods=methods)
    for place, target in enumerate(targets):
        gradients = oracle.block_gradients(model, images, target.tolist())
        for method, first in zip(methods, (1, 3, 2), strict=True):
            expected = expected_maps(family, gradients, first)
            assert expected.norm() > 0
            assert relative_error(single[place].maps[method.name], expected) < 1e-4, method.name
            assert relative_error(double[place].maps[method.name], expected) < 1e-9, method.name


def test_on_the_last_block_it_is_the_gradient_of_the_logit() -> None:
    """There the tokens after the block are those that the classifier reads."""
    model, images = tiny_vit(global_pool="avg").double(), random_images(2)
    last = oracle.matrices(model, images, [2, 2]).gradients[-1]
    expected = last.clamp(min=0).mean(dim=(1, 2))[:, 1:].reshape(2, 4, 4)
    torch.testing.assert_close(explain(model, images, [LeGrad(-1)], 2).maps["legrad_from-1"], expected)


class Logits(nn.Module):
    """A model that gives its logits and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return getattr(output, "logits", output)


def cut_off(model: nn.Module, count: int) -> nn.Module:
    """The model with the first `count` of its three blocks alone."""
    short = copy.deepcopy(model)
    for module in list(short.modules()):
        for name, blocks in module.named_children():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == 3:
                setattr(module, name, blocks[:count])
    return Logits(short)


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Siglip", "DINOv3ViT", "first", "mean"])
def test_of_other_models_it_is_the_gradient_of_the_model_cut_off_after_each_block(name: str) -> None:
    plain = name in ("first", "mean")
    model = randomised(Plain(name), seed=0) if plain else hugging_face(name, "sdpa")
    grid = (4, 6) if plain else (4, 4)
    model, images = model.double().eval(), random_images(2, (8 * grid[0], 8 * grid[1]))
    found = explain(model, images, [LeGrad(start) for start in (1, 2, 3)], 1).maps
    gradients = [oracle.matrices(cut_off(model, count), images, [1, 1]).gradients[-1] for count in (1, 2, 3)]
    rows = [g.clamp(min=0).mean(dim=(1, 2))[:, -grid[0] * grid[1] :].reshape(2, *grid) for g in gradients]
    for start, maps in enumerate(found.values()):
        torch.testing.assert_close(maps, torch.stack(rows[start:]).sum(dim=0))


def test_blocks_with_tokens_before_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 25, D\) from .*, but got \(25, 2, 48\). Leave out"):
        explain(randomised(Plain(batch_first=False), seed=0).eval(), random_images(2, (32, 48)), ["legrad"])


def test_on_a_class_token_model_only_the_class_token_s_row_counts() -> None:
    model, images = tiny_vit(), random_images(1)
    for gradient in oracle.block_gradients(model, images, [0]):
        assert gradient[:, :, 0].abs().sum() > 0
        assert gradient[:, :, 1:].abs().sum() == 0


def test_others_beside_it_are_the_same_and_it_computes_the_blocks_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit(), random_images(3)
    seen: list[str] = []
    for kind in (type(model), type(model.blocks[0])):
        forward = kind.forward

        def counted(self: Any, *args: Any, forward: Any = forward, **rest: Any) -> Any:
            seen.append(type(self).__name__)
            return forward(self, *args, **rest)

        monkeypatch.setattr(kind, "forward", counted)
    together = explain(model, images, ["legrad", "chefer", "rollout"], batch_size=2)
    assert seen.count("Block") == 2 * 2 * 3  # twice in each of two parts of the batch
    assert seen.count("VisionTransformer") == 2 * (2 + 3)
    for name in ("chefer", "rollout"):
        alone = explain(model, images, [name], batch_size=2).maps[name]
        torch.testing.assert_close(alone, together.maps[name], rtol=1e-5, atol=0)  # rollout alone needs no gradients


def test_frozen_and_checkpointed_models_and_no_grad_give_the_same_maps() -> None:
    model, images = tiny_vit().double(), random_images(2)
    plain = explain(model, images, ["legrad"], 1).maps["legrad"]
    model.requires_grad_(False)
    torch.testing.assert_close(explain(model, images, ["legrad"], 1).maps["legrad"], plain, rtol=1e-12, atol=0)
    model.set_grad_checkpointing(True)
    for early in (True, False):
        with set_checkpoint_early_stop(early):
            for found in explain_targets(model, images, [1, 0, 1], methods=["legrad"])[::2]:
                torch.testing.assert_close(found.maps["legrad"], plain, rtol=1e-12, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(explain(model, images, ["legrad"], 1).maps["legrad"], plain, rtol=1e-12, atol=0)


class Probe(nn.Module):
    """A frozen backbone under `no_grad`, and a head that also looks at the images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_vit(num_classes=0)
        self.head = nn.Linear(48 + 3, 5)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(images)
        return self.head(torch.cat([features, images.mean(dim=(2, 3))], dim=1))


def test_a_head_on_a_frozen_backbone_that_also_sees_the_images() -> None:
    model, images = Probe().double().eval(), random_images(2)
    maps = explain(model, images, ["legrad"], 1).maps["legrad"]

    class Whole(nn.Module):
        """The same without `no_grad`, in timm's parts: `blocks`, `norm` and `forward_head`."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.backbone, model.head
            self.blocks, self.norm = model.backbone.blocks, model.backbone.norm

        def forward(self, given: Tensor) -> Any:
            return self.backbone(given)

        def forward_head(self, tokens: Tensor) -> Tensor:
            features = self.backbone.forward_head(tokens)
            return self.head(torch.cat([features, images.double().mean(dim=(2, 3))], dim=1))

    expected = expected_maps(FAMILIES["vit"], oracle.block_gradients(Whole(), images, [1, 1]), 1)
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_the_model_and_the_world_as_they_were(fails: bool) -> None:
    model = mixed_state_model()
    before = whole_state(model)
    if fails:
        calls: list[Tensor] = []

        def fail_behind_the_blocks(_module: nn.Module, args: tuple[Tensor]) -> None:
            torch.rand(3)
            calls.append(args[0])
            if len(calls) == 3:  # in the first pass without blocks
                raise ZeroDivisionError

        handle = model.head.register_forward_pre_hook(fail_behind_the_blocks)
        before = whole_state(model)
        with pytest.raises(ZeroDivisionError):
            explain(model, random_images(2), ["legrad"])
        assert_same(before, whole_state(model))
        handle.remove()
    else:
        explain(model, random_images(2), ["legrad", Chefer()], batch_size=1)
        assert_same(before, whole_state(model))


def test_blocks_that_are_no_modules_are_refused() -> None:
    vit_pytorch = pytest.importorskip("vit_pytorch")
    model = vit_pytorch.ViT(
        image_size=32, patch_size=8, num_classes=5, dim=48, depth=3, heads=3, mlp_dim=96, dim_head=16
    ).eval()
    assert "chefer" in explain(model, random_images(1), ["chefer"]).maps
    with pytest.raises(ValueError, match=r"one after another.*Leave out the methods that need .*such as LeGrad"):
        explain(model, random_images(1), ["legrad"])
