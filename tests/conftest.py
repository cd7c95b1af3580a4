"""What many tests share: the smallest demo, and recipes over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml

from ray_ft import recipe
from ray_ft.demo import PROMPT, DemoPaths, write_demo
from ray_ft.pictures import write_pictures
from ray_ft.recipe import Recipe

# The same examples each time, so that one commit passes or fails for all; `pytest --hypothesis-profile hunt` looks for
# new ones. No deadline: the machine may be busy.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("hunt", max_examples=5_000, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """600 training rows in three files, 300 held-out ones, and a Gemma 3 of two layers: sliding and full attention."""
    return write_demo(str(tmp_path_factory.mktemp("demo")), rows=600, hidden_size=32, layers=2)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """36 rows with pictures, in Parquet and as messages that name files, and a Gemma 3 that sees."""
    return write_pictures(str(tmp_path_factory.mktemp("pictures") / "demo"), rows=36)


@pytest.fixture
def make_recipe(demo: DemoPaths, tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a recipe over the demo that trains in this process, without Ray, and keeps its runs in `tmp_path`.

    ``make_recipe("data.seq_len=64", sources=[{…}])``: overrides as on the command line; `sources` replaces data.train.
    """

    def make(*overrides: str, sources: list[dict[str, Any]] | None = None) -> Recipe:
        rows = {"format": "translation", "prompt": PROMPT}
        content = {
            "run": {"name": "test", "storage": str(tmp_path / "runs")},
            "model": {"path": demo.base},
            "data": {
                "train": [{"path": list(demo.train), **rows}],
                "eval": [{"path": demo.heldout, **rows}],
                "seq_len": 128,
            },
            "train": {"strategy": "none", "workers": 0, "global_batch": 8, "micro_batch": 4},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(content, allow_unicode=True))
        replaced = [] if sources is None else [f"data.train={json.dumps(sources)}"]
        return recipe.load(str(file), [*replaced, *overrides])

    return make
