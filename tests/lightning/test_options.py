"""Odd values of every option: refused at once in one form, or accepted, and then snapshots are taken."""

# ruff: noqa: RUF005
from __future__ import annotations

import inspect
import math
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models import CLASSES, random_images, tiny_vit
from tests.runs import Classifier, Pictures, fit, loader, quiet
from vit_explain_callback import Checks, Detail, Explainer, ExplanationTracker, Probe, ViTExplainCallback, explain
from vit_explain_callback.lightning.settings import MODEL_OPTIONS, CallbackModelOptions, Display, Schedule, Settings
from vit_explain_callback.metrics.drift import DriftMetric
from vit_explain_callback.options.rules import CLASS_NAMES, FLAG, checked, rules_of

IMAGES, LABELS = random_images(2), torch.tensor([0, 1])
MASKS = torch.ones(2, 32, 32, dtype=torch.bool)
PARAMETERS = [*inspect.signature(ViTExplainCallback).parameters][:-1] + [*MODEL_OPTIONS]
GROUPS: dict[str, type[Checks] | type[Detail]] = {"checks": Checks, "detail": Detail}
# What no integer is, and what is out of range of most; then what other types make of options.
NUMBERS: list[Any] = [1.5, 2.0, math.nan, math.inf, -math.inf, 10**30, -1, 0, True, "3", [3], {}, b"1", 1j, object()]
NUMBERS += [torch.tensor(1.5), torch.tensor([1, 2]), np.array([2]), np.float64(2), np.bool_(True), "", "nan", "auto"]
GOOD: list[Any] = [1, np.int64(2), np.uint8(2), torch.tensor(2)]
FLAGS: list[Any] = ["no", "true", 0, 1, None, [], 1.0, torch.tensor(True), np.bool_(False), True, False]
WORDS: list[Any] = ["Brief", "", None, 3, True, ["brief"], b"warn"]
SEQUENCES: list[Any] = ["abc", 3, 0.5, {}, object(), [], (), [None], [[1]], {"a": 1}, iter("ab"), True]


class Falsy:
    def __repr__(self) -> str:
        raise RuntimeError("no words")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")


def odd_metric(maps: Tensor, reference: Tensor) -> Tensor:
    return maps.new_zeros(len(maps))


MEANS: list[Any] = [*SEQUENCES, (0.5,), (0.5, 0.5), (math.nan,) * 3, (math.inf,) * 3, ["0.5"] * 3, (0.5,) * 4]
STDS: list[Any] = [*SEQUENCES, (0, 1, 1), (-1.0,) * 3, (0.5,), (math.nan,) * 3, torch.full((3,), 0.5), np.full(3, 0.5)]
VALUES: dict[str, list[Any]] = {
    **{
        name: [*NUMBERS, *GOOD, None, Falsy()]
        for name in ("num_images", "num_shown", "batch_size", "every_n_epochs", "every_n_steps", "prefix_tokens")
    },
    "checks": [*NUMBERS, *GOOD, None],
    "target": [*NUMBERS, *GOOD, None, "lable", "prediction", "0", CLASSES, torch.tensor([0, 1])],
    **dict.fromkeys(("block_statistics", "save_maps", "page", "margin_charts"), FLAGS),
    **dict.fromkeys(("detail", "level", "on_error", "removal"), WORDS),
    "every_n_snapshots": [*NUMBERS, *GOOD, None],
    "task": WORDS,
    "max_pictures_mb": [*NUMBERS, *GOOD, 0.5, np.float32(0.5), None],
    "methods": [*SEQUENCES, None, "rollout", "rolout", [3], ["rollout", "rollout"], nn.Identity(), {"rollout"}],
    "metrics": [*SEQUENCES, None, "spearman", "pearson", [odd_metric], DriftMetric("odd", odd_metric, 0)],
    "vit": [3, True, ["net"], b"net", nn.Identity(), Falsy(), "nowhere", "net.", "net.blocks", "net", ""],
    "class_names": [*SEQUENCES, None, ["a"], list("abcde"), list("abcdefgh"), range(5), np.array(list("abcde"))],
    "normalisation": [(mean, [0.5] * 3) for mean in MEANS] + [([0.5] * 3, std) for std in STDS] + [*SEQUENCES, None],
    "forward": ["x", 3, int, lambda: None, lambda images: images, nn.Identity(), Falsy(), lambda m, x: m.net(x), None],
    "grid_size": [
        *SEQUENCES,
        (4,),
        (4, -1),
        "4x4",
        (4, 4, 4),
        (4, 1.5),
        (4, True),
        (4, 10**30),
        (0, 4),
        (3, 4),
        [4, 4],
    ],
    "regions": [*SEQUENCES, None, MASKS, [MASKS], {"a": MASKS.float()}, {"a": MASKS[0]}, {3: MASKS}, {"": MASKS}]
    + [{"a": MASKS[:1]}, {"a": MASKS.numpy()}, {"a": MASKS[:, :7, :9]}, {"a": ~MASKS}, {"a/b": MASKS}, {"a": MASKS}],
    "images": [*SEQUENCES, IMAGES.numpy(), IMAGES.int(), IMAGES[0], IMAGES[:0], IMAGES[..., :0], IMAGES * math.nan]
    + [IMAGES.to("meta"), IMAGES.to_sparse(), (IMAGES, LABELS, 3), (IMAGES, "ab"), (IMAGES, 3), (IMAGES, LABELS[:1])]
    + [
        (IMAGES, LABELS / 3),
        (IMAGES, LABELS + 0j),
        (IMAGES, torch.eye(2)),
        (IMAGES, LABELS * math.nan),
        (LABELS, IMAGES),
    ]
    + [
        IMAGES,
        IMAGES.half(),
        (IMAGES,),
        (IMAGES, None),
        (IMAGES, [0, 1]),
        (IMAGES, LABELS.numpy()),
        (IMAGES, LABELS > 0),
    ]
    + [(IMAGES, LABELS + 10**6), {"image": IMAGES, "label": LABELS}, {"a": IMAGES}],
}
CASES = [(name, value) for name, values in VALUES.items() for value in values]


def in_words(case: Any) -> str:
    try:
        return re.sub(r" at 0x\w+|\s+", " ", str(case))[:40] if not isinstance(case, Tensor) else str(case.shape)
    except RuntimeError:
        return "falsy"


def with_what_belongs_to_it(name: str, value: Any) -> dict[str, Any]:
    more: dict[str, Any] = {"images": (IMAGES, LABELS)} if name in ("regions", "target") else {}
    if name == "every_n_steps":
        more = {"every_n_epochs": "auto"}
    checked = {} if name in ("removal", "batch_size") else {"checks": None}  # checks take most time
    unseen: dict[str, Any] = {"detail": {"page": False, "block_statistics": False}, "num_shown": 1}
    options = {"num_images": 2, "methods": ["rollout"]} | unseen | checked | more
    option = grouped(name, value)
    if "detail" in option and name != "detail":
        option = {"detail": unseen["detail"] | option["detail"]}
    return options | option


def grouped(name: str, value: Any) -> dict[str, Any]:
    """An option as the callback takes it: in a mapping where it belongs to a group."""
    group = next((option for option, group in GROUPS.items() if name in group.__annotations__), None)
    return {name: value} if group is None else {group: {name: value}}


def test_there_are_many_and_every_option_has_some() -> None:
    assert len(CASES) >= 200
    assert set(VALUES) == set(PARAMETERS).union(*(group.__annotations__ for group in GROUPS.values()))
    classes = (Settings, Schedule, Display, CallbackModelOptions, Checks, Detail)
    assert set(VALUES) - {"images", *GROUPS} == set().union(*map(rules_of, classes))


@pytest.mark.parametrize(("name", "value"), CASES, ids=in_words)
def test_an_odd_value_is_refused_at_once_or_works(name: str, value: Any, tmp_path: Path) -> None:
    refused = refusal(partial(ViTExplainCallback, **with_what_belongs_to_it(name, value)))
    if refused is not None:
        assert re.match(r"Expected .*, but (got|they|it) ", str(refused))
        assert re.search(rf"`{name}[`=\[]|one schedule", str(refused)), refused
        return
    callback = ViTExplainCallback(**with_what_belongs_to_it(name, value))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused = refusal(lambda: fit(callback, tmp_path, train=loader(batch_size=8), max_epochs=1))
    if refused is not None:
        assert name in OF_THE_MODEL, refused
        assert re.match(r"Expected .*, but ", str(refused)), refused
        return
    assert not [str(each.message) for each in caught if "training goes on" in str(each.message)]
    assert callback.tracker is not None
    steps = [one.step for one in callback.tracker.history.snapshots]
    assert (steps[0], steps[-1]) == (0, 2)


def refusal(work: Any) -> Exception | None:
    try:
        work()
    except (TypeError, ValueError) as error:
        return error
    return None


OF_THE_MODEL = ("target", "vit", "grid_size", "prefix_tokens", "normalisation", "images", "forward")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 1.5}, "Expected `num_images` to be an integer of at least 1 and at most 100000, but got 1.5."),
        ({"num_shown": "3"}, "Expected `num_shown` to be an integer of at least 1, but got '3'."),
        (
            {"every_n_epochs": 0},
            "Expected `every_n_epochs` to be an integer of at least 1 or 'auto' or None, but got 0.",
        ),
        ({"save_maps": "no"}, "Expected `save_maps` to be True or False, but got 'no'."),
        (
            {"grid_size": (4,)},
            "Expected `grid_size` to be (grid_h, grid_w), two integers of at least 1 or None, but got",
        ),
        (
            {"normalisation": ((0, 0, 0), (0, 1, 1))},
            "Expected `normalisation` to be (mean, std), a finite number and a number above 0 for each channel",
        ),
        ({"detail": "all"}, "Expected `detail` to be 'brief' or 'full', but got 'all'."),
        (
            {"regions": MASKS},
            "Expected `regions` to be boolean tensors (B, H, W) by name or None, but got a torch.bool",
        ),
        ({"forward": "x"}, "Expected `forward` to be a function of a module and images or None, but got 'x'."),
    ],
)
def test_the_form_of_the_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        ViTExplainCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": CLASSES, "images": (IMAGES, LABELS)}, r"`target` classes in 0 … 4"),
        (
            {"grid_size": (3, 4)},
            "Expected no `grid_size` or `prefix_tokens`, or those of VisionTransformer, 4x4 patches",
        ),
        ({"prefix_tokens": 9}, "8 patches in a grid of the image's proportions, 32x32, but there is none"),
        ({"normalisation": ((0.5,), (0.5,))}, "one value for each of the 3 channels of the images, but got 1"),
        ({"normalisation": ((0.5,) * 4, [0.5] * 4)}, "one value for each of the 3 channels of the images, but got 4"),
        ({"vit": "head"}, "`vit` to be the path"),
        ({"images": IMAGES[..., :24]}, "images of 32x32 pixels"),
        ({"images": (IMAGES, LABELS + 10**6)}, r"`target` classes in 0 … 4"),
        ({"regions": {"object": MASKS[:1]}}, "one mask for each of the 2 probe images, but got 1"),
    ],
)
def test_what_only_the_model_can_tell_is_refused_before_the_first_step(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    module = Classifier()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=message):
        fit(quiet(**{"num_images": 2} | options), tmp_path, module)
    assert all(one.equal(other) for one, other in zip(before, module.parameters(), strict=True))


class Grey(Classifier):
    def __init__(self) -> None:
        super().__init__(tiny_vit(in_chans=1))


def test_a_grey_image_is_shown_with_a_mean_of_its_own(tmp_path: Path) -> None:
    data = Pictures()
    data.images = data.images[:, :1]
    options: dict[str, Any] = {"num_images": 2, "checks": None}
    with pytest.raises(ValueError, match="each of the 1 channels of the images, but got 3"):
        fit(
            ViTExplainCallback(normalisation=([0.5] * 3, [0.5] * 3), **options),
            tmp_path,
            Grey(),
            loader(data),
            loader(data),
        )
    callback = ViTExplainCallback(**options | {"normalisation": ([0.25], np.array([0.5]))})
    fit(callback, tmp_path, Grey(), loader(data), loader(data))
    assert callback.tracker is not None
    picture, image = callback.tracker.probe.pictures[0], callback.tracker.probe.images
    assert image is not None
    expected = (image[0, 0, 0, 0] * 0.5 + 0.25).clamp(0, 1) * 255
    assert abs(int(picture[0, 0, 0]) - float(expected)) <= 1


def test_images_of_many_channels_are_shown_by_the_first_three_of_their_mean() -> None:
    images, mean, std = random_images(1).repeat(1, 2, 1, 1), [0.1, 0.2, 0.3, 9.0, 9.0, 9.0], [0.5] * 6
    expected = Probe.of(images[:, :3], normalisation=(mean[:3], std[:3])).pictures[0]
    assert (Probe.of(images, normalisation=(mean, std)).pictures[0] == expected).all()


@pytest.mark.parametrize("names", [["only one"], list("abcdefgh")])
def test_too_few_names_of_classes_leave_indices(tmp_path: Path, names: list[str]) -> None:
    callback = quiet(["rollout"], class_names=names, num_images=4)
    fit(callback, tmp_path, max_epochs=1)
    assert callback.tracker is not None
    assert callback.tracker.probe.class_names == names


def test_regions_of_another_size_count_by_their_share(tmp_path: Path) -> None:
    half = torch.zeros(2, 32, 32, dtype=torch.bool)
    half[:, :16] = True
    lifts = []
    for masks in (half, half[:, ::4, ::4], half.repeat_interleave(3, 1).repeat_interleave(3, 2)):
        callback = quiet(["rollout"], images=IMAGES, regions={"top": masks})
        fit(callback, tmp_path, max_epochs=1)
        assert callback.tracker is not None
        lifts.append(callback.tracker.scalars()["explain/lift/top/rollout"])
    assert lifts == pytest.approx([lifts[0]] * 3)


SHARED = ["batch_size", "checks", "metrics", "detail", "on_error", *Checks.__annotations__, *Detail.__annotations__]


@pytest.mark.parametrize(("name", "value"), [case for case in CASES if case[0] in SHARED], ids=in_words)
def test_the_tracker_takes_and_refuses_the_same(name: str, value: Any) -> None:
    def tracker() -> None:
        ExplanationTracker(Explainer(tiny_vit(), ["rollout"]), Probe.of(IMAGES), **grouped(name, value))

    assert repr(refusal(tracker)) == repr(refusal(partial(ViTExplainCallback, **grouped(name, value))))


@pytest.mark.parametrize(
    "options",
    [
        {"vit": 3},
        {"forward": "x"},
        {"grid_size": "4x4"},
        {"prefix_tokens": 1.5},
        {"class_names": "abc"},
        {"batch_size": 0},
    ],
    ids=in_words,
)
def test_explain_refuses_the_same(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"Expected `{next(iter(options))}` to be .*, but got"):
        explain(tiny_vit(), IMAGES, **options)


def test_explain_refuses_options_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"Expected options out of .*, but got `grid`"):
        explain(tiny_vit(), IMAGES, grid=(4, 4))  # type: ignore[call-arg]


def test_what_is_converted() -> None:
    given: dict[str, Any] = {"num_images": np.int64(2), "every_n_steps": torch.tensor(5), "grid_size": [4, 4]}
    settings = ViTExplainCallback(**given | {"normalisation": ([0, 0, 0], torch.ones(3))}).settings
    assert (settings.num_images, settings.schedule.every_n_steps) == (2, 5)
    assert type(settings.num_images) is type(settings.schedule.every_n_steps) is int
    assert settings.model["grid_size"] == (4, 4)
    assert settings.display.normalisation == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert checked("class_names", ("a", 1), CLASS_NAMES) == ["a", "1"]
    assert checked("page", np.bool_(True), FLAG) is True


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"check_every_n_snapshots": 5}, "checks="),
        ({"removal": "tokens"}, "checks=Checks(removal=…)"),
        ({"report": False}, "detail=Detail(page=…)"),
        ({"mean": [0.5] * 3}, "normalisation=(mean, std)"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(old: dict[str, Any], new: str) -> None:
    message = re.escape(f"Expected `{new}`, the new name of `{next(iter(old))}`, but got")
    with pytest.raises(TypeError, match=message):
        ViTExplainCallback(**old)
    with pytest.raises(TypeError, match=message):
        ExplanationTracker(Explainer(tiny_vit(), ["rollout"]), Probe.of(IMAGES), **old)


def test_a_group_refuses_what_is_none_of_its_options() -> None:
    with pytest.raises(TypeError, match=r"Expected options of `detail` out of level, .*, but got `pages`"):
        ViTExplainCallback(detail={"pages": True})  # type: ignore[arg-type]
