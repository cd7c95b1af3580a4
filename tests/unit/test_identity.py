"""What changed between two datasets is said by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ft import paths
from ray_ft.data import identity, stream
from ray_ft.data.files import File
from ray_ft.data.identity import explain
from ray_ft.data.prepare import prepare
from ray_ft.data.prepared import Prepared
from ray_ft.demo import DemoPaths
from ray_ft.errors import RecipeError
from ray_ft.recipe import Recipe

SECOND = 10**9
MOMENT = 1_793_538_309 * SECOND  # 2026-11-01 13:05:09 UTC


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"row of {name}"}) + "\n")
        os.utime(folder / f"{name}.jsonl", ns=(0, MOMENT))
    return folder


Explained = Callable[..., list[str]]


@pytest.fixture
def explained(make_recipe: Callable[..., Recipe], demo: DemoPaths, data: Path) -> Explained:
    """Prepares the folder, lets `change` change something, prepares again, and says what is told of it."""

    def explained(
        change: Callable[[], Any] = lambda: None, *overrides: str, sources: Any = None, folder: str | None = None
    ) -> list[str]:
        before = [{"format": "text", "path": str(data)}]

        def prepared(sources: Any, *overrides: str, folder: str | None = None) -> tuple[str, Prepared]:
            recipe = make_recipe(*overrides, sources=sources)
            return recipe.run.storage, prepare(recipe, "train", folder or demo.base, stream.in_process)

        storage, old = prepared(before)
        change()
        _, new = prepared(sources or before, *overrides, folder=folder)
        keys = [paths.base_name(one.location) for one in (old, new)]
        assert explain(storage, keys[0], keys[0]) == []
        found = explain(storage, *keys)
        assert (keys[0] == keys[1]) == (not found)
        return found

    return explained


def test_files_that_changed_came_and_went_are_named(explained: Explained, data: Path) -> None:
    def change() -> None:
        (data / "a.jsonl").write_text(json.dumps({"text": "a longer row"}) + "\n" * 1400)
        os.utime(data / "a.jsonl", ns=(0, MOMENT + SECOND // 2))
        (data / "b.jsonl").unlink()
        (data / "c.jsonl").write_text(json.dumps({"text": "row of c"}) + "\n")

    assert explained(change) == [
        f"{data}/a.jsonl changed: 21 bytes of 2026-11-01 13:05:09 UTC → 1,424 bytes of 2026-11-01 13:05:09.5 UTC",
        f"{data}/b.jsonl is gone",
        f"{data}/c.jsonl is new",
    ]


def test_nothing_that_changed_says_nothing(explained: Explained) -> None:
    assert explained() == []
    assert explained(lambda: None, "data.shuffle=false", "run.seed=4", "data.cache=off", "data.ledger=true") == []


def test_weights_are_no_change_of_the_rows(explained: Explained, data: Path) -> None:
    assert explained(sources=[{"format": "text", "path": str(data), "weight": 2.5}]) == []


def test_layout_is_named_as_in_the_recipe(explained: Explained) -> None:
    assert explained(lambda: None, "data.seq_len=64", "data.packing=false") == [
        "data.seq_len was 128, is 64",
        "data.packing was true, is false",
    ]


def test_sources_are_named_with_what_differs(explained: Explained, data: Path) -> None:
    one = {"format": "text", "path": str(data)}
    other = {"format": "text", "path": str(data / "b.jsonl")}
    assert explained(sources=[one, other]) == [f"{data}/b.jsonl is new", f"data.train.1 is new: {data}/b.jsonl"]
    assert explained(sources=[{**other, "field": "text"}]) == [
        f"{data}/a.jsonl is gone",
        f'data.train.0.path was ["{data}"], is ["{data}/b.jsonl"]',
    ]
    as_template = {"format": "template", "path": str(data), "prompt": "{text}", "completion": "{text}"}
    assert 'data.train.0.format was "text", is "template"' in explained(sources=[as_template])


def test_tokenizer_and_chat_template_are_named(explained: Explained, demo: DemoPaths, tmp_path: Path) -> None:
    for name, old, new, said in (
        ("chat_template.jinja", "'\\n\\n'", "'\\n'", "the chat template changed"),
        ("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true', "the tokenizer changed"),
    ):
        folder = Path(shutil.copytree(demo.base, tmp_path / name))
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new))
        assert explained(folder=str(folder)) == [said]


def test_what_is_gone_or_older_is_said_to_be(tmp_path: Path) -> None:
    (said,) = explain(str(tmp_path), "0123", "4567")
    assert said.startswith("what 0123 was made of is not known") and said.endswith("stats.json is gone")
    paths.write_json(str(tmp_path / "_prepared" / "0123" / "stats.json"), {"format": 1})
    assert explain(str(tmp_path), "0123", "4567")[0].endswith("was prepared by an older version")


def test_the_order_of_sources_alone_is_a_change(explained: Explained, data: Path) -> None:
    a, b = ({"format": "text", "path": str(data / f"{name}.jsonl")} for name in "ab")
    assert explained(sources=[a, b])[-2:] == [
        f'data.train.0.path was ["{data}"], is ["{data}/a.jsonl"]',
        f"data.train.1 is new: {data}/b.jsonl",
    ]
    found = identity.differences(
        *({**IDENTITY, "files": [[0, x, "1-1", ""], [0, y, "1-1", ""]]} for x, y in ("ab", "ba"))
    )
    assert found == ["the order of files or sources changed"]


IDENTITY: dict[str, Any] = {
    "format": 2,
    "sources": [],
    "files": [],
    "layout": {},
    "cut": {},
    "tokenizer": "x",
    "template": ["t", 1, 2, 3],
}


def test_special_tokens_and_the_form_of_the_index_are_named() -> None:
    changed = {**IDENTITY, "template": ["t", 1, 2, None], "format": 3}
    assert identity.differences(IDENTITY, changed) == [
        "the tokenizer's pad token was 3, is None",
        "this version prepares rows in another way (format 2, now 3)",
    ]


def test_credentials_are_neither_stored_nor_part_of_the_key_but_the_endpoint_is() -> None:
    def files(uri: str) -> list[list[Any]]:
        return identity.of_files([(0, File(uri, "jsonl", None, 5, "5-1"))])

    plain = files("s3://bucket/a.jsonl")
    assert files("s3://me:secret@bucket/a.jsonl") == plain == [[0, "s3://bucket/a.jsonl", "5-1", ""]]
    here, there = (files(f"s3://bucket/a.jsonl?endpoint_override={host}") for host in ("here", "there"))
    assert here != there and "here" not in json.dumps(here)
    lines = identity.differences(*({**IDENTITY, "files": found} for found in (here, there)))
    assert lines == ["s3://bucket/a.jsonl is reached in another way: the query of its URI changed"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("5-1500000000", "5-1500000000", True),
        ("5-1500000000", "5-1000000000", True),  # whole seconds
        ("5-1500000000", "5-1600000000", False),
        ("5-1000000000", "5-2000000000", False),
        ("5-1500000000", "6-1500000000", False),
        ("5-None", "5-None", True),
        ("5-None", "5-1500000000", False),
    ],
)
def test_stamps_are_equal_as_far_as_both_tell(one: str, other: str, same: bool) -> None:
    assert identity.same_stamp(one, other) is same is identity.same_stamp(other, one)


def test_a_size_without_a_time_is_shown_alone() -> None:
    assert identity.describe("1204-None") == "1,204 bytes"


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("weight", [0, -1, ".inf", ".nan"])
def test_a_weight_is_a_positive_number(make_recipe: Callable[..., Recipe], weight: Any) -> None:
    with pytest.raises(RecipeError, match=re.escape("weight")):
        make_recipe(f"data.train.0.weight={weight}")


def test_a_held_out_source_has_no_weight(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="a held-out row is used once"):
        make_recipe("data.eval.0.weight=2")


def test_off_needs_no_quotes(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("data.cache=off")
    assert recipe.data.cache == "off" and make_recipe('data.cache="off"') == recipe
    assert "cache: 'off'" in recipe.to_yaml()
    with pytest.raises(RecipeError, match="'auto' or 'off'"):
        make_recipe("data.cache=true")
