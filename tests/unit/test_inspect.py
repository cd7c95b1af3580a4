"""What `ray-ft data` shows is what training will see: the counts, and which tokens are trained."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_ft.data.prepare import Prepared, prepare
from ray_ft.data.stream import in_process
from ray_ft.demo import DemoPaths
from ray_ft.inspect import show
from ray_ft.recipe import Recipe


@pytest.fixture
def shown(demo: DemoPaths) -> Callable[..., tuple[str, dict[str, Prepared]]]:
    def shown(recipe: Recipe, examples: int = 0, **console: Any) -> tuple[str, dict[str, Prepared]]:
        splits = {"train": prepare(recipe, "train", demo.base, in_process)}
        if recipe.data.eval:
            splits["eval"] = prepare(recipe, "eval", demo.base, in_process)
        out = io.StringIO()
        show(recipe, splits, Console(file=out, width=200, **console), examples)
        return out.getvalue(), splits

    return shown


def test_counts_of_both_splits_and_the_steps_are_shown(
    make_recipe: Callable[..., Recipe], shown: Callable[..., Any]
) -> None:
    output, splits = shown(make_recipe())
    lines = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()}
    for name, prepared in splits.items():
        c = prepared.counts
        numbers = (c.rows, c.used, 0, 0, c.tokens, c.trained_tokens, c.packed)
        assert lines[name] == [*(f"{number:,}" for number in numbers), f"{prepared.non_pad_share:.1%}"]
    assert lines["train"][0] == "600" and lines["eval"][0] == "300"
    steps = -(-splits["train"].rows // 8)
    assert f"8 rows × 128 tokens = 4 rows × 1 workers × 2 accumulation; {steps} steps" in output
    assert "rejects" not in output and "examples" not in output


def test_the_histogram_counts_every_sample_by_its_length(
    make_recipe: Callable[..., Recipe], shown: Callable[..., Any]
) -> None:
    output, splits = shown(make_recipe("data.seq_len=32", "data.long_rows=truncate"))
    bars = {line.split()[0]: line for line in output.splitlines() if "█" in line}
    lengths = splits["train"].counts.lengths
    assert set(bars) == {f"{top // 2 + 1}–{top}" for top in lengths} and lengths[64] > 0
    assert sum(int(line.split()[2].replace(",", "")) for line in bars.values()) == 600
    assert "(over seq_len)" in bars["33–64"] and "(over seq_len)" not in bars["17–32"]


def test_rejects_are_shown_by_their_reason_and_place(
    make_recipe: Callable[..., Recipe], shown: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [*[{"text": "one"}] * 8, {"text": 1}, {"text": 2}, {"[bold]": 3}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": "text", "path": str(tmp_path / "data.jsonl")}
    output, splits = shown(make_recipe("data.eval=[]", "data.max_bad_rows=1", sources=[source]))
    assert "train rejects: 2 × field 'text' is int, not a string; 1 × missing field 'text'" in output
    assert splits["train"].rejects in output


def test_a_mixture_says_how_often_each_source_is_used(
    make_recipe: Callable[..., Recipe], shown: Callable[..., Any], tmp_path: Path
) -> None:
    for name, count in (("large", 60), ("small", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(count)))
    large, small = ({"format": "text", "path": str(tmp_path / f"{name}.jsonl")} for name in ("large", "small"))
    mixture = [large, {**small, "weight": 20.0}]
    output, _ = shown(make_recipe("data.eval=[]", "data.packing=false", "train.epochs=2", sources=mixture))
    assert "passes over the whole run: data.train.0: 2, data.train.1: 40" in output
    assert "data.train.1: each of its 3 packed rows is trained on about 40 times" in output
    assert "passes over" not in shown(make_recipe())[0]


def test_examples_mark_exactly_the_trained_tokens(
    make_recipe: Callable[..., Recipe], shown: Callable[..., Any], tmp_path: Path
) -> None:
    row = {"prompt": "one [bold]", "completion": "deux"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    source = {"format": "prompt_completion", "path": str(tmp_path / "data.jsonl")}
    recipe = make_recipe("data.eval=[]", sources=[source])
    plain, _ = shown(recipe, examples=3)
    prompt = "<bos><start_of_turn>user⏎one [bold]<end_of_turn>⏎<start_of_turn>model⏎"
    assert f"  {prompt}⟦deux<end_of_turn>⟧⏎\n" in plain
    coloured, _ = shown(recipe, examples=3, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32mdeux<end_of_turn>\x1b[0m" in coloured and "⟦" not in coloured


def test_thinking_that_is_masked_stands_outside_the_targets(
    make_recipe: Callable[..., Recipe], shown: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": "one", "r": "two", "a": "three"}) + "\n")
    source = {"format": "template", "path": str(tmp_path / "data.jsonl"), "prompt": "{q}"}
    source["completion"] = "<think>{r}</think>{a}"
    for thinking, expected in (
        ({"train": False}, "model⏎<think>two</think>⟦three<end_of_turn>⟧"),
        ({}, "model⏎⟦<think>two</think>three<end_of_turn>⟧"),
    ):
        recipe = make_recipe("data.eval=[]", sources=[{**source, "thinking": thinking}])
        assert expected in shown(recipe, examples=1)[0]


def test_as_many_examples_are_shown_as_asked_for_each_from_another_row(
    make_recipe: Callable[..., Recipe], shown: Callable[..., Any]
) -> None:
    output, _ = shown(make_recipe(), examples=5)
    examples = [line for line in output.splitlines() if "⟦" in line]
    assert len(examples) == len(set(examples)) == 5
    assert all(line.count("<bos>") == 1 and line.count("⟦") == 1 for line in examples)
    assert len([line for line in shown(make_recipe(), examples=1)[0].splitlines() if "⟦" in line]) == 1
