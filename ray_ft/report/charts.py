"""Charts as plain Plotly figures: dictionaries of `data` and `layout`. Colours are roles; the page's script fills them.

Limits: at most `POINTS` rows and as many evaluations a line; more are thinned out evenly, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

POINTS = 2000
TABLE_ROWS = 40  # of a run, in the table beneath the charts

#: Names of colours that the page's script replaces, so that they fit light, dark and print.
FIRST, SECOND, THIRD = "@first", "@second", "@third"
COLOURS, DASHES = (FIRST, SECOND, THIRD), ("solid", "dot", "dash")
MOST_SOURCES = len(COLOURS) * len(DASHES)  # lines that can be told apart


@dataclass(frozen=True)
class Chart:
    """One chart: `figure` for the script, `title` for people, `note` beneath it."""

    title: str
    figure: dict[str, Any]
    note: str = ""
    wide: bool = False


#: Column of metrics.jsonl → title, unit, what it means.
CURVES: tuple[tuple[str, str, str, str], ...] = (
    ("eval_macro_f1", "Held-out macro F1", "%", "mean of F1 over the labels that held-out rows have"),
    ("reward_accuracy", "Reward accuracy", "%", "share of pairs whose chosen answer has the higher reward"),
    ("eval_reward_accuracy", "Held-out reward accuracy", "%", "the same of held-out pairs"),
    ("reward_margin", "Reward margin", "", "of the chosen answer over the rejected one"),
    ("eval_reward_margin", "Held-out reward margin", "", "the same of held-out pairs"),
    ("lr", "Learning rate", "", ""),
    ("grad_norm", "Gradient norm", "", "before clipping"),
    ("tokens_per_second", "Throughput", "tokens/s", "over all workers, without evaluation and saving"),
    ("mfu", "Model FLOP utilisation", "%", "share of the GPU's dense bfloat16 peak"),
    ("step_seconds", "Time of a step", "s", ""),
    ("data_wait_share", "Waiting for data", "%", "share of training time in which the step waited for its rows"),
    ("non_pad_share", "Real tokens", "%", "share of places in the packed rows that are not padding"),
    ("memory_gib", "Peak memory of a worker", "GiB", "of the GPU; on CPU of the process"),
    ("checkpoint_seconds", "Time that a checkpoint held training up", "s", ""),
)


def thinned(rows: Sequence[Mapping[str, Any]], most: int = POINTS) -> list[Mapping[str, Any]]:
    """At most `most` rows evenly spaced, with the first and the last, and as many of those that hold an evaluation."""
    if len(rows) <= most:
        return list(rows)
    evaluated = [at for at, row in enumerate(rows) if row.get("eval_loss") is not None]
    return [rows[at] for at in sorted({*even(range(len(rows)), most), *even(evaluated, most)})]


def even(places: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of some things, evenly spaced, the first and the last among them."""
    if len(places) <= most:
        return places
    return [places[round(at * (len(places) - 1) / (most - 1))] for at in range(most)]


def training(rows: Sequence[Mapping[str, Any]], sources: Mapping[str, Mapping[str, str]] | None = None) -> list[Chart]:
    """The curves of a run; a column without a number gives none.

    Args:
        sources: columns of losses by source, with each one's name for people, by the title of their chart.
    """
    shown = thinned(rows)
    charts = []
    labels = any(row.get("accuracy") is not None for row in shown)
    pairs = any("reward_margin" in row for row in shown)
    unit = "label" if labels else "pair" if pairs else "target token"
    per = f"per {unit}" if pairs else f"nats per {unit}"
    for key, title, of in (("loss", "Loss", per), ("accuracy", "Accuracy", "share of labels")):
        lines = [_line(shown, key, "training", FIRST)]
        if any(row.get(f"eval_{key}") is not None for row in shown):
            lines.append(_line(shown, f"eval_{key}", "held-out", SECOND, markers=True))
        if lines[0]["x"]:
            figure = _figure(lines, of)
            figure["layout"]["showlegend"] = len(lines) > 1
            charts.append(Chart(title, figure, f"mean over the {unit}s of a step", wide=True))
    for title, columns in (sources or {}).items():
        found = [
            (column, name) for column, name in columns.items() if any(row.get(column) is not None for row in shown)
        ]
        lines = [
            _line(shown, column, plain(name), COLOURS[at % 3], dash=DASHES[at // 3], markers=column.startswith("eval"))
            for at, (column, name) in enumerate(found[:MOST_SOURCES])
        ]
        if lines:
            figure = _figure(lines, per)
            more = (
                f"; the first {MOST_SOURCES} of {len(found)}, all are in metrics.jsonl"
                if len(found) > MOST_SOURCES
                else ""
            )
            charts.append(Chart(title, figure, f"mean over each source's {unit}s{more}", wide=True))
    for key, title, unit, note in CURVES:
        line = _line(shown, key, title, FIRST, markers=key == "checkpoint_seconds")
        if not line["x"]:
            continue
        figure = _figure([line], "" if unit == "%" else unit)
        if unit == "%":
            figure["layout"]["yaxis"] |= {"tickformat": ".3~%", "rangemode": "tozero"}
        elif key not in ("lr", "grad_norm", "reward_margin", "eval_reward_margin"):
            figure["layout"]["yaxis"]["rangemode"] = "tozero"
        if key == "lr":
            figure["layout"]["yaxis"] |= {"exponentformat": "power", "rangemode": "tozero"}
        charts.append(Chart(title, figure, note))
    return charts


def lengths(stats: Mapping[str, Any], seq_len: int | None) -> Chart | None:
    """Samples by length, of the training split; lengths are counted up to powers of two."""
    counts = {int(top): number for top, number in stats.get("lengths", {}).items()}
    if not counts:
        return None
    tops = sorted(counts)
    figure = _figure(
        [
            {
                "type": "bar",
                "x": [f"{top // 2 + 1}–{top}" for top in tops],
                "y": [counts[top] for top in tops],
                "marker": {"color": FIRST},
                "hovertemplate": "%{x} tokens: %{y:,} samples<extra></extra>",
            }
        ],
        "samples",
        "tokens in a sample",
    )
    figure["layout"]["xaxis"] |= {"type": "category"}
    figure["layout"]["bargap"] = 0.3 if len(tops) > 2 else 0.7
    return Chart("Length of samples", figure, f"data.seq_len is {seq_len}" if seq_len else "")


def differences(rows: Sequence[Mapping[str, Any]], base: str = "base model") -> Chart | None:
    """Improvement over the base with its interval, for scores that have one, as shares of their scale."""
    found = [row for row in rows if row.get("low") is not None and row.get("high") is not None]
    if not found:
        return None
    names = [plain(row["title"]) for row in found][::-1]
    values = [row["value"] / row["scale"] for row in found][::-1]
    figure = _figure(
        [
            {
                "type": "scatter",
                "mode": "markers",
                "x": values,
                "y": names,
                "marker": {"color": FIRST, "size": 9},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [(row["high"] - row["value"]) / row["scale"] for row in found][::-1],
                    "arrayminus": [(row["value"] - row["low"]) / row["scale"] for row in found][::-1],
                    "color": FIRST,
                },
                "hovertemplate": "%{y}: %{x:+.1%}<extra></extra>",
            }
        ],
        "",
        "model − base, of the score's whole scale",
    )
    figure["layout"]["xaxis"] |= {"tickformat": "+.0%", "zeroline": True, "hoverformat": "+.1%"}
    figure["layout"]["yaxis"] |= {"type": "category", "automargin": True}
    note = "95% interval of a paired bootstrap over the rows"
    return Chart(f"Improvement over the {base}", figure, note, wide=True)


def over_steps(validations: Sequence[tuple[int, Mapping[str, float]]], title: str, note: str) -> Chart | None:
    """One line for each score, over the steps of the checkpoints that were evaluated beside the training."""
    names = list(dict.fromkeys(name for _, scores in validations for name in scores))
    lines = []
    for number, name in enumerate(names):
        points = [(step, scores[name]) for step, scores in validations if scores.get(name) is not None]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(name),
                "x": [step for step, _ in points],
                "y": [value for _, value in points],
                "line": {"color": COLOURS[number % 3], "dash": DASHES[number // 3 % 3]},
            }
        )
    return Chart(title, _figure(lines, ""), note, wide=True) if lines else None


def confusion(matrix: Sequence[Sequence[float]], wanted: Sequence[str], answered: Sequence[str]) -> Chart:
    """Rows of references by what was answered; `matrix[i][j]` counts references `wanted[i]` answered `answered[j]`."""
    figure = _figure(
        [
            {
                "type": "heatmap",
                "z": [list(row) for row in matrix],
                "x": [plain(name) for name in answered],
                "y": [plain(name) for name in wanted],
                "colorscale": "@scale",
                "xgap": 2,
                "ygap": 2,
                "texttemplate": "%{z}" if len(wanted) <= 20 else "",
                "hovertemplate": "%{y} answered as %{x}: %{z}<extra></extra>",
                "showscale": False,
            }
        ],
        "reference",
        "answer",
    )
    figure["layout"]["xaxis"] |= {"type": "category", "automargin": True}
    figure["layout"]["yaxis"] |= {"type": "category", "automargin": True, "autorange": "reversed"}
    figure["layout"]["height"] = 130 + 34 * len(wanted)
    return Chart("Confusion of labels", figure, "counts of held-out rows", wide=len(answered) > 8)


def plain(text: str) -> str:
    """A text of the data as Plotly shows it: its labels understand some tags and entities."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    colour: str,
    *,
    dash: str = "solid",
    markers: bool = False,
) -> dict[str, Any]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers or len(points) == 1 else "lines",
        "name": name,
        "x": [step for step, _ in points],
        "y": [value for _, value in points],
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"color": colour, "size": 6},
    }


def _figure(data: list[dict[str, Any]], y: str, x: str = "step") -> dict[str, Any]:
    layout = {
        "xaxis": {"title": {"text": x, "standoff": 8}},
        "yaxis": {"title": {"text": y, "standoff": 8}},
        "showlegend": len(data) > 1,
        "height": 260,
    }
    return {"data": data, "layout": layout}
