"""A fast slice of the sweep over timm's names: one for each mechanism, and one refusal for each refused family."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.coverage_sweep import REFUSED_FAMILIES, names_of, try_name
from vit_explain_callback import explain

MECHANISMS = {
    "vit_tiny_patch16_224": "class token",
    "vit_base_patch32_clip_224": "norm before the blocks",
    "vit_small_patch14_reg4_dinov2": "register tokens, layer scale",
    "vit_medium_patch16_gap_240": "mean pooling without a class token",
    "vit_medium_patch16_reg4_gap_256": "mean pooling with register tokens",
    "vit_little_patch16_reg1_gap_256": "query and key norms",
    "vit_base_patch16_siglip_224": "attention pooling",
    "vit_base_patch16_siglip_gap_224": "mean pooling after an attention-pooled pretraining",
    "vit_base_patch16_xp_224": "parallel scaling blocks",
    "vit_small_resnet26d_224": "hybrid, convolutional stem",
    "vit_base_r50_s16_224": "hybrid, ResNet v2",
    "vit_base_mci_224": "hybrid, class token and MobileCLIP stem",
    "vit_relpos_small_patch16_224": "relative position bias",
    "vit_relpos_base_patch16_clsgap_224": "relative position bias, class token left out of the mean",
    "vit_srelpos_small_patch16_224": "shared relative position bias",
    "vit_relpos_base_patch16_cls_224": "relative position bias with a class token",
    "deit_tiny_distilled_patch16_224": "distillation token",
    "deit3_small_patch16_224": "class token without position",
    "beit_base_patch16_224": "bias as mask",
    "beitv2_base_patch16_224": "bias as mask, class token",
    "eva_giant_patch14_clip_224": "EVA without rotary embedding",
    "eva02_tiny_patch14_224": "rotary embedding",
    "vit_pe_core_tiny_patch16_384": "Perception Encoder, attention pooling",
    "vit_small_patch16_dinov3": "DINOv3",
    "vit_5b_patch16_sapiens2": "grouped queries",
    "naflexvit_base_patch16_gap": "NaFlex, mean pooling",
    "naflexvit_base_patch16_map": "NaFlex, attention pooling",
    "naflexvit_base_patch16_radio_v3": "NaFlex, class token among eight prefix tokens",
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_timm_name_of_each_mechanism_equals_the_oracle(name: str) -> None:
    result = try_name(name)
    assert result["outcome"] == "correct", result["said"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cait_xxs24_224", "the softmax in `blocks.0.attn` of Cait to be multiplied with the values as it is"),
        ("convit_tiny", "the softmax in `blocks.0.attn` of ConVit to be multiplied with the values as it is"),
        ("tnt_s_patch16_224", "found TNT, which is not a stack of blocks that all attend over one set"),
        (
            "vit_small_patch16_18x2_224",
            "one attention operation in `blocks.0.attns` of VisionTransformer, but captured 2",
        ),
        ("vit_dwee_patch16_reg1_gap_256", "one attention operation in `blocks.0` of VisionTransformer, but captured 2"),
    ],
)
def test_attention_that_is_no_single_matrix_is_refused(name: str, reason: str) -> None:
    result = try_name(name)
    assert result["outcome"] == "refused"
    assert reason in result["said"]


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_without_global_attention_is_refused_before_it_runs(family: str) -> None:
    name = names_of((family,))[0]
    model = timm.create_model(name, num_classes=3)
    with pytest.raises(
        ValueError, match="is not a stack of blocks that all attend over one set of patch tokens"
    ) as error:
        explain(model, torch.zeros(1, 3, 8, 8))
    assert f"found {type(model).__name__}" in str(error.value)


def test_every_prefix_and_size_that_timm_allows_at_run_time() -> None:
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", depth=2, embed_dim=48, num_heads=3, dynamic_img_size=True, num_classes=3
    )
    for size, grid in (((28, 56), (2, 4)), ((70, 28), (5, 2)), ((42, 42), (3, 3))):
        maps = explain(model, torch.randn(2, 3, *size)).maps
        assert {tuple(value.shape[1:]) for value in maps.values()} == {grid}


def test_patch_dropout_is_off() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, patch_drop_rate=0.5, num_classes=3).train()
    images = torch.randn(2, 3, 64, 64)
    first, second = explain(model, images), explain(model, images)
    assert first.maps["grad_rollout"].shape == (2, 4, 4)
    assert first.maps["grad_rollout"].equal(second.maps["grad_rollout"])
