"""Validation beside the training: answers to a few held-out rows, and to prompts of one's own, by the newest
checkpoint, while the workers go on.

A thread here looks for committed checkpoints; a Ray actor, with GPUs of its own or none, loads the newest one's weights
and answers. It lives for one validation, so that nothing of the cluster is held in between, and gives way as soon as
the workers are lost, which may need its place to come back. Where training is faster, checkpoints between are passed
over. Nothing that happens here ends or delays the training: it is said in a line.

    <run>/eval/steps/step_00000100.json   scores and answers; the same in <run>/tensorboard/validation

Limits: for runs with workers (train.workers above 0), and for models that fit one GPU, as answers come from
transformers; on CPUs it takes its share of cores that the workers compute on, at the lowest priority.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ft import paths
from ray_ft.answers.found import Found
from ray_ft.answers.target import Answer, Prompt, Sampling
from ray_ft.errors import RecipeError, first_line
from ray_ft.evaluate.curves import Curves
from ray_ft.evaluate.questions import held_out_questions
from ray_ft.evaluate.report import TITLES, form, sample, short
from ray_ft.evaluate.scores import Scorer
from ray_ft.recipe import Recipe
from ray_ft.train import checkpoint, cluster

POLL_SECONDS = 2.0
LAST_SECONDS = 900.0  # how long the end of a training waits for its last validation
WAITING_SECONDS = 60.0  # without a place, after which people are told
SAMPLES = 5  # answers that a result keeps
SHOWN = ("accuracy", "macro_f1", "answer_match", "exact_match", "chrf", "bleu")


@dataclass(frozen=True)
class Answered:
    """What an actor brings back. `answers` None: the checkpoint was deleted while it was being read."""

    step: int
    answers: list[Answer] | None


class Validation:
    """A companion of `launch.train`; see `ray_ft.train.launch.Companion`.

    Raises:
        RecipeError: the recipe asks for none.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.evaluate.during is None:
            raise RecipeError("evaluate.during is null: nothing is to be validated", ["evaluate.during={every: 100}"])
        self._recipe, self._during, self._run = recipe, recipe.evaluate.during, recipe.run.dir
        self._free, self._over, self._stop, self._done = (threading.Event() for _ in range(4))
        self._say: Callable[[str], None] = lambda line: None
        self._curves: Curves | None = None

    # What launch tells.

    def started(self, say: Callable[[str], None]) -> None:
        self._say = say
        threading.Thread(target=self._watch, name="ray-ft-validation", daemon=True).start()

    def resumed(self) -> None:
        self._free.set()

    def paused(self) -> None:
        self._free.clear()

    def logged(self, row: dict[str, float], total: int) -> None:
        pass  # it looks for checkpoints by itself

    def ended(self, complete: bool) -> None:
        if not complete:
            self._stop.set()  # first: the end alone asks for a last validation
        self._over.set()
        try:
            if not self._done.wait(LAST_SECONDS):
                self._say(f"the last validation was given up after {LAST_SECONDS:.0f} s")
        finally:  # also when Ctrl-C ends the waiting
            self._stop.set()
            self._done.wait(10)

    # The thread.

    def _watch(self) -> None:
        try:
            held_out = self._recipe.data.eval
            self._questions = held_out_questions(self._recipe, self._during.max_rows) if held_out else []
            self._scorer = Scorer(
                [question.reference for question in self._questions],
                [question.target_language for question in self._questions],
                self._recipe.evaluate.labels,
                [question.thinking for question in self._questions],
            )
            self._validate_as_due()
        except Exception as error:
            self._say(f"validation ended: {first_line(error)}; training goes on")
        finally:
            with contextlib.suppress(OSError):
                if self._curves:
                    self._curves.close()
            self._done.set()

    def _validate_as_due(self) -> None:
        last = max((int(name[5:-5]) for name in paths.list_dir(self._run.validations) if _is_result(name)), default=0)
        unreachable = ""
        while not self._stop.is_set():
            over = self._over.is_set()  # read first: the last checkpoint is there when the training is over
            newest = last
            try:
                newest = max(checkpoint.steps(self._run.checkpoints), default=0)
            except Exception as error:
                if first_line(error) != unreachable:
                    self._say(f"validation cannot look for checkpoints: {first_line(error)}")
                unreachable = first_line(error)
            if newest >= last + self._during.every or (over and newest > last):
                if over or self._free.is_set():
                    last = self._validate(newest) or last
                    continue
            elif over:
                return
            self._over.wait(POLL_SECONDS) if not over else self._stop.wait(POLL_SECONDS)

    def _validate(self, newest: int) -> int | None:
        """Validate the newest checkpoint. Returns its step, also where that failed; None: it is to be tried again."""
        began = time.monotonic()
        try:
            answered = self._answered()
            if answered is None:
                return None
            if answered.answers is None:
                self._say(f"the checkpoint of step {answered.step} was deleted meanwhile; the newest is next")
                return None
            self._record(answered.step, answered.answers, time.monotonic() - began)
            return max(answered.step, newest)  # an older one, where the newest is broken
        except Exception as error:
            self._say(f"validation of step {newest} failed: {_reason(error)}; training goes on")
            return newest

    def _answered(self) -> Answered | None:
        """An actor's answers; None where it had to give way."""
        import ray

        gpus = self._during.gpus if cluster.on_gpus(self._recipe) else 0
        # No CPU: where the cluster has none to spare, the tasks that read rows for the workers would go without.
        actor = ray.remote(num_cpus=0, num_gpus=gpus)(_Validator).remote(self._recipe, gpus > 0)
        began, told = time.monotonic(), False
        try:
            placed = actor.ready.remote()
            reference = actor.answer.remote(self._prompts)
            while True:
                ready, _ = ray.wait([reference], timeout=POLL_SECONDS / 2)
                if ready:
                    return ray.get(reference)
                if self._stop.is_set() or not (self._free.is_set() or self._over.is_set()):
                    return None
                waits = not told and time.monotonic() - began > WAITING_SECONDS
                if waits and not ray.wait([placed], timeout=0)[0]:
                    told = True
                    self._say(f"validation waits for a place with {gpus} GPUs beside the workers'")
        finally:
            ray.kill(actor)

    @property
    def _prompts(self) -> list[Prompt]:
        """Of the held-out rows, then one's own."""
        own = [
            Prompt(messages=[{"role": "user", "content": text}]) if self._recipe.data.chat else Prompt(text=text)
            for text in self._during.prompts
        ]
        return [*(question.prompt for question in self._questions), *own]

    def _record(self, step: int, given: Sequence[Answer], seconds: float) -> None:
        answers, own = given[: len(self._questions)], given[len(self._questions) :]
        scored = self._scorer.scored([answer.text for answer in answers])
        scores = self._scorer.scores(scored)
        failed = [answer.error for answer in given if answer.error]
        result: dict[str, Any] = {
            "step": step,
            "rows": len(answers),
            "failed": len(failed),
            "scores": scores,
            "signatures": self._scorer.signatures(),
            "seconds": seconds,
            "samples": [sample(*pair) for pair in zip(self._questions, answers, strict=True)][:SAMPLES],
            "prompts": [
                {"prompt": prompt, "answer": answer.text.strip(), **({"error": answer.error} if answer.error else {})}
                for prompt, answer in zip(self._during.prompts, own, strict=True)
            ],
        }
        paths.write_json(paths.join(self._run.validations, f"step_{step:08d}.json"), result)
        self._curves = self._curves or Curves(self._run)
        self._curves.add(step, scores, {kind: result[kind] for kind in ("samples", "prompts")})
        shown = ", ".join(f"{TITLES[name]} {form(name, scores[name])}" for name in SHOWN if name in scores)
        shown = shown or ", ".join(repr(short(answer.text)) for answer in own[:2])
        broken = f", {len(failed)} without an answer ({failed[0]})" if failed else ""
        self._say(f"validation of step {step}: {shown} ({len(given)} answers in {seconds:.0f} s{broken})")


def _is_result(name: str) -> bool:
    return name.startswith("step_") and name.endswith(".json") and name[5:-5].isdigit()


def _reason(error: BaseException) -> str:
    """The first line of what was raised in the actor, not of Ray's report on it."""
    cause = getattr(error, "cause", None)
    return first_line(cause if isinstance(cause, BaseException) else error)


class _Validator:
    """The actor: the newest checkpoint's weights, asked once."""

    def __init__(self, recipe: Recipe, cuda: bool) -> None:
        self._recipe, self._cuda = recipe, cuda

    def ready(self) -> None:
        """Returns once it has its place."""

    def answer(self, prompts: Sequence[Prompt]) -> Answered:
        import torch

        from ray_ft.answers.local import Transformers

        if not self._cuda:
            os.nice(19)
            torch.set_num_threads(1)
        settings, run = self._recipe.evaluate, self._recipe.run
        what = Found(
            name=run.name,
            source=self._recipe.model.location,
            identity={},
            run=run.dir.root,
            wanted=self._recipe.serve.max_model_len,
            trained_seq_len=self._recipe.data.seq_len,
        )
        trained = what.trained  # looked up now: the newest there is
        assert trained is not None
        try:
            engine = Transformers(what, settings.batch_size, "cuda" if self._cuda else "cpu", 0)
            answers = list(engine.answers(prompts, Sampling(settings.max_new_tokens)))
        except Exception:
            if checkpoint.is_committed(trained.found.location):
                raise
            return Answered(trained.found.step, None)
        return Answered(trained.found.step, answers)
