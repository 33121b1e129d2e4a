"""The page in a headless browser: press a button, look at pictures, paint, redraw."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
SHOTS = os.environ.get("ARVISION_SCREENSHOTS")
"""Folder that screenshots are kept in, to be looked at."""


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-m", "arvision.cli", "ui", "--port", "0", "--images", "4"]
    command += ["--model", "llamagen-fashion", "--model", "var-fashion"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"at (http://[\d.]+:\d+)", line)
    assert found is not None, line + process.stderr.read()
    yield found[1]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said, said


@pytest.fixture
def page(address, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        # The page needs nobody but its own server.
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#arv-draw")
        yield page
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS or tmp_path) / "end.png"), full_page=True)
        browser.close()
        own = (address, "data:", "blob:")
        assert [url for url in asked if not url.startswith(own)] == []
        assert faults == []


def shot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / name), full_page=True)


def test_draw_look_paint_and_redraw(page):
    page.fill("#arv-prompt input", "ankle boot")
    page.press("#arv-prompt input", "Enter")
    page.fill("label:has-text('Seeds') input, label:has-text('Seeds') textarea", "7, 8")
    page.click("#arv-draw")
    page.wait_for_selector("text=Done. 2 of 2 pictures are the same, token for token.")
    for side in ("left", "right"):
        drawn = page.locator(f"#arv-{side} img")
        assert drawn.count() == 4  # two pictures and their maps
        size = drawn.first.evaluate("i => [i.naturalWidth, i.naturalHeight, i.complete]")
        assert size == [32, 32, True]
    shot(page, "drawn.png")
    page.click("text=Edit with a brush")
    page.click("#arv-take")
    page.wait_for_selector("text=then press Redraw")
    canvas = page.locator("#arv-painting canvas").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.55
    page.mouse.move(x - 60, y)
    page.mouse.down()
    for step in range(12):
        page.mouse.move(x - 60 + 10 * step, y + 4 * (step % 3))
    page.mouse.up()
    page.wait_for_timeout(1500)
    shot(page, "painted.png")
    page.fill("#arv-prompt input", "sneaker")
    page.press("#arv-prompt input", "Enter")
    page.click("#arv-redraw")
    page.wait_for_selector("text=given tokens")
    page.wait_for_selector("text=Done.")
    assert page.locator("#arv-left img").count() == 4
    shot(page, "redrawn.png")


def test_stop_ends_a_draw(page):
    page.fill("label:has-text('Seeds') input, label:has-text('Seeds') textarea", "1 2 3 4")
    page.click("#arv-draw")
    page.wait_for_selector("text=Drawing, a pass at a time")
    page.click("#arv-stop")
    page.wait_for_selector("text=Stopped; what was not drawn is missing.")
    # The next draw begins at once, so the first is no longer drawn.
    page.fill("label:has-text('Seeds') input, label:has-text('Seeds') textarea", "5")
    page.click("#arv-draw")
    page.wait_for_selector("text=Done. 1 of 1 pictures are the same")
