"""Answers that think first: what cannot be told apart is rejected, what is masked is masked, scores are of the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from ray_ft.answers.target import Answer
from ray_ft.data import stream
from ray_ft.data.lines import Reject
from ray_ft.data.prepare import prepare
from ray_ft.data.render import Renderer, load_tokenizer
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Sample
from ray_ft.data.thinking import fault, split
from ray_ft.demo import DemoPaths
from ray_ft.errors import RecipeError
from ray_ft.evaluate.questions import Question
from ray_ft.evaluate.report import System, build, show
from ray_ft.evaluate.scores import Scorer
from ray_ft.recipe import MessagesSource, Recipe, TemplateSource, Thinking
from ray_ft.report.evaluated import _answered
from ray_ft.view import View

TAGS = Thinking()
MASKED = Thinking(train=False)
TEMPLATE = TemplateSource(
    format="template", path="x", prompt="{q}", completion="<think>{r}</think> {a}", thinking=MASKED
)
MESSAGES = MessagesSource(format="messages", path="x", thinking=MASKED)
BAD = {
    "thinking is not closed": "<think>a b",
    "thinking is closed but not opened": "a</think>b",
    "thinking within thinking": "<think>a<think>b</think>c",
    "thinks twice in one answer": "<think>a</think>b<think>c</think>d",
    "nothing after the thinking": "<think>a</think> \n",
}


def talk(*contents: str) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    return {"messages": turns}


def sample_of(source: Any, row: dict[str, Any]) -> Sample:
    found = to_sample(source, row)
    assert not isinstance(found, Reject), found
    return found


@pytest.fixture(scope="module")
def renderer(demo: DemoPaths) -> Renderer:
    return Renderer(load_tokenizer(demo.base))


def trained(renderer: Renderer, sample: Sample) -> list[str]:
    """The text of each run of trained tokens."""
    (tokens,) = renderer.encode([sample])
    assert not isinstance(tokens, Reject), tokens
    edges = np.flatnonzero(np.diff(np.concatenate(([0], tokens.trained, [0])))).reshape(-1, 2)
    return [renderer.tokenizer.decode(tokens.ids[low:high].tolist()) for low, high in edges.tolist()]


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("reason", "answer"), BAD.items())
def test_what_cannot_be_told_apart_is_rejected_in_every_format(reason: str, answer: str) -> None:
    found = fault(answer, TAGS)
    assert found is not None and found[0] == reason
    result = to_sample(MESSAGES, talk("q", "<think>r</think>fine", "q", answer))
    assert isinstance(result, Reject) and result.reason == reason and result.detail.endswith("in answer 1")
    joined = TEMPLATE.model_copy(update={"completion": "{a}", "chat": False})
    assert isinstance(to_sample(joined, {"q": "q", "a": answer}), Reject)
    assert not isinstance(to_sample(joined.model_copy(update={"thinking": None}), {"q": "q", "a": answer}), Reject)


def test_a_tag_in_the_reasoning_column_is_no_end() -> None:
    result = to_sample(TEMPLATE, {"q": "q", "r": "I write </think> here", "a": "4"})
    assert isinstance(result, Reject) and result.reason == "thinking is closed but not opened"


def test_answers_without_thinking_and_questions_with_tags_are_used() -> None:
    assert fault("4", TAGS) is None and fault("<think></think>4", TAGS) is None
    sample_of(MESSAGES, talk("what does </think> mean?", "an end"))


def test_rejects_are_counted_with_file_line_and_reason(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"q": "q", "a": "<think>r</think>4"}, {"q": "q", "a": BAD["thinking is not closed"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(file), "format": "template", "prompt": "{q}", "completion": "{a}", "thinking": {}}
    recipe = make_recipe("data.eval=[]", sources=[source])
    prepared = prepare(recipe, "train", recipe.model.folder(weights=False), stream.in_process)
    assert (prepared.counts.used, dict(prepared.counts.rejected)) == (1, {"thinking is not closed": 1})
    (reject,) = map(json.loads, Path(prepared.rejects).read_text().splitlines())
    assert (reject["file"], reject["line"]) == (str(file), 2) and "<think>a b" in reject["detail"]


@pytest.mark.parametrize(("key", "value"), [("open", " "), ("close", ""), ("close", "<think>")])
def test_tags_that_cannot_be_told_apart_are_refused(make_recipe: Callable[..., Recipe], key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=r"name (a tag|others)"):
        make_recipe(sources=[{"path": "x", "format": "messages", "thinking": {key: value}}])


# ---------------------------------------------------------------------------------------------------------------- mask


def test_masked_thinking_and_both_of_its_tags_are_no_targets(renderer: Renderer) -> None:
    row = {"q": "one", "r": "two three", "a": "four"}
    assert trained(renderer, sample_of(TEMPLATE, row)) == [" four<end_of_turn>"]
    everything = TEMPLATE.model_copy(update={"thinking": TAGS})
    assert trained(renderer, sample_of(everything, row)) == ["<think>two three</think> four<end_of_turn>"]
    assert trained(renderer, sample_of(TEMPLATE.model_copy(update={"chat": False}), row)) == [" four<eos>"]


def test_each_turn_has_its_own_mask_and_text_before_the_thinking_is_trained(renderer: Renderer) -> None:
    sample = sample_of(MESSAGES, talk("a", "<think>b</think>one", "c", "two", "d", "three <think>e</think>four"))
    assert trained(renderer, sample) == ["one<end_of_turn>", "two<end_of_turn>", "three ", "four<end_of_turn>"]


def test_a_token_that_joins_the_tag_to_the_answer_is_trained(demo: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    tokenizer.add_tokens(["nk>f"])
    row = {"q": "one", "r": "two", "a": "four"}
    source = TEMPLATE.model_copy(update={"completion": "<think>{r}</think>{a}"})
    assert trained(Renderer(tokenizer), sample_of(source, row)) == ["nk>four<end_of_turn>"]


def test_a_template_that_opens_the_thinking_itself_or_leaves_it_out(demo: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    row = talk("q", "<think>two</think>four")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    assert trained(Renderer(tokenizer), sample_of(MESSAGES, row)) == ["four<eos>"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (result,) = Renderer(tokenizer).encode([sample_of(MESSAGES, row)])
    assert isinstance(result, Reject) and "leaves out what an answer thinks" in result.detail


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("text", "thinking", "said"),
    [
        ("<think> a </think>\n4 ", "a", "4"),
        ("a</think>4", "a", "4"),  # the template wrote the open tag
        ("<think>a", "a", ""),  # cut off
        ("4", None, "4"),
        ("<think>a</think>b</think>4", "a</think>b", "4"),
    ],
)
def test_any_answer_is_split(text: str, thinking: str | None, said: str) -> None:
    assert split(text, TAGS) == (thinking, said)
    assert split(text, None) == (None, text.strip())


def test_answer_match_is_of_what_follows_and_of_rows_that_may_think() -> None:
    references = ["<think>a</think>4", "<think>a</think>5", "plain"]
    scorer = Scorer(references, labels=["4", "5"], thinking=[TAGS, TAGS, None])
    scores = scorer.scores(scorer.scored(["<think>another way</think> 4\n", "5 <think>a", "other"]))
    assert (scores["answer_match"], scores["exact_match"]) == (1.0, 0.0)  # what was said before it counts, if cut off
    scores = scorer.scores(scorer.scored(["<think>a</think>5", "<think>a</think>5", "plain"]))
    assert (scores["answer_match"], scores["exact_match"]) == (0.5, pytest.approx(2 / 3))
    assert scores["accuracy"] == 0.5 and scores["rouge1"] == pytest.approx(200 / 3)
    assert "answer_match" not in Scorer(["a"]).scores(Scorer(["a"]).scored(["a"]))


def test_the_worst_examples_show_what_was_thought(make_recipe: Callable[..., Recipe], capsys: Any) -> None:
    rows = [talk("q", "<think>1+1=2</think>2"), talk("q", "<think>2+2=4</think>4")]
    questions = [Question(f"f:{at}", sample_of(MESSAGES, row)) for at, row in enumerate(rows)]
    given = [Answer(text, "stop", 1, 1) for text in ("<think>otherwise</think> 2", "<think>2+2=5</think>5")]
    recipe = make_recipe("evaluate.resamples=100")
    found = build({"run": "r", "step": 3}, recipe, questions, System("m", "fake", "none", given), None)
    (worst,) = found["worst"]  # thinking otherwise is no fault
    assert (worst["answer"], worst["reference"], worst["thinking"]) == ("5", "4", "2+2=5")
    assert found["model"]["scores"]["answer_match"] == 0.5
    show(found, View())
    assert "worst: '5' for '4' (f:1), thought '2+2=5'" in capsys.readouterr().out
    found["groups"]["source"] = {
        "sums": {"rows": 1, "model": {"answer_match": 1.0, "chrf": 9.0}, "base": {"chrf": 1.0}, "difference": {}},
        "words": {"rows": 1, "model": {"chrf": 9.0}, "base": {"chrf": 1.0}, "difference": {}},
    }
    show(found, View())
    (words,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("words")]
    assert words[:6] == ["words", "1", "–", "1.0", "→", "9.0"]  # a source that never thinks has no answer match
    sides = _answered(worst)[2]
    assert ("model, thinking", "2+2=5", None) in sides and ("model", "5", False) in sides
    assert ("reference, thinking", "2+2=4", None) in sides
