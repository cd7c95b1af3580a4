"""A sweep on one page: its trials side by side, what the settings did, and what it cost.

Its directory is read as a run's is: the journal of the trials in place of metrics, and nothing assumed to be there. A
trial has a page of its own, as any run: `ray-ft report <sweep>/0007`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray_ft import paths
from ray_ft.report import html, sweep_charts, trained
from ray_ft.report.blocks import Charts, Missing, Pre, Section, Table, Text, number, share
from ray_ft.report.sweep_charts import said, unit_of
from ray_ft.report.sweep_reading import Swept
from ray_ft.tune.columns import short_names
from ray_ft.tune.importance import Importance, importance, own
from ray_ft.tune.journal import Status, Trial
from ray_ft.tune.results import by_number, keys, settings_at

DRAWN = 400  # trials that charts show, the best ones; the tables have all
_ORDER: tuple[Status, ...] = ("finished", "running", "paused", "waiting", "stopped", "failed")


def page(swept: Swept) -> str:
    """The HTML of a sweep's report."""
    sections = [best(swept), curves(swept), settings(swept), budget(swept), trials(swept)]
    if any(trial.inherited for trial in swept.trials):
        sections.append(lineage(swept))
    sections += [failures(swept), trained.recipe(swept.record)]
    return html.render(swept.record.name, swept.kind, swept.words, _facts(swept), _tiles(swept), sections)


# -------------------------------------------------------------------------------------------------------------- head


def _facts(swept: Swept) -> list[tuple[str, str]]:
    record = swept.record
    search, scheduler = record.setting("tune.search"), record.setting("tune.scheduler")
    limits = record.setting("tune.budget") or {}
    limit = [f"{number(limits[key])} {key.replace('_', '-')}" for key in limits if limits[key] is not None]
    facts = [
        ("base model", paths.split_query(str(record.setting("model.path")))[0]),
        ("compared by", f"{swept.metric}, {'the least' if swept.sweep.mode == 'min' else 'the most'} is the best"),
        ("searched", f"{number(len(swept.space))} settings, search: {search}, scheduler: {scheduler}"),
        (
            "budget",
            " and ".join([*([f"{swept.planned:,} trials"] if swept.planned else ["every combination"]), *limit]),
        ),
        ("begun", trained.when(swept.sweep.created)),
        ("last written", trained.when(swept.written)),
        ("sweep directory", record.location),
        ("recipe", f"sha256 {record.recipe_sha256}" if record.recipe_sha256 else "without a checksum"),
    ]
    return [(name, text) for name, text in facts if text != "—"]


def _tiles(swept: Swept) -> list[tuple[str, str, str]]:
    tiles = []
    if swept.best is not None:
        where = f"trial {swept.best.name}, {swept.best.status}"
        tiles.append((f"best {swept.metric}", _value(swept.best.value), where))
    counts = Counter(trial.status for trial in swept.trials)
    if counts:
        note = ", ".join(f"{counts[status]:,} {status}" for status in _ORDER if counts[status])
        tiles.append(("trials", f"{len(swept.trials):,}", note))
    spent = swept.sweep.device_seconds
    if spent:
        tiles.append(_time("spent by trials", spent, "device-"))
        full = spent + sum(swept.rest(trial) for trial in swept.trials)
        if full > spent and swept.kind == "complete":
            tiles.append(("of full runs of all", share(spent / full), f"which would be {_in_words(full, 'device-')}"))
    if swept.sweep.seconds:
        tiles.append(_time("the sweep ran", swept.sweep.seconds, ""))
    return tiles


def _time(title: str, seconds: float, kind: str) -> tuple[str, str, str]:
    per, unit = unit_of(seconds)
    return title, number(seconds / per, 3), f"{kind}{unit}"


def _in_words(seconds: float, kind: str) -> str:
    _, figure, unit = _time("", seconds, kind)
    return f"{figure} {unit}"


# ---------------------------------------------------------------------------------------------------------- sections


def best(swept: Swept) -> Section:
    section = Section("best", "Best trial")
    found = swept.best
    if swept.kind == "stopped":
        section.blocks.append(Missing("The sweep has not come to its end.", "ray-ft tune RECIPE --resume"))
    if found is None:
        section.blocks.append(Missing("No trial has reported yet."))
        return section
    last = found.reports[-1]
    text = f"Trial {found.name}: {swept.metric} {_value(last.value)} at step {last.step:,} of {last.total:,}."
    if found.status != "finished":
        text += " No trial has gone to the end yet: another one may prove better."
    if found.inherited:
        text += " Its settings changed on the way (PBT): these are the last ones."
    section.blocks.append(Text(text))
    rows = [
        (key, said(value), said(own(swept.record.recipe, key)), _searched(swept.space.get(key) or {}))
        for key, value in found.settings.items()
    ]
    columns = ("setting", "best trial's", "recipe's own", "searched")
    section.blocks.append(Table(columns, rows, "Its settings", (0, 1, 2, 3)))
    where = swept.record.location
    section.blocks += [
        Text("Its model, from its own checkpoint:", f"ray-ft export {where} && ray-ft serve {where}"),
        Text("Trained anew with its settings:", f"ray-ft train {where}/best.yaml"),
        Text("A page about it alone:", f"ray-ft report {where}/{found.name}"),
    ]
    return section


def curves(swept: Swept) -> Section:
    section = Section("curves", "Learning curves")
    shown = _drawn(swept)
    chart = sweep_charts.curves(shown, swept.best, swept.metric)
    if chart is None:
        section.blocks.append(Missing(f"No trial has reported its {swept.metric} yet."))
        return section
    section.blocks.append(Charts([chart]))
    _say_drawn(swept, section)
    rows = [
        (trial.name, number(report.step), share(report.progress), _value(report.value), number(report.seconds, 3))
        for trial in shown[: sweep_charts.TABLE_TRIALS]
        for report in trial.reports
    ]
    some = "Reports" if len(shown) <= sweep_charts.TABLE_TRIALS else f"Reports of the best {sweep_charts.TABLE_TRIALS}"
    columns = ("trial", "step", "share of its run", swept.metric, "s until then")
    section.blocks.append(Table(columns, rows, f"{some}; sweep.parquet has all", (0,), closed=True))
    return section


def settings(swept: Swept) -> Section:
    section = Section("settings", "What the settings did")
    chart = sweep_charts.coordinates(_drawn(swept), swept.best, swept.metric, swept.space)
    if chart is None:
        section.blocks.append(Missing("Fewer than two trials that differ have reported: there is nothing to compare."))
        return section
    section.blocks.append(Charts([chart]))
    _say_drawn(swept, section)
    found = importance(swept.sweep, swept.record.recipe)
    if isinstance(found, str):
        section.blocks.append(Missing(f"No importance of single settings: {_lower(found)}"))
        return section
    section.blocks += [Charts([sweep_charts.importances(found.shares, _compared(found, swept.metric))])]
    rows = [(key, share(value)) for key, value in found.shares.items()]
    section.blocks.append(Table(("setting", "importance"), rows, "Importance of the settings", (0,), closed=True))
    section.blocks.append(
        Text(
            "Importance is a setting's share of the differences that single settings explain, in a forest of "
            "regression trees over the trials (fANOVA; Hutter, Hoos and Leyton-Brown 2014). Of few trials it is a "
            "hint, no proof."
        )
    )
    if found.left_out:
        left_out = "; ".join(f"{key}: {why}" for key, why in found.left_out.items())
        section.blocks.append(Text(f"Left out: {left_out}."))
    return section


def budget(swept: Swept) -> Section:
    section = Section("budget", "Budget")
    ordered = by_number(swept.sweep)
    chart = sweep_charts.budget(ordered, swept.best, swept.rest)
    if chart is None:
        section.blocks.append(Missing("No trial has run yet."))
        return section
    spent, rest = swept.sweep.device_seconds, sum(swept.rest(trial) for trial in ordered)
    text = f"Spent: {_in_words(spent, 'device-')} (each trial's time times its workers)."
    unknown = sum(not trial.reports for trial in ordered)
    if rest:
        text += (
            f" Full runs of all {len(ordered) - unknown:,} trials that reported would take about "
            f"{_in_words(spent + rest, 'device-')}, each at the speed that it had: {(spent + rest) / spent:.1f} times "
            "that."
        )
    section.blocks += [Text(text), Charts([chart])]
    by_status = [
        (status, number(len(group)), number(sum(trial.device_seconds for trial in group), 4))
        for status in _ORDER
        if (group := [trial for trial in ordered if trial.status == status])
    ]
    section.blocks.append(Table(("status", "trials", "device-seconds"), by_status, "By status"))
    return section


def trials(swept: Swept) -> Section:
    section = Section("trials", "Trials")
    if not swept.trials:
        section.blocks.append(Missing("There is no trial yet.", "ray-ft tune RECIPE"))
        return section
    names = short_names(keys(swept.sweep))
    columns = ("trial", "status", *names.values(), swept.metric, "step", "s", "device-s", "error")
    rows = [
        (
            trial.name,
            trial.status + (", the best" if trial is swept.best else ""),
            *(said(trial.settings[key]) if key in trial.settings else "—" for key in names),
            _value(trial.value),
            f"{trial.step:,} / {trial.reports[-1].total:,}" if trial.reports else "—",
            number(trial.seconds, 3),
            number(trial.device_seconds, 3),
            (trial.error or "").strip().split("\n")[0][:200],
        )
        for trial in swept.trials
    ]
    caption = "All trials, the best first; —: the recipe's own value" if names else "All trials, the best first"
    section.blocks.append(Table(columns, rows, caption, (0, 1, len(columns) - 1)))
    section.blocks.append(Text("One row per report, for further analysis:", "sweep.parquet"))
    return section


def lineage(swept: Swept) -> Section:
    """Who took over from whom (PBT)."""
    section = Section("lineage", "Who took over from whom")
    known = swept.sweep.trials
    rows = []
    for trial in by_number(swept.sweep):
        for at, took in enumerate(trial.inherited):
            before = trial.inherited[at - 1].settings if at else trial.first
            parent = known.get(took.parent)
            of_parent = settings_at(parent, took.step) if parent else None
            rows.append(
                (
                    trial.name,
                    number(took.step),
                    parent.name if parent else number(took.parent),
                    _changed(before, took.settings),
                    _changed(of_parent, took.settings),
                )
            )
    columns = ("trial", "went on after step", "from trial", "its settings before → after", "its parent's → its own")
    section.blocks.append(Table(columns, rows, "Each went on from the other's checkpoint", (0, 2, 3, 4)))
    if swept.best is not None and (line := _ancestors(known, swept.best)):
        section.blocks.append(Text(f"The weights of the best trial: {line}."))
    return section


def failures(swept: Swept) -> Section:
    section = Section("failures", "Failures")
    failed = [trial for trial in by_number(swept.sweep) if trial.error]
    section.blocks += [Pre(f"Trial {trial.name}", trial.error or "") for trial in failed]
    section.blocks += [Missing(f"This file could not be read: {fault}") for fault in swept.record.faults]
    if not section.blocks:
        section.blocks.append(Text("No trial has failed."))
    return section


# ------------------------------------------------------------------------------------------------------------- words


def _value(value: float | None) -> str:
    """A metric; trials that diverge report such as are no number."""
    return number(value) if value is None or math.isfinite(value) else str(value)


def _drawn(swept: Swept) -> list[Trial]:
    return swept.trials[:DRAWN]


def _say_drawn(swept: Swept, section: Section) -> None:
    if len(swept.trials) > DRAWN:
        section.blocks.append(Text(f"The lines show the best {DRAWN:,} of {len(swept.trials):,} trials."))


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _compared(found: Importance, metric: str) -> str:
    where = "at the end" if found.progress >= 1 else f"after {share(found.progress)} of the run"
    return f"for {metric} {where}, of {found.trials:,} trials"


def _searched(dimension: Mapping[str, Any]) -> str:
    parts = [f"{kind} {said(value)}" for kind, value in dimension.items() if value is not None]
    return ", ".join(parts) or "—"


def _changed(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    """What is different; — where it is not known what was before."""
    if before is None:
        return "—"
    names = short_names(list(after))
    parts = [
        f"{names[key]} {said(before.get(key))} → {said(value)}"
        for key, value in after.items()
        if before.get(key) != value
    ]
    return ", ".join(parts) or "unchanged"


def _ancestors(known: Mapping[int, Trial], trial: Trial) -> str:
    """Whose checkpoints a trial's weights come from, backwards; "" where all are its own."""
    line, until, seen = [trial.name], float("inf"), 0
    while seen < 1000:
        took = next((one for one in reversed(trial.inherited) if one.step < until), None)
        parent = None if took is None else known.get(took.parent)
        if took is None or parent is None:
            break
        line.append(f"of {parent.name} up to step {took.step:,}")
        trial, until, seen = parent, took.step, seen + 1
    return ", then ".join(reversed([f"of {line[0]} to the end", *line[1:]])) if len(line) > 1 else ""
