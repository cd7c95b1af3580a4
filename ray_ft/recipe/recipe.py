"""The whole recipe: its sections, and the rules between them."""

from __future__ import annotations

import hashlib
import json

import yaml
from pydantic import model_validator

from ray_ft import paths
from ray_ft.recipe.data import Data
from ray_ft.recipe.model import Model
from ray_ft.recipe.run import Run
from ray_ft.recipe.section import Section
from ray_ft.recipe.serve import Evaluate, Serve
from ray_ft.recipe.train import Preference, Train
from ray_ft.recipe.tune import Tune


class Recipe(Section):
    run: Run
    model: Model
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()
    tune: Tune | None = None
    """The sweep of `ray-ft tune`; null: none."""

    @model_validator(mode="after")
    def _quantized_is_whole(self) -> Recipe:
        if self.model.quantize and not self.train.in_process and self.train.strategy != "none":
            raise ValueError(
                f"model.quantize: {self.model.quantize} keeps the whole 4-bit base on each worker, which "
                f"train.strategy: {self.train.strategy} would cut up; set train.strategy: none, or model.quantize: null"
            )
        return self

    @model_validator(mode="after")
    def _preference_is_the_task(self) -> Recipe:
        if self.data.task != "preference":
            if self.train.preference != Preference():
                raise ValueError(
                    f"train.preference is read for sources of format preference, and data.train.0 has format "
                    f"{self.data.train[0].format}; remove it, or name sources of pairs"
                )
        elif self.model.quantize and self.model.unfreeze:
            raise ValueError(
                f"model.unfreeze: {self.model.unfreeze} trains parts of the base, so that preference tuning needs the "
                f"answers of the untrained one, which model.quantize: {self.model.quantize} does not keep; set "
                "unfreeze: [], or quantize: null"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_beside_workers(self) -> Recipe:
        if self.evaluate.during is not None:
            if self.train.in_process:
                raise ValueError(
                    "evaluate.during answers beside the workers, and train.workers is 0; set train.workers to at least "
                    "1, or evaluate.during: null"
                )
            if not self.data.eval and not self.evaluate.during.prompts:
                raise ValueError(
                    "evaluate.during answers held-out rows, and data.eval names none; name some, give prompts of your "
                    "own in evaluate.during.prompts, or set evaluate.during: null"
                )
        return self

    @model_validator(mode="after")
    def _labels_are_the_tasks(self) -> Recipe:
        labels, weights = self.model.labels, self.train.class_weights
        if self.data.task != "labels":
            kind = self.data.train[0].format
            for key, value in (("model.labels", labels), ("train.class_weights", weights)):
                if value:
                    raise ValueError(
                        f"{key} is read by sources of format labels, and data.train.0 has format {kind}; remove it, or "
                        "set format: labels"
                    )
            return self
        if not labels:
            raise ValueError(
                "data.train.0 has format labels, and model.labels names none; name them all, in the order of their "
                "numbers: model.labels: [negative, positive]"
            )
        if isinstance(weights, dict) and (unknown := sorted(weights.keys() - set(labels))):
            raise ValueError(
                f"train.class_weights names {', '.join(map(repr, unknown))}, and model.labels has "
                f"{', '.join(map(repr, labels))}; name labels as they are written there"
            )
        if self.evaluate.labels:
            raise ValueError(
                "evaluate.labels is for answers that are labels, and data.train.0 has format labels, whose labels are "
                "model.labels; remove evaluate.labels"
            )
        if self.evaluate.during is not None:
            raise ValueError(
                "evaluate.during asks for answers, and a model trained on format labels gives none; set "
                "evaluate.during: null, and train.eval_every: epoch, which has the accuracy too"
            )
        return self

    def sized(self, workers: int) -> Recipe:
        """The recipe of one start of an elastic run, which has so many workers; 0: in this process, unsharded."""
        changed: dict[str, object] = {"workers": workers, **({} if workers else {"strategy": "none"})}
        return self.model_copy(update={"train": self.train.model_copy(update=changed)})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def sha256(self) -> str:
        """Identity of all settings, independent of how the file was written."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def save(self) -> None:
        """Write the resolved recipe into the run directory."""
        paths.write_text(self.run.dir.recipe, f"# resolved by ray-ft; sha256 {self.sha256}\n{self.to_yaml()}")
