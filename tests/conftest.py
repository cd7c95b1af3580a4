"""What many tests share: the smallest demo, and recipes over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis.internal.conjecture import providers

from ray_ft import recipe
from ray_ft.demo import PROMPT, DemoPaths, labels, preference, write_demo
from ray_ft.recipe import Recipe

# The same examples each time, so that one commit passes or fails for all; `pytest --hypothesis-profile hunt` looks for
# new ones. No deadline: the machine may be busy.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("hunt", max_examples=5_000, deadline=None)
hypothesis.settings.load_profile("same")

# Hypothesis also draws the constants of whatever modules of ours are loaded: of a worker of pytest-xdist those that the
# files before had imported, and so other examples each time. They are for hunting alone.
_constants = providers._get_local_constants
providers._get_local_constants = lambda: (
    providers._local_constants if hypothesis.settings().derandomize else _constants()
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """600 training rows in three files, 300 held-out ones, and a Gemma 3 of two layers: sliding and full attention."""
    return write_demo(str(tmp_path_factory.mktemp("demo")), rows=600, hidden_size=32, layers=2)


@pytest.fixture(scope="session")
def label_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Rows with labels, to train on and held out."""
    part, folder = labels.draw(4_000, 0)[""], tmp_path_factory.mktemp("labels")
    return write_lines(folder / "train.jsonl", part.train), write_lines(folder / "heldout.jsonl", part.heldout)


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """120 preference pairs to train on, and 30 held out."""
    part, folder = preference.draw(600, 0)[""], tmp_path_factory.mktemp("pairs")
    files = zip(("train.jsonl", "heldout.jsonl"), (part.train[:120], part.heldout[:30]), strict=True)
    train, heldout = (write_lines(folder / name, rows) for name, rows in files)
    return train, heldout


def write_lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    """90 rows with pictures: messages that name files and that hold them, and Parquet; and a Gemma 3 that sees."""
    return write_demo(str(tmp_path_factory.mktemp("pictures") / "demo"), task="vision", rows=90)


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
