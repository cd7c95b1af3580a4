"""The loss in chunks against logits of all targets at once, at Gemma's 262,208 words: most memory, and time.

One layer of 27B stands before the head, so that hidden states have a gradient to take. Memory is counted from the end
of the decoder's forward pass to where the gradient of its output is complete: what the head and the loss take beside
weights and what the layer keeps. Time is of the whole, layer included, forwards and backwards. Where there is no GPU
the bytes of tensors are counted instead (`ray_ft.plan.ledger`), as nothing asks the allocator there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu.cases import config_of
from benchmarks.gpu.parts import reason
from ray_ft.model import load
from ray_ft.model.loss import LossModel
from ray_ft.plan.ledger import Ledger

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting

TOKENS = 8192
ROW = 4096
CHUNK = 1024
REPEATS = 5


def measure(setting: Setting) -> None:
    """Rows: `name`, `bytes` (most, of head and loss alone), `seconds` (of a forward and backward pass), `loss`."""
    device = torch.device(setting.device)
    text = config_of("27b", setting.small).get_text_config()
    text.num_hidden_layers, text.layer_types = 1, text.layer_types[:1]
    model = load.build(text, "sdpa", torch.bfloat16)
    load.allocate(model, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    load.compute_buffers(model)
    model.requires_grad_(False)  # a LoRA run's head; the gradient goes through it to the layers
    model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_(True))
    tokens, row, chunk = (64, 32, 16) if setting.small else (TOKENS, ROW, CHUNK)
    ids = torch.randint(0, text.vocab_size, (tokens // row, row), device=device)
    positions = torch.arange(row, device=device).expand(tokens // row, -1)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        f"ray-ft, {chunk} targets at once": lambda: LossModel(model, chunk)(ids, positions, ids).sum(),
        "ray-ft, all targets at once": lambda: LossModel(model, tokens)(ids, positions, ids).sum(),
        "transformers' own": lambda: (
            model(input_ids=ids, position_ids=positions, labels=ids).loss * (tokens - len(ids))
        ),
    }
    for name, way in ways.items():
        try:
            setting.emit({"name": name, **taken(way, model.get_decoder(), device)})
        except Exception as error:  # out of memory is what a whole loss may come to
            setting.emit({"name": name, "why": reason(error)})
            del error
        devices.give_back(device)


class _Memory:
    """Bytes in tensors, of a GPU by its allocator, else by a ledger that was active all the time."""

    def __init__(self, device: torch.device, ledger: Ledger | None) -> None:
        self._device, self._ledger = device, ledger
        self._before = 0

    def begin(self) -> None:
        """From here on the most is asked for, beside what there is."""
        devices.wait(self._device)
        if self._ledger is not None:
            self._ledger.take_peak()
            self._before = self._ledger.live
        else:
            devices.forget_peak(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def most(self) -> int:
        """Since `begin`."""
        if self._ledger is not None:
            return self._ledger.take_peak()[0] - self._before
        return devices.peak(self._device)["allocated"] - self._before


def taken(way: Callable[[], torch.Tensor], decoder: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    """`bytes`, `seconds` and `loss` of a way to a loss through a decoder that it calls once.

    Raises:
        RuntimeError: no gradient came to the decoder's output.
    """
    seconds, peaks, loss = [], [], 0.0
    for _ in range(1 + REPEATS):
        with Ledger() if device.type != "cuda" else contextlib.nullcontext() as ledger:
            memory = _Memory(device, ledger)
            for parameter in decoder.parameters() if ledger is not None else ():
                ledger.ignore(parameter)  # Gemma's head is the embedding

            def ended(_: Any, __: Any, output: Any, memory: _Memory = memory) -> None:
                output.last_hidden_state.register_hook(lambda _: peaks.append(memory.most()))
                memory.begin()

            hook = decoder.register_forward_hook(ended)
            try:
                devices.wait(device)
                began = time.perf_counter()
                total = way()
                total.backward()
                loss = total.item()
                devices.wait(device)
                seconds.append(time.perf_counter() - began)
            finally:
                hook.remove()
        del total
    if len(peaks) != len(seconds):
        raise RuntimeError(f"{len(peaks)} gradients came to the decoder's output in {len(seconds)} passes")
    return {"bytes": max(peaks), "seconds": sorted(seconds[1:])[REPEATS // 2], "loss": loss}
