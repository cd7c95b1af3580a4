"""The sections about how good the model is: evaluation, validation beside training, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_ft.report import charts
from ray_ft.report.blocks import Answers, Charts, Missing, Section, Table, Text, number
from ray_ft.report.reading import Record

LOSSES = ("loss", "perplexity", "reward_margin", "chosen_reward", "rejected_reward")  # of any size
SHARES = (  # 0 to 1; others are 0 to 100
    "exact_match", "answer_match", "accuracy", "macro_f1", "reward_accuracy", "logprob_accuracy",
)  # fmt: skip
MOST_LABELS = 40  # of the confusion that is drawn
MOST_COUNTS = 100  # labels of the one that is a table
MOST_ANSWERS = 50  # of each kind
MOST_STEPS = 8  # whose answers to one prompt are shown
MOST_TEXT = 4000  # characters of a prompt or an answer
GROUPS = {"language_pair": "Per language pair", "source": "Per source", "label": "Per label"}


def evaluation(record: Record) -> Section:
    section = Section("evaluation", "Evaluation")
    found = record.evaluation
    if found is None:
        why = (
            "This run names no held-out data (data.eval)." if not record.setting("data.eval") else "Not evaluated yet."
        )
        section.blocks.append(Missing(why, f"ray-ft evaluate {record.location}"))
        return section
    of = f" with {found['engine']}" if found.get("engine") else ""
    stale = record.state.saved is not None and found.get("step") is not None and found["step"] < record.state.saved
    section.blocks.append(
        Text(
            f"{number(found.get('rows'))} held-out rows, answered{of} by the model of step {number(found.get('step'))}."
        )
    )
    if stale:
        section.blocks.append(
            Missing(
                f"The newest checkpoint is of step {number(record.state.saved)}.", f"ray-ft evaluate {record.location}"
            )
        )
    section.blocks += [_scores(found), *_remarks(found), *_difference(found), *_labels(found), *_groups(found)]
    if signatures := found.get("signatures"):
        rows = [(title(name), str(text)) for name, text in signatures.items()]
        section.blocks.append(Table(("score", "signature"), rows, "How the scores were computed", (0, 1)))
    if worst := found.get("worst"):
        section.blocks += _answers(worst, "Worst answers")
    return section


def validations(record: Record) -> Section:
    section = Section("validations", "Validation beside training")
    if not record.validations:
        section.blocks.append(
            Missing(
                "Not asked for, or no checkpoint has been evaluated yet; in the recipe:",
                "evaluate.during: {every: 500}",
            )
        )
        return section
    each = [(step, _finite(report.get("scores") or {})) for step, report in record.validations]
    names = list(dict.fromkeys(name for _, scores in each for name in scores))
    shares = [(step, {n: v for n, v in scores.items() if n in SHARES}) for step, scores in each]
    others = [(step, {n: v for n, v in scores.items() if n not in (*LOSSES, *SHARES)}) for step, scores in each]
    drawn = [
        charts.over_steps(shares, "Shares over steps", "of the held-out rows that were answered, 0 to 1"),
        charts.over_steps(others, "Scores over steps", "0 to 100"),
    ]
    section.blocks.append(Charts([chart for chart in drawn if chart]))
    rows = [(number(step), *(form(name, scores.get(name)) for name in names)) for step, scores in each]
    section.blocks.append(Table(("step", *map(title, names)), rows, "Every validation", (), closed=True))
    for kind, caption in (("prompts", "Your prompts, step by step"), ("samples", "Held-out rows, step by step")):
        if items := _over_steps([(step, report.get(kind) or []) for step, report in record.validations]):
            section.blocks.append(Answers(items, caption))
    return section


def _over_steps(each: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> list[Any]:
    """Each prompt with its answers after some of the steps, evenly spaced, the first and the last among them."""
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for step, rows in each:
        for row in rows:
            found.setdefault(_asked(row.get("prompt")), []).append((step, row))
    items = []
    for asked, answers in list(found.items())[:MOST_ANSWERS]:
        sides: list[tuple[str, str, bool | None]] = []
        for step, row in charts.even(answers, MOST_STEPS):
            text = str(row.get("answer") or row.get("error") or "")
            if row.get("thinking"):
                sides.append((f"step {step:,}, thinking", _cut(str(row["thinking"])), None))
            good = text == str(row["reference"]).strip() if row.get("reference") else None
            sides.append((f"step {step:,}", _cut(text), good))
        last = answers[-1][1]
        if last.get("reference"):
            sides.append(("reference", _cut(str(last["reference"])), None))
        items.append((_cut(asked), str(last.get("origin", "")), sides))
    return items


def samples(record: Record) -> Section:
    section = Section("samples", "Answers before and after")
    found = (record.evaluation or {}).get("samples") or []
    if not found:
        section.blocks.append(Missing("No answers are kept yet.", f"ray-ft evaluate {record.location}"))
        return section
    section.blocks += _answers(found)
    return section


def _answers(rows: Sequence[Mapping[str, Any]], caption: str = "") -> list[Any]:
    blocks: list[Any] = [Answers([_answered(row) for row in rows[:MOST_ANSWERS]], caption)]
    if len(rows) > MOST_ANSWERS:
        blocks.append(Text(f"The first {MOST_ANSWERS} of {len(rows):,}; all of them:", "eval/report.json"))
    return blocks


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Loss, perplexity, statistics and scores of one side of a report, by name."""
    side = report.get("model") or {}
    flat = {name: side.get(name) for name in LOSSES}
    return _finite(flat | dict(side.get("statistics") or {}) | dict(side.get("scores") or {}))


def _finite(flat: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


def title(name: str) -> str:
    """A score's name for people."""
    known = {
        "chrf": "chrF",
        "bleu": "BLEU",
        "rouge": "ROUGE",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "rougeL": "ROUGE-L",
        "macro_f1": "macro F1",
        "logprob_accuracy": "accuracy by probability",
        "f1": "F1",
    }
    return known.get(name) or name.replace("_", " ")


def form(name: str, value: Any) -> str:
    """A score for people: shares and losses with the digits that tell models apart, others of 100 with one."""
    if value is None:
        return "—"
    if name in LOSSES:
        return number(value)
    return f"{value:.3f}" if name in SHARES else f"{value:.1f}"


def scale(name: str) -> float:
    return 1.0 if name in SHARES else 100.0


def _scores(found: Mapping[str, Any]) -> Table:
    model, base = numbers(found), numbers({"model": found.get("base")})
    difference = found.get("difference") or {}
    rows = []
    for name, value in model.items():
        by = difference.get(name) or {}
        change = by.get("value", value - base[name] if name in base else None)
        cells = (title(name), form(name, base.get(name)), form(name, value), _signed(name, change))
        rows.append((*cells, _interval(name, by) or "—", number(by.get("p"), 2)))
    if not base:
        return Table(("score", "model"), [(row[0], row[2]) for row in rows], "Scores (the base model was not asked)")
    before = _title(found)
    columns = ("score", before, "model", "difference", "95% interval", "p")
    return Table(columns, rows, f"{before[0].upper()}{before[1:]} → fine-tuned model")


def _title(found: Mapping[str, Any]) -> str:
    """What the model is compared with, for people."""
    return str((found.get("base") or {}).get("title", "base model"))


def _remarks(found: Mapping[str, Any]) -> list[Any]:
    """What was not measured, not answered or cut off."""
    remarks: list[Any] = []
    for who, side in (("The model", found.get("model") or {}), ("The base model", found.get("base") or {})):
        if side.get("no_loss"):
            remarks.append(Missing(f"{who} has no loss: {side['no_loss']}"))
        if side.get("failed"):
            remarks.append(
                Missing(f"{who}: {side['failed']:,} without an answer, such as: {side.get('first_failure')}")
            )
        if side.get("cut_off"):
            remarks.append(Missing(f"{who}: {side['cut_off']:,} answers were cut off at", "evaluate.max_new_tokens"))
    return remarks


def _difference(found: Mapping[str, Any]) -> list[Any]:
    rows = [
        {"title": title(name), "scale": scale(name), **by}
        for name, by in (found.get("difference") or {}).items()
        if isinstance(by, dict) and name not in LOSSES
    ]
    chart = charts.differences(rows, _title(found))
    return [Charts([chart])] if chart else []


def _groups(found: Mapping[str, Any]) -> list[Table]:
    tables = []
    for kind, groups in (found.get("groups") or {}).items():
        if not groups:
            continue
        names = list(dict.fromkeys(name for group in groups.values() for name in group.get("model") or {}))
        rows = []
        for key, group in groups.items():
            rows.append((str(key), number(group.get("rows")), *(_change(group, name) for name in names)))
        caption = GROUPS.get(kind, f"Per {kind.replace('_', ' ')}")
        if any(group.get("base") for group in groups.values()):
            caption += f": {_title(found)} → model [95% interval of the difference]"
        tables.append(Table((kind.replace("_", " "), "rows", *map(title, names)), rows, caption))
    return tables


def _change(group: Mapping[str, Any], name: str) -> str:
    after = form(name, (group.get("model") or {}).get(name))
    before = (group.get("base") or {}).get(name)
    if before is None:
        return after
    interval = _interval(name, (group.get("difference") or {}).get(name) or {})
    return f"{form(name, before)} → {after}" + (f"\n{interval}" if interval else "")


def _labels(found: Mapping[str, Any]) -> list[Any]:
    labels = found.get("labels")
    if not labels:
        return []
    per_label = labels.get("per_label") or {}
    names = list(dict.fromkeys(name for scores in per_label.values() for name in scores))
    rows = [(label, *(number(scores.get(name)) for name in names)) for label, scores in per_label.items()]
    summary = ", ".join(
        f"{title(name)} {_before(labels, name)}{number(labels[name])}"
        for name in ("accuracy", "macro_f1")
        if labels.get(name) is not None
    )
    blocks: list[Any] = [Table(("label", *map(title, names)), rows, f"Labels: {summary}")]
    confusion = labels.get("confusion") or {}
    wanted, answered, counts = (confusion.get(key) or [] for key in ("labels", "answers", "counts"))
    if counts and len(wanted) <= MOST_LABELS:
        blocks.append(Charts([charts.confusion(counts, wanted, answered)]))
    if counts and len(wanted) <= MOST_COUNTS:
        rows = [(label, *map(number, row)) for label, row in zip(wanted, counts, strict=True)]
        blocks.append(Table(("reference, down; answer, across", *answered), rows, "Confusion of labels", closed=True))
    elif counts:
        blocks.append(Text(f"The confusion of {len(wanted):,} labels is too large for a page:", "eval/report.json"))
    return blocks


def _before(labels: Mapping[str, Any], name: str) -> str:
    before = (labels.get("base") or {}).get(name)
    return "" if before is None else f"{number(before)} → "


def _answered(row: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, str, bool | None]]]:
    reference = str(row.get("reference", ""))
    sides: list[tuple[str, str, bool | None]] = []
    for name, key, thought in (
        ("base model", "base_answer", "base_thinking"),
        ("model", "answer", "thinking"),
    ):
        if row.get(thought):
            sides.append((f"{name}, thinking", _cut(str(row[thought])), None))
        if row.get(key) is not None:
            text = str(row[key])
            sides.append((name, _cut(text), text.strip() == reference.strip() if reference else None))
    asked = _cut(_asked(row.get("prompt")))
    if row.get("reference_thinking"):
        sides.append(("reference, thinking", _cut(str(row["reference_thinking"])), None))
    return asked, str(row.get("origin", "")), [*sides, ("reference", _cut(reference), None)]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} … ({len(text) - MOST_TEXT:,} more characters)"


def _asked(prompt: Any) -> str:
    """A prompt as text: the turns of a conversation one after the other."""
    if not isinstance(prompt, list):
        return str(prompt or "")
    turns = [turn for turn in prompt if isinstance(turn, dict)]
    texts = [turn.get("content") if isinstance(turn.get("content"), str) else "[not text]" for turn in turns]
    if len(turns) == 1:
        return str(texts[0])
    return "\n".join(f"{turn.get('role')}: {text}" for turn, text in zip(turns, texts, strict=True))


def _interval(name: str, by: Mapping[str, Any]) -> str:
    return f"[{_signed(name, by['low'])}, {_signed(name, by['high'])}]" if by.get("low") is not None else ""


def _signed(name: str, value: Any) -> str:
    return form(name, value) if value is None else f"{'+' if value >= 0 else '−'}{form(name, abs(value))}"
