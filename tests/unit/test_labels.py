"""Rows with labels: what a recipe refuses, what a row becomes, how it is counted and weighted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from ray_ft.data import stream
from ray_ft.data.counts import Counts
from ray_ft.data.identity import explain
from ray_ft.data.lines import Reject
from ray_ft.data.order import Order
from ray_ft.data.pack import START, TRAINED
from ray_ft.data.prepare import check, prepare
from ray_ft.data.render import Renderer, Tokens, load_tokenizer
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Labelled
from ray_ft.demo import DemoPaths
from ray_ft.demo.labels import LABELS
from ray_ft.errors import DataError, RecipeError
from ray_ft.recipe import LabelsSource, Recipe
from ray_ft.train.objective import class_weights
from ray_ft.train.schedule import ends_epoch

NAMES = ["good", "bad", "2"]
SOURCE = LabelsSource(path="none.jsonl", format="labels")


@pytest.fixture
def labelled(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a recipe over rows with labels, by default good ones."""

    def make(rows: list[dict[str, Any]] | None = None, *overrides: str) -> Recipe:
        file = tmp_path / "rows.jsonl"
        made = (
            [{"text": f"{word} one hundred", "label": word} for word in ("good", "bad", "2")] if rows is None else rows
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return make_recipe(
            "data.eval=[]", f"model.labels={json.dumps(NAMES)}", *overrides,
            sources=[{"path": str(file), "format": "labels"}],
        )  # fmt: skip

    return make


# ------------------------------------------------------------------------------------------------------------ recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.labels=[]", "format labels, and model.labels names none"),
        ('model.labels=["a"]', "'a' alone leaves nothing to decide"),
        ('model.labels=["a", "b", "a"]', "'a' stands there twice"),
        ('model.labels=["a", " "]', "a label's name is empty"),
        ("model.labels=[yes, no]", "True is no name but bool, as YAML reads yes"),
        ("model.labels=[0, 1]", "0 is no name but int"),
        ("train.class_weights={good: 2, ugly: 1}", "names 'ugly', and model.labels has 'good', 'bad', '2'"),
        ("train.class_weights={good: 0}", "greater than 0"),
        ("evaluate.labels=[good]", "evaluate.labels is for answers that are labels"),
        ("evaluate.during={every: 5}", "train.workers is 0"),
    ],
)
def test_labels_that_cannot_be_are_refused(labelled: Callable[..., Recipe], override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        labelled(None, override)
    assert said in str(caught.value)


def test_what_answers_is_no_part_of_labels(labelled: Callable[..., Recipe]) -> None:
    eval_too = "data.eval=[{path: x.jsonl, format: labels}]"
    with pytest.raises(RecipeError, match=r"evaluate\.during asks for answers, .* train\.eval_every: epoch"):
        labelled(None, eval_too, "evaluate.during={every: 5}", "train.workers=1")


@pytest.mark.parametrize("override", ["model.labels=[a, b]", "train.class_weights=balanced"])
def test_other_formats_have_no_labels(make_recipe: Callable[..., Recipe], override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(RecipeError, match=rf"{key} is read by sources of format labels, and data\.train\.0 has format"):
        make_recipe(override)


def test_one_run_is_for_one_task(labelled: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"eval\.0 has format text, which trains for language"):
        labelled(None, "data.eval=[{path: x.jsonl, format: text}]")
    assert labelled().data.task == "labels"


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("label", "number"), [("good", 0), ("bad", 1), (1, 1), (2, 2), ("2", 2)])
def test_a_label_is_a_name_or_a_number(label: Any, number: int) -> None:
    assert to_sample(SOURCE, {"text": " so ", "label": label}, labels=NAMES) == Labelled(" so ", number)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"text": "a", "label": "ugly"}, "unknown label", "'ugly'; model.labels has 0 'good', 1 'bad', 2 '2'"),
        ({"text": "a", "label": "Good"}, "unknown label", "'Good'"),
        ({"text": "a", "label": "1"}, "unknown label", "'1'"),
        ({"text": "a", "label": 3}, "unknown label", "3;"),
        ({"text": "a", "label": -1}, "unknown label", "-1"),
        ({"text": "a", "label": True}, "field 'label' is bool, neither a label's name nor its number", "True"),
        ({"text": "a", "label": 1.0}, "field 'label' is float, neither a label's name nor its number", "1.0"),
        ({"text": "a", "label": None}, "field 'label' is null, neither a label's name nor its number", ""),
        ({"text": "a", "label": ["good"]}, "field 'label' is list, neither a label's name nor its number", ""),
        ({"text": "a"}, "missing field 'label'", "'text'"),
        ({"text": " ", "label": 0}, "field 'text' is empty", ""),
        ({"text": None, "label": 0}, "field 'text' is null, not a string", ""),
        ({"label": 0}, "missing field 'text'", ""),
    ],
)
def test_a_row_that_says_no_label_or_no_text_is_rejected(row: dict[str, Any], reason: str, detail: str) -> None:
    found = to_sample(SOURCE, row, labels=NAMES)
    assert isinstance(found, Reject)
    assert found.reason == reason and detail in found.detail


def test_a_text_with_a_special_token_is_rejected(demo: DemoPaths) -> None:
    special = Renderer(load_tokenizer(demo.base)).special
    found = to_sample(SOURCE, {"text": "one<eos>two", "label": 0}, special, labels=NAMES)
    assert isinstance(found, Reject) and found.reason == "holds the special token '<eos>'"


# ------------------------------------------------------------------------------------------------------------ tokens

TEXTS = ["ninety", "  two   hundred and one ", "zwei\nund\tzwanzig", "Ünïcode 😀", "user: <b>"]


def test_the_tokens_are_those_of_the_tokenizers_own_call_with_the_label_behind_them(demo: DemoPaths) -> None:
    served = AutoTokenizer.from_pretrained(demo.base)
    encoded = Renderer(load_tokenizer(demo.base), enough=64).encode([Labelled(t, n) for n, t in enumerate(TEXTS)])
    for number, (text, tokens) in enumerate(zip(TEXTS, encoded, strict=True)):
        assert isinstance(tokens, Tokens)
        assert tokens.ids.tolist() == [*served(text)["input_ids"], number]
        assert tokens.trained.tolist() == [False] * (len(tokens) - 1) + [True]
        assert tokens.ids[0] == served.bos_token_id


def test_a_cut_keeps_the_label_and_what_the_tokenizer_puts_behind_a_text(demo: DemoPaths) -> None:
    tokenizer = deepcopy(load_tokenizer(demo.base))
    both = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=both)
    (tokens,) = Renderer(tokenizer, enough=8).encode([Labelled("one two three four five six " * 200, 7)])
    assert isinstance(tokens, Tokens) and not tokens.whole
    cut = tokens.cut(8)
    assert len(cut) == 8 and cut.ids[:6].tolist() == tokens.ids[:6].tolist()
    assert cut.ids[6:].tolist() == [tokenizer.eos_token_id, 7]
    assert cut.trained.tolist() == [False] * 7 + [True]


# ---------------------------------------------------------------------------------------------------------- prepared


def prepared_of(recipe: Recipe) -> Any:
    return prepare(recipe, "train", recipe.model.path, stream.in_process)


def test_rows_in_are_rows_used_and_rows_rejected_with_file_and_line(labelled: Callable[..., Recipe]) -> None:
    rows = [
        {"text": "one", "label": "good"}, {"text": "two", "label": "ugly"}, {"text": "", "label": "bad"},
        {"text": "three", "label": 1}, {"label": 1}, {"text": "four"}, {"text": "five hundred " * 300, "label": 2},
    ]  # fmt: skip
    recipe = labelled(rows, "data.max_bad_rows=1")
    prepared = prepared_of(recipe)
    counts = prepared.counts
    assert (counts.rows, counts.used, counts.rejected.total()) == (7, 2, 5)
    assert counts.labels == {"0/0": 1, "0/1": 1} and counts.trained_tokens == 2
    with open(prepared.rejects, encoding="utf-8") as file:
        rejects = [json.loads(line) for line in file]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (2, "unknown label"), (3, "field 'text' is empty"), (5, "missing field 'text'"), (6, "missing field 'label'"),
        (7, "longer than seq_len"),
    ]  # fmt: skip
    assert all(reject["file"].endswith("rows.jsonl") for reject in rejects)
    assert counts.say_labels(NAMES) == "good 1, bad 1, 2 0, none of 2"
    assert Counts.from_json(json.loads(json.dumps(counts.to_json()))) == counts


def test_a_long_text_is_cut_and_keeps_its_label(labelled: Callable[..., Recipe]) -> None:
    recipe = labelled([{"text": "five hundred " * 300, "label": 2}], "data.long_rows=truncate", "data.seq_len=16")
    prepared = prepared_of(recipe)
    rows = prepared.read(prepared.units)
    assert prepared.counts.truncated == 1
    assert (rows.flags[0, -1] & TRAINED) and rows.input_ids[0, -1] == 2 and not (rows.flags[0, :-1] & TRAINED).any()


def test_packed_texts_are_documents_of_their_own_each_with_one_label(labelled: Callable[..., Recipe]) -> None:
    prepared = prepared_of(labelled())
    rows = prepared.read(prepared.units)
    assert len(rows) == 1
    ends = np.flatnonzero(rows.flags[0] & TRAINED)
    assert sorted(rows.input_ids[0, ends].tolist()) == [0, 1, 2]
    assert all(rows.flags[0, ends + 1] & START)


def test_other_labels_are_other_data(labelled: Callable[..., Recipe]) -> None:
    one, other = labelled(), labelled(None, 'model.labels=["bad", "good", "2"]')
    keys = [prepared_of(recipe).location.rpartition("/")[2] for recipe in (one, other)]
    (change,) = explain(one.run.storage, *keys)
    assert change == 'model.labels was ["good", "bad", "2"], is ["bad", "good", "2"]'


def test_too_many_unknown_labels_refuse_the_run(labelled: Callable[..., Recipe]) -> None:
    recipe = labelled([{"text": "one", "label": "good"}, {"text": "two", "label": "ugly"}])
    with pytest.raises(DataError, match=r"50.0% of 2 rows are bad.*1 × unknown label"):
        check(prepared_of(recipe), recipe, "train", "rejects.jsonl")


# ----------------------------------------------------------------------------------------------------------- weights


def counted(*labels: int) -> Counts:
    return Counts(labels=Counter({f"0/{number}": rows for number, rows in enumerate(labels) if rows}))


def test_balanced_labels_count_alike_and_one_without_rows_does_not_count(labelled: Callable[..., Recipe]) -> None:
    recipe = labelled(None, "train.class_weights=balanced")
    weights = class_weights(recipe, counted(6, 2, 0))
    assert weights is not None and weights[0] * 6 == pytest.approx(weights[1] * 2)
    assert weights[0] * 6 + weights[1] * 2 == pytest.approx(8)  # a mean of 1 over the rows
    assert class_weights(labelled(), counted(6, 2, 0)) is None


def test_only_the_ratios_of_weights_matter_and_sources_count_as_often_as_they_are_used(
    labelled: Callable[..., Recipe],
) -> None:
    one, other = (labelled(None, f"train.class_weights={{good: {w}, bad: {w / 2}, '2': {w}}}") for w in (1, 10))
    assert class_weights(one, counted(1, 2, 1)) == pytest.approx([4 / 3, 2 / 3, 4 / 3])
    assert class_weights(other, counted(1, 2, 1)) == pytest.approx(class_weights(one, counted(1, 2, 1)))
    source = json.dumps([{"path": "x.jsonl", "format": "labels", "weight": 3}, {"path": "y.jsonl", "format": "labels"}])
    twice = labelled(None, "train.class_weights=balanced", f"data.train={source}")
    found = class_weights(twice, Counts(labels=Counter({"0/0": 1, "1/1": 1, "1/2": 2})))  # 3, 1, 2 uses in an epoch
    assert found == pytest.approx([2 / 3, 2, 1])


def test_epochs_end_at_the_step_that_uses_their_last_row(labelled: Callable[..., Recipe]) -> None:
    rows = [{"text": "nine " * 100, "label": number % 3} for number in range(10)]  # each fills a packed row
    recipe = labelled(rows, "train.epochs=3", "train.eval_every=epoch")
    order = Order.of(recipe, prepared_of(recipe))
    assert order.rows == 30
    assert [step for step in range(1, 9) if ends_epoch(order, 4, step)] == [3, 5, 8]
    assert [step for step in range(1, 4) if ends_epoch(order, 10, step)] == [1, 2, 3]


def test_the_demo_has_rows_with_labels_and_no_number_in_both_files(label_files: tuple[str, str]) -> None:
    parts = [[json.loads(line) for line in Path(file).read_text().splitlines()] for file in label_files]
    train, heldout = parts
    assert {row["label"] for row in train} == {row["label"] for row in heldout} == set(LABELS)
    assert not {row["text"] for row in train} & {row["text"] for row in heldout}
