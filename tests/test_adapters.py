"""Explainers of other libraries, against these libraries themselves; each test needs its own to be installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer

from tests.bits import differing
from tests.models import CLASSES, random_images, tiny_vit
from tests.other_models import tiny_resnet, tiny_swin
from tests.runs import Classifier, fit
from vit_explain_callback import MapFunction, ViTExplainCallback, adapters, explain, load_run
from vit_explain_callback.adapters import captum, pytorch_grad_cam, torch_cam, zennit

IMAGES = random_images(3, (64, 64))
TARGET = torch.tensor([0, 3, 4])


def tracked(method: MapFunction, model: nn.Module) -> Tensor:
    """The maps of a method, after which the model must be as it was."""
    before = {name: part.clone() for name, part in model.state_dict().items()}
    found = explain(model, IMAGES, [method], TARGET).maps[method.name]
    assert differing(before, model.state_dict()) == []
    assert all(part.grad is None and part.requires_grad for part in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return found


@pytest.mark.parametrize("kind", ["LayerGradCam", "IntegratedGradients", "Saliency"])
def test_captum(kind: str) -> None:
    attribution = getattr(pytest.importorskip("captum.attr"), kind)
    model = tiny_resnet()
    layer = "layer3" if kind == "LayerGradCam" else None
    options: dict[str, Any] = {"n_steps": 4} if kind == "IntegratedGradients" else {}
    method = captum(attribution, layer, **options)
    assert method.name == (f"{kind}_layer3" if layer else kind)
    found = tracked(method, model)
    own = attribution(model.eval(), *([model.layer3] if layer else []))
    expected = own.attribute(IMAGES.clone().requires_grad_(), target=TARGET, **options)
    assert found.shape == ((3, 4, 4) if layer else (3, 64, 64))
    assert found.equal(expected.detach().sum(dim=1))


def test_the_grad_cam_of_captum_equals_the_tracked_one_to_the_bit(tmp_path: Path) -> None:
    grad_cam = pytest.importorskip("captum.attr").LayerGradCam
    data: Any = [(image, index % CLASSES) for index, image in enumerate(random_images(8, (64, 64)))]
    module = Classifier(tiny_resnet())
    callback = ViTExplainCallback(
        [captum(grad_cam, "net.layer3", name="grad_cam")], images=next(iter(DataLoader(data, 8)))
    )
    trainer = fit(callback, tmp_path, module, DataLoader(data, 4), DataLoader(data, 4))
    assert isinstance(trainer, pl.Trainer)
    run = load_run(str(trainer.log_dir))
    images = torch.stack([image for image, _ in data])
    own = grad_cam(module.eval(), module.net.layer3).attribute(images, target=run.targets)
    assert run.steps[-1] == 4
    assert run.maps["grad_cam"][-1].equal(own.detach()[:, 0])
    assert not run.maps["grad_cam"][0].equal(own.detach()[:, 0])


def test_pytorch_grad_cam() -> None:
    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = tiny_resnet()
    found = tracked(pytorch_grad_cam(library.GradCAM, "layer3"), model)
    chosen = [targets.ClassifierOutputTarget(index) for index in TARGET.tolist()]
    with library.GradCAM(model=model.eval(), target_layers=[model.layer3]) as own:
        expected = own(input_tensor=IMAGES.clone(), targets=chosen)
    assert found.shape == (3, 64, 64)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_pytorch_grad_cam_with_a_reshape_transform() -> None:
    library = pytest.importorskip("pytorch_grad_cam")
    swin = pytorch_grad_cam(library.GradCAM, "layers.2", reshape_transform=channels_first)
    assert tracked(swin, tiny_swin()).isfinite().all()
    vit = pytorch_grad_cam(library.GradCAM, "blocks.1", reshape_transform=to_grid, name="grad_cam")
    found = explain(tiny_vit(), random_images(2), ["rollout", vit]).maps
    assert {name: tuple(maps.shape) for name, maps in found.items()} == {"rollout": (2, 4, 4), "grad_cam": (2, 32, 32)}
    torch.testing.assert_close(found["grad_cam"].amax(dim=(1, 2)), torch.ones(2))


@pytest.mark.parametrize("kind", ["GradCAM", "LayerCAM"])
def test_torch_cam(kind: str) -> None:
    cam = getattr(pytest.importorskip("torchcam.methods"), kind)
    model = tiny_resnet()
    found = tracked(torch_cam(cam, "layer3", name="cam"), model)
    with cam(model.eval(), target_layer=model.layer3) as own:
        expected = own(TARGET.tolist(), model(IMAGES.clone().requires_grad_()))[0]
    assert found.shape == (3, 4, 4)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_zennit() -> None:
    composites = pytest.importorskip("zennit.composites")
    attribution = pytest.importorskip("zennit.attribution")
    canonizers = pytest.importorskip("zennit.canonizers")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 16 * 16, CLASSES))

    def composite() -> Any:
        return composites.EpsilonPlusFlat(canonizers=[canonizers.SequentialMergeBatchNorm()])

    method = zennit(composite())
    assert method.name == "EpsilonPlusFlat"
    found = tracked(method, model)
    assert tracked(method, model).equal(found)
    with attribution.Gradient(model=model.eval(), composite=composite()) as own:
        _, expected = own(IMAGES.clone().requires_grad_(), torch.eye(CLASSES)[TARGET])
    assert found.shape == (3, 64, 64)
    torch.testing.assert_close(found, expected.sum(dim=1), rtol=1e-4, atol=1e-5)


def test_a_layer_is_a_path_and_never_a_module() -> None:
    model = tiny_resnet()
    for adapter in (captum, pytorch_grad_cam, torch_cam):
        with pytest.raises(
            TypeError, match=r"Expected `layer` to be a path such as .*, but got a Sequential: the model"
        ):
            adapter(dict, model.layer3)  # type: ignore[arg-type]
    assert "layer3" in dict(model.named_modules())  # the cure


def test_a_layer_that_is_not_there_and_one_of_tokens_are_said_in_a_sentence() -> None:
    grad_cam = pytest.importorskip("captum.attr").LayerGradCam
    with pytest.raises(RuntimeError, match=r"the function of `LayerGradCam_layer9` .* has no attribute `layer9`"):
        explain(tiny_resnet(), IMAGES, [captum(grad_cam, "layer9")])
    with pytest.raises(RuntimeError, match=r"a layer whose output is \(B, C, h, w\), but got \(2, 1, 48\)"):
        explain(tiny_vit(), random_images(2), [captum(grad_cam, "blocks.1")])


def tiny_convnext() -> Any:
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=CLASSES)


def torchvision_vit() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 64, "patch_size": 16, "hidden_dim": 48, "mlp_dim": 96}
    model = VisionTransformer(num_layers=2, num_heads=3, num_classes=CLASSES, **sizes)
    nn.init.normal_(model.heads.head.weight)
    return model


def to_grid(tokens: Tensor) -> Tensor:
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)


def channels_first(output: Tensor) -> Tensor:
    return output.movedim(-1, 1)


# Models of each column, with a layer that gives features.
MODELS: dict[str, list[tuple[Any, str]]] = {
    "CNN": [(tiny_resnet, "layer3"), (tiny_convnext, "stages.2")],
    "Swin": [(tiny_swin, "layers.2")],
    "ViT of timm": [(lambda: tiny_vit(img_size=64), "blocks.1")],
    "ViT of torchvision": [(torchvision_vit, "encoder.layers.encoder_layer_0")],
}
LIBRARIES = {"captum": "captum.attr", "pytorch-grad-cam": "pytorch_grad_cam", "torch-cam": "torchcam.methods"}
ROWS = re.findall(r"^\| ([\w-]+) `(\w+)` \| (.*) \|$", adapters.__doc__ or "", flags=re.MULTILINE)


def method_of(library: str, kind: str, column: str, layer: str, reshape: bool) -> MapFunction:
    """The method of a row, without options but for what "reshape" stands for."""
    found = getattr(pytest.importorskip(LIBRARIES.get(library, "zennit.composites")), kind)
    if library == "zennit":
        return zennit(found())
    if library == "torch-cam":
        return torch_cam(found, layer)
    if library == "captum":
        return captum(found, layer if kind.startswith("Layer") else None)
    if not reshape:
        return pytorch_grad_cam(found, layer)
    return pytorch_grad_cam(found, layer, reshape_transform=channels_first if column == "Swin" else to_grid)


@pytest.mark.parametrize("column", MODELS)
@pytest.mark.parametrize(("library", "kind", "cells"), ROWS, ids=[" ".join(row[:2]) for row in ROWS])
def test_the_table_of_the_docstring(library: str, kind: str, cells: str, column: str) -> None:
    cell = dict(zip(MODELS, cells.split(" | "), strict=True))[column]
    for make, layer in MODELS[column]:
        model = make()
        if cell != "yes":  # as it is, it is refused
            with pytest.raises(RuntimeError, match="Expected the function of"):
                explain(model, IMAGES, [method_of(library, kind, column, layer, reshape=False)], TARGET)
        if cell != "no":
            found = tracked(method_of(library, kind, column, layer, reshape=cell == "reshape"), model)
            assert found.isfinite().all()
            assert (found.amax(dim=(1, 2)) > found.amin(dim=(1, 2))).all()
            assert found.shape[1:] in ((4, 4), (8, 8), (64, 64))


def test_the_table_has_every_adapter() -> None:
    assert {library for library, *_ in ROWS} == {*LIBRARIES, "zennit"}
    assert len(ROWS) == 9


def test_channels_that_come_last_are_no_columns() -> None:
    grad_cam = pytest.importorskip("captum.attr").LayerGradCam
    with pytest.raises(RuntimeError, match=r"but got 4 × 64 cells of images of 64 × 64 pixels, as where channels come"):
        explain(tiny_swin(), IMAGES, [captum(grad_cam, "layers.2")], TARGET)
    wide = explain(tiny_resnet(), random_images(2, (72, 130)), [captum(grad_cam, "layer3")]).maps
    assert wide["LayerGradCam_layer3"].shape == (2, 5, 9)  # strides do not divide the sides
