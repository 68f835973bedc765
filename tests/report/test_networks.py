"""The pages of ResNet-18 and ResNet-20 in a browser: not one control is left unused."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxq.cli.main import app

PHOTOGRAPHS = ("-c", "random", "-n", "2", "--input-shape", "1,3,32,32")
PAINTS = ("changes", "roles", "coverage", "values")

WATCH = """(() => {
  const all = 'button, input, select, summary, canvas, a[href], [role=option]';
  const name = (e) => e.id && !e.id.startsWith('result-') ? '#' + e.id
    : e.dataset.place ? 'filter ' + e.dataset.place
    : e.dataset.step !== undefined ? 'pass'
    : e.getAttribute('role') || e.classList[0] || e.tagName.toLowerCase();
  const [seen, used] = [new Set(), new Set()];
  const look = () => document.querySelectorAll(all).forEach((e) => seen.add(name(e)));
  const use = (event) => {
    look();
    const control = event.target.closest?.(all);
    if (control) used.add(name(control));
  };
  for (const kind of ['click', 'input', 'change', 'keydown', 'pointerdown', 'wheel']) {
    document.addEventListener(kind, use, true);
  }
  window.unused = () => { look(); return [...seen].filter((one) => !used.has(one)).sort(); };
  window.seen = () => seen.size;
})()"""
"""Notes every control that is ever there, by what it is, and those that something was done to."""


@pytest.fixture(scope="module", autouse=True)
def small_networks(one_thread: None) -> None:
    """Every test here runs on one thread."""


def run(*arguments: str) -> None:
    done = CliRunner().invoke(app, list(arguments), prog_name="fxq")
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what it answers does not matter here."""
    folder = tmp_path_factory.mktemp("resnet18") / "run"
    run("compile", "torchvision/resnet18", *PHOTOGRAPHS, "-o", str(folder))
    run("analyze", str(folder), "--sample", "1")
    run("report", str(folder))
    return folder


@functools.cache
def resnet20(data: Path, folder: Path) -> Path:
    weights, images = (
        data / name for name in ("resnet20-apot-fp32-cifar10.safetensors", "cifar10-train-20k.npz")
    )
    if not weights.is_file() or not images.is_file():
        pytest.skip(f"{data} has no ResNet-20, or no images")
    asked = ("-w", str(weights), "-c", str(images), "-n", "16")
    run("compile", "cifar/resnet20", *asked, "-o", str(folder))
    run("analyze", str(folder), "--sample", "2")
    run("report", str(folder))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resnet20") / "run"


@pytest.fixture(params=["resnet18", "resnet20"])
def opened(request: Any, browser: Any) -> Any:
    """The browser with the page of a network, which notes what is used."""
    if request.param == "resnet18":
        folder = request.getfixturevalue("resnet18")
    else:
        folder = resnet20(request.getfixturevalue("data"), request.getfixturevalue("place"))
    browser.complaints.clear()
    browser.open(folder / "report.html")
    browser.evaluate(WATCH)
    return browser


def test_every_control_does_something(opened: Any, tmp_path: Path) -> None:
    page = opened
    for tour in (steps, colours, views, nodes, searching, tabs, errors, pictures, skip):
        tour(page, tmp_path)
    assert page.evaluate("unused()") == []
    assert page.evaluate("seen()") > 25
    assert page.complaints == []
    assert all(one.startswith(("file:", "data:", "about:")) for one in page.requests)


# ---- parts of the tour -------------------------------------------------------------------------


def steps(page: Any, _: Path) -> None:
    last = page.evaluate("Number(document.getElementById('slider').max)")
    assert last == 6
    page.click("#previous")
    assert page.evaluate("fxq.step") == last - 1
    page.click("#next")
    assert page.evaluate("fxq.step") == last
    page.click("#slider")
    assert page.evaluate("fxq.step") == last / 2
    focus(page, "graph")
    for key, step in (("ArrowLeft", 2), ("ArrowLeft", 1), ("ArrowRight", 2)):
        page.press(key)
        assert page.evaluate("fxq.step") == step
    for step in range(last + 1):
        page.click(f"#pass-list li:nth-child({step + 1}) button")
        assert page.evaluate("fxq.step") == step
        assert text(page, "#panel h2").endswith(text(page, "#step-name").split()[-1])
        assert page.evaluate("fxq.graph.nodes.length") > 40


def colours(page: Any, _: Path) -> None:
    page.click("#pass-list li:nth-child(6) button")  # the quantize pass, which changes most
    focus(page, "paint")
    drawn, legends = [picture(page)], [text(page, "#legend")]
    for name in PAINTS[1:]:
        page.press("ArrowDown")
        assert page.evaluate("fxq.graph.paint") == name
        drawn.append(picture(page))
        legends.append(text(page, "#legend"))
    assert len(set(drawn)) == len(set(legends)) == len(PAINTS)
    for _one in PAINTS[1:]:
        page.press("ArrowUp")
    assert picture(page) == drawn[0]


def views(page: Any, _: Path) -> None:
    focus(page, "graph")
    for key, more in (("+", True), ("=", True), ("-", False)):
        before = page.evaluate("fxq.graph.view.k")
        page.press(key)
        assert (page.evaluate("fxq.graph.view.k") > before) is more
    for button, more in (("zoom-in", True), ("zoom-out", False)):
        before = page.evaluate("fxq.graph.view.k")
        page.click(f"#{button}")
        assert (page.evaluate("fxq.graph.view.k") > before) is more
    page.click("#fit")
    fitted = page.evaluate("({...fxq.graph.view})")
    focus(page, "graph")
    page.press("+")
    page.press("0")
    assert page.evaluate("({...fxq.graph.view})") == fitted
    x, y = middle(page, "graph")
    page.mouse("Wheel", x, y, deltaX=0, deltaY=400)
    page.wait(f"fxq.graph.view.y < {fitted['y']}")
    page.mouse("Wheel", x, y, deltaX=0, deltaY=-100, modifiers=2)
    page.wait(f"fxq.graph.view.k > {fitted['k']}")
    before = page.evaluate("fxq.graph.view.x")
    page.mouse("Pressed", x, y, button="left", clickCount=1)
    for far in (10, 40):
        page.mouse("Moved", x + far, y, button="left", buttons=1)
    page.mouse("Released", x + far, y, button="left", clickCount=1)
    assert page.evaluate("fxq.graph.view.x") != before
    before = page.evaluate("fxq.graph.view.y")
    page.click("#map")
    assert page.evaluate("fxq.graph.view.y") != before
    page.click("#fit")


def nodes(page: Any, _: Path) -> None:
    page.click_at(*place_of(page, "conv1"))
    assert heading(page) == "conv1"
    focus(page, "graph")
    for key in ("ArrowDown", "ArrowUp", "n", "p"):
        before = heading(page)
        page.press(key)
        assert heading(page) != before
    assert heading(page) == "conv1"
    charts = page.evaluate("document.querySelectorAll('#panel svg').length")
    assert charts >= 2  # its weights, and the ranges of its channels
    before = page.evaluate("document.querySelector('#panel svg').outerHTML")
    page.click("#panel input.log")
    assert page.evaluate("document.querySelector('#panel svg').outerHTML") != before
    moved = page.evaluate("document.querySelectorAll('#panel .moved li').length")
    assert moved >= 2  # by the fold, and by quantizing
    page.click("#panel .moved li:first-child .link")
    assert page.evaluate("fxq.step") == 1
    page.click("#panel .facts .link")
    assert heading(page) == "x"
    page.press("Escape")
    assert heading(page) == "No node selected"


def searching(page: Any, _: Path) -> None:
    page.press("/")
    page.type("bn1")
    found = page.evaluate("[...document.querySelectorAll('#results li')].map(e => e.innerText)")
    assert len(found) > 4
    page.press("ArrowDown")
    page.press("ArrowUp")
    page.press("Enter")
    assert heading(page) == "bn1"
    assert page.evaluate("fxq.step") <= 1  # the fold removed it
    page.click("#pass-list li:last-child button")
    page.click("#tab-node")
    assert "in the graph from step 0 to 0" in text(page, "#panel")
    page.click("#panel .more")
    assert page.evaluate("fxq.step") == 0
    focus(page, "search")
    page.evaluate("document.getElementById('search').select()")
    page.type("layer1 relu")
    page.click("#results li:nth-child(2)")
    assert "relu" in heading(page)
    focus(page, "search")
    page.press("Escape")
    assert page.evaluate("document.getElementById('results').hidden")


def tabs(page: Any, _: Path) -> None:
    page.click("#tab-step")
    page.click("#pass-list li:nth-child(6) button")
    page.click("#panel summary")
    assert "first_last_bits" in text(page, "#panel")
    before = page.evaluate("document.querySelectorAll('#panel .items li').length")
    page.click("#panel .more")
    assert page.evaluate("document.querySelectorAll('#panel .items li').length") > before
    page.click("#tab-coverage")
    assert "layers run on integers" in text(page, "#panel")
    total = 0
    for where in ("int8", "folded", "float", "all"):
        page.click(f"[data-place={where}]")
        shown = page.evaluate("document.querySelectorAll('#panel .items li').length")
        assert str(shown) == text(page, f"[data-place={where}]").split()[-1]
        total += shown
    assert total == 2 * shown
    page.click("#panel .items .link")
    assert heading(page) == "conv1"
    page.click("#tab-recipe")
    assert 'use = "quantize-aciq"' in text(page, "#panel pre")
    for key, tab in (("ArrowRight", "node"), ("ArrowLeft", "recipe"), ("ArrowLeft", "error")):
        page.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"


def errors(page: Any, _: Path) -> None:
    page.click("#tab-error")
    parts = page.evaluate(
        "[...document.querySelectorAll('#panel .fall')].map(e => +e.dataset.part)"
    )
    assert len(parts) == 7  # six passes, and the integers
    assert sum(parts) == pytest.approx(float(text(page, "#error-sum")), rel=5e-3)
    page.click("#panel .fall:nth-child(5) .link")
    assert page.evaluate("fxq.step") == 5
    figures = each(page, ".sensitivity .small", "parseFloat(e.innerText)")
    assert len(figures) > 20
    assert figures == sorted(figures)
    widths = each(page, ".sensitivity i", "parseFloat(e.style.width)")
    assert widths == sorted(widths)
    assert 0 < widths[0] < 100
    page.click("#panel .sensitivity .link")
    assert "Error by cause" in text(page, "#panel")


def pictures(page: Any, folder: Path) -> None:
    """Light and dark, large and small: the page has the size of the window, and no more."""
    for scheme in ("light", "dark"):
        values = [{"name": "prefers-color-scheme", "value": scheme}]
        page.send("Emulation.setEmulatedMedia", features=values)
        page.drawn()
        taken = page.screenshot(folder / f"{scheme}.png")
        width, height = struct.unpack(">II", taken[16:24])
        assert [width, height] == page.evaluate("[innerWidth, innerHeight]")
        assert (ink(page) < 128) is (scheme == "dark")
        assert page.evaluate("document.body.scrollWidth <= innerWidth")
    page.send("Emulation.setEmulatedMedia", features=[])
    size = {"width": 640, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    page.send("Emulation.setDeviceMetricsOverride", **size)
    page.drawn()
    assert page.evaluate("document.body.scrollWidth <= innerWidth")
    page.screenshot(folder / "narrow.png")
    page.send("Emulation.clearDeviceMetricsOverride")
    page.drawn()


def skip(page: Any, _: Path) -> None:
    page.evaluate("document.querySelector('.skip').focus()")
    page.press("Enter")
    page.wait("document.activeElement.id === 'graph'")


# ---- what is on the page -----------------------------------------------------------------------


def text(page: Any, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({selector!r}).innerText"))


def each(page: Any, selector: str, value: str) -> list[float]:
    """A number of each element ``e`` of the panel."""
    found = f"[...document.querySelectorAll('#panel {selector}')].map((e) => {value})"
    return list(page.evaluate(found))


def heading(page: Any) -> str:
    return str(page.evaluate("document.querySelector('#panel h2').firstChild.textContent"))


def focus(page: Any, element: str) -> None:
    page.evaluate(f"document.getElementById('{element}').focus()")


def picture(page: Any) -> str:
    page.drawn()
    return str(page.evaluate("fxq.graph.canvas.toDataURL()"))


def ink(page: Any) -> float:
    """How bright the page is, of 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(one) for one in colour[4:-1].split(",")) / 3


def middle(page: Any, element: str) -> list[float]:
    return list(
        page.evaluate(
            f"(() => {{ const b = document.getElementById('{element}').getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
    )


def place_of(page: Any, name: str) -> list[float]:
    """Where a node is on the screen."""
    return list(
        page.evaluate(
            "(() => { const g = fxq.graph, b = g.canvas.getBoundingClientRect();"
            f" const r = g.nodes.find((one) => one.name === '{name}');"
            " return [b.x + g.view.x + g.view.k * g.x(r.node),"
            " b.y + g.view.y + g.view.k * g.y(r.node)]; })()"
        )
    )


# ---- size --------------------------------------------------------------------------------------


def test_the_page_of_resnet50_is_small(tmp_path: Path) -> None:
    run("compile", "torchvision/resnet50", *PHOTOGRAPHS, "-o", str(tmp_path / "run"))
    run("report", str(tmp_path / "run"))
    assert 2**18 < (tmp_path / "run" / "report.html").stat().st_size < 5e6
