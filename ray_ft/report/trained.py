"""The sections about how the model was made: training, data, failures, the export's checks, and the recipe."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ray_ft.report import charts
from ray_ft.report.blocks import Charts, Missing, Pre, Section, Table, Text, number, share
from ray_ft.report.reading import Record

SHARES = (
    "mfu",
    "data_wait_share",
    "non_pad_share",
    *(f"{split}{name}_accuracy" for split in ("", "eval_") for name in ("reward", "logprob")),
)
TITLES = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "accuracy": "accuracy",
    "eval_accuracy": "held-out accuracy",
    "eval_macro_f1": "held-out macro F1",
    "reward_accuracy": "reward accuracy",
    "eval_reward_accuracy": "held-out reward accuracy",
    "reward_margin": "reward margin",
    "eval_reward_margin": "held-out reward margin",
    "logprob_accuracy": "accuracy by probability",
    "eval_logprob_accuracy": "held-out accuracy by probability",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "step_seconds": "s per step",
    "data_wait_share": "waiting for data",
    "non_pad_share": "real tokens",
    "memory_gib": "GiB",
    "checkpoint_seconds": "checkpoint s",
}


def when(seconds: float | None) -> str:
    return "—" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def training(record: Record) -> Section:
    section = Section("training", "Training")
    if not record.rows:
        section.blocks.append(Missing("This run has no metrics yet.", "ray-ft train RECIPE"))
        return section
    by_source = _by_source(record)
    drawn = charts.training(record.rows, by_source)
    section.blocks.append(Charts(drawn))
    if len(record.rows) > charts.POINTS:
        section.blocks.append(
            Text(f"The lines show {charts.POINTS:,} of {len(record.rows):,} rows, evenly, and as many evaluations.")
        )
    rows = charts.thinned(record.rows, charts.TABLE_ROWS)
    names = [name for name in TITLES if any(row.get(name) is not None for row in rows)]
    cells = [
        (number(row["step"]), *(share(row.get(n)) if n in SHARES else number(row.get(n)) for n in names))
        for row in rows
    ]
    some = (
        f"{len(rows):,} of {len(record.rows):,} rows of metrics" if len(rows) < len(record.rows) else "Rows of metrics"
    )
    section.blocks.append(Table(("step", *(TITLES[name] for name in names)), cells, some, (), closed=True))
    for title, columns in by_source.items():
        held = [row for row in rows if any(row.get(name) is not None for name in columns)]
        if held:
            cells = [(number(row["step"]), *(number(row.get(name)) for name in columns)) for row in held]
            section.blocks.append(Table(("step", *columns.values()), cells, title, (), closed=True))
    return section


def _by_source(record: Record) -> dict[str, dict[str, str]]:
    """Title → column of metrics.jsonl → the source's name; without those that are no mixture."""
    found: dict[str, dict[str, str]] = {}
    for split, title, prefix in (
        ("train", "Training loss by source", ""),
        ("eval", "Held-out loss by source", "eval_"),
    ):
        names = record.sources(split)
        if len(names) > 1:
            found[title] = {f"{prefix}loss/data.{split}.{at}": name for at, name in enumerate(names)}
    return found


def data(record: Record) -> Section:
    section = Section("data", "Data")
    if not record.stats:
        section.blocks.append(Missing("The data is not prepared yet.", "ray-ft train RECIPE"))
        return section
    columns = (
        "",
        "rows in",
        "used",
        "rejected",
        "cut",
        "duplicates",
        "tokens",
        "trained tokens",
        "packed rows",
        "real tokens",
    )
    keys = ("rows", "used", None, "truncated", "duplicates", "tokens", "trained_tokens", "packed")
    rows = []
    for split, found in record.stats.items():
        rejected = sum((found.get("rejected") or {}).values())
        cells = [number(rejected if key is None else found.get(key)) for key in keys]
        rows.append(
            ({"train": "training", "eval": "held-out"}.get(split, split), *cells, share(found.get("non_pad_share")))
        )
    section.blocks.append(Table(columns, rows, "Rows in = rows used + rows rejected"))
    section.blocks += [*_sources(record), *_rejects(record)]
    if chart := charts.lengths(record.stats.get("train") or {}, record.setting("data.seq_len")):
        section.blocks.append(Charts([chart]))
        lengths = record.stats["train"]["lengths"]
        rows = [(f"{int(top) // 2 + 1}–{top}", number(lengths[top])) for top in sorted(lengths, key=int)]
        section.blocks.append(Table(("tokens", "samples"), rows, "Length of samples", closed=True))
    return section


def _sources(record: Record) -> list[Table]:
    rows = []
    for split, name in (("train", "training"), ("eval", "held-out")):
        packed = (record.stats.get(split) or {}).get("packed_by_source") or {}
        for index, source in enumerate(record.setting(f"data.{split}") or []):
            path = source.get("path")
            where = ", ".join(path) if isinstance(path, list) else str(path)
            weight = number(source.get("weight")) if split == "train" else "—"
            rows.append((name, where, str(source.get("format")), weight, number(packed.get(str(index), 0))))
    return (
        [Table(("split", "source", "format", "weight", "packed rows"), rows, "Per source", (0, 1, 2))] if rows else []
    )


def _rejects(record: Record) -> list[Any]:
    rows = []
    for split, found in record.stats.items():
        for reason, count in sorted((found.get("rejected") or {}).items(), key=lambda pair: -pair[1]):
            name = {"train": "training", "eval": "held-out"}.get(split, split)
            rows.append((name, reason, number(count)))
    if not rows:
        return [Text("No row was rejected.")]
    examples = [
        (reason, f"{reject.get('file')}:{reject.get('line')}", str(reject.get("detail") or ""))
        for reason, rejects in record.rejects.items()
        for reject in rejects
    ]
    blocks: list[Any] = [Table(("split", "reason", "rows"), rows, "Rejected rows", (0, 1))]
    if examples:
        blocks.append(Table(("reason", "file:line", "detail"), examples, "Some of them", (0, 1, 2)))
        blocks.append(Text("Every rejected row, with file, line and reason:", "data/rejects.jsonl"))
    return blocks


def failures(record: Record) -> Section:
    section = Section("failures", "Failures and restarts")
    if len(record.starts) > 1:
        rows = [
            (when(at), "started" if number_ == 0 else f"went on after step {step:,}")
            for number_, (at, step) in enumerate(record.starts)
        ]
        caption = "Starts of the run, and returns to a checkpoint after which steps were taken again"
        section.blocks.append(Table(("when", "what"), rows, caption, (0, 1)))
    if record.aside:
        section.blocks.append(
            Table(("checkpoint", "why"), record.aside, "Checkpoints found broken, and set aside", (0, 1))
        )
    section.blocks += [Pre(f"Last traceback of {name}", text) for name, text in record.tracebacks.items()]
    section.blocks += [Missing(f"This file could not be read: {fault}") for fault in record.faults]
    if not section.blocks:
        section.blocks.append(
            Text("None that left a trace: one start, no broken checkpoint, no traceback of a worker.")
        )
    return section


def export(record: Record) -> Section:
    section = Section("export", "Export and its checks")
    if not record.manifests:
        section.blocks.append(Missing("Not exported yet.", f"ray-ft export {record.location}"))
        return section
    for folder, manifest in record.manifests.items():
        kind, alone = ("an adapter", " --adapter-only") if manifest.get("kind") == "adapter" else ("a whole model", "")
        model = manifest.get("model") or {}
        # Of what lies there: "bytes" of an adapter's model are its base's.
        held = sum(file.get("bytes") or 0 for file in (manifest.get("files") or {}).values())
        size = f"{held / 2**20:,.1f} MiB" + (f" in {model.get('dtype')}" if kind == "a whole model" else "")
        made = f"step {number(manifest.get('step'))}, {size}, made {manifest.get('created')}"
        section.blocks.append(Text(f"{folder}/ holds {kind} of {made}."))
        if record.state.saved is not None and (manifest.get("step") or 0) < record.state.saved:
            section.blocks.append(
                Missing(
                    f"The newest checkpoint is of step {record.state.saved:,}.",
                    f"ray-ft export {record.location}{alone}",
                )
            )
        caption = "Checks that it passed before it was published"
        rows = [_check(name, found) for name, found in (manifest.get("checks") or {}).items()]
        section.blocks.append(Table(("check", "", "what was found"), rows, caption, (0, 1, 2)))
    return section


def _check(name: str, found: Any) -> tuple[str, str, str]:
    if not isinstance(found, dict):
        return name.replace("_", " "), "", _said(found)
    rest = {key: value for key, value in found.items() if key not in ("passed", "left_out")}
    outcome = "" if "passed" not in found else "passed" if found["passed"] else "failed"
    if found.get("left_out"):
        outcome, rest = "left out", {"": found["left_out"], **rest}
    return name.replace("_", " "), outcome, _said(rest)


def _said(found: Any) -> str:
    if isinstance(found, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_said(value)}".strip() for name, value in found.items())
    if isinstance(found, list):
        return ", ".join(map(_said, found)) or "none"
    if isinstance(found, bool):
        return "yes" if found else "no"
    return number(found)


def recipe(record: Record) -> Section:
    return Section("recipe", "Recipe", [Pre("The recipe with every setting", record.recipe_text)])
