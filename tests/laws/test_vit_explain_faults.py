"""The known faults of the vit-explain project, each with a test that would have caught it here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.modules import module as module_hooks

from tests import oracle
from tests.models import FAMILIES, random_images, tiny_vit
from vit_explain_callback import AttentionRollout, GradientRollout, explain


def oracle_map(found: oracle.Matrices, gradients: list[Tensor], image: int = 0) -> Tensor:
    start = torch.eye(17, dtype=torch.float64)[0]
    attentions = [attention[image] for attention in found.attentions]
    return oracle.rollout(attentions, [gradient[image] for gradient in gradients], start)[1:].reshape(4, 4)


def test_1_gradients_belong_to_their_own_block() -> None:
    model, images = tiny_vit().double(), random_images(1)
    found = oracle.matrices(model, images)
    ours = explain(model, images).maps["grad_rollout"][0]
    torch.testing.assert_close(ours, oracle_map(found, found.gradients), rtol=1e-9, atol=1e-12)
    reversed_order = oracle_map(found, found.gradients[::-1])
    assert not torch.allclose(ours, reversed_order, rtol=1e-2)


def test_2_the_gradient_is_of_the_probabilities_and_not_of_the_scores() -> None:
    model, images = tiny_vit().double(), random_images(1)
    found = oracle.matrices(model, images)
    ours = explain(model, images).maps["grad_rollout"][0]
    assert not torch.allclose(ours, oracle_map(found, found.score_gradients), rtol=1e-2)


def test_3_rows_are_normalised_whatever_the_batch_size() -> None:
    """Without `keepdim`, a batch as large as the number of tokens was silently wrong, and other sizes raised."""
    model, images = tiny_vit().double(), random_images(17)
    together = explain(model, images, [AttentionRollout("max")]).maps["rollout_max"]
    alone = torch.cat([explain(model, image[None], [AttentionRollout("max")]).maps["rollout_max"] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_4_every_image_has_its_own_discarding_and_its_own_map() -> None:
    model, images = tiny_vit().double(), random_images(3)
    method = AttentionRollout(discard_ratio=0.9)
    maps = explain(model, images, [method]).maps[method.name]
    assert maps.shape == (3, 4, 4)
    for image in range(3):
        torch.testing.assert_close(
            maps[image], explain(model, images[image : image + 1], [method]).maps[method.name][0]
        )


def test_5_the_fused_kernel_needs_no_switching_off() -> None:
    model = tiny_vit()
    assert all(block.attn.fused_attn for block in model.blocks)
    assert explain(model, random_images(1), ["rollout"]).maps["rollout"].isfinite().all()


def test_6_nothing_is_carried_from_one_call_into_the_next() -> None:
    model, images = tiny_vit(), random_images(2)
    alone = explain(model, images[1:]).maps["grad_rollout"]
    explain(model, images[:1])
    assert explain(model, images[1:]).maps["grad_rollout"].equal(alone)


def test_7_no_hook_stays_behind() -> None:
    model = tiny_vit()
    explain(model, random_images(1))
    explain(model, random_images(1))
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks


def test_8_training_gradients_are_neither_erased_nor_added_to() -> None:
    model = tiny_vit()
    model(random_images(2)).square().sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    explanation = explain(model, random_images(1))
    assert all(parameter.grad.equal(before[name]) for name, parameter in model.named_parameters())
    assert not explanation.maps["grad_rollout"].requires_grad
    assert not explanation.logits.requires_grad


def test_9_fusion_and_discarding_are_options_of_both_methods() -> None:
    methods = [
        AttentionRollout(head_fusion="max", discard_ratio=0.9),
        GradientRollout(head_fusion="max", discard_ratio=0.9),
    ]
    assert set(explain(tiny_vit(), random_images(1), methods).maps) == {"rollout_max_0.9", "grad_rollout_max_0.9"}


def test_10_a_misspelt_fusion_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="`head_fusion` to be one of mean, max, min, but got 'avg'"):
        AttentionRollout(head_fusion="avg")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vit_wide", "dinov2_registers", "registers_gap", "vit_map"])
def test_11_grids_need_not_be_square_nor_tokens_one_class_and_patches(name: str) -> None:
    family = FAMILIES[name]
    maps = explain(family.create(), random_images(2, family.image_size)).maps
    assert {tuple(value.shape) for value in maps.values()} == {(2, *family.grid)}


def test_12_a_frozen_backbone_has_gradient_maps_too() -> None:
    model, images = tiny_vit(), random_images(1)
    expected = explain(model, images).maps["grad_rollout"]
    model.requires_grad_(False)
    torch.testing.assert_close(explain(model, images).maps["grad_rollout"], expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_13_targets_may_lie_anywhere_and_bfloat16_maps_become_numpy() -> None:
    """The class mask was built on the CPU, which broke CUDA; bfloat16 maps broke `.numpy()`."""
    model, images = tiny_vit().bfloat16(), random_images(2).double()
    maps = explain(model, images, target=torch.tensor([1, 2], dtype=torch.int16)).maps
    assert maps["grad_rollout"].numpy().shape == (2, 4, 4)
