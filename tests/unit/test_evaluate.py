"""Evaluation with an engine that is a fake: questions, targets, losses over HTTP, the report, and errors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from rich.console import Console

from ray_ft import answers, paths
from ray_ft.answers.target import Answer, Prompt, Sampling, Target
from ray_ft.data import pack, stream
from ray_ft.data.prepare import prepare
from ray_ft.data.samples import Conversation, Joined
from ray_ft.demo import DemoPaths
from ray_ft.errors import CheckpointError, DataError, ModelError, RecipeError, ServeError
from ray_ft.evaluate import Question, evaluate, held_out_questions, show
from ray_ft.evaluate import run as running
from ray_ft.evaluate.losses import Loss
from ray_ft.evaluate.questions import groups
from ray_ft.evaluate.remote import documents_of, endpoint_loss
from ray_ft.evaluate.report import System, build
from ray_ft.recipe import Recipe
from ray_ft.view import View

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def shown() -> tuple[View, io.StringIO]:
    out = io.StringIO()
    return View(Console(file=out, soft_wrap=True)), out


def conversation(asked: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of ours, and one of somebody else's that must go nowhere."""
    monkeypatch.delenv("RAY_FT_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "secret")


# ---------------------------------------------------------------------------------------------------------- questions


def test_questions_know_their_source_their_languages_and_what_to_ask(
    make_recipe: MakeRecipe, demo: DemoPaths, tmp_path: Path
) -> None:
    rows = [{"prompt": f"ask {n}", "completion": "yes"} for n in range(3)]
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [
        {"path": demo.heldout, "format": "translation", "prompt": "{text}"},
        {"path": str(file), "format": "prompt_completion", "chat": False},
    ]
    recipe = make_recipe(f"data.eval={json.dumps(held_out)}")
    questions = held_out_questions(recipe, 1000)
    assert len(questions) == 303
    first, last = questions[0], questions[-1]
    assert first.source == "data.eval.0 (heldout.parquet)" and last.source == "data.eval.1 (plain.jsonl)"
    assert first.pair in ("en-fr", "en-es") and first.target_language == first.pair[3:]
    assert last.pair is None and last.origin == f"{file}:3"
    assert first.prompt.text is None and first.prompt.messages == first.asked == [dict(first.sample.prompt[0])]
    assert (last.prompt.messages, last.prompt.text, last.asked) == (None, "ask 2", "ask 2")
    found = groups(questions)
    assert {name: len(rows) for name, rows in found["source"].items()} == {first.source: 300, last.source: 3}
    assert sum(map(len, found["language_pair"].values())) == 300
    few = held_out_questions(recipe, 20)
    assert few == held_out_questions(recipe, 20) and len(few) == 20
    assert [questions.index(question) for question in few] == sorted(questions.index(question) for question in few)


def test_a_question_without_tags_is_in_no_group() -> None:
    assert groups([Question("here:1", Joined("a", "b"))]) == {"language_pair": {}, "source": {}}


# ------------------------------------------------------------------------------------------------------------ engines


class Echo:
    """Answers with what a function makes of the prompt's last content."""

    name = "transformers"

    def __init__(self, model: str, answer: Callable[[str], Answer]) -> None:
        self.model, self._answer = model, answer
        self.identity: dict[str, Any] = {}

    def answers(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Answer]:
        for prompt in prompts:
            yield self._answer(prompt.messages[-1]["content"] if prompt.messages else prompt.text or "")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What answers, by location; and in "asked" with which settings. The cluster is not started."""
    known: dict[str, Any] = {"asked": []}

    @contextlib.contextmanager
    def opened(target: Target, engine: str = "auto", **settings: Any) -> Iterator[Echo]:
        known["asked"].append((target.location, engine, settings))
        yield known[target.location]

    monkeypatch.setattr(answers, "opened", opened, raising=False)
    monkeypatch.setattr(running.session, "connected", contextlib.nullcontext)
    monkeypatch.setattr(running.stream, "spread", stream.in_process)
    monkeypatch.setattr(running, "losses", lambda judged, *_: [Loss(1.5, 10, 2)] * len(judged))
    return known


def right(references: dict[str, str]) -> Callable[[str], Answer]:
    return lambda asked: Answer(f" {references[asked]}\n", "stop", 5, 5)


def references_of(recipe: Recipe) -> dict[str, str]:
    return {question.prompt.messages[-1]["content"]: question.reference for question in held_out_questions(recipe, 999)}  # type: ignore[index]


@pytest.fixture
def model_folder(demo: DemoPaths, tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.symlink_to(demo.base, target_is_directory=True)
    return str(folder)


def test_a_model_beside_its_base(
    make_recipe: MakeRecipe, engines: dict[str, Any], model_folder: str, demo: DemoPaths, tmp_path: Path, shown: Any
) -> None:
    recipe = make_recipe("evaluate.max_rows=30", "evaluate.resamples=100")
    engines[model_folder] = Echo("tuned", right(references_of(recipe)))
    engines[demo.base] = Echo("base", lambda asked: Answer("un", "length", 5, 5))
    view, out = shown
    found = evaluate(model_folder, view, recipe=str(tmp_path / "recipe.yaml"), to=str(tmp_path / "out"))
    settings = {"batch_size": 32, "device": "auto", "gpus": 1}
    assert engines["asked"] == [(model_folder, "auto", settings), (demo.base, "transformers", settings)]  # asked alike
    assert found["model"]["scores"]["exact_match"] == 1
    assert found["base"]["scores"]["exact_match"] < 0.2
    difference = found["difference"]["exact_match"]
    assert difference["value"] == pytest.approx(1 - found["base"]["scores"]["exact_match"])
    assert 0 < difference["low"] <= difference["value"] <= difference["high"] and difference["p"] < 0.05
    assert found["model"]["loss"] == 1.5 and found["model"]["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["base"]["cut_off"] == 200 and found["model"]["cut_off"] == 0
    pairs = found["groups"]["language_pair"]
    assert set(pairs) == {"en-es", "en-fr"} and sum(pair["rows"] for pair in pairs.values()) == 200
    assert found["worst"] == [] and len(found["samples"]) == 20
    sample = found["samples"][0]
    assert sample["answer"] == sample["reference"] and sample["base_answer"] == "un"
    assert sample["origin"].startswith(demo.heldout)
    assert paths.read_json(str(tmp_path / "out" / "report.json")) == json.loads(json.dumps(found, allow_nan=False))
    given = paths.read_json(str(tmp_path / "out" / "examples.json"))["examples"]
    assert len(given) == 20 and set(given[0]) == {"prompt", "reference", "origin"}
    assert given[0]["prompt"][0]["role"] == "user"
    show(found, view)
    text = out.getvalue()
    for part in ("exact match", "chrF nrefs:1", "en-es", "base: 200 answers cut off", "→ 1.000", "report: "):
        assert part in text, text


def test_without_the_base(
    make_recipe: MakeRecipe, engines: dict[str, Any], model_folder: str, demo: DemoPaths, tmp_path: Path, shown: Any
) -> None:
    recipe = make_recipe()
    engines[model_folder] = engines[demo.base] = Echo("tuned", right(references_of(recipe)))
    for target, base in ((model_folder, False), (demo.base, None)):  # not wanted, or the base itself
        engines["asked"].clear()
        found = evaluate(target, shown[0], recipe=str(tmp_path / "recipe.yaml"), base=base, engine="transformers")
        assert [(where, engine) for where, engine, _ in engines["asked"]] == [(target, "transformers")]
        assert found["base"] is None and found["difference"] == {}
        assert found["samples"][0]["base_answer"] is None
        show(found, shown[0])
    assert not (tmp_path / "runs" / "test").exists()  # what is no run is written nowhere unasked


def test_what_cannot_be_evaluated_is_named(
    make_recipe: MakeRecipe, engines: dict[str, Any], model_folder: str, tmp_path: Path, shown: Any
) -> None:
    recipe, view = make_recipe(), shown[0]
    given = str(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="is no run") as caught:
        evaluate(model_folder, view)
    assert "--recipe" in str(caught.value) and "no folder" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"where a run was meant: there is no folder .*/runs/nope"):
        evaluate("runs/nope", view)  # a hub id, by its form
    with pytest.raises(ModelError):
        evaluate(str(tmp_path / "nothing"), view, recipe=given)
    recipe.save()
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        evaluate(recipe.run.dir.root, view)
    with pytest.raises(RecipeError, match="a recipe of its own"):
        evaluate(recipe.run.dir.root, view, recipe=given)
    make_recipe("data.eval=[]").save()
    with pytest.raises(DataError, match=r"no data\.eval"):
        held_out_questions(make_recipe("data.eval=[]"), 5)
    labelled = tmp_path / "labelled.yaml"
    labelled.write_text(make_recipe('evaluate.labels=["oui"]').to_yaml())
    with pytest.raises(DataError, match=r"evaluate\.labels are 'oui'; no held-out answer is one of them"):
        evaluate(model_folder, view, recipe=str(labelled))
    with pytest.raises(ServeError, match="has its own engine"):
        evaluate("http://127.0.0.1:9/v1", view, recipe=given, base=False, engine="vllm")
    with pytest.raises(ServeError, match="no answer from"):
        evaluate("http://127.0.0.1:9/v1", view, recipe=given, base=False)


def test_a_run_that_vllm_cannot_load_is_refused_before_anything_is_judged(
    make_recipe: MakeRecipe, engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model_folder: str, shown: Any
) -> None:
    def refuse(target: Target, engine: str) -> None:
        raise CheckpointError(f"{target.location}, {engine}: not exported")

    make_recipe()
    monkeypatch.setattr(running, "losses", lambda *_: pytest.fail("judged"))
    monkeypatch.setattr(answers, "check", refuse)
    with pytest.raises(CheckpointError, match="model, vllm: not exported"):
        evaluate(model_folder, shown[0], recipe=str(Path(model_folder).parent / "recipe.yaml"), engine="vllm")


# ------------------------------------------------------------------------------------------------------------- report


def report_of(recipe: Recipe, pairs: list[tuple[str, str]], base: list[str] | None = None) -> dict[str, Any]:
    questions = [Question(f"f:{n}", conversation("q", right), "s", ("en", "zh")) for n, (_, right) in enumerate(pairs)]
    model = System("m", "fake", Loss(2.0, 4, 1), [Answer(text, "stop", 1, 1) for text, _ in pairs])
    other = base and System("b", "fake", "it is on holiday", [Answer.failed("too long") for _ in base])
    return build({"run": "r", "step": 3}, recipe, questions, model, other or None)


def test_the_worst_come_first_and_right_answers_are_not_among_them(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("evaluate.resamples=100")
    pairs = [("right", "right"), ("", "empty"), ("nearli right", "nearly right"), ("xyz", "quite another")]
    found = report_of(recipe, pairs)
    assert [row["origin"] for row in found["worst"]] == ["f:1", "f:3", "f:2"]
    assert found["model"]["scores"]["exact_match"] == 0.25  # an empty answer counts
    assert "tok:zh" in found["signatures"]["bleu"] and "tok:zh" in found["groups"]["source"]["s"]["bleu_signature"]


def test_labels_and_failures_are_in_the_report(make_recipe: MakeRecipe, shown: Any) -> None:
    recipe = make_recipe('evaluate.labels=["yes","no"]', "evaluate.resamples=100")
    found = report_of(recipe, [("yes", "yes"), ("perhaps", "no")], ["", ""])
    assert found["labels"]["accuracy"] == found["model"]["scores"]["accuracy"] == 0.5
    assert found["labels"]["confusion"]["counts"] == [[1, 0, 0], [0, 0, 1]]
    assert found["labels"]["base"]["accuracy"] == 0
    assert found["difference"]["accuracy"]["value"] == 0.5
    assert found["base"]["loss"] is None and found["base"]["no_loss"] == "it is on holiday"
    assert found["base"]["failed"] == 2 and found["base"]["first_failure"] == "too long"
    show(found, shown[0])
    assert "no loss of the base: it is on holiday" in shown[1].getvalue()
    assert "base: 2 without an answer, such as: too long" in shown[1].getvalue()


def test_one_row_and_markup_are_shown_as_they_are(make_recipe: MakeRecipe, shown: Any) -> None:
    found = report_of(make_recipe("evaluate.resamples=100"), [("[bold]x[/]", "[red]y")], ["[/]"])
    show(found, shown[0])
    assert "'[bold]x[/]' for '[red]y'" in shown[1].getvalue()
    assert found["difference"]["chrf"]["p"] == 1


# --------------------------------------------------------------------------------------------- losses over an endpoint


class Server:
    """A completions endpoint that gives each token the log-probability of a table; or refuses, as its `mode` says."""

    def __init__(self, table: np.ndarray, mode: Literal["gives", "refuses", "ignores", "chat only", "lies"]) -> None:
        self.mode, self.prompts = mode, []  # type: tuple[str, list[list[int]]]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "x"}]})

            def do_POST(self) -> None:
                assert "secret" not in str(self.headers) and "authorization" not in self.headers
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if outer.mode == "refuses":
                    self.reply(400, {"error": {"message": "unknown field 'prompt_logprobs'"}})
                elif outer.mode == "chat only":
                    self.reply(404, {"error": {"message": "not found"}})
                else:
                    ids = asked["prompt"]
                    outer.prompts.append(ids)
                    assert asked["prompt_logprobs"] == 0 and asked["max_tokens"] == 1
                    given = [None, *({str(i): {"logprob": float(table[i])}} for i in ids[1:])]
                    given = given[:-1] if outer.mode == "lies" else given
                    extra = {} if outer.mode == "ignores" else {"prompt_logprobs": given}
                    choice = {"index": 0, "text": "x", "finish_reason": "length", **extra}
                    self.reply(200, {"id": "1", "object": "text_completion", "model": "m", "choices": [choice]})

            def reply(self, status: int, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Target:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return Target("endpoint", f"http://127.0.0.1:{self.server.server_address[1]}/v1")

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def few(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """A recipe with thirty held-out rows."""
    file = tmp_path / "few.jsonl"
    rows = [{"prompt": f"number {n}", "completion": "one " * (n + 1)} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_recipe(f"data.eval={json.dumps([{'path': str(file), 'format': 'prompt_completion'}])}")


def test_an_endpoints_loss_is_over_every_target_token_once(few: Recipe) -> None:
    recipe = few
    prepared = prepare(recipe, "eval", recipe.model.path, stream.in_process)
    documents = list(documents_of(prepared))
    assert len(documents) == prepared.counts.used
    assert sum(first for *_, first in documents) == prepared.rows
    table = -np.random.default_rng(0).uniform(0.1, 3, 100_000)
    server = Server(table, "gives")
    with server as target:
        found = endpoint_loss(target, prepared, 8, lambda done, total: None)
    assert isinstance(found, Loss)
    rows = prepared.read(prepared.units)
    wanted = rows.input_ids[(rows.flags & pack.TRAINED) > 0]  # however they lie in the rows
    assert found.targets == len(wanted) and found.rows == prepared.rows
    assert found.loss == pytest.approx(-table[wanted].mean())
    assert sorted(server.prompts) == sorted(ids.tolist() for ids, *_ in documents)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("refuses", "refuses prompt_logprobs \\(400\\).*unknown field"),
        ("ignores", "does not give prompt_logprobs"),
        ("chat only", "has no /v1/completions"),
        ("lies", "probabilities of .* tokens for a prompt of"),
    ],
)
def test_an_endpoint_that_gives_no_loss_says_why(few: Recipe, mode: Any, reason: str) -> None:
    recipe = few
    prepared = prepare(recipe, "eval", recipe.model.path, stream.in_process)
    with Server(np.zeros(100_000), mode) as target:
        found = endpoint_loss(target, prepared, 4, lambda done, total: None)
    assert isinstance(found, str) and re.search(reason, found), found
