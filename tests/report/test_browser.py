"""The page in a real browser: every control is used, and nothing is complained of."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from fxq.report import write

STEPS = 6  # of the recipe aciq-4bit


def text(page: Any, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({selector!r}).innerText"))


def step(page: Any) -> int:
    return int(page.evaluate("fxq.step"))


def selected(page: Any) -> str | None:
    found = page.evaluate("document.querySelector('#panel h2').firstChild.textContent")
    return None if found is None else str(found)


def view(page: Any) -> dict[str, float]:
    return dict(page.evaluate("({...fxq.graph.view})"))


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


def no_complaints(page: Any) -> None:
    assert page.complaints == []
    assert all(one.startswith(("file:", "data:", "about:")) for one in page.requests)


def test_steps_by_button_slider_list_and_keys(page: Any) -> None:
    assert step(page) == STEPS
    page.click("#previous")
    assert step(page) == STEPS - 1
    page.click("#next")
    assert step(page) == STEPS
    assert page.evaluate("document.getElementById('next').disabled")
    page.evaluate("document.getElementById('graph').focus()")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    page.press("ArrowRight")
    assert step(page) == STEPS - 1
    page.evaluate("document.getElementById('slider').focus()")
    page.press("ArrowLeft")
    assert step(page) == STEPS - 2
    page.click("#pass-list li:first-child button")
    assert step(page) == 0
    assert text(page, "#step-name") == "0 capture"
    page.click("#pass-list li:nth-child(2) button")
    assert "removed" in text(page, "#panel")
    assert page.evaluate("document.querySelectorAll('[aria-current]').length") == 1
    no_complaints(page)


def test_nodes_by_click_keys_and_search(page: Any) -> None:
    page.click_at(*place_of(page, "conv1"))
    assert selected(page) == "conv1"
    assert page.evaluate("document.querySelectorAll('#panel svg').length") >= 3
    page.click("#panel input.log")
    assert page.evaluate("document.querySelector('#panel input.log').checked") is False
    page.evaluate("document.getElementById('graph').focus()")
    page.press("ArrowDown")
    assert selected(page) != "conv1"
    page.press("ArrowUp")
    assert selected(page) == "conv1"
    page.press("n")
    assert page.evaluate("document.querySelector('#panel h2 .chip') !== null")
    page.press("Escape")
    assert "No node" in text(page, "#panel")
    page.press("/")
    page.type("bn1")
    assert page.evaluate("document.activeElement.id") == "search"
    assert (
        page.evaluate("document.getElementById('search').getAttribute('aria-expanded')") == "true"
    )
    page.press("Enter")
    assert selected(page) == "bn1"
    assert step(page) == 0  # it was folded by the first pass
    no_complaints(page)


def test_panels_zoom_colours_and_map(page: Any) -> None:
    for name, word in {"coverage": "integers", "error": "ratio", "recipe": "[[pass]]"}.items():
        page.click(f"#tab-{name}")
        assert word in text(page, "#panel")
    page.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-error"
    page.click("#tab-coverage")
    page.click("[data-place=int8]")
    assert page.evaluate("document.activeElement.dataset.place") == "int8"
    before = view(page)["k"]
    page.click("#zoom-in")
    assert view(page)["k"] > before
    page.click("#zoom-out")
    page.click("#zoom-out")
    assert view(page)["k"] < before
    page.click("#fit")
    x, y = place_of(page, "conv1")
    top = view(page)["y"]
    page.mouse("Wheel", x, y, deltaX=0, deltaY=40)
    page.wait(f"fxq.graph.view.y !== {top}")
    page.click("#map")
    for name in ("roles", "coverage", "changes"):
        page.evaluate(
            f"(() => {{ const s = document.getElementById('paint'); s.value = '{name}';"
            " s.dispatchEvent(new Event('change')); })()"
        )
        page.drawn()
        assert page.evaluate("fxq.graph.paint") == name
    no_complaints(page)


def test_the_address_holds_the_state_and_both_schemes_are_drawn(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page.open(path, "#step=5&panel=node&node=conv2")
    page.wait("fxq.step === 5")
    pictures = []
    for scheme in ("light", "dark"):
        page.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        page.drawn()
        pictures.append(page.screenshot(tmp_path / f"{scheme}.png"))
    assert step(page) == 5
    assert selected(page) == "conv2"
    assert pictures[0] != pictures[1]
    assert struct.unpack(">II", pictures[0][16:24])[0] > 1000
    no_complaints(page)


def test_an_analysis_is_shown_most_sensitive_first(
    browser: Any, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    layers = {
        "conv1": {"alone": {"sqnr": 30.0}, "without": {"sqnr": 14.5}},
        "conv2": {"alone": {"sqnr": 18.25}, "without": {"sqnr": 16.0}},
        "fc": {"alone": {"score": 1.0}, "without": {"score": 1.0}},
    }
    (run / "analysis.json").write_text(json.dumps({"inputs": {}, "layers": layers}))
    browser.open(write(run, tmp_path / "analyzed.html"))
    browser.click("#tab-error")
    rows = browser.evaluate(
        "[...document.querySelectorAll('#panel .sensitivity')].map((row) => row.innerText)"
    )
    assert len(rows) == 2
    assert "conv2" in rows[0]
    assert "18.3 dB (16.0 dB)" in rows[0] or "18.2 dB (16.0 dB)" in rows[0]
    assert "conv1" in rows[1]
    no_complaints(browser)
