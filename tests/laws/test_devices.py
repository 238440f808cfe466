"""On another device than the CPU: the same explanations, nothing left there, and no waiting block by block.

Each law runs on CUDA where it is there (`pytest -m cuda`), and everywhere on a device that is not there
(`pretend_device.py`), which tells what mixes tensors of two devices without having one.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import pretend_device
from tests.models import FAMILIES, random_images, steady_vit, tiny_vit
from tests.pretend_device import Pretend, tensors_on_device
from tests.processes import context
from vit_explain_callback import Explainer, ExplanationTracker, MapFunction, Probe, explain, explain_targets
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.map_function import AnyMethod

METHODS: list[str | AnyMethod] = [
    *("rollout", "rollout_max_0.9", "rollout_min_from2", "grad_rollout", "grad_rollout_0.5", "flow", "attention"),
    *("attention_block1_head2", "grad_attention", "chefer", "gradsam", "legrad"),
]
# In some release of torch that we allow, these are refused on CUDA where algorithms are to be deterministic.
REFUSED = {"kthvalue", "histc", "bincount", "median", "put", "put_", "cumsum", "grid_sampler_2d_backward"}


def saliency(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    images.requires_grad_()
    chosen = model(images).gather(1, target[:, None])
    return torch.autograd.grad(chosen.sum(), images)[0].abs().amax(dim=1)


SALIENCY = MapFunction("saliency", saliency)


def assert_near(found: Explanation, expected: Explanation, tolerance: float) -> None:
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=1e-3 * tolerance, equal_nan=True)
    assert found.maps.keys() == expected.maps.keys()
    for name, maps in expected.maps.items():
        close(found.maps[name], maps)
    close(found.logits, expected.logits)
    assert found.target.equal(expected.target)
    if expected.blocks is not None:
        for name, statistic in vars(expected.blocks).items():
            close(getattr(found.blocks, name), statistic)


def explanations_are_those_of_the_cpu(device: str, family: str) -> None:
    model, images = FAMILIES[family].create().double(), random_images(2, FAMILIES[family].image_size).double()
    target = torch.tensor([1, 2])
    expected = explain(model, images, METHODS, target, block_statistics=True)
    found = explain(model.to(device), images.to(device), METHODS, target.to(device), block_statistics=True)
    assert {maps.device.type for maps in found.maps.values()} == {found.logits.device.type} == {device}
    assert_near(found.cpu(), expected, 1e-7)


def images_and_targets_may_be_elsewhere(device: str) -> None:
    model, images, target = tiny_vit().double(), random_images(3).double(), torch.tensor([0, 3, 1])
    methods = [*METHODS, SALIENCY]
    expected = explain_targets(model, images, [target, 2, None], methods=methods)
    looking = explain(model, images, ["attention"], query=(1, 2))
    model.to(device)
    for given in (images, images.to(device)):
        found = explain_targets(model, given, [target, 2, None], methods=methods, batch_size=2)
        for one, other in zip(found, expected, strict=True):
            assert_near(one.cpu(), other, 1e-7)
        assert_near(explain(model, given, ["attention"], query=(1, 2)).cpu(), looking, 1e-7)


def explanations_show_and_save_themselves(device: str) -> None:
    model, images = tiny_vit().to(device), random_images(2).to(device)
    found = explain(model, images, ["rollout", "flow", "grad_attention"])
    assert found.plot().axes
    assert found._repr_jpeg_()
    assert found.overlay().shape == (32, 32, 3)
    assert found.target_probability.shape == (2,)
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder, "explanation.safetensors"))
        loaded = Explanation.load(Path(folder, "explanation.safetensors"))
    assert_near(loaded, found.cpu(), 1e-12)


def observed(device: str, dtype: torch.dtype = torch.float64) -> tuple[list[dict[str, float]], str]:
    """The scalars of a run of two snapshots with every check, and its summary."""
    model, labels = steady_vit().to(dtype).to(device), torch.tensor([0, 1, -1, 3])
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"folder": Path(folder, "run"), "on_error": "raise", "checks": 1}
        probe = Probe.of(random_images(4), labels)
        tracker = ExplanationTracker(Explainer(model, ["rollout_0.5", "grad_rollout"]), probe, target=labels, **options)
        values = [tracker.observe(0)]
        with torch.no_grad():
            model.blocks[1].attn.qkv.weight.mul_(1.2)
        return [*values, tracker.observe(1)], tracker.finish()


def a_run_gives_the_numbers_of_the_cpu(device: str) -> None:
    (expected, words), (found, other_words) = observed("cpu"), observed(device)
    assert words == other_words
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for tag, value in one.items():
            torch.testing.assert_close(other[tag], value, rtol=1e-6, atol=1e-9, equal_nan=True)


def nothing_is_left_on_the_device(device: str) -> None:
    model, images = tiny_vit().to(device), random_images(3).to(device)
    explainer = Explainer(model, [*METHODS, SALIENCY])

    def held() -> int:
        return torch.cuda.memory_allocated() if device == "cuda" else tensors_on_device()

    explainer(images, block_statistics=True)  # the layout of the tokens is remembered
    before = held()
    for _ in range(3):
        explainer(images, block_statistics=True)
        assert held() == before
    kept = explainer(images)
    assert held() > before
    del kept
    assert held() == before


LAWS: dict[str, Callable[[str], None]] = {
    **{f"maps of {family}": partial(explanations_are_those_of_the_cpu, family=family) for family in FAMILIES},
    "images and targets": images_and_targets_may_be_elsewhere,
    "shown and saved": explanations_show_and_save_themselves,
    "a run": a_run_gives_the_numbers_of_the_cpu,
    "nothing left": nothing_is_left_on_the_device,
}


def pretending(law: Callable[[str], None], float64: bool = True) -> None:
    """Check a law on the device that is not there; in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with Pretend(float64):
        law(pretend_device.NAME)


def a_run_without_float64(device: str) -> None:
    assert observed(device, torch.float32)[0][0].keys() == observed("cpu")[0][0].keys()


def asked_of_the_device(blocks: int) -> tuple[Counter[str], Counter[str]]:
    """How often each operation ran in an explanation by every method, and how often the CPU waited for which."""
    with Pretend() as asked:
        model, images = tiny_vit(depth=blocks).to(pretend_device.NAME), random_images(3)
        explainer = Explainer(model, [method for method in METHODS if method != "flow"])
        explainer(images, block_statistics=True)  # the layout of the tokens is remembered
        asked.operations.clear()
        asked.waits.clear()
        explainer(images, block_statistics=True)
        return asked.operations, asked.waits


def mistakes_that_pass() -> list[str]:
    passed = []
    with Pretend():
        there, here = torch.ones(3).to(pretend_device.NAME), torch.ones(3)
        mistakes: dict[str, Callable[[], object]] = {
            "a sum": lambda: there + here,
            "a sum the other way round": lambda: here + there,
            "a sum in place": lambda: there.add_(here),
            "a product": lambda: torch.ones(2, 3) @ there,
            "a condition": lambda: torch.where(here > 0, there, 0.0),
            "an index of the device": lambda: here[there > 0],
            "values from elsewhere": lambda: there.index_put_((torch.tensor([0, 1]),), here[:2]),
            "an array": lambda: there.numpy(),
            "a generator": lambda: torch.rand(3, device=pretend_device.NAME, generator=torch.Generator()),
        }
        for name, mistake in mistakes.items():
            with suppress(RuntimeError, TypeError):
                mistake()
                passed.append(name)
        assert (there + 1 + torch.tensor(2.0))[torch.tensor([0])].cpu().tolist() == [4.0]
    return passed


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Runs a function in another process, the same for all tests of this file."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("needs a torch in which a device can be made in Python")
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        yield lambda work, *args, **kwargs: pool.submit(work, *args, **kwargs).result()


@pytest.mark.parametrize("law", LAWS)
def test_law_on_a_device_that_is_not_there(law: str, elsewhere: Callable[..., Any]) -> None:
    elsewhere(pretending, LAWS[law])


def test_mistakes_are_caught(elsewhere: Callable[..., Any]) -> None:
    assert elsewhere(mistakes_that_pass) == []


def test_no_block_makes_the_cpu_wait(elsewhere: Callable[..., Any]) -> None:
    three, six = elsewhere(asked_of_the_device, 3), elsewhere(asked_of_the_device, 6)
    assert six[0]["baddbmm"] > 2 * three[0]["baddbmm"] > 0
    assert six[1] == three[1] == {"_local_scalar_dense": 1}  # whether the targets are classes of the model


def test_no_operation_is_refused_where_algorithms_are_to_be_deterministic(elsewhere: Callable[..., Any]) -> None:
    assert REFUSED & set(elsewhere(asked_of_the_device, 3)[0]) == set()


@pytest.mark.parametrize("law", [explanations_show_and_save_themselves, a_run_without_float64])
def test_a_device_needs_no_float64(law: Callable[[str], None], elsewhere: Callable[..., Any]) -> None:
    elsewhere(pretending, law, float64=False)


@pytest.mark.cuda
@pytest.mark.parametrize("law", LAWS)
def test_law_on_cuda(law: str) -> None:
    LAWS[law]("cuda")
