"""What a sweep keeps on storage, and what `--resume` reads: plain JSON, written whole at each change.

    <storage>/<sweep>/ recipe.yaml  sweep.json  best.yaml  sweep.parquet  report.html
                       0000/ 0001/ …  one run directory per trial, with trial.json beside what every run has

Ray Tune's own snapshots are not used: they are pickles, are seconds old when a sweep is killed, and give trials other
names. One process writes here, the one that runs the sweep.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ray_ft import artifacts, paths
from ray_ft.errors import StorageError, first_line
from ray_ft.recipe import Recipe
from ray_ft.retry import patiently

FORMAT = 1
TRIAL = "trial.json"
_NUMBER = re.compile(r"\d{4,}")

#: `paused`: it waits for its turn with a checkpoint; `stopped`: by the scheduler, as others do better; `running` in a
#: sweep that was killed: to be continued.
Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
OVER: tuple[Status, ...] = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Report:
    """The metric at one step of a trial, of `total`; `seconds` the trial had run by then, over all its starts."""

    step: int
    total: int
    value: float
    seconds: float

    @property
    def progress(self) -> float:
        """Share of the run, 0 to 1."""
        return self.step / self.total


@dataclass(frozen=True)
class Inherited:
    """A trial that went on from another one's checkpoint (PBT): with what settings, after which step of it."""

    step: int
    parent: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, taken: dict[str, Any]) -> Inherited:
        """What a trial told that it takes over (`inherit.pending`)."""
        return cls(taken["step"], taken["parent"], taken["settings"])


@dataclass
class Trial:
    """What is known of one trial.

    Attributes:
        settings: recipe keys and their values, as they are now; `first` as they were at the beginning (PBT).
        seconds: that it ran, over all its starts; times `workers`: device-seconds.
        error: why it failed, with the ways out.
        pruned: whether its checkpoints were deleted.
    """

    number: int
    settings: dict[str, Any]
    workers: int = 1
    first: dict[str, Any] = field(default_factory=dict)
    status: Status = "waiting"
    reports: list[Report] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    inherited: list[Inherited] = field(default_factory=list)
    pruned: bool = False

    def __post_init__(self) -> None:
        self.first = self.first or dict(self.settings)

    @property
    def name(self) -> str:
        return artifacts.trial_name(self.number)

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def value(self) -> float | None:
        """The metric as last reported."""
        return self.reports[-1].value if self.reports else None

    @property
    def step(self) -> int:
        return self.reports[-1].step if self.reports else 0

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.workers

    def reported(self, report: Report) -> None:
        """Add a report; steps that were taken again replace what was reported of them."""
        self.reports = [one for one in self.reports if one.step < report.step] + [report]

    def took_over(self, inherited: Inherited) -> None:
        """It stands where its parent stood; what it reported of steps after that is of weights that are gone."""
        if inherited not in self.inherited[-1:]:  # heard of already, before the sweep was killed
            self.inherited.append(inherited)
        self.settings = dict(inherited.settings)
        self.reports = [one for one in self.reports if one.step <= inherited.step]

    @classmethod
    def of(cls, content: dict[str, Any]) -> Trial:
        return cls(
            **{
                **content,
                "reports": [Report(**one) for one in content["reports"]],
                "inherited": [Inherited(**one) for one in content["inherited"]],
            }
        )


@dataclass
class Sweep:
    """A sweep's directory and what is known of its trials, by number.

    Attributes:
        seconds: that the sweep itself ran, over all its starts.
    """

    root: str
    metric: str
    mode: Literal["min", "max"]
    recipe_sha256: str
    created: float
    seconds: float = 0.0
    trials: dict[int, Trial] = field(default_factory=dict)

    @classmethod
    def create(cls, recipe: Recipe) -> Sweep:
        """Begin the directory of a new sweep, with its resolved recipe."""
        assert recipe.tune is not None
        sweep = cls(recipe.run.dir.root, recipe.tune.metric, recipe.tune.mode, recipe.sha256, time.time())
        sweep.save()  # first: a recipe alone would be taken for a training run's
        recipe.save()
        return sweep

    @classmethod
    def load(cls, root: str) -> Sweep:
        """Read a sweep's directory, finished or not.

        Raises:
            StorageError: there is no sweep, it is of another format, or storage does not answer.
        """
        root = paths.absolute(root)
        ways = ["give the folder that `ray-ft tune` made: <run.storage>/<run.name>", "begin one: ray-ft tune RECIPE"]
        try:
            if not patiently(lambda: paths.exists(paths.join(root, artifacts.SWEEP))):
                raise StorageError(f"no sweep at {root!r}: it has no {artifacts.SWEEP}", ways)
            content = patiently(lambda: paths.read_json(paths.join(root, artifacts.SWEEP)))
            if content["format"] != FORMAT:
                raise StorageError(
                    f"the sweep at {root!r} is in format {content['format']!r}, this version reads {FORMAT}",
                    ["read it with the version that wrote it", "begin another under another run.name"],
                )
            facts = {key: content[key] for key in ("metric", "mode", "recipe_sha256", "created", "seconds")}
            return cls(root, trials={trial.number: trial for trial in _trials(root)}, **facts)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StorageError(f"the sweep at {root!r} cannot be read: {first_line(error)}", ways) from error

    def save(self) -> None:
        """Write sweep.json: the sweep without its trials, and which of them is the best so far."""
        best = self.best()
        content = {
            "format": FORMAT,
            "metric": self.metric,
            "mode": self.mode,
            "recipe_sha256": self.recipe_sha256,
            "created": self.created,
            "seconds": self.seconds,
            "best": None if best is None else best.number,
        }
        _write(paths.join(self.root, artifacts.SWEEP), content)

    def save_trial(self, trial: Trial) -> None:
        """Write one trial's trial.json."""
        self.trials[trial.number] = trial
        _write(paths.join(self.run_of(trial).root, TRIAL), asdict(trial))

    def run_of(self, trial: Trial) -> artifacts.RunDir:
        return artifacts.RunDir(paths.join(self.root, trial.name))

    def best(self) -> Trial | None:
        """The best of the trials that went to the end; where none did, the best of the others that reported."""
        ranked = self.ranked()
        return ranked[0] if ranked else None

    def ranked(self) -> list[Trial]:
        """Trials that reported, the best first: finished ones by their last value, then the others."""
        sign = 1 if self.mode == "min" else -1
        reported = [trial for trial in self.trials.values() if trial.reports and trial.status != "failed"]

        def key(trial: Trial) -> tuple[bool, float, float, int]:
            last = trial.reports[-1]
            unfinished = trial.status != "finished"
            value = math.inf if math.isnan(last.value) else sign * last.value
            return unfinished, -last.progress if unfinished else 0.0, value, trial.number

        return sorted(reported, key=key)

    @property
    def device_seconds(self) -> float:
        return sum(trial.device_seconds for trial in self.trials.values())


def _trials(root: str) -> Iterator[Trial]:
    for name in paths.list_dir(root):
        location = paths.join(root, name, TRIAL)
        if _NUMBER.fullmatch(name) and paths.exists(location):
            yield Trial.of(paths.read_json(location))


def _write(location: str, content: Any) -> None:
    try:
        patiently(lambda: paths.write_json(location, content))
    except OSError as error:
        raise StorageError(
            f"the sweep's record {location} cannot be written: {first_line(error)}",
            ["check the free space and the rights there", "then go on: ray-ft tune RECIPE --resume"],
        ) from error
