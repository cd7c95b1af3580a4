"""`ray-ft evaluate`: a run, a model or an endpoint, on a recipe's held-out rows, beside the base model.

The model's loss, its answers, then the base's: one model is in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ray_ft import answers, paths, session
from ray_ft import recipe as recipes
from ray_ft.answers.target import EngineName, Sampling, Target
from ray_ft.data import stream
from ray_ft.data.prepare import prepare
from ray_ft.data.prepared import Prepared
from ray_ft.errors import CheckpointError, DataError, RecipeError, ServeError
from ray_ft.evaluate import report
from ray_ft.evaluate.losses import Judged, Loss, losses
from ray_ft.evaluate.questions import Question, held_out_questions
from ray_ft.evaluate.remote import endpoint_loss
from ray_ft.evaluate.report import System
from ray_ft.recipe import Recipe
from ray_ft.trained import Trained
from ray_ft.view import View


def evaluate(
    target: str,
    view: View,
    *,
    recipe: str | None = None,
    base: bool | None = None,
    engine: EngineName | None = None,
    model: str | None = None,
    to: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model on held-out rows.

    Args:
        target: a run directory; a model's folder, URI or hub id; or an endpoint's URL.
        recipe: for a target that is no run, the recipe that names the held-out data, and the base as its model.
        base: whether the base is asked as well; None: as the recipe says. Never where the target is the base.
        engine: what answers; None: as the recipe says.
        model: of an endpoint, the model to ask for.
        to: folder for report.json and examples.json; None: a run's own, and nowhere for other targets.

    Returns:
        the content of report.json.

    Raises:
        CheckpointError: the run has no committed checkpoint, or no export where vLLM is to answer.
        DataError: no held-out data.
        RecipeError: no recipe where one is needed, or one where there is one already.
        ServeError: the endpoint cannot be reached, refuses the key, or has an engine of its own.
    """
    work = _Work.of(target, recipe, base, engine, model)
    questions = held_out_questions(work.recipe, work.recipe.evaluate.max_rows)
    labels = work.recipe.evaluate.labels
    if labels and not any(question.said in labels for question in questions):
        some = ", ".join(repr(question.said[:40]) for question in questions[:3])
        raise DataError(
            f"evaluate.labels are {', '.join(map(repr, labels))}; no held-out answer is one of them, such as {some}",
            ["name the answers as they stand in the data, letter case included", "evaluate.labels=[]"],
        )
    for each in work.targets:
        answers.check(each, work.engine)
    with work.connected():
        with view.progress("judging") as progress:
            found = work.losses(progress)
        systems = [work.asked(number, loss, questions, view) for number, loss in enumerate(found)]
    compared = systems[1] if len(systems) > 1 else None
    content = report.build(work.head, work.recipe, questions, systems[0], compared)
    if to is not None:
        folder = paths.absolute(to)
        written, beside = paths.join(folder, "report.json"), paths.join(folder, "examples.json")
    elif work.trained is not None:
        written, beside = work.trained.run.evaluation, work.trained.run.examples
    else:
        return content
    report.write(content, questions, written, beside)
    view.line(f"report: {written}")
    return content


@dataclass
class _Work:
    """What is to be done.

    Attributes:
        targets: what is asked: the model, and behind it the base where it is wanted.
        trained: where the model is a run.
    """

    targets: list[Target]
    recipe: Recipe
    trained: Trained | None
    engine: EngineName

    @classmethod
    def of(
        cls, text: str, recipe: str | None, base: bool | None, engine: EngineName | None, model: str | None
    ) -> _Work:
        target = Target.of(text, model)
        trained = None
        if target.kind == "run":
            if recipe is not None:
                raise RecipeError(
                    f"{text!r} is a run and has a recipe of its own, beside {recipe!r}",
                    ["leave --recipe out", "evaluate its export with the other recipe: the folder <run>/export"],
                )
            trained = Trained.of(target.location)
            settings = trained.recipe
        elif recipe is None:
            missing = target.kind == "folder" and not paths.is_uri(text) and not paths.exists(target.location)
            raise RecipeError(
                f"{text!r} is no run, so which held-out data it is to be evaluated on is not known",
                [
                    "--recipe RECIPE, whose data.eval names it",
                    *([f"where a run was meant: there is no folder {paths.absolute(text)}"] if missing else []),
                ],
            )
        else:
            settings = recipes.load(recipe)
        wanted = settings.evaluate.base if base is None else base
        found = Target("folder", settings.model.location)
        targets = [target, found] if wanted and not _same(target, found) else [target]
        if target.kind == "endpoint" and len(targets) == 1 and engine not in (None, "auto"):
            raise ServeError(f"{text!r} has its own engine: {engine} cannot be chosen for it", ["leave --engine out"])
        return cls(targets, settings, trained, engine or settings.evaluate.engine)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """With Ray, unless an endpoint alone is asked."""
        if any(target.kind != "endpoint" for target in self.targets):
            with session.connected():
                yield
        else:
            yield

    def losses(self, progress: Callable[[int, int], None]) -> list[Loss | str]:
        """Of each target; or why there is none."""
        found: dict[int, Loss | str] = {}
        judged: dict[int, Judged] = {}
        for number, target in enumerate(self.targets):
            rows = self._rows(target)
            if target.kind == "endpoint":
                found[number] = endpoint_loss(target, rows, self.recipe.evaluate.batch_size, progress)
            else:
                judged[number] = Judged(self.trained or target.location, rows)
                if number:
                    judged[number] = Judged(target.location, rows)
        if judged:
            found |= dict(zip(judged, losses(list(judged.values()), self.recipe, progress), strict=True))
        return [found[number] for number in range(len(self.targets))]

    def _rows(self, target: Target) -> Prepared:
        """The held-out rows as the target's tokenizer cuts them; an endpoint's is taken to be the recipe's model's."""
        if self.trained is not None:
            prepared = self.trained.prepared("eval")
            if prepared is None:
                raise DataError(
                    "the run was trained without data.eval", ["train again with it: the same command continues"]
                )
            return prepared
        own = target.kind == "endpoint" or target.location == self.recipe.model.location
        other = {"path": target.location, "revision": None, "trust_remote_code": False}
        changed = self.recipe.model if own else self.recipe.model.model_copy(update=other)
        settings = self.recipe.model_copy(update={"model": changed})
        spread = stream.spread if any(other.kind != "endpoint" for other in self.targets) else stream.in_process
        return prepare(settings, "eval", changed.folder(weights=False), spread)

    def asked(self, number: int, loss: Loss | str, questions: Sequence[Question], view: View) -> System:
        """The answers of one of the targets to the questions."""
        target, settings = self.targets[number], self.recipe.evaluate
        chosen: dict[str, Any] = {"batch_size": settings.batch_size}
        if target.kind != "endpoint":
            chosen |= {"engine": self.engine, "device": "auto", "gpus": self.recipe.train.world_size}
            if self.recipe.train.device == "cpu":
                chosen |= {"device": "cpu", "gpus": 0}
        with (
            answers.opened(target, **chosen) as engine,
            view.progress("asking the base" if number else "asking") as progress,
        ):
            if self.trained is not None and not number:
                self._check_step(engine.identity)
            given = []
            for answer in engine.answers([q.prompt for q in questions], Sampling(settings.max_new_tokens)):
                given.append(answer)
                progress(len(given), len(questions))
            if engine.name in ("vllm", "transformers"):
                self.engine = cast(EngineName, engine.name)  # of both, so that they are compared alike
            return System(engine.model, engine.name, loss, given)

    def _check_step(self, identity: dict[str, Any]) -> None:
        assert self.trained is not None
        if (step := identity.get("step")) not in (None, self.trained.found.step):
            raise CheckpointError(
                f"the run went on meanwhile: its loss is of step {self.trained.found.step}, its answers of step {step}",
                ["evaluate again when it is trained", "evaluate.during evaluates beside the training"],
            )

    @property
    def head(self) -> dict[str, Any]:
        target = self.targets[0]
        if self.trained is not None:
            return {"run": self.trained.recipe.run.name, "step": self.trained.found.step}
        return {"run": None, "step": None, "target": target.location}


def _same(target: Target, base: Target) -> bool:
    """Whether a model is the base itself."""
    return target.kind == "folder" and paths.absolute(target.location) == paths.absolute(base.location)
