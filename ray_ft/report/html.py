"""The page itself: sections into a template, and the scripts and styles beside them, so that nothing is loaded.

What a browser may do with the page is fixed in the page (a content security policy): run these two scripts and nothing
else, and reach no address at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

import ray_ft
from ray_ft.data.files import public_name
from ray_ft.report import evaluated, trained
from ray_ft.report.blocks import Charts, Section, number
from ray_ft.report.reading import Record

_ASSETS = resources.files("ray_ft.report") / "assets"


def page(record: Record) -> str:
    """The HTML of a run's report."""
    sections = [
        trained.training(record),
        evaluated.evaluation(record),
        evaluated.samples(record),
        evaluated.validations(record),
        trained.data(record),
        trained.failures(record),
        trained.export(record),
        trained.recipe(record),
    ]
    return render(record.name, record.state.kind, record.state.words, _facts(record), _tiles(record), sections)


def render(
    name: str,
    kind: str,
    words: str,
    facts: Sequence[tuple[str, str]],
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[Section],
) -> str:
    """The HTML of a report.

    Args:
        kind, words: where it stands, as of `reading.State`.
        facts: (name, text) of the head.
        tiles: (title, figure, note) of the few numbers that most readers want.
    """
    from plotly.offline import get_plotlyjs

    draw = _asset("draw.js")
    # Browsers hash what they parsed, in which every line ends with a line feed.
    scripts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in (get_plotlyjs(), draw)]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("page.html.jinja")).render(
        name=name,
        kind=kind,
        words=words,
        facts=facts,
        tiles=tiles,
        sections=sections,
        figures=_for_script(sections),
        style=_asset("style.css"),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts],
        version=ray_ft.__version__,
        made=trained.when(time.time()),
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    """What the run is, for the head of the page."""
    adapter = record.setting("model.adapter")
    workers = record.setting("train.workers")
    strategy = record.setting("train.strategy")
    where = "in one process" if workers == 0 else f"{strategy} on {_span(workers)} worker{'s' * (workers != 1)}"
    batch, length = record.setting("train.global_batch"), record.setting("data.seq_len")
    state = record.state
    facts = [
        ("base model", public_name(str(record.setting("model.path")))),
        (
            "trained",
            f"an adapter: {adapter.get('name')}, rank {adapter.get('rank')}" if adapter else "the model itself",
        ),
        ("how", f"{where}, {number(batch)} rows × {number(length)} tokens a step"),
        ("started", trained.when(record.starts[0][0] if record.starts else None)),
        ("last written", trained.when(state.written)),
        ("newest checkpoint", "none" if state.saved is None else f"step {state.saved:,}"),
        ("run directory", record.location),
        ("recipe", f"sha256 {record.recipe_sha256}" if record.recipe_sha256 else "without a checksum"),
    ]
    return [(name, text) for name, text in facts if text != "—"]


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    tiles: list[tuple[str, str, str]] = []

    def last(key: str) -> tuple[Any, int] | None:
        return next(((row[key], row["step"]) for row in reversed(record.rows) if row.get(key) is not None), None)

    for key, title in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        if found := last(key):
            first = next(row[key] for row in record.rows if row.get(key) is not None)
            tiles.append((title, number(found[0]), f"{number(first)} at first"))
    report = record.evaluation or {}
    model, base = evaluated.numbers(report), evaluated.numbers({"model": report.get("base")})
    for name in [name for name in model if name not in evaluated.LOSSES][:3]:
        note = (
            f"base model {evaluated.form(name, base[name])}"
            if name in base
            else f"of step {number(report.get('step'))}"
        )
        tiles.append((evaluated.title(name), evaluated.form(name, model[name]), note))
    rates = sorted(row["tokens_per_second"] for row in record.rows if row.get("tokens_per_second"))
    if rates:
        mfu = sorted(row["mfu"] for row in record.rows if row.get("mfu"))
        tiles.append(
            ("tokens/s", f"{rates[len(rates) // 2]:,.0f}", f"MFU {mfu[len(mfu) // 2]:.1%}" if mfu else "median")
        )
    return tiles


def _span(workers: Any) -> str:
    return "–".join(map(str, workers)) if isinstance(workers, list) else str(workers)


def _for_script(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """The figures in the order in which the template numbers them."""
    figures = [
        chart.figure
        for section in sections
        for block in section.blocks
        if isinstance(block, Charts)
        for chart in block.charts
    ]
    json.dumps(figures, allow_nan=False)  # the browser reads JSON, which has no NaN
    return figures


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
