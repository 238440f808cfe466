"""Models that are not timm's: Hugging Face, torchvision and plain PyTorch, whose layout is found by experiment."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests import oracle
from tests.models import CLASSES, random_images, randomised, tiny_vit
from tests.optional import optional
from vit_explain_callback import AttentionRollout, GradientRollout, explain

peft, transformers, vit_pytorch = map(optional, ("peft", "transformers", "vit_pytorch"))

METHODS = [AttentionRollout(), AttentionRollout("max", 0.5), GradientRollout(), GradientRollout("max", 0.5, 2)]
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}

CLASS, PATCHES = {0: 1.0}, {"patches": 1.0}
HUGGING_FACE: dict[str, tuple[int, dict[Any, float]]] = {  # name: prefix tokens, what the classifier reads
    "ViT": (1, CLASS),
    "DeiT": (2, CLASS),
    "Dinov2": (1, {0: 0.5, "patches": 0.5}),
    "Dinov2WithRegisters": (5, {0: 0.5, "patches": 0.5}),
    "Beit": (1, PATCHES),
    "Siglip": (0, PATCHES),
    "CLIP": (1, PATCHES),
    "DINOv3ViT": (3, CLASS),
}


def hugging_face(name: str, attention: str, **options: Any) -> Any:
    configuration = getattr(transformers, f"{name}Config")
    if name in ("Siglip", "CLIP"):
        config = configuration(vision_config=SMALL, text_config={}, num_labels=CLASSES)
    else:
        config = configuration(**SMALL, num_labels=CLASSES, **options)
    config._attn_implementation = attention
    if name == "DINOv3ViT":
        config.num_register_tokens = 2
        return randomised(WithHead(transformers.DINOv3ViTModel(config)), seed=0).eval()
    return randomised(getattr(transformers, f"{name}ForImageClassification")(config), seed=0).eval()


class WithHead(nn.Module):
    """A classifier on a Hugging Face backbone's class token."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).pooler_output)


class Plain(nn.Module):
    """A ViT as people write it: class token at either end, any order of the dimensions, any pooling."""

    def __init__(self, pooling: str = "first", batch_first: bool = True, weights: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 48))
        self.positions = nn.Parameter(torch.zeros(1, 25, 48))
        layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(48, CLASSES)
        self.pooling, self.batch_first = pooling, batch_first

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(images), -1, -1)
        order = [patches, class_token] if self.pooling == "last" else [class_token, patches]
        tokens = torch.cat(order, dim=1) + self.positions
        tokens = self.encoder(tokens if self.batch_first else tokens.transpose(0, 1))
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        pooled = {
            "first": lambda: tokens[:, 0],
            "last": lambda: tokens[:, -1],
            "mean": lambda: tokens.mean(dim=1),
            "max": lambda: tokens.amax(dim=1),
            "weighted": lambda: (tokens * tokens[..., :1].softmax(dim=1)).sum(dim=1),
            "some": lambda: tokens[:, 3:7].mean(dim=1),
        }[self.pooling]()
        return self.head(pooled)


def check(
    model: Any,
    images: Tensor,
    grid: tuple[int, int],
    first: int,
    readout: dict[Any, float],
    class_token: int | None = None,
) -> None:
    """Maps of `model` against the oracle, told by the test what the tokens are."""
    model = model.double()
    explanation = explain(model, images, METHODS)
    found = oracle.matrices(Logits(model), images)
    tokens, patches = found.attentions[0].shape[-1], slice(first, first + grid[0] * grid[1])
    start = torch.zeros(tokens, dtype=torch.float64)
    for key, weight in readout.items():
        rows = patches if key == "patches" else slice(0, tokens) if key == "all" else slice(key, key + 1)
        start[rows] += weight / len(start[rows])
    class_token = next((key for key in readout if isinstance(key, int)), class_token)
    for method in METHODS:
        for image in range(len(images)):
            blocks = [a[image] for a in found.attentions[:3]]
            gradients = [g[image] for g in found.gradients[:3]] if isinstance(method, GradientRollout) else None
            options = (method.head_fusion, method.discard_ratio, method.start_block, class_token)
            expected = oracle.rollout(blocks, gradients, start, *options)[patches].reshape(grid)
            torch.testing.assert_close(explanation.maps[method.name][image], expected, rtol=1e-9, atol=1e-12)


class Logits(nn.Module):
    """A model that returns the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return getattr(output, "logits", output)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_equal_the_oracle_and_both_attentions_agree(name: str) -> None:
    prefix, readout = HUGGING_FACE[name]
    model, images = hugging_face(name, "sdpa"), random_images(2)
    check(model, images, (4, 4), prefix, readout)
    fused = explain(model.double(), images, METHODS)
    eager = explain(hugging_face(name, "eager").double(), images, METHODS)
    for key, maps in fused.maps.items():
        # Some of the eager ones take their softmax in float32, whatever the model's dtype.
        torch.testing.assert_close(eager.maps[key].double(), maps, rtol=1e-4, atol=1e-6)


def test_a_timm_model_wrapped_by_hugging_face() -> None:
    options: dict[str, Any] = {"architecture": "vit_tiny_patch16_224", "num_labels": CLASSES}
    config = transformers.TimmWrapperConfig(**options, model_args={"img_size": 32, "depth": 2})
    model = transformers.TimmWrapperForImageClassification(config).eval()
    images = random_images(2)
    for key, maps in explain(model, images).maps.items():
        torch.testing.assert_close(maps, explain(model.timm_model, images).maps[key])


def test_torchvision() -> None:
    options = {"num_layers": 3, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96, "num_classes": CLASSES}
    model = torchvision.models.VisionTransformer(image_size=32, patch_size=8, **options)
    check(randomised(model, seed=0), random_images(2), (4, 4), 1, CLASS)


@pytest.mark.parametrize(
    ("pooling", "first", "readout"),
    [("first", 1, {0: 1.0}), ("last", 0, {24: 1.0}), ("mean", 1, {"all": 1.0})],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_plain_pytorch(pooling: str, first: int, readout: dict[Any, float], batch_first: bool) -> None:
    model = randomised(Plain(pooling, batch_first), seed=0)
    check(model, random_images(2, (32, 48)), (4, 6), first, readout)


@pytest.mark.parametrize("pooling", ["max", "weighted", "some"])
def test_a_readout_that_cannot_be_told_is_refused(pooling: str) -> None:
    with pytest.raises(ValueError, match="no row of the rollout stands for its prediction"):
        explain(randomised(Plain(pooling), seed=0), random_images(2, (32, 48)))


@pytest.mark.parametrize(("kind", "pooling"), [("ViT", "cls"), ("ViT", "mean"), ("SimpleViT", "mean")])
def test_lucidrains(kind: str, pooling: str) -> None:
    """Softmax by hand, blocks that are lists, patches by reshaping; the oracle reads its attention from `attend`."""
    options: dict[str, Any] = {"dim": 48, "depth": 3, "heads": 3, "mlp_dim": 96, "dim_head": 16, "num_classes": CLASSES}
    if kind == "ViT":
        options["pool"] = pooling
    model = getattr(vit_pytorch, kind)(image_size=(24, 32), patch_size=8, **options)
    model, images = randomised(model, seed=0).double().eval(), random_images(2, (24, 32)).double()
    seen: list[Tensor] = []
    transformer: Any = model.transformer
    for attention, _ in transformer.layers:
        attention.attend.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(images)
    prefix = seen[0].shape[-1] - 12
    start = torch.zeros(seen[0].shape[-1], dtype=torch.float64)
    if pooling == "cls":
        start[0] = 1
    else:
        start[:] = 1 / len(start)
    for method in (AttentionRollout(), AttentionRollout("max", 0.5)):
        maps = explain(model, images, [method]).maps[method.name]
        class_token = 0 if pooling == "cls" else None
        for image in range(2):
            blocks = [attention[image] for attention in seen[:3]]
            row = oracle.rollout(blocks, None, start, method.head_fusion, method.discard_ratio, 1, class_token)
            torch.testing.assert_close(maps[image], row[prefix:].reshape(3, 4), rtol=1e-9, atol=1e-12)


def test_low_rank_adapters_and_parametrized_weights() -> None:
    model, images = tiny_vit(), random_images(2)
    expected = explain(model, images)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["qkv"]))
    normed = copy.deepcopy(model)
    for block in normed.blocks:
        nn.utils.parametrizations.weight_norm(block.attn.qkv)
    for other in (adapted, normed):
        for key, maps in explain(other, images).maps.items():
            torch.testing.assert_close(maps, expected.maps[key], rtol=1e-4, atol=1e-6)


def test_a_model_wrapped_for_data_parallel_training(tmp_path: Path) -> None:
    model, images = tiny_vit(), random_images(2)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for key, maps in explain(wrapped, images).maps.items():
            torch.testing.assert_close(maps, explain(model, images).maps[key])
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_forward_that_takes_and_returns_more() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()

        def forward(self, images: Tensor, boxes: Tensor) -> dict[str, Tensor]:
            return {"class": self.vit(images), "boxes": boxes}

    model, images = Detector(), random_images(2)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        explain(model, images)
    maps = explain(model, images, forward=lambda model, images: model(images, images)["class"]).maps
    for key, value in explain(model.vit, images).maps.items():
        torch.testing.assert_close(maps[key], value)


class OwnHead(nn.Module):
    """A head of one's own on a timm backbone, whatever the backbone's own pooling."""

    def __init__(self, read: Any, **options: Any) -> None:
        super().__init__()
        self.backbone = tiny_vit(num_classes=0, **options)
        self.read = read
        self.head = randomised(nn.Linear(48, CLASSES), seed=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.read(self.backbone, images))


@pytest.mark.parametrize(
    ("read", "options", "readout"),
    [
        (lambda vit, images: vit(images), {}, CLASS),
        (lambda vit, images: vit.forward_features(images)[:, 0], {"global_pool": "avg"}, CLASS),
        (lambda vit, images: vit(images)[:, 0], {"global_pool": ""}, CLASS),
        (lambda vit, images: vit.forward_features(images)[:, 1:].mean(dim=1), {}, PATCHES),
        (lambda vit, images: vit.forward_features(images).mean(dim=1), {"global_pool": "avg"}, {"all": 1.0}),
    ],
)
def test_a_head_of_ones_own_is_believed_before_timm(read: Any, options: Any, readout: dict[Any, float]) -> None:
    check(OwnHead(read, **options), random_images(2), (4, 4), 1, readout, class_token=0)


def test_a_frozen_backbone_under_no_grad() -> None:
    def without_gradients(vit: nn.Module, images: Tensor) -> Any:
        with torch.no_grad():
            return vit(images)

    images = random_images(2)
    plain = explain(OwnHead(lambda vit, images: vit(images)), images)
    frozen = explain(OwnHead(without_gradients), images)
    assert torch.is_grad_enabled()
    for key, maps in plain.maps.items():
        torch.testing.assert_close(frozen.maps[key], maps)
    detached = OwnHead(lambda vit, images: vit(images).detach())
    with pytest.raises(ValueError, match=r"`blocks.0.attn`, but its output is cut off from the logits"):
        explain(detached, images)
    torch.testing.assert_close(explain(detached, images, ["rollout"]).maps["rollout"], plain.maps["rollout"])


def test_one_logit_counts_as_two_classes() -> None:
    model, images = tiny_vit(num_classes=1), random_images(3)
    explanation = explain(model, images)
    with torch.no_grad():
        logit = model(images)[:, 0]
    torch.testing.assert_close(explanation.logits.softmax(dim=1)[:, 1], logit.sigmoid())
    assert explanation.target.equal((logit > 0).long())
    double = copy.deepcopy(model).double()
    found = oracle.matrices(Scaled(double), images)
    start = torch.eye(17, dtype=torch.float64)[0]
    maps = explain(double, images, ["grad_rollout"], target=1).maps["grad_rollout"]
    expected = oracle.rollout([a[0] for a in found.attentions], [g[0] for g in found.gradients], start)
    torch.testing.assert_close(maps[0], expected[1:].reshape(4, 4), rtol=1e-9, atol=1e-12)


class Scaled(nn.Module):
    """One logit z as z / 2."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) / 2


class Shuffled(Plain):
    """Patches in columns instead of rows: the grid cannot be told."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.transpose(2, 3))


def test_what_cannot_be_told_can_be_stated() -> None:
    model, images = randomised(Shuffled(), seed=0), random_images(2, (32, 48))
    with pytest.raises(ValueError, match=r"the grid cannot be told. State it: `prefix_tokens=`, `grid_size=`"):
        explain(model, images)
    stated = explain(model, images, grid_size=(6, 4))
    assert stated.maps["rollout"].shape == (2, 6, 4)
    told = explain(randomised(Plain(), seed=0), images.transpose(2, 3))
    torch.testing.assert_close(stated.maps["rollout"], told.maps["rollout"])
    square = explain(tiny_vit(), random_images(2), prefix_tokens=1)
    torch.testing.assert_close(square.maps["rollout"], explain(tiny_vit(), random_images(2)).maps["rollout"])
    for wrong, message in (
        ({"prefix_tokens": 3}, "22 patches in a grid of the image's proportions"),
        ({"grid_size": (3, 4), "prefix_tokens": 1}, "1 \\+ 3x4 do not"),
        ({"grid_size": (9, 9)}, "-56 \\+ 9x9 do not"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, images, **wrong)  # type: ignore[arg-type]


def test_a_compiled_model_gives_the_same_maps() -> None:
    model, images = tiny_vit(), random_images(2)
    expected = explain(model, images)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(images)
    for key, maps in explain(compiled, images).maps.items():
        torch.testing.assert_close(maps, expected.maps[key])
    model.compile(backend="eager")
    model(images)
    for key, maps in explain(model, images).maps.items():
        torch.testing.assert_close(maps, expected.maps[key])


def test_models_without_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected attention among the tokens of an image in ResNet, but saw none"):
        explain(torchvision.models.resnet18(num_classes=3), random_images(1, (64, 64)))
    with pytest.raises(ValueError, match="windowed, hierarchical and convolutional"):
        explain(torchvision.models.swin_t(num_classes=3), random_images(1, (64, 64)))


class Around(nn.Module):
    """A ViT of timm's and a head; asked for what it does not have, it asks the ViT, as wrappers for LoRA do."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.vit, self.head = tiny_vit(), head

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("vit"), name)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.vit(images))
        return logits


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_part_that_is_scripted_changes_nothing() -> None:
    head, images = nn.Sequential(nn.Linear(CLASSES, 4), nn.Tanh()), random_images(2)
    plain, scripted = explain(Around(head), images), explain(Around(torch.jit.script(head)), images)
    assert plain.maps.keys() == scripted.maps.keys()
    for name, maps in plain.maps.items():
        torch.testing.assert_close(scripted.maps[name], maps, rtol=1e-5, atol=1e-7)
