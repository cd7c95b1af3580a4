"""What `ray-ft plan` says of the cases, reckoned on the CPU while the GPU is busy with them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.cases import Case, config_of, recipe_of, tiny
from benchmarks.gpu.parts import reason
from ray_ft.plan import Planner, fleet
from ray_ft.plan.memory import CONTEXT, SLACK

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting

GPU = "h200-141"


def planned(case: Case, small: bool = False) -> Any:
    """The case's plan on one H200."""
    prices = fleet.load_prices()
    recipe = recipe_of(case, f"google/gemma-3-{case.size}-it")
    return Planner(recipe, config_of(case.size, small), prices).plan(fleet.choose(prices, 1, GPU, 1, 1))


def measure(setting: Setting, *cases: Case) -> None:
    """Rows: `case`, `tensors` and `total` (bytes, on the GPU: without and with context and slack), `tokens_per_second`,
    `fits`."""
    for case in dict.fromkeys(cases):
        if setting.left < 10:
            setting.emit({"case": case.name, "why": "the time was over"})
            continue
        try:
            found = planned(tiny(case) if setting.small else case, setting.small)
        except Exception as error:  # what cannot be planned is a row, too
            setting.emit({"case": case.name, "why": reason(error)})
            continue
        parts = found.memory.parts
        setting.emit({
            "case": case.name,
            "tensors": found.memory.total - parts[CONTEXT] - parts[SLACK],
            "total": found.memory.total,
            "fullest": found.memory.fullest,
            "tokens_per_second": found.speed.tokens_per_second,
            "fits": found.fits,
        })  # fmt: skip


def longest(case: Case, limit: float, small: bool = False) -> int:
    """Tokens of a row with which the plan's total comes to `limit` bytes, by its growth between two lengths."""

    @cache
    def total(seq_len: int) -> float:
        return float(planned(replace(case, seq_len=seq_len), small).memory.total)

    short, far = (64, 256) if small else (4096, 16384)
    each = (total(far) - total(short)) / (far - short)
    return int(short + max(limit - total(short), 0.0) / each)
