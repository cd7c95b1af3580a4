"""The parts, in the order of their worth: what each is called, what it may take, and the module that does it.

A part runs in a process of its own (`child`), and gives rows as it goes: what it found before its time was over stays.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases as known
from benchmarks.gpu.cases import Case


@dataclass
class Setting:
    """Where a part runs, and what it does with what it finds.

    Attributes:
        small: hardly any weights, for a machine without a GPU.
        steps: of a case, timed at least.
        until: by `time.monotonic`; a part stops before.
        emit: takes a row. A later one of the same case that holds steps as well stands for the earlier.
        seconds: of a case's steps, timed at least.
    """

    device: str
    small: bool
    steps: int
    until: float
    folder: Path
    emit: Callable[[dict[str, Any]], None]
    seconds: float = 0.0

    @property
    def left(self) -> float:
        return self.until - time.monotonic()


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        limit: seconds that it may take; `least`: with fewer there is no use in starting.
        module: of this package; its `measure` takes a `Setting` and the cases.
        seconds: of each case's steps, timed at least.
        gpu: whether it needs the GPU to itself.
    """

    limit: float
    least: float
    does: str
    module: str
    cases: tuple[Case, ...] = ()
    seconds: float = 10.0
    gpu: bool = True

    def measure(self, setting: Setting) -> None:
        importlib.import_module(f"benchmarks.gpu.{self.module}").measure(setting, *self.cases)


def reason(error: BaseException) -> str:
    """Of a failure, in a line."""
    from benchmarks.gpu import device as devices

    said = (str(error).strip() or repr(error)).splitlines()[0]
    if devices.is_out_of_memory(error):
        return f"out of memory: {said.split('. ')[1] if said.count('. ') > 1 else said}"[:200]
    return f"{type(error).__name__}: {said}"[:240]


#: Limits are for one H200: some 20 seconds of each are for imports and for building a model. Those of FIRST come to
#: 525, which is what `--minutes 9` leaves; what does not fit in the time of the whole is left out from the end.
FIRST = {
    "matmul": Part(45, 20, "matrix products alone: the ceiling", "matmul"),
    "lora27": Part(150, 45, "LoRA of 27B at 4,096 tokens, and its longest row", "training",
                   (known.LORA_27B, known.LONG_LORA)),
    "full27": Part(140, 60, "27B in full on one GPU, Adafactor, and its longest row", "training",
                   (known.FULL_27B, known.LONG_FULL)),
    "full27-8bit": Part(65, 50, "27B in full on one GPU, 8-bit AdamW", "training", (known.FULL_27B_8BIT,)),
    "full12": Part(50, 40, "12B in full", "training", (known.FULL_12B,)),
    "full4": Part(40, 30, "4B in full", "training", (known.FULL_4B,)),
    "loss": Part(35, 25, "the loss in chunks and whole", "loss"),
}  # fmt: skip
#: For a call of its own.
SECOND = {
    "ablation": Part(170, 40, "what each thing brings, on LoRA of 4B", "training", known.ABLATION, seconds=3),
    "lora27-ways": Part(110, 45, "LoRA of 27B, attention and compiling otherwise", "training", known.LORA_WAYS),
}
PARTS: dict[str, Part] = {
    **FIRST,
    **SECOND,
    "plan": Part(300, 30, "what `ray-ft plan` says of all of them", "predict", known.PLANNED, gpu=False),
}
