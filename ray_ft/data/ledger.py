"""Which samples each step used: recorded by every worker as it takes a batch, put together for whole steps, read back.

The names travel with the rows through the same path, so the ledger says what was trained on, not what was planned. The
workers' parts of the steps since the last checkpoint are written with the next one, to

    <run>/ledger/step_00000100.jsonl    a line per step: {"step": 100, "first": 1584, "samples": [["a.jsonl:17"], …]}

so a step of which the work was lost leaves no line, and one that was done again leaves that of the later time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray_ft import artifacts, paths
from ray_ft.data.order import PADDING, Order
from ray_ft.data.stream import Batch
from ray_ft.errors import TrainingError


class Ledger:
    """What one worker used since the last `take`."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def add(self, step: int, batch: Batch) -> None:
        """Record the batch of a step; steps count from 1, as checkpoints do.

        Raises:
            TrainingError: the batch does not name its samples.
        """
        if batch.samples is None:
            raise TrainingError(
                f"step {step}: the batch does not name its samples, though data.ledger is true",
                ["report this with the recipe; it should not happen", "data.ledger=false"],
            )
        self._lines.append(_line({"step": step, "first": batch.first, "samples": batch.samples}))

    def take(self) -> bytes:
        """The lines since the last call; empty where there are none."""
        taken, self._lines = b"".join(self._lines), []
        return taken


def merge(parts: Sequence[bytes]) -> bytes:
    """The workers' lines as one line per step, with the rows of all workers in the order of their positions.

    Raises:
        TrainingError: the parts of a step leave a gap or overlap.
    """
    steps: dict[int, list[dict[str, Any]]] = {}
    for part in parts:
        for line in part.splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).append(entry)
    merged = []
    for step, entries in sorted(steps.items()):
        entries.sort(key=lambda entry: entry["first"])
        samples: list[list[str]] = []
        for entry in entries:
            if entry["first"] != (expected := entries[0]["first"] + len(samples)):
                raise TrainingError(
                    f"ledger of step {step}: a worker used rows from position {entry['first']} on, where {expected} "
                    "comes next",
                    ["report this with the recipe; it should not happen"],
                )
            samples += entry["samples"]
        merged.append(_line({"step": step, "first": entries[0]["first"], "samples": samples}))
    return b"".join(merged)


def read(run: artifacts.RunDir) -> dict[int, list[list[str]]]:
    """Step → the samples in each of its rows, of all checkpoints of a run.

    Where a step is in two files, because the work after a checkpoint was done again, both have to say the same.

    Raises:
        TrainingError: they do not.
    """
    found: dict[int, list[list[str]]] = {}
    for name in paths.list_dir(run.at("ledger")):
        if not (name.startswith("step_") and name.endswith(".jsonl")):
            continue
        for line in paths.read_bytes(run.at("ledger", name)).splitlines():
            entry = json.loads(line)
            if found.setdefault(entry["step"], entry["samples"]) != entry["samples"]:
                raise TrainingError(
                    f"{run.at('ledger', name)}: step {entry['step']} used other samples than another checkpoint says",
                    ["report this with the recipe; it should not happen"],
                )
    return dict(sorted(found.items()))


def consumed(steps: Mapping[int, Sequence[Sequence[str]]], order: Order) -> list[Counter[str]]:
    """How often each sample was used, for each epoch that was begun; padding is left out.

    Args:
        steps: as `read` gives them: step 1 begins at position 0, and each has as many rows.
    """
    found: list[Counter[str]] = []
    for step, rows in sorted(steps.items()):
        for position, row in enumerate(rows, start=(step - 1) * len(rows)):
            if position >= order.rows:
                continue
            epoch = order.epoch_of(position)
            found += [Counter() for _ in range(epoch + 1 - len(found))]
            found[epoch].update(name for name in row if name != PADDING)
    return found


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
