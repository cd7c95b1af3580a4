"""What a sweep leaves to others: every report as a table, and the best trial as a recipe.

Both are written anew each time from the journal, so that they may be asked for while the sweep runs, and after it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ray_ft import paths
from ray_ft.recipe import Recipe
from ray_ft.retry import patiently
from ray_ft.tune.journal import Report, Sweep, Trial

TABLE, BEST = "sweep.parquet", "best.yaml"


def write_table(sweep: Sweep) -> str:
    """Write ``sweep.parquet``, one row per report; a trial that never reported has one row, without step and metric.

    Columns: ``number``, ``status``, ``error`` (of the trial); ``step``, ``total``, ``progress`` (0 to 1), the metric
    under its own name, ``seconds`` (that the trial had run by then) and ``device_seconds`` (times its workers);
    ``trial_device_seconds`` (of the whole trial, also behind its last report); one column per setting, named by its
    recipe key and as it was at that report (`settings_at`), null where the recipe's own value was kept; ``best``
    (whether the trial is the sweep's best). Settings whose values are of several types are JSON text.

    Returns:
        its location.

    Raises:
        OSError: storage does not answer.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    best = sweep.best()
    none: list[Report | None] = [None]
    rows = [
        (trial, report, trial.settings if report is None else settings_at(trial, report.step))
        for trial in by_number(sweep)
        for report in (trial.reports or none)
    ]

    def column(of: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([of(trial, report) for trial, report, _ in rows], kind)

    def reported(of: Any, kind: pa.DataType) -> pa.Array:
        return column(lambda trial, report: None if report is None else of(report), kind)

    columns = {
        "number": column(lambda trial, report: trial.number, pa.int64()),
        "status": column(lambda trial, report: trial.status, pa.string()),
        "error": column(lambda trial, report: trial.error, pa.string()),
        "step": reported(lambda report: report.step, pa.int64()),
        "total": reported(lambda report: report.total, pa.int64()),
        "progress": reported(lambda report: report.progress, pa.float64()),
        sweep.metric: reported(lambda report: report.value, pa.float64()),
        "seconds": column(lambda trial, report: _seconds(trial, report), pa.float64()),
        "device_seconds": column(lambda trial, report: _seconds(trial, report) * trial.workers, pa.float64()),
        "trial_device_seconds": column(lambda trial, report: trial.device_seconds, pa.float64()),
        **{key: _setting([settings.get(key) for _, _, settings in rows]) for key in keys(sweep)},
        "best": column(lambda trial, report: best is not None and trial.number == best.number, pa.bool_()),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    location, content = paths.join(sweep.root, TABLE), sink.getvalue().to_pybytes()
    patiently(lambda: paths.write_bytes(location, content))
    return location


def write_best(sweep: Sweep, recipe: Recipe) -> str | None:
    """Write ``best.yaml``: the whole recipe with the best trial's settings, to be trained as it is.

    Args:
        recipe: the sweep's.

    Returns:
        its location; None where no trial has reported yet, and nothing was written.

    Raises:
        OSError: storage does not answer.
    """
    import yaml

    from ray_ft.recipe.loading import parse
    from ray_ft.tune.space import Space

    best = sweep.best()
    if best is None:
        return None
    content = Space(recipe).apply(best.settings)
    content["run"] = {**content["run"], "name": f"{recipe.run.name}-best"}
    location = paths.join(sweep.root, BEST)
    text = yaml.safe_dump(parse(content).model_dump(mode="json", exclude={"tune"}), sort_keys=False, allow_unicode=True)
    head = [f"# ray-ft train {location}", *(f"# {line}" for line in _origin(sweep, recipe, best))]
    patiently(lambda: paths.write_text(location, "\n".join([*head, text])))
    return location


def by_number(sweep: Sweep) -> list[Trial]:
    return [sweep.trials[number] for number in sorted(sweep.trials)]


def keys(sweep: Sweep) -> list[str]:
    """Recipe keys that any trial sets, in the order in which trials have them."""
    return list(dict.fromkeys(key for trial in by_number(sweep) for key in trial.settings))


def settings_at(trial: Trial, step: int) -> dict[str, Any]:
    """The settings with which a trial took a step: under PBT they change where it goes on from another trial."""
    return next((one.settings for one in reversed(trial.inherited) if one.step < step), trial.first)


def _seconds(trial: Trial, report: Report | None) -> float:
    return trial.seconds if report is None else report.seconds


def _setting(values: Sequence[Any]) -> Any:
    """One column: numbers, truth values or text as they are; anything else, and mixtures, as JSON text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    for allowed, kind in (
        ({bool}, pa.bool_()),
        ({int}, pa.int64()),
        ({int, float}, pa.float64()),
        ({str}, pa.string()),
    ):
        if kinds <= allowed:
            return pa.array(values, kind)
    return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values], pa.string())


def _origin(sweep: Sweep, recipe: Recipe, best: Trial) -> list[str]:
    last = best.reports[-1]
    what = f"{sweep.metric} {last.value:.6g} at step {last.step} of {last.total}, {best.status}"
    lines = [f"Trial {best.name} of the sweep {recipe.run.name!r}, the best of {len(sweep.trials)}: {what}."]
    if best.status != "finished":
        lines.append("No trial has gone to the end yet: another one may prove better.")
    if best.inherited:
        lines += [
            f"Its settings changed on the way (PBT), the last time after step {best.inherited[-1].step}: below are the",
            "last ones, and a run that has them from its first step may end elsewhere.",
        ]
    return lines
