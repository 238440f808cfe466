"""Any function as a method: what it is given, what it may give, and what it must leave alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bits import differing
from tests.models import random_images, tiny_vit
from tests.other_models import grad_cam, saliency, tiny_resnet, tiny_swin
from vit_explain_callback import Explainer, MapFunction, explain, explain_targets
from vit_explain_callback.metrics.maps import pooled

Function = Callable[[nn.Module, Tensor, Tensor], Any]
IMAGES = random_images(3, (64, 64))


def naive_grad_cam(model: nn.Module, layer: str, image: Tensor, target: int) -> Tensor:
    """Grad-CAM of one image in float64, by finite differences of the logit along each channel."""
    model = model.double().eval()
    features: list[Tensor] = []

    def logit(shift: Tensor | None) -> Tensor:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            features.append(output.detach())
            return None if shift is None else output + shift

        handle = model.get_submodule(layer).register_forward_hook(hook)
        with torch.no_grad():
            found = model(image[None].double())[0, target]
        handle.remove()
        return found

    logit(None)
    (known,) = features[0]
    total = torch.zeros_like(known[0])
    for channel in range(len(known)):
        # The mean gradient of a channel is what the logit gains where all of its cells rise together, by cell.
        shift = torch.zeros_like(features[0])
        shift[:, channel] = 1e-6
        slope = (logit(shift) - logit(-shift)) / 2e-6 / known[channel].numel()
        total += slope * known[channel]
    return total.clamp(min=0)


def test_the_map_is_the_functions_own_and_the_model_any() -> None:
    model = tiny_resnet()
    found = explain(model, IMAGES, [grad_cam("layer3")], target=2)
    assert found.maps["grad_cam"].shape == (3, 4, 4)
    for image, relevance in zip(IMAGES, found.maps["grad_cam"], strict=True):
        expected = naive_grad_cam(tiny_resnet(), "layer3", image, 2)
        torch.testing.assert_close(relevance.double(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.logits, model.eval()(IMAGES))
    assert found.blocks is None
    assert found.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_each_map_keeps_its_grid_beside_the_built_in_methods() -> None:
    methods: list[str | MapFunction] = [
        MapFunction("saliency", saliency),
        "rollout",
        grad_cam("blocks.1.norm1", name="no_grid"),
    ]
    images = random_images(2)
    with pytest.raises(
        RuntimeError, match="Expected the function of `no_grid` to give maps of 2 images, but it raised"
    ):
        explain(tiny_vit(), images, methods)
    found = explain(tiny_vit(), images, methods[:2], block_statistics=True)
    assert [(name, *maps.shape[1:]) for name, maps in found.maps.items()] == [("saliency", 32, 32), ("rollout", 4, 4)]
    assert found.maps["rollout"].equal(explain(tiny_vit(), images, ["rollout"]).maps["rollout"])
    assert found.overlay("saliency").shape == (32, 32, 3)


def test_swin_has_no_rollout_but_a_map() -> None:
    with pytest.raises(ValueError, match="Expected SwinTransformer to hold a Vision Transformer"):
        explain(tiny_swin(), IMAGES, ["rollout", grad_cam("layers.2", True)])
    assert explain(tiny_swin(), IMAGES, [grad_cam("layers.2", True)]).maps["grad_cam"].shape == (3, 4, 4)


def test_targets_and_parts_of_a_batch_are_told_apart() -> None:
    given: list[list[int]] = []

    def noted(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        given.append(target.tolist())
        return saliency(model, images, target)

    model = tiny_resnet()
    targets: list[int | Tensor | None] = [torch.tensor([0, 1, 2]), 4]
    both = explain_targets(model, IMAGES, targets, methods=[MapFunction("s", noted)], batch_size=2)
    assert given == [[0, 1], [4, 4], [2], [4]]
    for target, found in zip(targets, both, strict=True):
        torch.testing.assert_close(
            found.maps["s"], explain(model, IMAGES, [MapFunction("s", saliency)], target).maps["s"]
        )
    given.clear()
    once = explain_targets(model, IMAGES, targets, methods=[MapFunction("s", noted, needs_target=False)])
    assert len(given) == 1
    assert once[0].maps["s"].equal(once[1].maps["s"])


def test_the_function_gets_the_logits_that_are_explained_and_the_users_own_names() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_resnet()

        def forward(self, images: Tensor) -> Output:
            return Output(self.net(images)[:, :1])

    kinds: list[str] = []

    def function(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        kinds.append(type(model).__name__)
        assert not model.training
        assert model.get_submodule("net.layer4") is not wrapped.net.layer4
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model(images).shape == (len(images), 2)  # one logit counts as two classes
        return saliency(model, images, target)

    wrapped = Wrapped()
    explain(wrapped, IMAGES, [MapFunction("s", function)])
    explain(wrapped, IMAGES, [MapFunction("s", function)], forward=lambda model, images: model(images).logits)
    assert kinds == ["Wrapped", "Wrapped"]


def test_what_a_function_does_to_its_copy_and_its_images_stays_there() -> None:
    def rude(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        found = saliency(model, images, target)
        model(images).sum().backward()
        model.train().requires_grad_()
        model(images)
        model.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            for part in [*model.parameters(), *model.buffers(), images]:
                part.zero_()
        return found

    model = tiny_resnet()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    images = IMAGES.clone()
    methods = [MapFunction("rude", rude), MapFunction("after", saliency)]
    found = explain(model, images, methods, batch_size=2)
    expected = explain(tiny_resnet(), IMAGES, [MapFunction("s", saliency)], batch_size=2).maps["s"]
    assert found.maps["after"].equal(expected)
    assert differing(before, model.state_dict()) == []
    assert images.equal(IMAGES)
    assert all(part.grad is None and part.requires_grad for part in model.parameters())


def used_from_outside(model: nn.Module, change: Callable[[nn.Module], object]) -> Function:
    def function(_: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        change(model)
        return torch.rand(len(images), 2, 2)

    return function


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "gradients": (lambda model: model(IMAGES).sum().backward(), "`conv1.weight.grad`, `bn1.weight.grad`, .* and more"),
    "hooks": (lambda model: model.layer4.register_forward_hook(lambda *_: None), "hooks on `layer4`"),
    "training": (lambda model: model.layer4.train(), "`layer4.training`"),
    "requires_grad": (lambda model: model.fc.weight.requires_grad_(False), "`fc.weight.requires_grad`"),
    "buffers": (lambda model: model.bn1.running_mean.add_(1), "the buffer `bn1.running_mean`"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_of_the_users_model_is_put_back_and_refused_by_name(change: str) -> None:
    model = tiny_resnet().eval()
    model(IMAGES).sum().backward()
    held = {name: (part.grad, part.grad.clone()) for name, part in model.named_parameters()}
    before = {name: part.clone() for name, part in model.state_dict().items()}
    act, named = CHANGES[change]
    with pytest.raises(
        RuntimeError, match=f"it changed {named}.*, which was put back. Use the model that the function is"
    ):
        explain(model, IMAGES, [MapFunction("mine", used_from_outside(model, act))])
    assert differing(before, model.state_dict()) == []
    assert not any(module.training or module._forward_hooks for module in model.modules())
    for name, part in model.named_parameters():
        assert part.grad is held[name][0], name
        assert part.grad.equal(held[name][1]), name
        assert part.requires_grad, name


def test_the_users_weights_cannot_be_written_to_from_a_function() -> None:
    model = tiny_resnet()
    before = {name: part.clone() for name, part in model.state_dict().items()}

    def step(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("fc.weight").zero_()

    explain(model, IMAGES, [MapFunction("mine", used_from_outside(model, step))])
    assert differing(before, model.state_dict()) == []


BAD: dict[str, tuple[Function, str]] = {
    "shape": (
        lambda model, images, target: torch.rand(3, 1, 2, 2),
        r"maps of shape \(3, h, w\), but got \(3, 1, 2, 2\)",
    ),
    "count": (lambda model, images, target: torch.rand(2, 2, 2), r"maps of shape \(3, h, w\), but got \(2, 2, 2\)"),
    "nothing": (lambda model, images, target: None, r"a floating-point tensor of \(B, h, w\), but it gave NoneType"),
    "integers": (lambda model, images, target: torch.ones(3, 2, 2).long(), "but it gave torch.int64"),
    "device": (lambda model, images, target: torch.rand(3, 2, 2, device="meta"), "on cpu.*, but they are on meta"),
    "error": (lambda model, images, target: model.get_submodule("layer9"), "maps of 3 images, but it raised Attrib"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_map_is_refused_by_name(bad: str) -> None:
    function, said = BAD[bad]
    with pytest.raises(RuntimeError, match=f"Expected the function of `mine` to give .*{said}"):
        explain(tiny_resnet(), IMAGES, [MapFunction("mine", function)])


def constant(maps: Tensor, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return maps


def test_half_precision_becomes_single_and_double_stays() -> None:
    for dtype, kept in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        function = MapFunction("mine", partial(constant, torch.rand(3, 2, 2).to(dtype)))
        assert explain(tiny_resnet(), IMAGES, [function]).maps["mine"].dtype == kept


def test_sampling_starts_at_the_same_place_each_time_and_moves_no_stream() -> None:
    sampled = MapFunction("mine", lambda model, images, target: torch.rand(3, 4, 4))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    explainer = Explainer(tiny_resnet(0), [sampled])
    torch.manual_seed(3)
    one, other = explainer(IMAGES).maps["mine"], explainer(IMAGES).maps["mine"]
    assert one.equal(other)
    assert torch.rand(4).equal(expected)


def test_a_gpu_that_is_not_in_use_yet_is_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What seeds it now would do so when it is first used, and then with our seed instead of the user's."""
    if torch.cuda.is_initialized():
        pytest.skip("needs a GPU that is not in use yet, or none")
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(3)
    explain(tiny_vit(), random_images(2), [MapFunction("noise", lambda _, images, __: torch.rand_like(images)[:, 0])])
    assert seeds == [3]


def test_what_cannot_be_asked_of_a_function_is_refused_before_it_runs() -> None:
    mine = MapFunction("mine", saliency)
    with pytest.raises(ValueError, match="Expected no `query` for `mine`"):
        explain(tiny_vit(), random_images(1), ["attention", mine], query=(0, 0))
    with pytest.raises(ValueError, match="Expected no `vit` or `grid_size` for mine alone"):
        explain(tiny_resnet(), IMAGES, [mine], vit="layer4", grid_size=(2, 2))
    with pytest.raises(ValueError, match=r"Expected a model that can be copied for `mine`, but .* is scripted"):
        explain(_scripted(), IMAGES, [mine])
    with pytest.raises(ValueError, match="Expected logits from ResNet, but it has no classifier"):
        explain(_headless(), IMAGES, [mine])
    for name in ("", "a b", "a/b", "random", None):
        with pytest.raises(ValueError, match="Expected `name` of letters, digits"):
            MapFunction(name, saliency)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected the `function` of `mine` to be called as"):
        MapFunction("mine", "saliency")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected `methods` to hold names, `Method` or `MapFunction` objects"):
        explain(tiny_resnet(), IMAGES, [saliency])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="each only once"):
        explain(tiny_resnet(), IMAGES, [mine, mine])


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have it compiled
        return torch.jit.trace(tiny_resnet().eval(), IMAGES)  # type: ignore[no-any-return]


def _headless() -> nn.Module:
    model = tiny_resnet()
    model.reset_classifier(0)
    return model  # type: ignore[no-any-return]


def test_the_name_of_a_model_without_a_vit_is_its_own() -> None:
    assert Explainer(tiny_resnet(), [MapFunction("mine", saliency)]).name == "ResNet"


def test_pooling_is_the_mean_of_squares() -> None:
    maps = torch.rand(2, 130, 60, dtype=torch.float64)
    found = pooled(maps)
    assert found.shape == (2, 44, 20)
    for row, column in ((0, 0), (43, 19), (20, 7)):
        # Bins of an uneven division begin at floor and end at ceil, as torch documents them.
        rows = slice(row * 130 // 44, -(-(row + 1) * 130 // 44))
        columns = slice(column * 60 // 20, -(-(column + 1) * 60 // 20))
        torch.testing.assert_close(found[:, row, column], maps[:, rows, columns].mean(dim=(1, 2)))
    assert pooled(found) is found
    assert pooled(torch.rand(1, 224, 224)).shape == (1, 56, 56)
