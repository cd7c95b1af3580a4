"""What all benchmarks share: pairs in turn, results that say their conditions, and the page made from them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page
from benchmarks.__main__ import NAMES
from benchmarks.pairs import differences, interleaved, percentile, ratios, spread
from benchmarks.result import CONDITIONS, RESULTS, Figure, Result, Table, read, recorded

ROOT = Path(__file__).parents[2]
SAID = dict.fromkeys(CONDITIONS, "none")


def result_of(name: str, *figures: Figure) -> Result:
    machine = {"cores": 2, "cpu": "a CPU", "memory_gib": 24, "python": "3.11", "packages": {"torch": "2.13"}}
    made = Result(name, "A: ours. B: theirs.", SAID, list(figures), [Table("It grows", ("size", "s"), [(1, "2 | 3")])])
    made.machine, made.load, made.pairs, made.commit = machine, (0.1, 0.2), 8, "abc"
    return made


def test_arms_take_turns_and_the_warm_up_is_thrown_away() -> None:
    called: list[tuple[str, int]] = []

    def arm(name: str) -> Any:
        return lambda number: called.append((name, number)) or {"rate": number + 10.0 + (name == "b")}

    pairs = interleaved({"a": arm("a"), "b": arm("b")}, 3, warm_up=1)
    assert called == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert ratios(pairs, "b", "a", "rate") == [11 / 10, 12 / 11, 13 / 12]
    assert differences(pairs, "b", "a", "rate") == [1.0, 1.0, 1.0]
    assert spread([3.0, 1.0, 2.0], "{:.1f}") == "2.0 (1.0 … 3.0)" and spread([1.0]) == "1.000"
    assert percentile([5, 1, 3], 50) == 3 and percentile(list(range(101)), 95) == 95


@pytest.mark.parametrize(
    ("aims", "reached"),
    [
        ({}, None),
        ({"at_least": 2.0}, True),
        ({"at_least": 2.1}, False),
        ({"at_most": 1.9}, False),
        ({"at_most": 2}, True),
    ],
)
def test_an_aim_is_for_the_median(aims: dict[str, float], reached: bool | None) -> None:
    assert Figure("x", [1.0, 2.0, 100.0], **aims).reached is reached


def test_a_result_that_does_not_say_its_conditions_is_refused() -> None:
    given = argparse.Namespace(pairs=1, to=None)
    with (
        pytest.raises(ValueError, match="x does not say its threads, padding"),
        recorded("x", "", {"data": "", "flops": "", "clipping": ""}, given),
    ):
        raise AssertionError("it began all the same")


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = argparse.Namespace(pairs=1, to=tmp_path / "new" / "x.json")
    with recorded("x", "A and B", SAID, given) as made:
        made.figures.append(Figure("tokens/s", [1.0, 2.0], at_least=0.5))
        made.tables.append(Table("t", ("a",), [("b",)]))
    found = read(given.to)
    assert found.figures == [Figure("tokens/s", [1.0, 2.0], at_least=0.5)]
    assert found.machine["packages"]["torch"] and len(found.load) == 2 and found.began


def test_the_page_takes_each_result_to_its_place_and_keeps_the_prose() -> None:
    found = {"one": result_of("one", Figure("x, A ÷ B", [0.5], at_least=0.9), Figure("y", [2.0]))}
    before = "# Page\n<!-- summary -->\nold\n<!-- /summary -->\n## one\nprose\n<!-- one -->\n<!-- /one -->\nend\n"
    text = page.made(before, found)
    assert "| [one](#one) | x, A ÷ B | 0.500 | ≥ 0.9 | **no** |" in text
    assert "old" not in text and "prose" in text and text.endswith("end\n") and "| 1 | 2 \\| 3 |" in text
    assert "| y | 2.000 |" in text and "[one](#one) | y" not in text
    assert page.made(text, found) == text
    with pytest.raises(ValueError, match="no place for two"):
        page.made(before, {**found, "two": result_of("two")})
    with pytest.raises(ValueError, match="has a place for one, of which there is no result"):
        page.made(before, {})
    with pytest.raises(ValueError, match="has 0 ends"):
        page.made(before.replace("<!-- /one -->", ""), found)


def test_of_many_figures_those_that_reach_their_aims_are_counted() -> None:
    many = [Figure(f"f{at}", [1.0], at_most=2.0) for at in range(page.MANY)] + [Figure("slow", [3.0], at_most=2.0)]
    text = page.made(
        "<!-- summary -->\n<!-- /summary -->\n<!-- one -->\n<!-- /one -->", {"one": result_of("one", *many)}
    )
    assert "| f1 |" not in text and text.count("slow") == 2
    assert f"| {page.MANY} more |" in text and f"{page.MANY} more reach their aims." in text


def test_the_page_says_what_the_results_say() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.made(text, page.results()) == text, (
        "make it again: python -c 'from benchmarks import page; page.write()'"
    )


def test_every_benchmark_that_make_bench_runs_is_there_and_explained() -> None:
    guide = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        there = ROOT / "benchmarks" / name
        assert there.with_suffix(".py").exists() or (there / "__main__.py").exists(), name
        assert f"| `{name}` |" in guide, name
    listed = re.findall(r"^\| `(\w+)` \|", guide, flags=re.MULTILINE)
    assert set(listed) >= set(NAMES)
    assert {file.stem for file in RESULTS.glob("*.json")} <= set(listed)
