"""From costs measured on one machine to hundreds of GPUs: arithmetic, with `ray_ft.plan` for what GPUs and fabric do.

Limits: what was measured is a straight line through 1 to 8 workers on two cores; nobody has run 512. So each overhead
is given twice: as if each worker's part ran beside the others', which is so of what happens in the workers, and as if
all parts came one after the other in one process, which is the worst that a driver, a coordinator or an actor can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.result import Table
from benchmarks.scale.growth import Series, line, number

if TYPE_CHECKING:
    from ray_ft.plan.planner import Plan

RECIPE = "configs/gemma3_27b_fsdp.yaml"
GPU = "h100-80"
PER_NODE = 8
FLEETS = (8, 64, 512)
#: Rows of 1,024 tokens for each GPU and step: as many as the recipe has on its eight.
ROWS_PER_GPU = 2
#: Overrides, by what they are called on the page.
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "shards over all": (),
    "a copy in each node": ("train.fsdp.replicas=nodes",),
}


@dataclass(frozen=True)
class Linear:
    """A cost by the number of workers: `fixed`, and `each` more for every worker."""

    fixed: float
    each: float

    @classmethod
    def of(cls, series: Series) -> Linear:
        """The line through all that was measured; what noise makes negative is nothing."""
        points = [(size, value) for size, values in series.values.items() for value in values]
        fixed, each = line([size for size, _ in points], [value for _, value in points])
        return cls(max(fixed, 0.0), max(each, 0.0))

    def beside(self) -> float:
        """Where each worker's part runs beside the others'."""
        return self.fixed + self.each

    def in_a_row(self, workers: int) -> float:
        """Where all come one after the other."""
        return self.fixed + self.each * workers


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        data, control: seconds that Ray Data and Ray's control add to a step.
        start: seconds that they add to a start.
        commit, restore: seconds for each run (a tensor's piece on a worker) of a checkpoint's index: of rank 0, which
            commits, and of each worker, which looks for its own.
        requests: to storage, one after the other, of rank 0's commit.
    """

    data: Linear
    control: Linear
    start: Linear
    commit: float
    restore: float
    requests: Linear


@dataclass(frozen=True)
class Estimate:
    """Of one fleet; seconds.

    Attributes:
        step: of computing and sending alone, as planned.
        best, worst: the same with overheads, beside each other and in a row.
        start: Ray's own part of a start, in a row.
        runs: in a checkpoint's index. commit, restore, requests: see `Costs`.
    """

    workers: int
    step: float
    best: float
    worst: float
    start: float
    runs: int
    commit: float
    restore: float
    requests: float


def extrapolate(costs: Costs, workers: int, step: float, tensors: int) -> Estimate:
    """One step, start and checkpoint of `workers` GPUs.

    Args:
        step: seconds of computing and sending, without overheads.
        tensors: in a checkpoint, moments included; each is in a run on every worker (FSDP and ZeRO-3 cut each).

    Control comes on top of the step. Ray Data works while the step computes (`stream.PREFETCH_STEPS` batches ahead), so
    of its time only what is longer than the step counts.

    Raises:
        ValueError: a number that is not above 0.
    """
    if workers < 1 or step <= 0 or tensors < 1:
        raise ValueError(f"{workers} workers, a step of {step} s and {tensors} tensors: all have to be above 0")

    def with_overheads(data: float, control: float) -> float:
        return max(step, data) + control

    runs = workers * tensors
    return Estimate(
        workers,
        step,
        with_overheads(costs.data.beside(), costs.control.beside()),
        with_overheads(costs.data.in_a_row(workers), costs.control.in_a_row(workers)),
        costs.start.in_a_row(workers),
        runs,
        costs.commit * runs,
        costs.restore * runs,
        costs.requests.in_a_row(workers),
    )


def costs_of(series: Sequence[Series], tensors_in_shards: int) -> Costs:
    """The costs among all series, by their names.

    Args:
        tensors_in_shards: of the checkpoints of many workers.
    """
    named = {one.name: one for one in series}
    start = Linear.of(named["Ray Train, more until the first step"])
    rows = Linear.of(named["Ray Data, more until the first step"])
    return Costs(
        Linear.of(named["Ray Data, more of a step"]),
        Linear.of(named["Ray's control, more of a step"]),
        Linear(start.fixed + rows.fixed, start.each + rows.each),
        max(named["checkpoint of many workers, committing"].per_unit / tensors_in_shards, 0.0),
        max(named["checkpoint of many workers, restoring one worker's part"].per_unit / tensors_in_shards, 0.0),
        Linear.of(named["checkpoint of many workers, requests of a commit"]),
    )


def plans() -> dict[tuple[int, str], Plan]:
    """What `ray-ft plan` says of the recipe on each fleet, by its GPUs and layout."""
    from ray_ft import recipe as recipes
    from ray_ft.plan import Planner, fleet, shapes

    one = recipes.load(RECIPE)
    prices = fleet.load_prices()
    planner = Planner(one, shapes.find_config(one.model.location), prices)
    found = {}
    for gpus in FLEETS:
        nodes = gpus // PER_NODE
        for name, overrides in LAYOUTS.items():
            if nodes == 1 and overrides:
                continue
            machines = fleet.choose(prices, gpus, GPU, nodes, PER_NODE)
            found[gpus, name] = planner.plan(machines, [f"train.global_batch={ROWS_PER_GPU * gpus}", *overrides])
    return found


def tensors_of(plan: Plan) -> int:
    """In a checkpoint: what is trained, and for Adafactor two factors of each; of others its two moments."""
    return 3 * sum(parameter.trained for parameter in plan.shapes.parameters)


def tables(costs: Costs, planned: Mapping[tuple[int, str], Plan]) -> list[Table]:
    """The estimates, and what they start from."""
    rows, alone = [], None
    for (gpus, layout), plan in planned.items():
        found = extrapolate(costs, gpus, plan.speed.step, tensors_of(plan))
        tokens = ROWS_PER_GPU * plan.recipe.data.seq_len  # of a GPU in a step
        alone = alone or tokens / found.step
        rows.append(
            (
                f"{gpus}, {layout}",
                number(plan.speed.compute),
                number(plan.speed.communication),
                number(found.step),
                f"{number(found.best)} to {number(found.worst)}",
                f"{gpus * tokens / found.worst:,.0f} to {gpus * tokens / found.best:,.0f}",
                f"{tokens / found.worst / alone:.0%} to {tokens / found.best / alone:.0%}",
                number(found.start),
                f"{found.runs:,}",
                f"{number(found.commit)} and {number(found.restore)}",
                f"{found.requests:,.0f}",
            )
        )
    columns = (
        "GPUs, layout", "computing [s]", "sending [s]", "step as planned [s]", "step with overheads [s]", "tokens/s",
        "of 8 GPUs' rate each", "Ray's part of a start, in a row [s]", "runs in a checkpoint's index",
        "index: rank 0 to commit, each to restore [s]", "requests of a commit",
    )  # fmt: skip
    measured = [
        (name, number(1000 * one.fixed), number(1000 * one.each))
        for name, one in (("Ray Data, a step", costs.data), ("control, a step", costs.control), ("start", costs.start))
    ]
    index = [(f"index, each run, {name}", number(1000 * value), "") for name, value in
             (("committing", costs.commit), ("restoring", costs.restore))]  # fmt: skip
    return [
        Table("Gemma 3 27B, extrapolated", columns, rows),
        Table("From what was measured here", ("", "fixed [ms]", "for each worker [ms]"), [*measured, *index]),
    ]
