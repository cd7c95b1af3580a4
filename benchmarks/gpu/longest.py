"""The longest row of tokens that a step fits in memory with: from what `ray-ft plan` says on, up or down, then between.

A length is tried by one step of the product's loop on one row, in which everything is at its peak once; the model is
built once, and two short rows are trained on before: what is compiled for any length then is. Tries alone are given as
rows; the longest that fitted is read off them (`found`), also where the time was over in the middle of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu.cases import Case
from benchmarks.gpu.parts import reason
from benchmarks.gpu.steps import Built

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting

UNIT = 1024  # lengths are multiples of it
MOST = 131072  # what the model was made for
CLOSE = 0.06  # of the length: nearer to the limit nothing is sought
FIRST = 0.9  # of the guess, which is tried first: a length that fits says more than one that does not


def is_close(low: int, high: int | None, unit: int, most: int) -> bool:
    """Whether the limit is known: low fitted, 0 for none, and high did not, None for none."""
    if high is None:
        return low >= most
    return high <= unit or bool(low and high - low <= max(unit, CLOSE * low))


def search(guess: int, unit: int, most: int, fits: Callable[[int], bool], enough: Callable[[int], bool]) -> None:
    """Try lengths until the limit is known: up or down until it lies between two, which are then halved.

    Args:
        guess: tried first; then a quarter more or less, then twice or half as much.
        most: lengths above it are not tried.
        enough: whether there is no time for a try of a length.
    """
    low, high = 0, None
    at, stride = min(max(guess // unit * unit, unit), most), 1.25
    while not is_close(low, high, unit, most) and not enough(at):
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            at = min(max(int(low * stride), low + unit), most)
        elif low:
            at = (low + high) // 2
        else:
            at = int(high / stride)
        stride = 2.0
        at = min(max(at // unit * unit, unit), most)
        if at in (low, high):
            break


def found(tries: Sequence[dict[str, Any]]) -> tuple[int, int | None, bool]:
    """(the longest that fitted or 0, the shortest above it that did not or None, whether the limit lies between).

    Args:
        tries: rows of `measure`, at least one.
    """
    low = max((row["tokens"] for row in tries if row["fits"]), default=0)
    high = min((row["tokens"] for row in tries if not row["fits"]), default=None)
    return low, high, is_close(low, high, tries[0]["unit"], tries[0]["most"])


def measure(setting: Setting, case: Case, limit: float, guess: Callable[[], int]) -> None:
    """Rows of tries: `tokens`, `fits` or `why` not, `seconds`; and of all `guess`, `unit` and `most`.

    Args:
        limit: bytes of the device.
        guess: tokens, by `ray-ft plan`.

    Raises:
        Exception: what a short row fails with, or a longer one where the device is unusable after it.
    """
    device = torch.device(setting.device)
    if device.type != "cuda":  # where flex attention has no backward pass
        case = case.variant(case.name, "model.attention=auto")
    unit, most = (16, 256) if setting.small else (UNIT, MOST)
    ready = Built(case, device, setting.folder / "model", setting.small, 1)
    for tokens in (2 * unit, 3 * unit):  # beyond the window of Gemma's layers
        ready.run(1, tokens)
    spent: dict[int, float] = {}
    expected = guess()

    def enough(tokens: int) -> bool:
        # Attention's time grows with the square of the length: the longest so far says what a longer one takes.
        last = max(spent, default=0)
        needs = spent[last] * max(tokens / last, (tokens / last) ** 1.5) if last else 0.0
        return setting.left < needs + 2

    def fits(tokens: int) -> bool:
        began = time.monotonic()
        devices.forget_peak(device)
        row: dict[str, Any] = {"case": case.name, "tokens": tokens, "guess": expected, "unit": unit, "most": most}
        try:
            ready.run(1, tokens, seed=tokens)
            row |= {"fits": True, **devices.peak(device)}
        except Exception as error:  # memory, or a kernel's own limit: the row says which
            row |= {"fits": False, "why": reason(error)}
            error.__traceback__ = None  # its frames hold the activations
            if devices.is_broken(device):
                raise
        for parameter in ready.built.strategy.module.parameters():
            parameter.grad = None
        devices.give_back(device)
        took = time.monotonic() - began
        if row["fits"]:  # one that does not fit ends early
            spent[tokens] = took
        setting.emit({**row, "seconds": took})
        return bool(row["fits"])

    search(int(expected * FIRST), unit, most, fits, enough)
    if not spent:
        setting.emit({"case": case.name, "why": f"no length was found to fit; ray-ft plan: {expected:,}"})
