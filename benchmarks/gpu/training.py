"""Trains cases one after the other in this process, a row for each: how fast, in how much memory.

What fails costs its own row, which says why; a case that does not fit in memory is followed by the one that it names
instead. After an error that leaves the device unusable nothing more is tried.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu import longest, predict, steps
from benchmarks.gpu.cases import Case, tiny
from benchmarks.gpu.parts import reason

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting


def measure(setting: Setting, *cases: Case) -> None:
    """Rows of each case, as `steps.measured` or `longest.measure` gives them, or with `why` there are none."""
    device = torch.device(setting.device)
    limit = devices.described(device)["limit"] or 2 * 2**30
    waiting = [tiny(case) if setting.small else case for case in cases]
    slowest, broken = 0.0, ""
    with _Guesses([case for case in waiting if case.sought], limit, setting.small) as guess:
        while waiting:
            case = waiting.pop(0)
            if broken:
                setting.emit({"case": case.name, "why": f"not tried: the device was unusable after {broken}"})
                continue
            if setting.left < 1.2 * slowest + 2:
                why = f"not measured: {setting.left:.0f} s were left, and to build one before took {slowest:.0f} s"
                setting.emit({"case": case.name, "why": why})
                continue
            try:
                if case.sought:
                    longest.measure(setting, case, limit, guess[case.name])
                else:
                    slowest = max(slowest, steps.measured(case, setting)["built_seconds"])
            except Exception as error:  # whatever a kernel, a library or the product says: it is this row's result
                setting.emit({"case": case.name, "why": reason(error)})
                if devices.is_out_of_memory(error) and case.instead is not None:
                    waiting.insert(0, tiny(case.instead) if setting.small else case.instead)
                del error
            devices.give_back(device)
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # what was compiled may hold a model
            shutil.rmtree(setting.folder / "model", ignore_errors=True)
            broken = case.name if devices.is_broken(device) else ""


def _without_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a context would take memory from what is measured


class _Guesses:
    """What `ray-ft plan` says of the longest rows, reckoned in a process beside this one: it takes half a minute, in
    which the GPU has other work. Gives a function for each case, which waits for the answer."""

    def __init__(self, cases: Sequence[Case], limit: float, small: bool) -> None:
        self._cases, self._limit, self._small = cases, limit, small
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> dict[str, Callable[[], int]]:
        if not self._cases:
            return {}
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _without_gpu)
        found: dict[str, Future[int]] = {
            case.name: self._pool.submit(predict.longest, case, self._limit, self._small) for case in self._cases
        }
        return {name: future.result for name, future in found.items()}

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
