"""Cost as work grows, and what follows for 27B on 64 and 512 GPUs.

    python -m benchmarks.scale [--pairs 3] [--many] [--only PART …] [--to FILE]

It reports overheads, not speed-ups: all on one machine, whose cores the workers share. Each series has a growth
exponent and the one that is due; a pair is one pass over its sizes, where that takes seconds. With --to, docs/scale.md
is made again. --many adds ten million rows and 512 trials, and takes half an hour more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

from benchmarks.result import options, recorded
from benchmarks.scale import checkpoints, data, extrapolate, growth, page, reports, sweeps, workers
from benchmarks.scale.growth import Series

#: Title → what measures it, of (scratch folder, repetitions, whether to measure many).
PARTS: dict[str, tuple[str, Callable[[str, int, bool], list[Series]]]] = {
    "checkpoints": ("Checkpoints", lambda scratch, repeat, many: checkpoints.series(scratch, repeat)),
    "reports": ("Logged steps", lambda scratch, repeat, many: reports.series(scratch, repeat)),
    "sweeps": ("Sweeps", sweeps.series),
    "data": ("Data", data.series),
    "workers": ("Workers", lambda scratch, repeat, many: workers.series(scratch, max(repeat // 2, 1))),
}
CONDITIONS = {
    "data": f"texts of some 30 tokens, seq_len {data.SEQ_LEN}; metrics, trials and checkpoints are made up",
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
    with recorded("scale", compared, CONDITIONS, given) as result:
        found: dict[str, list[Series]] = {}
        with tempfile.TemporaryDirectory(prefix="ray_ft_scale_") as scratch:
            for part in given.only:
                title, measure = PARTS[part]
                found[part] = measure(scratch, given.pairs, given.many)
                growth.say(part, found[part])
                result.figures += [one.figure() for one in found[part]]
                result.tables.append(growth.table(title, found[part]))
        every = [one for part in found.values() for one in part]
        if {"checkpoints", "workers"} <= found.keys():
            costs = extrapolate.costs_of(every, checkpoints.TENSORS_IN_SHARDS)
            result.tables[:0] = extrapolate.tables(costs, extrapolate.plans())
        result.raw = [
            {"name": one.name, "of": one.of, "unit": one.unit, "due": one.due, "values": one.values} for one in every
        ]
    if given.to and set(given.only) == set(PARTS):
        page.write(result)


if __name__ == "__main__":
    main()
