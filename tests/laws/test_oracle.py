"""`explain` against the naive float64 oracle, and what it promises about batches, targets and the model's state."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode as current_mode

from tests import oracle
from tests.models import CLASSES, FAMILIES, Family, random_images, tiny_vit
from vit_explain_callback import AttentionRollout, GradientRollout, explain
from vit_explain_callback.methods import engine as fold
from vit_explain_callback.methods.engine import CHUNK_ENTRIES

VARIANTS = [
    kind(fusion, ratio, start)
    for kind in (AttentionRollout, GradientRollout)
    for fusion in ("mean", "max", "min")
    for ratio in (0.0, 0.5, 0.9)
    for start in (1, 2)
]


def expected_maps(family: Family, found: oracle.Matrices, method: Any) -> Tensor:
    maps = []
    gradients_wanted = isinstance(method, GradientRollout)
    for image in range(len(found.logits)):
        attentions = [attention[image] for attention in found.attentions]
        gradients = [gradient[image] for gradient in found.gradients] if gradients_wanted else None
        if family.readout == "pool":
            last = oracle.fused_matrix(attentions.pop(), gradients.pop() if gradients else None, method.head_fusion)
            start = last.mean(dim=0)
            start = torch.cat([torch.zeros(family.tokens - len(start)), start / start.sum()])
        else:
            start = family.start_row()
        options = (method.head_fusion, method.discard_ratio, method.start_block, family.class_token)
        row = oracle.rollout(attentions, gradients, start.double(), *options)
        maps.append(row[family.prefix :].reshape(family.grid))
    return torch.stack(maps)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_equal_the_oracle_in_both_precisions(name: str, device: str) -> None:
    family = FAMILIES[name]
    model, images = family.create(), random_images(2, family.image_size)
    found = oracle.matrices(model, images)
    model.to(device)
    single = explain(model, images, VARIANTS).cpu()
    double = explain(copy.deepcopy(model).double(), images, VARIANTS).cpu()
    torch.testing.assert_close(single.logits.double(), found.logits, rtol=1e-4, atol=1e-4)
    for method in VARIANTS:
        expected = expected_maps(family, found, method)
        if not expected.isfinite().all():  # a pool whose fused attention is all zero has no row to start from
            assert single.maps[method.name].isfinite().equal(expected.isfinite())
            continue
        assert single.maps[method.name].dtype == torch.float32
        assert double.maps[method.name].dtype == torch.float64
        assert relative_error(single.maps[method.name], expected) < 1e-4, method.name
        assert relative_error(double.maps[method.name], expected) < 1e-9, method.name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hand_written_softmax_gives_the_maps_of_the_fused_kernel(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.create().double(), random_images(2, family.image_size)
    fused = explain(model, images, VARIANTS)
    switched = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in switched:
        module.fused_attn = False
    by_hand = explain(model, images, VARIANTS)
    assert len(switched) >= 3
    for key, maps in fused.maps.items():
        torch.testing.assert_close(by_hand.maps[key], maps, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_batch_equals_its_images_one_by_one(batch_size: int) -> None:
    model, images = tiny_vit().double(), random_images(5)
    target = torch.tensor([3, 0, 1, 4, 2])
    together = explain(model, images, VARIANTS, target, batch_size=batch_size)
    for image in range(5):
        alone = explain(model, images[image : image + 1], VARIANTS, target[image : image + 1])
        for key, maps in alone.maps.items():
            torch.testing.assert_close(together.maps[key][image], maps[0], rtol=1e-9, atol=1e-12)


def test_chunks_of_images_heads_and_queries_do_not_change_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit().double(), random_images(3)
    whole = explain(model, images, VARIANTS)
    assert CHUNK_ENTRIES > 3 * 3 * 17 * 17
    # A row, five rows, one head, two heads, one image at a time.
    for entries in (1, 5 * 17, 17 * 17, 2 * 17 * 17, 4 * 17 * 17):
        monkeypatch.setattr("vit_explain_callback.methods.engine.CHUNK_ENTRIES", entries)
        monkeypatch.setattr("vit_explain_callback.methods.engine.HEAD_ENTRIES", entries)
        for key, maps in explain(model, images, VARIANTS).maps.items():
            torch.testing.assert_close(maps, whole.maps[key], rtol=1e-12, atol=0)


def test_permuting_the_patches_permutes_the_map() -> None:
    """Shuffle patch tokens behind the position embedding: attention, and so the map, must be shuffled alike."""
    model, images = tiny_vit().double(), random_images(2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    plain = explain(model, images, VARIANTS, 1)

    class Shuffle(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1)

    model.norm_pre = Shuffle()
    shuffled = explain(model, images, VARIANTS, 1)
    for key, maps in plain.maps.items():
        torch.testing.assert_close(shuffled.maps[key].flatten(1), maps.flatten(1)[:, order], rtol=1e-9, atol=1e-12)


def test_with_one_head_every_fusion_is_the_same() -> None:
    model, images = tiny_vit(num_heads=1).double(), random_images(2)
    for kind in (AttentionRollout, GradientRollout):
        maps = list(explain(model, images, [kind(fusion, 0.5) for fusion in ("mean", "max", "min")]).maps.values())
        torch.testing.assert_close(maps[0], maps[1], rtol=1e-12, atol=0)
        torch.testing.assert_close(maps[0], maps[2], rtol=1e-12, atol=0)


def test_targets() -> None:
    model, images = tiny_vit(), random_images(3)
    predicted = explain(model, images)
    assert predicted.target.equal(predicted.logits.argmax(dim=1))
    named = explain(model, images, target=predicted.target)
    assert named.maps["grad_rollout"].equal(predicted.maps["grad_rollout"])
    first = explain(model, images, target=2)
    assert first.target.tolist() == [2, 2, 2]
    assert first.maps["rollout"].equal(predicted.maps["rollout"])
    assert not first.maps["grad_rollout"].equal(explain(model, images, target=3).maps["grad_rollout"])


def test_one_forward_and_one_backward_serve_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit(), random_images(2)
    passes: list[str] = []
    forward = type(model).forward

    def counted_forward(*given: Any) -> Any:
        passes.append("forward")
        return forward(*given)

    monkeypatch.setattr(type(model), "forward", counted_forward)
    backward = torch.autograd.grad

    def counted(*args: Any, **rest: Any) -> Any:
        if current_mode() is None:  # type: ignore[no-untyped-call]  # else torch calls itself once more
            passes.append("backward")
        return backward(*args, **rest)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    explain(model, images, VARIANTS)
    assert passes == ["forward", "backward"]
    passes.clear()
    explain(model, images, ["rollout", "rollout_max"])
    assert passes == ["forward"]


class Deep(nn.Module):
    """A ViT inside another module, behind a frozen, batch-normalised head."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.backbone = vit
        self.head = nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Any:
        return self.head(self.backbone(images))


def mixed_state_model() -> Deep:
    """Some modules in training mode and some not, some parameters frozen, gradients from a step that is under way."""
    model = Deep(tiny_vit(drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.2)).train()
    vit: Any = model.backbone
    vit.blocks[1].eval()
    vit.patch_embed.requires_grad_(False)
    model(random_images(4, seed=9)).sum().backward()
    return model


def whole_state(model: nn.Module) -> dict[str, Any]:
    hooks = [
        (name, key, len(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks")
    ]
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "fused": {n: m.fused_attn for n, m in model.named_modules() if hasattr(m, "fused_attn")},
        "hooks": hooks,
        "global_hooks": (
            dict(torch.nn.modules.module._global_forward_hooks),
            dict(torch.nn.modules.module._global_forward_pre_hooks),
        ),
        "function": torch.nn.functional.scaled_dot_product_attention,
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "dtype": torch.get_default_dtype(),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state()),
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert before.equal(after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, tuple | list):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference", "autocast"])
def test_the_model_and_the_world_are_left_as_they_were(mode: str) -> None:
    model = mixed_state_model()
    around: Any = {
        "plain": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }[mode]
    with around:
        before = whole_state(model)
        explanation = explain(model, random_images(2), ["rollout", "grad_rollout"], batch_size=1)
        assert_same(before, whole_state(model))
    plain = explain(model, random_images(2), ["rollout", "grad_rollout"], batch_size=1)
    for key, maps in plain.maps.items():
        assert maps.dtype == torch.float32
        assert maps.equal(explanation.maps[key])


def test_an_error_inside_the_forward_leaves_everything_as_it_was() -> None:
    model = mixed_state_model()

    def fail(*_: Any) -> None:
        torch.rand(3)
        random.random()
        raise RuntimeError("out of luck")

    model.backbone.blocks[2].register_forward_hook(fail)
    before = whole_state(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        explain(model, random_images(2))
    assert_same(before, whole_state(model))


def test_a_careless_forward_is_caught_by_the_comparison() -> None:
    model = mixed_state_model()
    before = whole_state(model)
    model(random_images(2))  # dropout draws, batch norm updates
    with pytest.raises(AssertionError):
        assert_same(before, whole_state(model))


def test_gradient_checkpointing_and_a_frozen_backbone_give_the_same_maps() -> None:
    model, images = tiny_vit().double(), random_images(2)
    plain = explain(model, images, VARIANTS)
    model.requires_grad_(False)
    frozen = explain(model, images, VARIANTS)
    model.set_grad_checkpointing(True)
    checkpointed = explain(model, images, VARIANTS)
    for key, maps in plain.maps.items():
        torch.testing.assert_close(frozen.maps[key], maps, rtol=1e-12, atol=0)
        torch.testing.assert_close(checkpointed.maps[key], maps, rtol=1e-12, atol=0)


def test_a_bfloat16_model_gives_float32_maps_near_those_of_its_weights_in_float32() -> None:
    model, images = tiny_vit().bfloat16(), random_images(2)
    maps = explain(model, images).maps
    reference = explain(copy.deepcopy(model).float(), images).maps
    for key, value in maps.items():
        assert value.dtype == torch.float32
        assert relative_error(value, reference[key].double()) < 0.05
        assert value.numpy().dtype == np.float32


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 32, 40), ValueError, "Expected images of 32x32 pixels"),
        (torch.zeros(3, 32, 32), ValueError, r"shape \(B, C, H, W\)"),
        (torch.zeros(0, 3, 32, 32), ValueError, "B >= 1"),
        (torch.full((1, 3, 32, 32), float("nan")), ValueError, "NaN or Inf"),
        (torch.full((1, 3, 32, 32), 255.0), ValueError, "as of bytes"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8"),
        (torch.zeros(1, 1, 32, 32), ValueError, "3 channels"),
    ],
)
def test_wrong_images_are_refused(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explain(tiny_vit(), images)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": ["rolout"]}, ValueError, "`methods` to name `rollout`, `grad_rollout`, `flow`, .* or `legrad`"),
        ({"methods": []}, ValueError, "at least one method"),
        ({"methods": ["rollout", AttentionRollout()]}, ValueError, "each only once"),
        ({"methods": [3]}, TypeError, "got 3"),
        ({"methods": [AttentionRollout(start_block=4)]}, ValueError, r"`start_block` in 1 … 3 \(the model's blocks\)"),
        ({"target": 5}, ValueError, r"`target` classes in 0 … 4"),
        ({"target": torch.tensor([0, -1])}, ValueError, r"`target` classes in 0 … 4"),
        ({"target": torch.tensor([0, 1, 2])}, ValueError, r"`target` of shape \(2,\)"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, "an integer tensor"),
        ({"target": "dog"}, TypeError, "'dog'"),
        ({"batch_size": 0}, ValueError, "`batch_size` to be an integer of at least 1"),
        (
            {"vit": "head"},
            ValueError,
            "Expected `vit='head'` .* but nothing in Linear can attend",
        ),
        ({"vit": "nowhere"}, ValueError, "nowhere"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explain(tiny_vit(), random_images(2), **arguments)


def test_models_that_cannot_be_explained_are_refused_with_the_reason() -> None:
    images = random_images(2)

    class Outputs(nn.Module):
        def __init__(self, output: Any) -> None:
            super().__init__()
            self.vit = tiny_vit()
            self.output = output

        def forward(self, images: Tensor) -> Any:
            return self.output(self.vit(images))

    with pytest.raises(TypeError, match="tensor of logits"):
        explain(Outputs(lambda logits: [logits]), images)
    with pytest.raises(ValueError, match=r"logits of shape \(2, C\)"):
        explain(Outputs(lambda logits: logits[:, None]), images)
    with pytest.raises(ValueError, match=r"`blocks.0.attn`, but its output is cut off"):
        explain(Outputs(lambda logits: logits.detach()), images)
    with pytest.raises(ValueError, match="no classifier"):
        explain(tiny_vit(num_classes=0), images)
    assert "rollout" in explain(tiny_vit(num_classes=0), images, ["rollout"]).maps


def test_blocks_that_no_method_looks_at_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fused = fold._fused

    def counted(*args: Any) -> Any:
        seen.append(len(args[3]))
        return fused(*args)

    monkeypatch.setattr(fold, "_fused", counted)
    explain(tiny_vit(), random_images(1), ["rollout_from3", "rollout_max_from2"])
    assert seen == [2, 1]  # of three blocks


def test_targets_made_in_inference_mode_can_be_explained() -> None:
    model, images = tiny_vit(), random_images(2)
    plain = explain(model, images, target=torch.tensor([1, 2]))
    with torch.inference_mode():
        found = explain(model, images.clone(), target=torch.tensor([1, 2]))
    assert found.maps["grad_rollout"].equal(plain.maps["grad_rollout"])
