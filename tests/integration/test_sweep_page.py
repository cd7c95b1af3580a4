"""The page of a sweep in a real browser: that its policy lets the charts be drawn, and that it fits screens."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from ray_ft.recipe import Recipe
from ray_ft.report import report
from ray_ft.view import View

sys.path.append(str(Path(__file__).parent.parent / "unit"))  # where sweeps are made, and what waits
import fake_engine as fake
import sweeps

#: Set where this must not be skipped, as in continuous integration.
REQUIRE = "RAY_FT_REQUIRE_CHROMIUM"


def test_the_page_is_drawn_and_fits(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    chromium = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if chromium is None:
        reason = "there is no Chromium on this machine (as root: apt-get install chromium)"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, and {reason}")
        pytest.skip(reason)
    sweep = sweeps.asha(sweeps.recipe_with(make_recipe))
    location = report(sweep.root, View(), str(tmp_path / "out.html"))
    errors: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="dark")
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda told: errors.append(told.text) if told.type in ("error", "warning") else None)
        page.goto(f"file://{location}")
        expect(page.locator("html[data-drawn='4']")).to_have_count(1, timeout=60_000)
        expect(page.locator("h1")).to_contain_text("complete: 16 trials", timeout=60_000)
        charts = page.locator(".chart")
        assert [chart.locator("svg.main-svg").count() > 0 for chart in charts.all()] == [True] * 4
        lines = ".scatterlayer path.js-line"
        assert charts.nth(0).locator(lines).count() == 15  # of the trials that reported
        assert charts.nth(1).locator(lines).count() == 15
        assert charts.nth(3).locator(".barlayer .point").count() == 16 + 14  # all, and the rest of those stopped
        fits = "charts => charts.every(chart => chart.querySelector('svg').clientWidth <= chart.clientWidth)"
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            fake.wait_until(partial(charts.evaluate_all, fits), 60)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert errors == []
    assert requests == [f"file://{location}"]
