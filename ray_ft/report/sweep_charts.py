"""Charts of a sweep's trials, as `charts` draws those of a run: plain Plotly figures whose colours are roles.

Lines of many trials are one Plotly trace for each kind, with gaps between them: pages of hundreds of trials stay quick.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_ft.report.blocks import number
from ray_ft.report.charts import FIRST, SECOND, THIRD, Chart, plain
from ray_ft.tune.columns import short_names
from ray_ft.tune.journal import Trial

POINTS = 200  # of one trial's line
TABLE_TRIALS = 20  # whose reports stand in the table beneath the lines
_LABEL = 14  # characters of a value beside an axis
_APART = 0.06  # of an axis, between such values
_TICKS = 6  # values that stand beside an axis, where there are no more; else the ends alone

#: Status → how its lines and bars are drawn: colour, opacity, dash. The best trial is drawn over the others.
_LOOKS: dict[str, tuple[str, float, str]] = {
    "finished": (FIRST, 0.9, "solid"),
    "running": (THIRD, 0.9, "solid"),
    "paused": (THIRD, 0.6, "dot"),
    "stopped": ("@quiet", 0.4, "solid"),
    "failed": ("@warn-line", 0.9, "dash"),
}
#: A legend that grows upwards where it needs several lines.
_ABOVE = {"y": 1.02, "yanchor": "bottom"}
_BEST = (SECOND, 1.0, "solid")


def said(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return json.dumps(value, ensure_ascii=False)


def curves(trials: Sequence[Trial], best: Trial | None, metric: str) -> Chart | None:
    """The metric over each trial's progress."""
    shown = [trial for trial in trials if any(_finite(report.value) for report in trial.reports)]
    if not shown:
        return None
    names = short_names(_keys(shown))
    lines = []
    for title, group, look in _groups(shown, best):
        x: list[float | None] = []
        y: list[float | None] = []
        texts: list[str] = []
        for trial in group:
            about = _about(trial, names)
            reports = [report for report in trial.reports if _finite(report.value)]
            every = math.ceil(len(reports) / POINTS)
            for report in [*reports[:-1:every], reports[-1]]:
                x.append(report.progress)
                y.append(report.value)
                texts.append(f"{metric} {number(report.value)} at step {report.step:,} of {report.total:,}<br>{about}")
            x.append(None)
            y.append(None)
            texts.append("")
        lines.append(_line(title, x, y, texts, look, 3 if title == "best" else 1.5, "lines+markers"))
    values = [report.value for trial in shown for report in trial.reports if _finite(report.value)]
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "share of a trial's run", "standoff": 8}, "tickformat": ".0%", "range": [0, 1.02]},
        "yaxis": {"title": {"text": metric, "standoff": 8}},
        "showlegend": True,
        "legend": _ABOVE,
        "height": 360,
        "hovermode": "closest",
    }
    if min(values) > 0 and max(values) > 20 * min(values):
        layout["yaxis"] |= {"type": "log", "dtick": 1}
    note = "one line per trial" + (f"; {len(trials) - len(shown):,} never reported" if len(shown) < len(trials) else "")
    return Chart("Learning curves", {"data": lines, "layout": layout}, note, wide=True)


def coordinates(
    trials: Sequence[Trial], best: Trial | None, metric: str, space: Mapping[str, Mapping[str, Any]]
) -> Chart | None:
    """Each trial as a line through its settings to its metric; `trials` best first: the better, the darker.

    Plotly's own parallel coordinates need WebGL and compile code in the browser, which the page's policy forbids.
    """
    shown = [trial for trial in trials if trial.reports and _finite(trial.reports[-1].value)]
    names = short_names(_keys(shown))
    axes = {
        names[key]: axis
        for key in names
        if (axis := _axis([trial.settings.get(key) for trial in shown], space.get(key) or {}))
    }
    if not axes or len(shown) < 2:
        return None
    axes[metric] = _axis([trial.reports[-1].value for trial in shown], {}) or ([0.5] * len(shown), [])
    quarter = math.ceil(len(shown) / 4)
    lines = []
    for part in reversed(range(4)):
        group = range(part * quarter, min((part + 1) * quarter, len(shown)))
        look = (FIRST, (0.95, 0.55, 0.3, 0.16)[part], "solid")
        title = ("best quarter", "second", "third", "last")[part]
        lines += _through(title, [at for at in group if shown[at] is not best], shown, axes, names, metric, look)
    if best in shown:
        lines += _through("best", [shown.index(best)], shown, axes, names, metric, _BEST)
    layout = {
        "xaxis": {
            "tickvals": list(range(len(axes))), "ticktext": [plain(name) for name in axes], "side": "top",
            "showgrid": False, "range": [-0.25, len(axes) - 0.5], "fixedrange": True, "showline": False,
        },
        "yaxis": {"visible": False, "range": [-0.07, 1.07], "fixedrange": True},
        "shapes": [
            {
                "type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "layer": "below",
                "line": {"color": "@line", "width": 1},
            }
            for at in range(len(axes))
        ],
        "annotations": [
            {
                "x": at, "y": place, "text": plain(text), "showarrow": False, "xanchor": "left", "xshift": 4,
                "bgcolor": "@panel", "borderpad": 1, "font": {"size": 11, "color": "@text"}, "opacity": 0.85,
            }
            for at, (_, ticks) in enumerate(axes.values())
            for place, text in ticks
        ],
        "showlegend": True,
        "height": 380,
        "margin": {"l": 14, "t": 64, "b": 34},
        "legend": {"y": -0.02, "yanchor": "top", "traceorder": "reversed"},
        "hovermode": "closest",
    }  # fmt: skip
    note = f"{len(shown):,} trials, each to its last {metric}; a gap: the recipe's own value"
    return Chart("Settings and metric", {"data": lines, "layout": layout}, note, wide=True)


def importances(shares: Mapping[str, float], note: str) -> Chart:
    """Bars, the largest share on top."""
    names = short_names(list(shares))
    figure = {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "x": list(shares.values())[::-1],
                "y": [plain(names[key]) for key in shares][::-1],
                "marker": {"color": FIRST},
                "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": {"tickformat": ".0%", "range": [0, 1], "title": {"text": "share", "standoff": 8}},
            "yaxis": {"type": "category"},
            "showlegend": False,
            "bargap": 0.4,
            "height": 100 + 34 * len(shares),
        },
    }
    return Chart("Importance of the settings", figure, note, wide=True)


def budget(trials: Sequence[Trial], best: Trial | None, rest: Callable[[Trial], float]) -> Chart | None:
    """Device-time of each trial, by number, and what `rest` says that stopped ones would have taken to the end."""
    spent = [trial for trial in trials if trial.device_seconds > 0]
    if not spent:
        return None
    per, unit = unit_of(max(trial.device_seconds + rest(trial) for trial in spent))
    bars = [
        _bars(title, group, [trial.device_seconds / per for trial in group], unit, look)
        for title, group, look in _groups(spent, best)
    ]
    stopped = [trial for trial in spent if trial.status == "stopped" and rest(trial) > 0]
    if stopped:
        look = ("@grid", 1.0, "")
        bars.append(_bars("not run, as stopped", stopped, [rest(trial) / per for trial in stopped], unit, look))
    layout = {
        "xaxis": {
            "type": "category", "title": {"text": "trial", "standoff": 8},
            "categoryorder": "array", "categoryarray": [trial.name for trial in spent],
        },
        "yaxis": {"title": {"text": f"device-{unit}", "standoff": 8}, "rangemode": "tozero"},
        "barmode": "stack",
        "bargap": 0.25,
        "showlegend": True,
        "legend": _ABOVE,
        "height": 320,
        "hovermode": "closest",
    }  # fmt: skip
    return Chart("Budget spent per trial", {"data": bars, "layout": layout}, "its time × its workers", wide=True)


def unit_of(seconds: float) -> tuple[float, str]:
    """(Seconds of it, name) of the unit in which to say a time."""
    return (3600.0, "hours") if seconds >= 7200 else (60.0, "minutes") if seconds >= 600 else (1.0, "seconds")


def _groups(trials: Sequence[Trial], best: Trial | None) -> list[tuple[str, list[Trial], tuple[str, float, str]]]:
    """(Title, trials, look) of what is drawn alike, those that stand out last."""
    order = ("stopped", "failed", "paused", "running", "finished")
    groups = [
        (status, [trial for trial in trials if trial.status == status and trial is not best], _LOOKS[status])
        for status in order
    ]
    if best in trials:
        groups.append(("best", [trial for trial in trials if trial is best], _BEST))
    return [group for group in groups if group[1]]


def _axis(
    values: Sequence[Any], dimension: Mapping[str, Any]
) -> tuple[list[float | None], list[tuple[float, str]]] | None:
    """(Each value's place from 0 to 1, (place, text) of what stands beside the axis); None where all are one value."""
    there = [value for value in values if value is not None]
    if len({json.dumps(value, sort_keys=True) for value in there}) < 2:
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        low, high = min(there), max(there)
        log = low > 0 and (dimension.get("loguniform") is not None or high >= 100 * low)

        def place(value: float) -> float:
            return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

        marked = [low, high]  # and what lies between, where it is little and none is written over another
        for value in sorted(set(there)) if len(set(there)) <= _TICKS else []:
            if all(abs(place(value) - place(other)) >= _APART for other in marked):
                marked.append(value)
        return [None if value is None else place(value) for value in values], [
            (place(value), number(value, 3)) for value in marked
        ]
    names = sorted({said(value) for value in there})
    places = {name: at / (len(names) - 1) for at, name in enumerate(names)}
    ticks = [
        (place, name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…")
        for name, place in places.items()
        if len(names) <= 2 * _TICKS
    ]
    return [None if value is None else places[said(value)] for value in values], ticks


def _through(
    title: str,
    group: Sequence[int],
    shown: Sequence[Trial],
    axes: Mapping[str, tuple[list[float | None], list[tuple[float, str]]]],
    names: Mapping[str, str],
    metric: str,
    look: tuple[str, float, str],
) -> list[dict[str, Any]]:
    """The trace of some trials through all axes."""
    x: list[float | None] = []
    y: list[float | None] = []
    texts: list[str] = []
    for at in group:
        trial = shown[at]
        x += [*range(len(axes)), None]
        y += [*(places[at] for places, _ in axes.values()), None]
        texts += [f"{metric} {number(trial.reports[-1].value)}<br>{_about(trial, names)}"] * (len(axes) + 1)
    return [_line(title, x, y, texts, look, 3 if title == "best" else 1.5, "lines")] if group else []


def _line(
    title: str,
    x: Sequence[float | None],
    y: Sequence[float | None],
    texts: Sequence[str],
    look: tuple[str, float, str],
    width: float,
    mode: str,
) -> dict[str, Any]:
    colour, opacity, dash = look
    return {
        "type": "scatter",
        "mode": mode,
        "name": title,
        "x": list(x),
        "y": list(y),
        "text": list(texts),
        "hovertemplate": "%{text}<extra></extra>",
        "opacity": opacity,
        "line": {"color": colour, "width": width, "dash": dash},
        "marker": {"color": colour, "size": width + 2.5},
    }


def _bars(
    title: str, group: Sequence[Trial], heights: Sequence[float], unit: str, look: tuple[str, float, str]
) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": title,
        "x": [trial.name for trial in group],
        "y": list(heights),
        "marker": {"color": look[0], "opacity": look[1]},
        "hovertemplate": f"%{{x}}, {title}: %{{y:.3~g}} device-{unit}<extra></extra>",
    }


def _about(trial: Trial, names: Mapping[str, str]) -> str:
    """A trial for people who point at it: its name and its settings, as they are now."""
    settings = [f"{names[key]} {said(value)}" for key, value in trial.settings.items() if key in names]
    return "<br>".join([f"{trial.name}, {trial.status}", *map(plain, settings)])


def _keys(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.settings))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
