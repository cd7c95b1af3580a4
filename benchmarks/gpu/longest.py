"""The longest row of tokens that a step fits in memory with: from what `ray-ft plan` says on, up or down, then between.

A length is tried by one step of the product's loop on one row, in which everything is at its peak once; the model is
built once. The last length that fitted is what counts, and how far above it one failed is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu.cases import Case, tiny
from benchmarks.gpu.parts import reason
from benchmarks.gpu.predict import longest
from benchmarks.gpu.steps import Built

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting

UNIT = 1024  # lengths are multiples of it
CLOSE = 0.06  # of the length: nearer to the limit nothing is sought


def search(
    guess: int, unit: int, most: int, fits: Callable[[int], bool], enough: Callable[[int], bool]
) -> tuple[int, int | None]:
    """(the longest that fitted, the shortest that did not): 0 and None where there was none.

    Args:
        guess: tried first; then twice or half as much until the limit lies between two, which are halved.
        most: lengths above it are not tried.
        enough: whether there is no time for a try of a length.
    """
    low, high = 0, None
    at = min(max(guess // unit * unit, unit), most)
    while not enough(at):
        if fits(at):
            low = at
        else:
            high = at
        if high is None:
            if low >= most:
                break
            at = min(2 * low, most)
        elif high <= unit or (low and high - low <= max(unit, CLOSE * low)):
            break
        else:
            at = ((low + high) // 2 if low else high // 2) // unit * unit
            at = max(at, unit)
        if at in (low, high):
            break
    return low, high


def measure(setting: Setting, case: Case) -> None:
    """Rows of tries (`tokens`, `fits`, `seconds`), then one with `longest`, `failed` and `guess`."""
    device = torch.device(setting.device)
    case = tiny(case) if setting.small else case
    if device.type != "cuda":  # where flex attention has no backward pass
        case = case.variant(case.name, "model.attention=auto")
    limit = devices.described(device)["limit"] or 2 * 2**30
    most = 256 if setting.small else 131072  # what the model was made for
    unit = 16 if setting.small else UNIT
    guess = longest(case, limit, setting.small)
    ready = Built(case, device, setting.folder / "model", setting.small, 1)
    spent: dict[int, float] = {}

    def enough(tokens: int) -> bool:
        # Attention's time grows with the square of the length: the longest so far says what a longer one takes.
        last = max(spent, default=0)
        needs = spent[last] * max(tokens / last, (tokens / last) ** 1.5) if last else 0.0
        return setting.left < needs + 3

    def fits(tokens: int) -> bool:
        began = time.monotonic()
        devices.forget_peak(device)
        row: dict[str, Any] = {"case": case.name, "tokens": tokens}
        try:
            ready.run(1, tokens, lambda: False, seed=tokens)
            row |= {"fits": True, **devices.peak(device)}
        except Exception as error:  # memory, or a kernel's own limit: the row says which
            row |= {"fits": False, "why": reason(error)}
            error.__traceback__ = None  # its frames hold the activations
        for parameter in ready.built.strategy.module.parameters():
            parameter.grad = None
        devices.give_back(device)
        spent[tokens] = time.monotonic() - began
        setting.emit({**row, "seconds": spent[tokens]})
        return bool(row["fits"])

    low, high = search(guess // 2, unit, most, fits, enough)  # half, as the time of a try is not known before the first
    setting.emit({"case": case.name, "longest": low, "failed": high, "guess": guess, "most": most})
