"""The page in Chromium: everything follows the slider, and what is drawn is what Python draws."""

from __future__ import annotations

import base64
import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.page.test_document import HOSTILE, data_of
from tests.saved_runs import save_run
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.page.document import render_page
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.visualization.overlay import POSITIVE, Picture, colour_limit, difference, overlay

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

PIXELS = """([image, run]) => {
    const canvas = image < 0 ? largeFrames[run].canvas : tiles[image].frames[run].canvas;
    const context = canvas.getContext('2d', { willReadFrequently: true });
    return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
}"""
ENLARGED = -1
NAMELESS = """[...document.querySelectorAll('button, select, input, a')].filter(
    each => each.localName === 'select' || !each.textContent.trim()
).filter(each => !each.getAttribute('aria-label') && !each.labels?.length).map(each => each.outerHTML)"""
TEXTLESS = """[...document.querySelectorAll('svg, [role=img]')].filter(
    each => !each.getAttribute('aria-label') && each.getAttribute('aria-hidden') !== 'true'
).map(each => each.outerHTML)"""
# The page shows changes before the next frame, and pictures are decoded in the background.
SETTLED = (
    "async () => { await Promise.all(pictures); for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); }"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page of runs, and fails the test on an error, a message in the console or a request."""
    noticed: list[str] = []
    tabs: list[Any] = []

    def open_page(*runs: Path, address: str = "", most_snapshots: int = 300, **options: Any) -> Any:
        file = tmp_path / "page.html"
        file.write_text(render_page(runs, most_snapshots), encoding="utf-8")
        tab = chromium.new_page(**({"viewport": {"width": 1366, "height": 900}} | options))
        tabs.append(tab)
        own = f"file://{file}"
        tab.on("console", lambda message: noticed.append(message.text))
        tab.on("pageerror", lambda error: noticed.append(str(error)))
        tab.on("request", lambda request: noticed.extend({request.url} if foreign(request.url, own) else ()))
        tab.goto(own + address)
        tab.evaluate(SETTLED)
        return tab

    yield open_page
    for tab in tabs:
        tab.close()
    assert noticed == []


def foreign(url: str, own: str) -> bool:
    return not url.startswith(("data:", own))


def step_to(tab: Any, position: int) -> None:
    tab.locator("#position").fill(str(position))
    tab.evaluate(SETTLED)


def press(tab: Any, *keys: str) -> None:
    for key in keys:
        tab.keyboard.press(key)
    tab.evaluate(SETTLED)


def wait_until(tab: Any, condition: str) -> None:
    """Playwright's own waiting needs `eval`, which the page forbids."""
    for _ in range(100):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


def pixels(tab: Any, image: int, size: tuple[int, int] = (48, 64), run: int = 0) -> Picture:
    drawn = np.array(tab.evaluate(PIXELS, [image, run]), dtype=np.uint8).reshape(*size, 4)
    assert (drawn[..., 3] == 255).all()
    return drawn[..., :3]


def order(tab: Any) -> list[int]:
    found: list[int] = tab.evaluate(
        "[...document.querySelectorAll('#tiles li')].map(li => tiles.find(t => t.item === li).image)"
    )
    return found


def saved_maps(run: Path, method: str = "grad_rollout") -> Tensor:
    """(T, B, grid_h, grid_w)."""
    paths = sorted((run / "explanations").glob("step_*"))
    return torch.stack([Snapshot.load(path).maps[method] for path in paths])


def predictions(run: Path) -> Tensor:
    return torch.stack([Snapshot.load(path).prediction for path in sorted((run / "explanations").glob("step_*"))])


def stored_picture(tab: Any, image: int) -> Picture:
    text = data_of(tab.content())["pictures"][image]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def grey_of(picture: Picture) -> Picture:
    """The backdrop of an overlay without the overlay."""
    return overlay(picture, torch.zeros(1, 1), 1.0)


def alone(relevance: Tensor, limit: float, size: tuple[int, int] = (48, 64)) -> Picture:
    """A map (grid_h, grid_w) on white, opaque at the limit."""
    values = (relevance / relevance.abs().mean() / limit).double().numpy()
    table = POSITIVE[(values.clip(0, 1) * 255).round().astype(int)]
    opacity = table[..., 3:] / POSITIVE[-1, 3]
    rows, columns = (np.arange(pixels) * count // pixels for pixels, count in zip(size, values.shape, strict=True))
    drawn: Picture = ((opacity * table[..., :3] + 1 - opacity) * 255).round().astype(np.uint8)[rows][:, columns]
    return drawn


def assert_drawn(found: Picture, expected: Picture, most: int = 8) -> None:
    """Equal but for the 8 bits of the maps: a map value may fall on the next colour or the one after."""
    off = np.abs(found.astype(int) - expected.astype(int))
    assert off.max() <= most
    assert off.mean() <= 1.2


def marker(tab: Any) -> set[str]:
    """Where the curves' markers stand; each at one place."""
    return {each.get_attribute("x1") for each in tab.locator("#charts .marker").all()}


def test_tiles_are_what_python_draws_at_every_step_and_in_every_mode(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run")
    tab = opened(run)
    for method in ("rollout", "grad_rollout"):
        tab.locator("#method").select_option(method)
        maps = saved_maps(run, method)
        limit = colour_limit(maps[0])
        for step in range(4):
            step_to(tab, step)
            for key, mode in enumerate(("overlay", "baseline", "previous", "raw", "plain"), start=1):
                press(tab, str(key))
                for image in range(4):
                    picture, now = stored_picture(tab, image), maps[step, image]
                    others = {"baseline": maps[0, image], "previous": maps[max(0, step - 1), image]}
                    if mode in others:
                        expected = difference(picture, now, others[mode], limit)
                    elif mode == "raw":
                        expected = alone(now, limit)
                    else:
                        expected = picture if mode == "plain" else overlay(picture, now, limit)
                    assert_drawn(pixels(tab, image), expected)


def test_a_signed_map_is_drawn_around_zero(tmp_path: Path, opened: Any) -> None:
    maps = torch.randn(4, 4, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.3
    tab = opened(save_run(tmp_path / "run", maps={"signed": maps}))
    limit = colour_limit(maps[0])
    for image in range(4):
        assert_drawn(pixels(tab, image), overlay(stored_picture(tab, image), maps[3, image], limit))
    assert tab.locator("#scale").inner_text().startswith("−")


def test_smooth_maps_meet_their_values_at_the_centres_of_patches_and_lie_between(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run", size=(60, 90), grids={"rollout": (4, 6)})  # patches of 15 × 15 pixels
    tab = opened(run)
    press(tab, "4")  # the map alone
    sharp = pixels(tab, 0, (60, 90))
    tab.locator("#smooth").check()
    tab.evaluate(SETTLED)
    smooth = pixels(tab, 0, (60, 90))
    centres = np.ix_(range(7, 60, 15), range(7, 90, 15))
    assert np.abs(smooth[centres].astype(int) - sharp[centres]).max() <= 4
    assert np.abs(np.diff(smooth.astype(int), axis=1)).max() < np.abs(np.diff(sharp.astype(int), axis=1)).max() / 2
    assert (smooth[:7, :7] == sharp[:7, :7]).all()  # outside of the outermost centres, theirs


def test_the_strength_of_the_map_goes_down_to_the_grey_picture(tmp_path: Path, opened: Any) -> None:
    tab = opened(save_run(tmp_path / "run"))
    tab.locator("#opacity").fill("0")
    tab.evaluate(SETTLED)
    assert_drawn(pixels(tab, 1), grey_of(stored_picture(tab, 1)), most=1)


def test_the_slider_moves_every_tile_every_marker_and_every_number(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run", blocks=3)
    tab = opened(run)
    tab.locator("#scalars button").first.evaluate("button => button.click()")  # without scrolling to it
    drift = torch.stack([spearman(maps, saved_maps(run)[0]) for maps in saved_maps(run)])
    names, paths = ("cat", "dog", "hare"), sorted((run / "explanations").glob("step_*"))
    seen: list[tuple[list[bytes], set[str]]] = []
    for step, text in enumerate(("step 0", "step 10", "step 20", "step 40")):
        step_to(tab, step)
        assert tab.locator("#where").inner_text() == text
        assert tab.locator("#position").get_attribute("aria-valuetext") == f"{text}, {step + 1} of 4"
        for image in range(4):
            said = tab.evaluate(f"tiles[{image}].drift.textContent")
            assert said == f"ρ {drift[step, image]:.2f}".replace("-", "−")
            prediction, label = int(predictions(run)[step, image]), (0, 1, 2, 0)[image]
            probability = Snapshot.load(paths[step]).explanation.probabilities[image, prediction]
            said, stated = tab.evaluate(f"tiles[{image}].texts[0].prediction.textContent").split(" · p ")
            assert said == f"{'' if prediction == label else '✗ '}{names[prediction]}"
            assert float(stated) == pytest.approx(float(probability), abs=0.006)
        assert len(marker(tab)) == 1
        assert f"at {text.split()[1]}:" in tab.locator("#scalar svg[role=img]").get_attribute("aria-label")
        assert tab.locator("#blocks .cell").evaluate("cell => cell.style.left") == f"{step * 25}%"
        seen.append(([pixels(tab, image).tobytes() for image in range(4)], marker(tab)))
    for earlier, later in pairwise(seen):
        assert all(a != b for a, b in zip(earlier[0], later[0], strict=True))
        assert earlier[1] != later[1]


def test_tiles_out_of_sight_are_drawn_when_they_come_into_it(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run", images=40, labels=[0] * 40)
    tab = opened(run, viewport={"width": 390, "height": 500}, address="#step=10")
    maps, last = saved_maps(run), order(tab)[-1]
    expected = overlay(stored_picture(tab, last), maps[1, last], colour_limit(maps[0]))
    assert (np.array(tab.evaluate(PIXELS, [last, 0])) == 0).all()
    tab.evaluate(f"tiles[{last}].item.scrollIntoView()")
    wait_until(tab, f"tiles[{last}].visible")
    tab.evaluate(SETTLED)
    assert_drawn(pixels(tab, last), expected)


def test_curves_are_dragged_and_blocks_are_clicked(tmp_path: Path, opened: Any) -> None:
    tab = opened(save_run(tmp_path / "run", blocks=3))
    box = tab.locator("#charts svg[role=img]").first.bounding_box()
    left, width, y = box["x"] + box["width"] * 36 / 340, box["width"] * 296 / 340, box["y"] + box["height"] / 2
    where = tab.locator("#where")
    tab.mouse.move(left + 0.26 * width, y)
    tab.mouse.down()
    tab.evaluate(SETTLED)
    assert where.inner_text() == "step 10"
    tab.mouse.move(left + 0.48 * width, y)
    tab.evaluate(SETTLED)
    assert where.inner_text() == "step 20"
    tab.mouse.up()
    tab.mouse.move(left, y)
    tab.evaluate(SETTLED)
    assert where.inner_text() == "step 20"
    heat = tab.locator("#blocks canvas").bounding_box()
    tab.locator("#blocks canvas").click(position={"x": heat["width"] * 0.4, "y": heat["height"] * 0.1})
    tab.evaluate(SETTLED)
    assert where.inner_text() == "step 10"
    name = tab.locator("#statistic").input_value()
    value = data_of(tab.content())["runs"][0]["blocks"][name][2][1]
    assert f"block 3 of 3: {float(f'{value:.3g}'):g}" in tab.locator("#blocks figcaption").inner_text()


def test_a_legend_hides_and_shows_its_line(tmp_path: Path, opened: Any) -> None:
    tab = opened(save_run(tmp_path / "run"))
    chart = tab.locator(".chart", has_text="Probe images")
    button = chart.locator("button", has_text="accuracy")
    lines = chart.locator(".plot path.line").count()
    button.click()
    assert chart.locator(".plot path.line").count() == lines - 1
    assert button.get_attribute("aria-pressed") == "false"
    press(tab, "b")
    assert chart.locator("svg[role=img]").get_attribute("aria-label").startswith("Probe images at 0: accuracy")
    tab.locator("#method").select_option("grad_rollout")
    assert chart.locator(".plot path.line").count() == lines - 1
    button.click()
    assert chart.locator(".plot path.line").count() == lines


def test_sort_orders_and_filters(tmp_path: Path, opened: Any) -> None:
    labels = [0, 1, 2, 0, 2, 1]
    run = save_run(tmp_path / "run", images=6, labels=labels, regions=["left"])
    maps, predicted = saved_maps(run), predictions(run)
    drift = torch.stack([spearman(each, maps[0]) for each in maps])
    tab = opened(run, address="#step=20")
    lift = [
        each[2] for each in np.transpose(data_of(tab.content())["runs"][0]["methods"]["grad_rollout"]["lift"]["left"])
    ]
    changed = (predicted[2] != predicted[0]).tolist()
    assert any(changed)
    assert not all(changed)

    def ordered(keys: Sequence[float]) -> list[int]:
        return sorted(range(6), key=lambda image: (keys[image], image))

    expected = {
        "worst": ordered(drift.amin(dim=0).tolist()),
        "now": ordered(drift[2].tolist()),
        "probe": [*range(6)],
        "label": ordered(labels),
        "flipped": ordered([-float(each) for each in changed]),
        "lift left": ordered([-value for value in lift]),
    }
    assert tab.locator("#sort option").evaluate_all("all => all.map(each => each.value)") == list(expected)
    for name, images in expected.items():
        tab.locator("#sort").select_option(name)
        tab.evaluate(SETTLED)
        assert order(tab) == images, name
    tab.locator("#class").select_option(label="hare")
    tab.evaluate(SETTLED)
    assert sorted(order(tab)) == [2, 4]
    tab.locator("#class").select_option(label="all")
    tab.locator("#flipped").check()
    tab.evaluate(SETTLED)
    assert sorted(order(tab)) == [image for image in range(6) if changed[image]]
    press(tab, "b")
    assert order(tab) == []
    assert tab.locator("#nothing").is_visible()


def test_a_patch_says_its_value_rank_and_share(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run")
    tab = opened(run)
    relevance = saved_maps(run)[3, 2].double()
    row, column = 1, 3
    box = tab.locator("#tiles li").nth(order(tab).index(2)).locator("canvas.map").bounding_box()
    tab.mouse.move(box["x"] + (column + 0.5) / 5 * box["width"], box["y"] + (row + 0.5) / 3 * box["height"])
    text = tab.locator("#tip").inner_text()
    rank = 1 + int((relevance > relevance[row, column]).sum())
    assert text.startswith(f"row 2, column 4: {float(text.split()[4])} × uniform; rank {rank} of 15, ")
    expected = (relevance[row, column] / relevance.sum()).item()
    assert float(text.split()[4]) == pytest.approx(expected * 15, abs=0.02)
    assert float(text.split(", ")[-1].split()[0]) / 100 == pytest.approx(expected, abs=0.002)
    tab.mouse.move(2, 2)
    assert tab.locator("#tip").is_hidden()


def test_an_address_opens_its_moment_and_keeps_it(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run")
    tab = opened(run, address="#step=19&image=3&method=rollout&mode=baseline")
    assert tab.locator("#large-title").inner_text() == "Image 3 · cat"
    assert "Step 20." in tab.locator("#facts").inner_text()
    assert tab.locator("#method").input_value() == "rollout"
    press(tab, "ArrowRight")
    wait_until(tab, "location.hash.includes('step=40')")
    assert tab.evaluate("location.hash") == "#step=40&method=rollout&mode=baseline&image=3"
    tab.evaluate("location.hash = '#step=10&method=nonsense&mode=__proto__&image=99'")
    wait_until(tab, "document.getElementById('where').textContent === 'step 10'")
    assert tab.locator("#method").input_value() == "rollout"


def test_within_another_page_as_in_a_notebook(tmp_path: Path, chromium: Any) -> None:
    noticed: list[str] = []
    outer = f'<iframe srcdoc="{escape(render_page([save_run(tmp_path / "run")]))}" width="1000" height="700"></iframe>'
    (tmp_path / "notebook.html").write_text(outer, encoding="utf-8")
    tab = chromium.new_page()
    tab.on("console", lambda message: noticed.append(message.text))
    tab.on("pageerror", lambda error: noticed.append(str(error)))
    tab.goto(f"file://{tmp_path / 'notebook.html'}")
    inner = tab.frames[1]
    inner.evaluate(SETTLED)
    step_to(inner, 0)
    assert inner.locator("#where").inner_text() == "step 0"
    tab.close()
    assert noticed == []


def test_everything_is_reached_by_keyboard_alone(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run", regions=["left"])
    tab = opened(run)
    where = tab.locator("#where")
    for keys, text in (
        (["b"], "step 0"),
        (["ArrowRight"] * 2, "step 20"),
        (["ArrowLeft"], "step 10"),
        (["n"], "step 40"),
    ):
        press(tab, *keys)
        assert where.inner_text() == text
    press(tab, "m")
    assert tab.locator("#method").input_value() == "rollout"
    press(tab, "2")
    assert tab.locator("#modes [aria-pressed=true]").inner_text() == "against baseline"
    press(tab, "b", "p")
    wait_until(tab, "document.getElementById('where').textContent === 'step 40'")
    wait_until(tab, "document.getElementById('play').textContent.includes('Play')")
    for _ in range(30):
        press(tab, "Tab")
        if tab.evaluate("document.activeElement.className") == "tile":
            break
    first = order(tab)[0]
    press(tab, "Enter")
    assert tab.locator("#large-title").inner_text().startswith(f"Image {first} ")
    press(tab, "ArrowDown", "ArrowLeft")
    assert tab.locator("#large-title").inner_text().startswith(f"Image {order(tab)[1]} ")
    assert where.inner_text() == "step 20"
    tab.locator("#large-frames canvas.map").focus()
    press(tab, "ArrowRight", "ArrowDown")
    assert tab.locator("#patch").inner_text().startswith("row 2, column 2: ")
    assert where.inner_text() == "step 20"
    press(tab, "Escape")
    assert tab.locator("#large").is_hidden()
    assert tab.evaluate("document.activeElement.className") == "tile"


def test_every_control_has_a_name_and_every_picture_a_text(tmp_path: Path, opened: Any) -> None:
    tab = opened(save_run(tmp_path / "run", blocks=2), address="#image=1")
    assert tab.evaluate(NAMELESS) == []
    assert tab.evaluate(TEXTLESS) == []
    assert "rank correlation with the baseline" in tab.locator("#own svg[role=img]").get_attribute("aria-label")


def test_an_enlarged_image_has_its_curve_and_its_history(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "run", steps=range(60))
    tab = opened(run, address="#image=2")
    strip = tab.locator("#strip button")
    assert strip.count() == 24
    assert strip.first.inner_text() == "step 0"
    assert strip.last.inner_text() == "step 59"
    strip.first.click()
    tab.evaluate(SETTLED)
    assert strip.first.get_attribute("aria-current") == "true"
    maps = saved_maps(run)
    drawn = pixels(tab, ENLARGED)
    assert_drawn(drawn, overlay(stored_picture(tab, 2), maps[0, 2], colour_limit(maps[0])))
    with tab.expect_download() as download:
        tab.locator("#save").click()
    assert (np.asarray(Image.open(download.value.path()))[..., :3] == drawn).all()


def test_scalars_are_found_by_parts_of_their_name(tmp_path: Path, opened: Any) -> None:
    tab = opened(save_run(tmp_path / "run"))
    scalars = data_of(tab.content())["runs"][0]["scalars"]
    tab.locator("#search").fill("GRAD spear prev")
    found = [tag for tag in scalars if all(word in tag.lower() for word in ("grad", "spear", "prev"))]
    assert tab.locator("#scalars button").all_inner_texts() == found
    tab.locator("#scalars button").first.click()
    assert tab.locator("#scalar h3").inner_text() == found[0]
    last = float(tab.locator("#scalar .legend b").inner_text().replace("−", "-"))
    assert last == pytest.approx(scalars[found[0]][-1], rel=5e-3)


def test_two_runs_stand_under_one_slider(tmp_path: Path, opened: Any) -> None:
    one, other = save_run(tmp_path / "one"), save_run(tmp_path / "two", steps=(0, 15, 80), seed=1)
    tab = opened(one, other, address="#mode=run")
    own, others = saved_maps(one), saved_maps(other)
    limit = colour_limit(own[0])
    where = [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (3, 2)]
    for position, (first, second) in enumerate(where):
        step_to(tab, position)
        for image in range(4):
            picture = stored_picture(tab, image)
            assert_drawn(pixels(tab, image), overlay(picture, own[first, image], limit))
            assert_drawn(
                pixels(tab, image, run=1), difference(picture, others[second, image], own[first, image], limit)
            )
    assert tab.locator("#where").inner_text() == "step 40 | 80"
    assert tab.locator("#summary h1").count() == 2
    chart = tab.locator(".chart", has_text="Probe images")
    assert {"accuracy, one", "accuracy, two"} <= {
        text.rsplit(" ", 1)[0].strip() for text in chart.locator(".legend button").all_inner_texts()
    }
    tab.locator("#by").select_option("share")
    tab.evaluate(SETTLED)
    texts = []
    for position in range(5):
        step_to(tab, position)
        texts.append(tab.locator("#where").inner_text())
    assert texts == ["step 0", "step 0 | 15", "step 10 | 15", "step 20 | 15", "step 40 | 80"]


def test_runs_with_other_patches_have_no_difference(tmp_path: Path, opened: Any) -> None:
    one, other = save_run(tmp_path / "one"), save_run(tmp_path / "two", grids={"rollout": (6, 4)}, seed=1)
    tab = opened(one, other, address="#mode=run")
    assert_drawn(pixels(tab, 0, run=1), grey_of(stored_picture(tab, 0)), most=1)
    press(tab, "1")
    maps = saved_maps(other, "rollout")
    limit = colour_limit(saved_maps(one, "rollout")[0])
    assert_drawn(pixels(tab, 0, run=1), overlay(stored_picture(tab, 0), maps[3, 0], limit))


def test_hostile_names_show_as_text(tmp_path: Path, opened: Any) -> None:
    run = save_run(tmp_path / "<i>", grids={HOSTILE: (2, 2)}, class_names=[HOSTILE] * 3, regions=[HOSTILE], blocks=1)
    tab = opened(run, address="#image=0")
    tab.locator("#search").evaluate("input => { input.value = 'img src'; input.oninput() }")
    tab.locator("#scalars button").first.evaluate("button => button.click()")
    assert tab.locator("img, i").count() == 0
    assert tab.locator("#large-title").inner_text() == f"Image 0 · {HOSTILE}"
    assert tab.locator("#method option").inner_text() == HOSTILE
    assert tab.locator(".eyebrow").inner_text() == "<i>"


@pytest.mark.parametrize("unusual", ["one snapshot", "no labels", "regression", "some labels", "NaN maps", "thinned"])
def test_unusual_runs_open(unusual: str, tmp_path: Path, opened: Any) -> None:
    options: dict[str, dict[str, Any]] = {
        "one snapshot": {"steps": (7,)},
        "no labels": {"labels": None, "class_names": None},
        "some labels": {"labels": (0, -1, 2, -1)},
        "regression": {"regression": True, "classes": 1, "labels": None, "class_names": None},
        "NaN maps": {"maps": {"rollout": torch.full((4, 4, 2, 2), math.nan)}},
        "thinned": {"steps": range(12)},
    }
    tab = opened(save_run(tmp_path / "run", **options[unusual]), most_snapshots=6)
    press(tab, "b", "ArrowRight", "2", "3", "m", "p", "n")
    tab.locator(".tile").first.click()
    tab.evaluate(SETTLED)
    about, facts = tab.locator("#about").inner_text(), tab.locator("#facts").inner_text()
    assert ("shows 6 of its 12 snapshots" in about) == (unusual == "thinned")
    assert facts.startswith("output ") == (unusual == "regression")
    if unusual == "NaN maps":
        press(tab, "1")
        assert_drawn(pixels(tab, 0), grey_of(stored_picture(tab, 0)), most=1)
        assert tab.evaluate("tiles[0].drift.textContent") == "ρ –"


@pytest.mark.parametrize("width", [390, 1366, 3840])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_on_any_screen(width: int, scheme: str, tmp_path: Path, opened: Any) -> None:
    names = ["a_class_name_without_any_place_to_break_it_in_two", "dog", "hare"]
    run = save_run(tmp_path / "run", class_names=names, blocks=2, regions=["left"])
    tab = opened(run, viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (
        sum(int(part) for part in tab.evaluate(f"getComputedStyle(document.body).{name}").strip("rgb()").split(","))
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) == (scheme == "dark")
    tab.locator(".tile").first.click()
    tab.evaluate(SETTLED)
    box = tab.locator("#large").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert tab.evaluate("large.scrollWidth <= large.clientWidth")
