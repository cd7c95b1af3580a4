"""A plan for people, and for machines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ray_ft.plan.fleet import GIB
from ray_ft.plan.planner import Plan
from ray_ft.plan.search import Way

PER = 1e9  # tokens that time and cost are told for, where the run's number is not known


def show(
    console: Console,
    command: str,
    plan: Plan,
    tokens: tuple[float, str] | None,
    settings: Sequence[Plan],
    ways: Sequence[Way],
) -> None:
    """Print a plan.

    Args:
        command: the recipe's path and the overrides that it was asked about with, for commands to paste.
        tokens: of the run, and how they are known.
        settings: that fit, the cheapest first.
        ways: what would make it fit.
    """

    def line(text: str) -> None:
        console.print(escape(text))

    shapes, memory, fleet = plan.shapes, plan.memory, plan.fleet
    train = plan.recipe.train
    line(
        f"{plan.recipe.model.path}: {shapes.total:,} parameters, {shapes.trained:,} trained; "
        f"{train.strategy} on {fleet.label}, {train.micro_batch} rows × {plan.recipe.data.seq_len} tokens × "
        f"{train.accumulation} accumulation"
    )
    console.print(_memory(plan))
    free = memory.gpu_limit - memory.total
    verdict = f"fits: {_gib(free)} GiB free ({free / memory.gpu_limit:.0%})" if plan.fits else _shortage(plan)
    console.print(f"[bold {'green' if plan.fits else 'red'}]{escape(verdict)}[/]", f"(fullest: {memory.fullest})")
    if plan.recipe.data.images:
        line("not counted: what the vision tower computes for images, and what it keeps of them where it is trained")
    line(_speed(plan))
    line(_cost(plan, tokens))
    if settings:
        console.print(_settings(settings, tokens))
        line(f"the cheapest: ray-ft train {command} {_pasted(settings[0])}")
    for way in ways:
        line(f"  → {way.says}{f': {way.options}' if way.options else ''}")
        line(f"    {_gib(way.plan.memory.total)} GiB, {_cost(way.plan, tokens)}")
        line(f"    ray-ft train {command} {_pasted(way.plan)}")
    if not settings and not ways:
        line("  → nothing that was tried fits; see docs/plan.md for what was")


def as_json(
    plan: Plan, tokens: tuple[float, str] | None, settings: Sequence[Plan], ways: Sequence[Way]
) -> dict[str, Any]:
    """All that `show` prints, in bytes, seconds and dollars."""
    return {
        "model": plan.recipe.model.path,
        "parameters": plan.shapes.total,
        "trained": plan.shapes.trained,
        **_plan_json(plan, tokens),
        "tokens": tokens[0] if tokens else None,
        "tokens_from": tokens[1] if tokens else None,
        "phases": plan.memory.phases,
        "settings": [_plan_json(one, tokens) for one in settings],
        "ways_out": [{"says": w.says, "options": w.options, **_plan_json(w.plan, tokens)} for w in ways],
    }


def _plan_json(plan: Plan, tokens: tuple[float, str] | None) -> dict[str, Any]:
    speed, memory, fleet = plan.speed, plan.memory, plan.fleet
    amount = tokens[0] if tokens else PER
    return {
        "gpu": fleet.name,
        "nodes": fleet.nodes,
        "gpus_per_node": fleet.gpus_per_node,
        "overrides": list(plan.overrides),
        "fits": plan.fits,
        "gpu_bytes": memory.total,
        "gpu_limit_bytes": memory.gpu_limit,
        "gpu_parts": memory.parts,
        "fullest_phase": memory.fullest,
        "host_bytes": memory.host_total,
        "host_limit_bytes": memory.host_limit,
        "host_parts": memory.host,
        "tokens_per_second": speed.tokens_per_second,
        "step_seconds": speed.step,
        "compute_seconds": speed.compute,
        "communication_seconds": speed.communication,
        "update_seconds": speed.update,
        "mfu": speed.mfu,
        "hours": speed.hours(amount),
        "dollars": plan.dollars(amount),
        "for_tokens": amount,
    }


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column("", footer="together, of")
    for title, total, limit in (
        ("GiB per GPU", memory.total, memory.gpu_limit),
        ("GiB per machine", memory.host_total, memory.host_limit),
    ):
        table.add_column(title, justify="right", footer=f"{_gib(total)} of {_gib(limit)}", no_wrap=True)
    for part in [*memory.parts, *(part for part in memory.host if part not in memory.parts)]:
        table.add_row(part, *(_gib(parts[part]) if parts.get(part) else "" for parts in (memory.parts, memory.host)))
    return table


def _shortage(plan: Plan) -> str:
    memory = plan.memory
    lacks = []
    if memory.total > memory.gpu_limit:
        lacks.append(f"{_gib(memory.total - memory.gpu_limit)} GiB are missing on each GPU")
    if memory.host_total > memory.host_limit:
        lacks.append(f"{_gib(memory.host_total - memory.host_limit)} GiB are missing in each machine's memory")
    return f"does not fit: {', '.join(lacks)}"


def _speed(plan: Plan) -> str:
    speed = plan.speed
    return (
        f"{speed.tokens_per_second:,.0f} tokens/s, {speed.step:.2f} s a step (computing {speed.compute:.2f}, sending "
        f"{speed.communication:.2f}, updating {speed.update:.2f}), MFU {speed.mfu:.0%}"
    )


def _cost(plan: Plan, tokens: tuple[float, str] | None) -> str:
    amount, how = tokens or (PER, "per billion tokens")
    hours, dollars = plan.speed.hours(amount), plan.dollars(amount)
    what = f"{amount:,.0f} tokens ({how})" if tokens else how
    return f"{what}: {hours:,.1f} h, ${dollars:,.0f} at ${plan.fleet.dollars_per_hour:,.2f} an hour"


def _settings(settings: Sequence[Plan], tokens: tuple[float, str] | None) -> Table:
    amount = tokens[0] if tokens else PER
    table = Table(box=None, pad_edge=False, title="settings that fit and train the same", title_justify="left")
    for column in ("GiB", "tokens/s", "hours", "$"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("overrides", overflow="fold")
    for plan in settings:
        cells = (_gib(plan.memory.total), f"{plan.speed.tokens_per_second:,.0f}", f"{plan.speed.hours(amount):,.1f}")
        table.add_row(*cells, f"{plan.dollars(amount):,.0f}", escape(_pasted(plan)))
    return table


def _pasted(plan: Plan) -> str:
    """Overrides as they are written on a command line."""
    return shlex.join(plan.overrides)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= 0.05 * GIB else f"{size / GIB:.2f}"
