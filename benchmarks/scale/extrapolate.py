"""From costs measured on one machine to hundreds of GPUs: arithmetic, with `ray_ft.plan` for what GPUs and fabric do.

Limits: what was measured is a straight line through 1 to 8 workers on two cores; nobody has run 512. So each overhead
is given twice: as if each worker's part ran beside the others', which is so of what happens in the workers; and as if
all parts came one after the other in one process, which is the worst that a driver, a coordinator or an actor can do,
and two standard errors more. Indexes of checkpoints are measured at their full size, on a local disk.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.result import Table
from benchmarks.scale.checkpoints import INDEX, index_name
from benchmarks.scale.fit import Linear
from benchmarks.scale.growth import Series, number
from ray_ft.plan.cut import Cut

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
class Costs:
    """What was measured, by the number of workers; seconds.

    Attributes:
        rows, board: for which a step waits for rows, and talks to the board of Ray's control.
        start: that Ray Train and Ray Data add to a start.
        data, control: that are left when whole steps are taken from each other: for comparison alone.
        commit, restore: of the checkpoint's index of each layout, with as many runs as `runs_of` says: of rank 0,
            which commits, and of each worker, which looks for its own.
        requests: to storage, one after the other, of rank 0's commit.
    """

    rows: Linear
    board: Linear
    start: Linear
    data: Linear
    control: Linear
    commit: Mapping[str, Mapping[int, Sequence[float]]]
    restore: Mapping[str, Mapping[int, Sequence[float]]]
    requests: Linear


@dataclass(frozen=True)
class Estimate:
    """Of one fleet; seconds.

    Attributes:
        step: of computing and sending alone, as planned.
        best, worst: the same with overheads, beside each other; and in a row, with what is not known of them.
        start, start_most: Ray's own part of a start, in a row; and what it is not above.
        commit, restore: of the index. requests: see `Costs`.
    """

    workers: int
    step: float
    best: float
    worst: float
    start: float
    start_most: float
    commit: float
    restore: float
    requests: float


def extrapolate(costs: Costs, workers: int, step: float, layout: str) -> Estimate:
    """One step, start and checkpoint of `workers` GPUs.

    Args:
        step: seconds of computing and sending, without overheads.
        layout: one of `LAYOUTS`.

    Waiting for rows and talking to the board come on top of the step. A longer step hides more of the first
    (`stream.PREFETCH_STEPS` batches wait in each worker), which is not counted.

    Raises:
        ValueError: a number that is not above 0.
        KeyError: no checkpoint of so many workers was measured.
    """
    if workers < 1 or step <= 0:
        raise ValueError(f"{workers} workers and a step of {step} s: both have to be above 0")
    both = costs.rows, costs.board
    return Estimate(
        workers,
        step,
        step + sum(one.beside() for one in both),
        step + sum(one.most(workers) for one in both),
        costs.start.in_a_row(workers),
        costs.start.most(workers),
        statistics.median(costs.commit[layout][workers]),
        statistics.median(costs.restore[layout][workers]),
        costs.requests.in_a_row(workers),
    )


def costs_of(series: Sequence[Series]) -> Costs:
    """The costs among all series, by their names."""
    named = {one.name: one.values for one in series}
    train, rows = named["Ray Train, more until the first step"], named["Ray Data, more until the first step"]
    both = {count: [a + b for a, b in zip(train[count], rows[count], strict=True)] for count in train}
    return Costs(
        Linear.of(named["Ray Data, waiting for rows, of a step"]),
        Linear.of(named["Ray's control, talking to the board, of a step"]),
        Linear.of(both),
        Linear.of(named["Ray Data, more of a step"]),
        Linear.of(named["Ray's control, more of a step"]),
        *({layout: named[index_name(layout, name)] for layout in LAYOUTS} for name in INDEX),
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


def runs_of(plan: Plan) -> int:
    """Runs (a tensor's piece on a worker) in the index of a checkpoint, of FSDP.

    Of each trained weight every worker of one copy of the model that has rows of it writes its own. Moments of AdamW
    are cut like it. What is whole on all workers, rank 0 writes alone: the count of steps of each weight, and all of
    Adafactor's moments, two of a matrix, one of a vector (`ray_ft.strategy.state`, `ray_ft.train.adafactor`).

    Raises:
        ValueError: another strategy, which cuts otherwise.
    """
    train = plan.recipe.train
    cut = Cut.of(train, plan.fleet.nodes)
    if cut.strategy != "fsdp":
        raise ValueError(f"the runs of {cut.strategy} are not counted, only those of fsdp")
    trained = [parameter for parameter in plan.shapes.parameters if parameter.trained]
    pieces = sum(cut.elements(one, rank) > 0 for one in trained for rank in range(cut.shards))
    if train.optimizer.name == "adafactor":
        return pieces + len(trained) + sum(2 if len(one.shape) > 1 else 1 for one in trained)
    return 3 * pieces + len(trained)


def indexes(planned: Mapping[tuple[int, str], Plan]) -> dict[str, dict[int, tuple[int, int]]]:
    """What `checkpoints.by_runs` measures: layout → GPUs → (those that write weights, runs in the index)."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for (gpus, layout), plan in planned.items():
        found.setdefault(layout, {})[gpus] = Cut.of(plan.recipe.train, plan.fleet.nodes).shards, runs_of(plan)
    return found


def tables(costs: Costs, planned: Mapping[tuple[int, str], Plan]) -> list[Table]:
    """The estimates, and what they start from."""
    rows, alone = [], None
    for (gpus, layout), plan in planned.items():
        found = extrapolate(costs, gpus, plan.speed.step, layout)
        tokens = ROWS_PER_GPU * plan.recipe.data.seq_len  # of a GPU in a step
        alone = alone or tokens / found.step
        rows.append(
            (
                f"{gpus}, {layout}",
                number(plan.speed.compute),
                number(plan.speed.communication),
                f"{found.step:.3f}",
                f"{found.best:.3f} to {found.worst:.3f}",
                f"{gpus * tokens / found.worst:,.0f} to {gpus * tokens / found.best:,.0f}",
                f"{tokens / found.worst / alone:.0%} to {tokens / found.best / alone:.0%}",
                f"{number(found.start)}, ≤ {number(found.start_most)}",
                f"{runs_of(plan):,}",
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
        (name, *one.said())
        for name, one in (
            ("a step's waiting for rows", costs.rows),
            ("a step's talking to the board", costs.board),
            ("Ray's part of a start", costs.start),
            ("for comparison: Ray Data, more of a whole step", costs.data),
            ("for comparison: Ray's control, more of a whole step", costs.control),
        )
    ]
    return [
        Table("Gemma 3 27B, extrapolated", columns, rows),
        Table("From what was measured here, with standard errors", ("", "fixed [ms]", "each worker [ms]"), measured),
    ]
