"""The parts, in the order of their worth: what each is called, what it may take, and the function that does it.

A part runs in a process of its own (`child`), and gives rows as it goes: what it found before its time was over stays.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Setting:
    """Where a part runs, and what it does with what it finds.

    Attributes:
        small: hardly any weights, for a machine without a GPU.
        until: by `time.monotonic`; a part stops before.
        emit: takes a row.
    """

    device: str
    small: bool
    steps: int
    until: float
    folder: Path
    emit: Callable[[dict[str, Any]], None]
    slowest: float = field(default=0.0)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()


@dataclass(frozen=True)
class Part:
    """`seconds`: at most; `least`: with less there is no use in starting. `gpu`: whether it needs the GPU to itself."""

    seconds: float
    least: float
    does: str
    function: Callable[[Setting], None]
    gpu: bool = True


def train_all(setting: Setting, cases: Sequence[Any]) -> None:
    """A row for each case. What fails costs that row: it says why."""
    import torch

    from benchmarks.gpu import cases as known
    from benchmarks.gpu import device as devices
    from benchmarks.gpu import steps

    device = torch.device(setting.device)
    for case in cases:
        began = time.monotonic()
        if setting.left < setting.slowest:
            why = f"not measured: {setting.left:.0f} s were left, and one before it took {setting.slowest:.0f} s"
            setting.emit({"case": case.name, "why": why})
            continue
        try:
            row = steps.measured(
                known.tiny(case) if setting.small else case,
                device,
                setting.folder / "model",
                setting.small,
                setting.steps,
                lambda: setting.left < 2,
            )
        except Exception as error:  # whatever a kernel, a library or the product says: it is this row's result
            row = {"why": reason(error)}
            del error
        setting.emit({"case": case.name, **row})
        devices.give_back(device)
        shutil.rmtree(setting.folder / "model", ignore_errors=True)
        setting.slowest = max(setting.slowest, time.monotonic() - began) if "why" not in row else setting.slowest


def reason(error: BaseException) -> str:
    """Of a failure, in a line."""
    from benchmarks.gpu import device as devices

    said = (str(error).strip() or repr(error)).splitlines()[0]
    if devices.is_out_of_memory(error):
        return f"out of memory: {said.split('. ')[1] if said.count('. ') > 1 else said}"[:200]
    return f"{type(error).__name__}: {said}"[:240]


def _matmul(setting: Setting) -> None:
    from benchmarks.gpu import matmul

    matmul.measure(setting)


def _loss(setting: Setting) -> None:
    from benchmarks.gpu import loss

    loss.measure(setting)


def _plan(setting: Setting) -> None:
    from benchmarks.gpu import predict

    predict.all_cases(setting)


def _cases(choose: Callable[[Any], Sequence[Any]]) -> Callable[[Setting], None]:
    def run(setting: Setting) -> None:
        from benchmarks.gpu import cases

        train_all(setting, choose(cases))

    return run


def _longest(choose: Callable[[Any], Any]) -> Callable[[Setting], None]:
    def run(setting: Setting) -> None:
        from benchmarks.gpu import cases, longest

        longest.measure(setting, choose(cases))

    return run


def _serving(setting: Setting) -> None:
    from benchmarks.gpu import serving

    serving.measure(setting)


#: Seconds are for one H200: 20 of each are for imports and for building a model. What does not fit in the time of the
#: whole is left out from the end.
PARTS: dict[str, Part] = {
    "matmul": Part(45, 15, "matrix products alone: the ceiling", _matmul),
    "lora27": Part(75, 40, "LoRA of 27B at 4,096 tokens", _cases(lambda c: c.LORA_CASES[:1])),
    "full27": Part(150, 90, "27B in full on one GPU, Adafactor", _cases(lambda c: [c.FULL_27B])),
    "full27-8bit": Part(150, 25, "27B in full on one GPU, 8-bit AdamW", _cases(lambda c: [c.FULL_27B_8BIT])),
    "full12": Part(110, 60, "12B in full", _cases(lambda c: [c.FULL_12B])),
    "full4": Part(60, 30, "4B in full", _cases(lambda c: [c.FULL_4B])),
    "loss": Part(35, 20, "the loss in chunks and whole", _loss),
    "lora27-ways": Part(130, 45, "LoRA of 27B, attention and compiling otherwise", _cases(lambda c: c.LORA_CASES[1:])),
    "ablation": Part(180, 40, "what each thing brings, on LoRA of 4B", _cases(lambda c: c.ABLATION)),
    "longest-lora": Part(180, 60, "the longest row of 27B with LoRA", _longest(lambda c: c.LONG_LORA)),
    "longest-full": Part(180, 60, "the longest row of 27B in full", _longest(lambda c: c.LONG_FULL)),
    "serving": Part(240, 60, "our server against vLLM's own", _serving),
    "plan": Part(300, 30, "what `ray-ft plan` says of all of them", _plan, gpu=False),
}
