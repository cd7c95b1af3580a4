"""Validation beside the training: what it hears, when it is due, and that nothing it does reaches the training."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import recipe_of
from rich.console import Console

from ray_ft import paths
from ray_ft.answers.target import Answer
from ray_ft.demo import DemoPaths
from ray_ft.errors import RecipeError, TrainingError
from ray_ft.evaluate import during, held_out_questions
from ray_ft.evaluate.during import Answered, Validation
from ray_ft.recipe import Recipe
from ray_ft.train import launch, loop
from ray_ft.view import View


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shown() -> tuple[View, io.StringIO]:
    out = io.StringIO()
    return View(Console(file=out, soft_wrap=True)), out


def recipe_for(demo: DemoPaths, storage: Path, *overrides: str) -> Recipe:
    few = [f"data.train.0.path={demo.train[0]}", "train.micro_batch=8", "train.global_batch=16", "train.eval_every=100"]
    return recipe_of(demo, storage, *few, *overrides)


# ------------------------------------------------------------------------------------- what launch tells a companion


class Recorded:
    """A companion that notes what it is told; `work` runs in a thread of its own while the training goes on."""

    def __init__(self, work: Callable[[], Any] = lambda: None) -> None:
        self.told: list[Any] = []
        self._thread = threading.Thread(target=work, daemon=True)

    def started(self, say: Callable[[str], None]) -> None:
        self.told.append("started")
        say("hello from beside")
        self._thread.start()

    def resumed(self) -> None:
        self.told.append("resumed")

    def paused(self) -> None:
        self.told.append("paused")

    def ended(self, complete: bool) -> None:
        self._thread.join()
        self.told.append(complete)


def test_a_companion_hears_of_the_run_and_holds_no_step_up(
    demo: DemoPaths, tmp_path: Path, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, seen, taken = threading.Event(), list[bool](), list[int]()
    real = loop.train_step

    def train_step(*args: Any) -> Any:
        found = real(*args)
        taken.append(1)
        if len(taken) == 3:
            trained.set()
        return found

    monkeypatch.setattr(loop, "train_step", train_step)
    companion = Recorded(lambda: seen.append(trained.wait(100)))
    launch.train(recipe_for(demo, tmp_path / "a", "train.max_steps=3"), shown[0], beside=[companion])
    assert companion.told == ["started", "resumed", True]
    assert "hello from beside" in shown[1].getvalue()
    assert seen == [True]  # all steps were taken while it was at work, and its end was waited for

    class Slow(Recorded):
        def started(self, say: Callable[[str], None]) -> None:
            seen.append(trained.wait(0.1))
            super().started(say)

    # One that holds the training up is seen by the same measure, so that it can fail.
    trained.clear()
    taken.clear()
    launch.train(recipe_for(demo, tmp_path / "b", "train.max_steps=3"), shown[0], beside=[Slow()])
    assert seen == [True, False] and trained.is_set()


def test_a_companion_hears_that_the_workers_are_gone_and_back(
    demo: DemoPaths, tmp_path: Path, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = launch._in_process

    def lost_and_back(job: Any, monitor: Any) -> int:
        monitor.take([("begin", (0, 2, 0.0, [])), ("lost", "a worker died"), ("line", "not for companions")])
        return real(job, monitor)

    monkeypatch.setattr(launch, "_in_process", lost_and_back)
    companion = Recorded()
    launch.train(recipe_for(demo, tmp_path, "train.max_steps=1"), shown[0], beside=[companion])
    assert companion.told == ["started", "resumed", "paused", "resumed", True]


def test_a_companion_that_fails_is_said_and_costs_nothing(demo: DemoPaths, tmp_path: Path, shown: Any) -> None:
    class Broken(Recorded):
        def started(self, say: Callable[[str], None]) -> None:
            raise OSError("no place left")

        def resumed(self) -> None:
            raise OSError("still none")

        def ended(self, complete: bool) -> None:
            raise OSError("none at all")

    assert launch.train(recipe_for(demo, tmp_path, "train.max_steps=2"), shown[0], beside=[Broken()]).complete
    for why in ("no place left", "still none", "none at all"):
        assert f"Broken beside the training failed: {why}; training goes on" in shown[1].getvalue()


def test_a_run_that_fails_ends_its_companions(
    demo: DemoPaths, tmp_path: Path, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TrainingError("on fire")

    monkeypatch.setattr(loop, "train_step", fail)
    companion = Recorded()
    with pytest.raises(TrainingError, match="on fire"):
        launch.train(recipe_for(demo, tmp_path, "train.max_steps=2"), shown[0], beside=[companion])
    assert companion.told[-1] is False


# --------------------------------------------------------------------------------------------------------- validation


class Clockwork(Validation):
    """Validation over checkpoints that are only numbers, without Ray; `answers` says what becomes of each attempt."""

    def __init__(self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, answers: Callable[[int], Any]) -> None:
        super().__init__(recipe)
        self.lines: list[str] = []
        self.committed: list[int] = []
        self.attempts: list[int] = []
        self._answers_to = answers
        monkeypatch.setattr(during, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(during.checkpoint, "steps", lambda folder: list(self.committed))

    def _answered(self) -> Answered | None:
        self.attempts.append(self.committed[-1])
        found = self._answers_to(self.committed[-1])
        if isinstance(found, Exception):
            raise found
        return found

    def begin(self) -> None:
        self.started(self.lines.append)

    def results(self) -> list[str]:
        return paths.list_dir(self._run.validations)


def right(recipe: Recipe) -> Callable[[int], Answered]:
    texts = [question.reference for question in held_out_questions(recipe, 4)]
    return lambda step: Answered(step, [Answer(text, "stop", 1, 1) for text in texts])


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def recipe(demo: DemoPaths, tmp_path: Path) -> Recipe:
    return recipe_for(demo, tmp_path, "train.workers=1", 'evaluate.during={"every": 10, "max_rows": 4}')


def test_each_validation_takes_the_newest_checkpoint_when_due(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Clockwork(recipe, monkeypatch, right(recipe))
    beside.begin()
    beside.committed = [5]
    beside.resumed()
    time.sleep(0.1)
    assert beside.attempts == []  # 5 steps only
    beside.committed = [5, 12, 14]
    until(lambda: beside.results() == ["step_00000014.json"])
    beside.committed = [20]
    time.sleep(0.1)
    beside.committed = [20, 24]
    until(lambda: len(beside.results()) == 2)
    beside.committed = [24, 26]
    beside.ended(True)  # and the last one, whatever the distance
    assert beside.results() == [f"step_000000{step}.json" for step in (14, 24, 26)]
    found = paths.read_json(paths.join(recipe.run.dir.validations, "step_00000026.json"))
    assert found["scores"]["exact_match"] == 1 and found["rows"] == 4 and "nrefs:1" in found["signatures"]["chrf"]
    assert any("validation of step 26: exact match 1.000, chrF 100.0" in line for line in beside.lines)
    assert any("tfevents" in name for name in paths.list_dir(paths.join(recipe.run.dir.tensorboard, "validation")))

    again = Clockwork(recipe, monkeypatch, right(recipe))  # the run is continued: what was validated stays
    again.committed = [26]
    again.begin()
    again.ended(True)
    assert again.attempts == []


def test_prompts_of_ones_own_are_answered_too_and_kept_by_step(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = 'evaluate.during={"every": 10, "max_rows": 4, "prompts": ["Say <b>two</b>.", "And?"]}'
    recipe = recipe_for(demo, tmp_path, "train.workers=1", settings)

    def answers(step: int) -> Answered:
        own = [Answer(f"two of {step}", "stop", 1, 1), Answer.failed("too long")]
        return Answered(step, [*(right(recipe)(step).answers or []), *own])

    beside = Clockwork(recipe, monkeypatch, answers)
    beside.begin()
    beside.resumed()
    for step in (10, 20):
        beside.committed = [step]
        until(lambda step=step: f"step_000000{step}.json" in beside.results())  # type: ignore[misc]
    beside.ended(True)
    assert [prompt.messages for prompt in beside._prompts][-1] == [{"role": "user", "content": "And?"}]
    found = paths.read_json(paths.join(recipe.run.dir.validations, "step_00000020.json"))
    assert found["prompts"][0] == {"prompt": "Say <b>two</b>.", "answer": "two of 20"}
    assert found["prompts"][1]["error"] == "too long" and found["failed"] == 1
    assert found["rows"] == len(found["samples"]) == 4 and found["scores"]["exact_match"] == 1  # of held-out rows alone
    board = EventAccumulator(paths.join(recipe.run.dir.tensorboard, "validation"))
    board.Reload()
    texts = board.Tensors("prompts/0/text_summary")
    assert [text.step for text in texts] == [10, 20]
    assert texts[1].tensor_proto.string_val[0].decode() == "prompt:\n\n    Say <b>two</b>.\n\nanswer:\n\n    two of 20"
    assert b"reference:" in board.Tensors("samples/3/text_summary")[0].tensor_proto.string_val[0]


def test_prompts_need_no_held_out_rows_and_follow_the_template_only_where_training_does(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = 'evaluate.during={"every": 10, "prompts": ["Once"]}'
    plain = {"path": demo.train[0], "format": "text", "field": "source_text"}
    data = ["data.eval=[]", f"data.train={json.dumps([plain])}"]
    recipe = recipe_for(demo, tmp_path, "train.workers=1", *data, settings)
    beside = Clockwork(recipe, monkeypatch, lambda step: Answered(step, [Answer("upon", "stop", 1, 1)]))
    beside.committed = [10]
    beside.begin()
    beside.ended(True)
    assert [prompt.text for prompt in beside._prompts] == ["Once"]
    assert beside.lines[0].startswith("validation of step 10: 'upon' (1 answers in")


def test_a_validation_that_fails_is_said_once_and_the_next_is_made(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = right(recipe)
    beside = Clockwork(recipe, monkeypatch, lambda step: RuntimeError("out of memory") if step == 10 else fine(step))
    beside.committed = [10]
    beside.resumed()
    beside.begin()
    until(lambda: bool(beside.lines))
    time.sleep(0.05)
    assert beside.lines == ["validation of step 10 failed: out of memory; training goes on"]
    beside.committed = [10, 20]
    beside.ended(True)
    assert beside.attempts == [10, 20] and beside.results() == ["step_00000020.json"]


def test_a_checkpoint_that_retention_deletes_is_passed_over(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = right(recipe)

    def answers(step: int) -> Answered:
        if step == 10:
            beside.committed = [20]
            return Answered(10, None)
        return fine(step)

    beside = Clockwork(recipe, monkeypatch, answers)
    beside.committed = [10]
    beside.resumed()
    beside.begin()
    until(lambda: beside.results() == ["step_00000020.json"])
    beside.ended(True)
    assert "the checkpoint of step 10 was deleted meanwhile; the newest is next" in beside.lines
    assert beside.attempts == [10, 20]


def test_the_actor_answers_with_the_newest_checkpoint_and_tells_deletion_from_failure(
    demo: DemoPaths, tmp_path: Path, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_ft.answers.local import Transformers

    launch.train(recipe_for(demo, tmp_path, "train.max_steps=2"), shown[0])
    monkeypatch.setattr(during.os, "nice", lambda by: by)  # not of the tests' own process
    recipe = recipe_for(demo, tmp_path, "train.workers=1", 'evaluate.during={"every": 1}', "evaluate.max_new_tokens=4")
    prompts = [question.prompt for question in held_out_questions(recipe, 3)]
    validator = during._Validator(recipe, cuda=False)
    found = validator.answer(prompts)
    assert found.step == 2 and found.answers is not None
    assert [answer.error for answer in found.answers] == [None] * 3

    def fail(*_: Any) -> Iterator[Answer]:
        raise ValueError("a block is not what was written")

    monkeypatch.setattr(Transformers, "answers", fail)
    with pytest.raises(ValueError, match="a block"):  # the checkpoint is there, so this is a failure
        validator.answer(prompts)

    def fail_as_it_goes(*_: Any) -> Iterator[Answer]:
        during.checkpoint.delete(during.checkpoint.committed(recipe.run.dir.checkpoints)[-1][1], print)
        raise FileNotFoundError("shard_00000.safetensors")

    monkeypatch.setattr(Transformers, "answers", fail_as_it_goes)
    assert validator.answer(prompts) == Answered(2, None)


def test_it_stands_aside_while_the_workers_are_gone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Clockwork(recipe, monkeypatch, right(recipe))
    beside.committed = [10]
    beside.begin()
    time.sleep(0.1)
    assert beside.attempts == []  # the workers do not have their places yet
    beside.resumed()
    until(lambda: len(beside.results()) == 1)
    beside.paused()
    beside.committed = [20]
    time.sleep(0.1)
    assert beside.attempts == [10]
    beside.resumed()
    until(lambda: len(beside.results()) == 2)
    beside.ended(False)


def test_a_run_that_was_stopped_waits_for_no_validation(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Clockwork(recipe, monkeypatch, right(recipe))
    beside.begin()
    beside.committed = [10]
    began = time.monotonic()
    beside.ended(False)
    assert time.monotonic() - began < during.LAST_SECONDS / 10 and not beside.results()


def test_the_end_of_a_run_that_was_stopped_is_no_reason_for_a_last_validation(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(threading.Event):
        def set(self) -> None:
            super().set()
            time.sleep(0.3)  # whoever looks for it sees it before anything else is said

    beside = Clockwork(recipe, monkeypatch, right(recipe))
    beside._over = Slow()
    looked = threading.Event()
    monkeypatch.setattr(during.checkpoint, "steps", lambda folder: looked.set() or [10])
    beside.committed = [10]
    beside.begin()
    assert looked.wait(60)
    beside.ended(False)
    assert not beside.attempts


def test_the_end_waits_for_the_last_validation_only_so_long(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    beside = Clockwork(recipe, monkeypatch, lambda step: over.wait(20) and None)
    monkeypatch.setattr(during, "LAST_SECONDS", 0.2)
    beside.committed = [10]
    beside.begin()
    threading.Timer(0.5, over.set).start()
    beside.ended(True)
    assert beside.lines == ["the last validation was given up after 0 s"]


def test_what_cannot_be_validated_is_refused(demo: DemoPaths, tmp_path: Path) -> None:
    wanted = 'evaluate.during={"every": 10}'
    with pytest.raises(RecipeError, match=r"train\.workers is 0"):
        recipe_for(demo, tmp_path, wanted)
    with pytest.raises(RecipeError, match=r"evaluate\.during is null"):
        Validation(recipe_for(demo, tmp_path, "train.workers=1"))


def test_the_reason_of_a_failure_is_the_actors_own() -> None:
    class Wrapped(Exception):
        cause = ValueError("what happened\nthere")

    assert during._reason(Wrapped("a page of Ray's")) == "what happened"
    assert during._reason(OSError("here")) == "here"
