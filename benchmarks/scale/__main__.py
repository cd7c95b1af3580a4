"""Cost as work grows, and what follows for 27B on 64 and 512 GPUs.

    python -m benchmarks.scale [--pairs 3] [--many] [--only PART …] [--to FILE]

It reports overheads, not speed-ups: all on one machine, whose cores the workers share. Each series has a growth
exponent and the one that is due; a pair is one pass over its sizes, where that takes seconds, and at least 3 rounds of
workers. With --to, docs/scale.md is made again. --many adds ten million rows and 512 trials, and takes half an hour
more. On a machine that is busy at the start the page says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.result import Table, options, recorded
from benchmarks.scale import arms, checkpoints, data, extrapolate, growth, page, reports, sweeps, workers
from benchmarks.scale.growth import Series

if TYPE_CHECKING:
    from argparse import Namespace

    from ray_ft.plan.planner import Plan

    Planned = dict[tuple[int, str], Plan]

#: Title → what measures it, of (scratch folder, what was asked for, the plans of the large model).
PARTS: dict[str, tuple[str, Callable[[str, Namespace, Planned], list[Series]]]] = {
    "checkpoints": (
        "Checkpoints",
        lambda scratch, given, plans: checkpoints.series(scratch, given.pairs, extrapolate.indexes(plans)),
    ),
    "reports": ("Logged steps", lambda scratch, given, _: reports.series(scratch, given.pairs)),
    "sweeps": ("Sweeps", lambda scratch, given, _: sweeps.series(scratch, given.pairs, given.many)),
    "data": ("Data", lambda scratch, given, _: data.series(scratch, given.pairs, given.many)),
    "workers": ("Workers", lambda scratch, given, _: workers.series(scratch, max(given.pairs, workers.ROUNDS))),
}


def conditions(many: bool) -> dict[str, str]:
    rows, trials = max((*data.ROWS, data.MANY_ROWS * many)), max((*sweeps.TRIALS, sweeps.MANY_TRIALS * many))
    left = "" if many else f"; {data.MANY_ROWS:,} rows and {sweeps.MANY_TRIALS} trials (--many) were left out"
    return {
        "data": f"texts of some 30 tokens, seq_len {data.SEQ_LEN}, in the steps of workers {arms.SEQ_LEN}; metrics, "
        "trials and checkpoints are made up",
        "sizes": f"up to {rows:,} rows, {max(data.FILES):,} files, {trials} trials{left}",
        "threads": "1 for each worker; up to 8 workers and Ray on the cores of one machine",
        "flops": "none: models are too small to compute",
        "clipping": "1.0 in the steps of workers",
        "padding": "packed rows; counted as they come",
    }


def main() -> None:
    parser = options(__doc__, 3)
    parser.add_argument("--many", action="store_true", help="ten million rows and 512 trials too")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; default: all")
    given = parser.parse_args()
    compared = "The same work, more and more of it: exponents of growth against those that are due."
    with recorded("scale", compared, conditions(given.many), given) as result:
        planned = extrapolate.plans() if "checkpoints" in given.only else {}
        found: dict[str, list[Series]] = {}
        with tempfile.TemporaryDirectory(prefix="ray_ft_scale_") as scratch:
            for part in given.only:
                title, measure = PARTS[part]
                found[part] = measure(scratch, given, planned)
                growth.say(part, found[part])
                result.figures += [figure for one in found[part] if (figure := one.figure())]
                result.tables.append(growth.table(title, found[part]))
        every = [one for part in found.values() for one in part]
        if {"checkpoints", "workers"} <= found.keys():
            result.tables[:0] = extrapolate.tables(extrapolate.costs_of(every), planned)
        if untold := [one for one in every if not one.measurable]:
            rows = [(one.name, f"{growth.number(one.floor)} {one.unit}") for one in untold]
            result.tables.append(Table("Not measurable, so without a verdict", ("", "told from nothing above"), rows))
        result.raw = [
            {"name": one.name, "of": one.of, "unit": one.unit, "due": one.due, "floor": one.floor, "values": one.values}
            for one in every
        ]
    if given.to and set(given.only) == set(PARTS):
        page.write(result)


if __name__ == "__main__":
    main()
