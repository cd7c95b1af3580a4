"""Rows of parts to the figures and tables of a result. Pure: it measures nothing.

A share of the ceiling is FLOPs per second of the model's matrix products over the fastest product that was measured
(`matmul`). FLOPs per token are 6 for each trained weight and 4 for each frozen one, the embedding counted as the output
projection (`ray_ft.model.flops`), recomputation not counted; attention scores, of the places that are attended to, are
a column of their own and no part of the aims.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.cases import ABLATION, BASE, FULL_4B, FULL_12B, FULL_27B, FULL_27B_8BIT, TRAINED, Case
from benchmarks.gpu.longest import found as found_longest
from benchmarks.gpu.matmul import harmonic
from benchmarks.pairs import spread
from benchmarks.result import Figure, Result, Table

GIB, GB = 2**30, 1e9
Row = dict[str, Any]

#: Case → (least share of the ceiling, most GB in tensors): the aims.
AIMS: dict[str, tuple[float | None, float | None]] = {
    FULL_27B.name: (None, 80.0),
    FULL_27B_8BIT.name: (0.50, 130.0),
    FULL_12B.name: (0.58, None),
    FULL_4B.name: (0.58, None),
}
LORA_AIM = 0.60
PLAN_AIM = 0.15


def fill(result: Result, rows: Sequence[Row]) -> None:
    """Figures and tables of all that was found, and at the end what was not, with its reason."""
    top = ceiling(rows)
    _products(result, rows, top)
    _training(result, rows, top)
    _longest(result, rows)
    _loss(result, rows)
    _plan(result, rows)
    _ablation(result, rows, top)
    missing = [(row["part"], row.get("case") or row.get("name") or "", row["why"]) for row in rows if _failed(row)]
    result.tables.append(Table("Not measured", ("part", "what", "why"), missing or [("", "", "nothing is missing")]))
    result.raw = list(rows)


def _failed(row: Row) -> bool:
    return "why" in row and "tokens" not in row  # a length that does not fit has its place in a table


def of(rows: Sequence[Row], *parts: str) -> list[Row]:
    return [row for row in rows if row["part"] in parts]


def ceiling(rows: Sequence[Row]) -> float | None:
    """FLOP/s of the fastest product; None where none was measured."""
    return max((row["rate"] for row in of(rows, "matmul") if "rate" in row), default=None)


def shares(row: Row, top: float) -> list[float]:
    """Of the ceiling, in each step; attention not counted."""
    return [row["tokens"] * row["flops"] / seconds / top for seconds in row["step_seconds"]]


def rates(row: Row) -> list[float]:
    """Tokens per second in each step."""
    return [row["tokens"] / seconds for seconds in row["step_seconds"]]


def _products(result: Result, rows: Sequence[Row], top: float | None) -> None:
    found = [row for row in of(rows, "matmul") if "rate" in row]
    if top is None:
        return
    result.figures.append(Figure("matrix products, best", [top / 1e12], "TFLOP/s", form="{:.1f}"))
    for model in dict.fromkeys(row["model"] for row in found if "model" in row):
        if (rate := harmonic(found, model)) is not None:
            name = f"matrix products of Gemma 3 {model.upper()}'s shapes, together"
            result.figures.append(Figure(name, [rate / 1e12], "TFLOP/s", form="{:.1f}"))
    lines = [
        (row.get("model", ""), row["name"], " × ".join(map(str, row["shape"])), f"{row['rate'] / 1e12:.1f}",
         f"{row['share']:.1%}" if "share" in row else "")
        for row in found
    ]  # fmt: skip
    columns = ("model", "product", "rows × inner × columns", "TFLOP/s", "of the model's FLOPs")
    result.tables.append(Table("Matrix products in bfloat16, forward pass", columns, lines))


def _training(result: Result, rows: Sequence[Row], top: float | None) -> None:
    names = {case.name for case in TRAINED}
    found = {row["case"]: row for row in rows if "flops" in row and row["case"] in names}
    lora = [found[case.name] for case in TRAINED if case.lora and case.keys and case.name in found]
    if lora and top:
        best = max(lora, key=lambda row: statistics.median(shares(row, top)))
        name = "LoRA 27B at 4,096 tokens, share of the ceiling, the best that a recipe can say"
        result.figures.append(Figure(name, shares(best, top), at_least=LORA_AIM))
    for case, (least, most) in AIMS.items():
        if case not in found:
            continue
        row = found[case]
        result.figures.append(Figure(f"{case}, tokens/s", rates(row), "tokens/s", form="{:,.0f}"))
        if top:
            result.figures.append(Figure(f"{case}, share of the ceiling", shares(row, top), at_least=least))
        if "allocated" in row:
            name = f"{case}, most memory in tensors"
            result.figures.append(Figure(name, [row["allocated"] / GB], "GB", at_most=most, form="{:.1f}"))
    lines = [_cells(case, found[case.name], top) for case in TRAINED if case.name in found]
    if lines:
        columns = tuple(lines[0])
        rows_of = [tuple(line.values()) for line in lines]
        result.tables.append(Table("Training, through the product's loop", columns, rows_of))


def _cells(case: Case, row: Row, top: float | None) -> dict[str, str]:
    """Column → what it says of a case."""
    middle = statistics.median(row["step_seconds"])

    def share(flops: float) -> str:
        return f"{row['tokens'] * flops / middle / top:.3f}" if top else "no ceiling"

    def memory(key: str) -> str:
        return f"{row[key] / GIB:.1f}" if key in row else ""

    both = row["flops"] + row["score_flops"]
    return {
        "case": case.name,
        "settings": row["settings"],
        "rows × tokens": f"{case.rows} × {row['tokens'] // case.rows}",
        "clip": str(row["clip"] or "none"),
        "attention": row["attention"].removeprefix("attention: ").split(",")[0].split(":")[0],
        "s a step": f"{spread(row['step_seconds'])} × {len(row['step_seconds'])}",
        "tokens/s": f"{row['tokens'] / middle:,.0f}",
        "GFLOP/token": f"{row['flops'] / 1e9:.1f}",
        "of the ceiling": share(row["flops"]),
        "GFLOP/token with scores": f"{both / 1e9:.1f}",
        "of the ceiling with scores": share(both),
        "GiB in tensors": memory("allocated"),
        "GiB held": memory("reserved"),
    }


def _longest(result: Result, rows: Sequence[Row]) -> None:
    tries = [row for row in rows if "fits" in row and "guess" in row]
    lines = []
    for case in dict.fromkeys(row["case"] for row in tries):
        mine = [row for row in tries if row["case"] == case]
        low, high, close = found_longest(mine)
        least = "" if close else ", at least: the time ended the search"
        if low:
            result.figures.append(Figure(case + least, [low], "tokens", form="{:,.0f}" if close else "≥ {:,.0f}"))
        lines += [
            (case, f"{row['tokens']:,}", "fits" if row["fits"] else row["why"], f"{row['seconds']:.1f}",
             f"{row['allocated'] / GIB:.1f}" if "allocated" in row else "")
            for row in mine
        ]  # fmt: skip
        above = f"{high:,} does not fit" if high else f"{mine[0]['most']:,} would be the most"
        said = f"the longest{least}; {above}; ray-ft plan: {mine[0]['guess']:,}"
        lines.append((case, f"{'' if close else '≥ '}{low:,}", said, "", ""))
    if lines:
        result.tables.append(Table("Longest rows", ("case", "tokens", "", "s", "GiB in tensors"), lines))


def _loss(result: Result, rows: Sequence[Row]) -> None:
    found = [row for row in of(rows, "loss") if "bytes" in row]
    if not found:
        return
    first = found[0]
    for other in found[1:]:
        name = f"memory of head and loss, {other['name']} ÷ {first['name']}"
        result.figures.append(Figure(name, [other["bytes"] / first["bytes"]], form="{:.2f}"))
    lines = [(r["name"], f"{r['bytes'] / GIB:.3f}", f"{r['seconds'] * 1e3:.1f}", f"{r['loss']:.4g}") for r in found]
    columns = ("", "GiB of head and loss", "ms with one layer, forwards and backwards", "loss, summed")
    result.tables.append(Table("The loss", columns, lines))


def compared(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(case, bytes in tensors as planned, as measured) of all that were both."""
    plans = {row["case"]: row for row in of(rows, "plan") if "tensors" in row}
    return [
        (row["case"], plans[row["case"]]["tensors"], row["allocated"])
        for row in rows
        if row["part"] != "plan" and "allocated" in row and "flops" in row and row["case"] in plans
    ]


def _plan(result: Result, rows: Sequence[Row]) -> None:
    both = compared(rows)
    if both:
        worst = max(abs(planned / real - 1) for _, planned, real in both)
        name = f"memory, ray-ft plan against {len(both)} measured peaks, largest difference"
        result.figures.append(Figure(name, [worst], at_most=PLAN_AIM))
        lines = [
            (case, f"{planned / GIB:.1f}", f"{real / GIB:.1f}", f"{planned / real - 1:+.1%}")
            for case, planned, real in both
        ]
        columns = ("case", "GiB planned", "GiB measured", "")
        result.tables.append(Table("Memory in tensors: ray-ft plan (without context and slack)", columns, lines))
    plans = [row for row in of(rows, "plan") if "total" in row]
    said = [
        (row["case"], f"{row['total'] / GIB:.1f}", "yes" if row["fits"] else "no", row["fullest"],
         f"{row['tokens_per_second']:,.0f}")
        for row in plans
    ]  # fmt: skip
    if said:
        heads = ("case", "GiB of the GPU", "fits one H200 and its host", "fullest", "tokens/s")
        result.tables.append(Table("What ray-ft plan says", heads, said))


def _ablation(result: Result, rows: Sequence[Row], top: float | None) -> None:
    found = {row["case"]: row for row in of(rows, "ablation") if "flops" in row}
    lines = []
    for case in ABLATION:
        if (row := found.get(case.name)) is None:
            continue
        base, ratio = found.get(case.against), ""
        if base is not None:
            ratio = f"{statistics.median(rates(row)) / statistics.median(rates(base)):.3f}"
        cells = _cells(case, row, top)
        lines.append((
            case.name, cells["settings"], "" if case.keys else "no key of a recipe", ratio, case.against,
            *(cells[name] for name in BROUGHT),
        ))  # fmt: skip
    if lines:
        title = f"What each thing brings: LoRA of 4B, {BASE.rows} × {BASE.seq_len} tokens a step, {BASE.micro} at once"
        columns = ("case", "settings", "", "tokens/s ÷", "that of", *BROUGHT)
        result.tables.append(Table(title, columns, lines))


BROUGHT = ("s a step", "tokens/s", "of the ceiling", "GiB in tensors", "GiB held")
