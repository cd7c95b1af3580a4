"""The sweep: which settings are searched, how, and how much it may cost.

What the searched keys mean is checked by `ray_ft.tune.space`, which knows the recipe that they stand in.
"""

from __future__ import annotations

import difflib
import json
import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_ft import paths
from ray_ft.recipe.data import Task
from ray_ft.recipe.section import Section

Share = Annotated[float, Field(gt=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Kind = Literal["choice", "grid", "uniform", "loguniform", "randint", "expr"]

KINDS: tuple[Kind, ...] = ("choice", "grid", "uniform", "loguniform", "randint", "expr")
RANGES: tuple[Kind, ...] = ("uniform", "loguniform", "randint")

#: Trials of a sweep that does not say how many.
TRIALS = 16

#: Columns of metrics.jsonl that a sweep may compare, and the task whose runs report it; None: all runs do. Those of
#: held-out rows begin with eval_, and need data.eval.
METRICS: dict[str, Task | None] = {
    "eval_loss": None, "eval_accuracy": "labels", "eval_macro_f1": "labels", "eval_reward_accuracy": "preference",
    "eval_reward_margin": "preference", "loss": None, "tokens_per_second": None, "step_seconds": None,
    "memory_gib": None,
}  # fmt: skip

#: Those of which more is better: a sweep that minimises one is a mistake.
HIGHER = ("tokens_per_second", "eval_accuracy", "eval_macro_f1", "eval_reward_accuracy", "eval_reward_margin")

#: What may change while a trial goes on from another one's checkpoint: the weights and moments in it stay as they are.
MUTABLE = (
    "train.optimizer.lr",
    "train.optimizer.weight_decay",
    "train.optimizer.betas",
    "train.optimizer.eps",
    "train.schedule",
    "train.clip_norm",
    "model.adapter.dropout",
)


class Dimension(Section):
    """One key's values: exactly one of choice, grid, uniform, loguniform, randint and expr."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these values."""
    grid: Annotated[list[Any], Field(min_length=1)] | None = None
    """Each of these values, with every combination of the other dimensions' (search: grid)."""
    uniform: tuple[Finite, Finite] | None = None
    """[low, high]: any number between them."""
    loguniform: tuple[Finite, Finite] | None = None
    """[low, high], both above 0: a number whose logarithm is uniform."""
    randint: tuple[int, int] | None = None
    """[low, high]: a whole number, both included."""
    expr: str | None = None
    """Computed from the recipe and the dimensions above: "2 * model.adapter.rank"."""
    when: str | None = None
    """Condition over the recipe and the dimensions above, "train.optimizer.name == 'adamw'"; false: the recipe's own
    value is kept."""

    @property
    def kind(self) -> Kind:
        """Which of the six it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> list[Any]:
        """The values of a choice or grid; none of another kind."""
        return self.choice or self.grid or []

    @property
    def range(self) -> tuple[float, float] | None:
        """[low, high] of a range, else None."""
        return self.uniform or self.loguniform or self.randint

    @field_validator("choice", "grid")
    @classmethod
    def _different(cls, values: list[Any] | None) -> list[Any] | None:
        texts = []
        for value in values or []:
            try:
                texts.append(json.dumps(value, sort_keys=True, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{value!r} is no number, text, list or mapping; quote it to make it text") from error
        twice = [text for at, text in enumerate(texts) if text in texts[:at]]
        if twice:
            raise ValueError(f"{twice[0]} stands twice, and would be tried twice; leave one out")
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a dimension is exactly one of {', '.join(KINDS)}, and this is {' and '.join(given) or 'none'}; "
                + ("leave one out" if given else "for example {choice: [8, 16]}")
            )
        if self.range is not None:
            low, high = self.range
            if low >= high:
                ways = "; one value is set in the recipe itself" if low == high else f"; write [{high}, {low}]"
                raise ValueError(f"{self.kind}: [{low}, {high}] is [low, high], and holds nothing between them{ways}")
            if self.loguniform and low <= 0:
                raise ValueError(
                    f"loguniform: [{low}, {high}] has no logarithm at {low}; raise low above 0, or use uniform"
                )
        return self


class ASHA(Section):
    """Settings of scheduler asha: at each rung only the best 1/eta of the trials go on."""

    eta: Annotated[float, Field(gt=1)] = 4
    """Of so many trials one goes on from each rung; rungs are so many times apart."""
    first: Share = 0.0625
    """First rung, as a share of a trial's run."""


class Median(Section):
    """Settings of scheduler median: a trial whose best is worse than the median of the others' means is stopped."""

    first: Share = 0.25
    """Share of a trial's run before which none is stopped."""
    trials: Annotated[int, Field(ge=1)] = 3
    """Other trials that must have come as far."""


class PBT(Section):
    """Settings of scheduler pbt: the worst trials go on from a better one's checkpoint with changed settings."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between comparisons, and between checkpoints; null: a tenth of the run."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the trials that take over from as many of the best."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability that a setting is drawn anew; otherwise it is changed by a fifth, or to a neighbour."""
    synchronous: bool = False
    """Wait until all trials have come as far, and compare them all; false: each is compared as it comes."""


class Budget(Section):
    """What a sweep may cost beside its number of trials; then running trials end, and `--resume` can go on."""

    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of all trials times their workers, on GPUs or CPUs."""
    wall_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of the sweep itself, over all its starts."""


class Tune(Section):
    """Settings of `ray-ft tune`; `ray-ft train` does not read them."""

    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Recipe keys and their values: {train.optimizer.lr: {loguniform: [1e-5, 1e-3]}}."""
    metric: str = "eval_loss"
    """What is compared: a column of metrics.jsonl."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """Settings that are tried; null: 16, or with search: grid every combination."""
    search: Literal["random", "grid", "optuna"] = "random"
    """random: drawn independently; grid: every combination; optuna: drawn near those that did well (TPE)."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """What ends or changes trials early; none: all go to the end."""
    asha: ASHA = ASHA()
    median: Median = Median()
    pbt: PBT = PBT()
    budget: Budget = Budget()
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Trials that run at once; null: as many as the cluster has room for, also by growing."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn; each trial trains with run.seed."""
    keep: Annotated[int, Field(ge=1)] = 1
    """Best trials that keep their checkpoints; those of others are deleted when they end."""

    @property
    def wanted(self) -> int | None:
        """Settings that are to be tried; None: every combination of the grid."""
        return self.trials or (None if self.search == "grid" else TRIALS)

    @field_validator("metric")
    @classmethod
    def _reported(cls, metric: str) -> str:
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
            raise ValueError(
                f"no run reports it; one of {', '.join(METRICS)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        return metric

    @field_validator("space")
    @classmethod
    def _absolute(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        located = {}
        for key, dimension in space.items():
            changed = {
                kind: [_located(key, value) for value in values]
                for kind in ("choice", "grid")
                if (values := getattr(dimension, kind)) is not None
            }
            located[key] = dimension.model_copy(update=changed)
        return located

    @model_validator(mode="after")
    def _better_is_better(self) -> Tune:
        if self.metric in HIGHER and self.mode == "min":
            raise ValueError(f"metric: {self.metric} with mode: min looks for the worst; set mode: max")
        return self

    @model_validator(mode="after")
    def _space_of_this_search(self) -> Tune:
        for key, dimension in self.space.items():
            if self.search == "grid" and dimension.kind in RANGES:
                raise ValueError(
                    f"search: grid takes every combination, and space.{key} is {dimension.kind}, which has no end of "
                    "values; list some (grid: […]), or set search: random or optuna"
                )
            if self.search != "grid" and dimension.kind == "grid":
                raise ValueError(
                    f"space.{key} is grid, and search is {self.search}, which draws one value at a time; write choice, "
                    "or set search: grid"
                )
        return self

    @model_validator(mode="after")
    def _settings_of_this_scheduler(self) -> Tune:
        # A setting that nothing reads would look as if it had an effect.
        for name, given, default in (
            ("asha", self.asha, ASHA()),
            ("median", self.median, Median()),
            ("pbt", self.pbt, PBT()),
        ):
            if given != default and self.scheduler != name:
                raise ValueError(
                    f"{name}: is read by scheduler {name}, and scheduler is {self.scheduler}; remove it "
                    f"(tune.{name}={{}}), or set scheduler: {name}"
                )
        return self

    @model_validator(mode="after")
    def _population(self) -> Tune:
        if self.scheduler != "pbt":
            return self
        if self.search != "random":
            raise ValueError(
                f"scheduler: pbt changes settings itself, from a first draw, and search is {self.search}; set search: "
                "random, or scheduler: asha"
            )
        if self.trials == 1:
            raise ValueError("scheduler: pbt compares trials with each other, and trials is 1; set trials to 2 or more")
        for key, dimension in self.space.items():
            if not any(key == one or key.startswith(one + ".") for one in MUTABLE):
                raise ValueError(
                    f"scheduler: pbt goes on from another trial's checkpoint, which does not fit another {key}; leave "
                    f"it out of space, or set scheduler: asha (pbt may search {', '.join(MUTABLE)})"
                )
            if dimension.kind == "expr" or dimension.when is not None:
                raise ValueError(
                    f"scheduler: pbt changes each setting by itself, and space.{key} has "
                    f"{'expr' if dimension.kind == 'expr' else 'when'}; leave that out, or set scheduler: asha"
                )
        return self


def _located(key: str, value: Any) -> Any:
    """The value with its paths made absolute, as the recipe's own are: trials run elsewhere."""
    if isinstance(value, dict):
        return {name: _located(f"{key}.{name}", one) for name, one in value.items()}
    if isinstance(value, list):
        return [_located(key, one) for one in value]
    if not isinstance(value, str):
        return value
    if key == "model.path":  # a hub id looks like a relative path; only a folder that is there is one
        return paths.absolute(value) if os.path.isdir(paths.absolute(value)) else value
    inside = key == "train.zero.config" or (key.startswith("data.") and key.endswith(".path"))
    return paths.absolute(value) if inside else value
