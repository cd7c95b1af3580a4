"""The loss in chunks against logits of all targets at once, at Gemma's 262,208 words: most memory, and time.

One layer of 27B stands before the head, so that all else is small; counted is what a forward and backward pass takes
beside weights, gradients' final places and inputs. Where there is no GPU the bytes of tensors are counted instead
(`ray_ft.plan.ledger`), as nothing asks the allocator there.
"""

from __future__ import annotations

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
    """Rows: `name`, `bytes` (most, beside what stood before), `seconds` (of a forward and backward pass), `loss`."""
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
            setting.emit({"name": name, **_taken(way, device)})
        except Exception as error:  # out of memory is what a whole loss may come to
            setting.emit({"name": name, "why": reason(error)})
            del error
        devices.give_back(device)


def _taken(way: Callable[[], torch.Tensor], device: torch.device) -> dict[str, Any]:
    seconds = []
    most, loss = 0, 0.0
    for _ in range(1 + REPEATS):
        devices.wait(device)
        devices.forget_peak(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        began = time.perf_counter()
        if device.type == "cuda":
            total = way()
            total.backward()
            loss = total.item()
            most = max(most, devices.peak(device)["allocated"] - before)
        else:
            with Ledger() as ledger:
                total = way()
                total.backward()
            loss, most = total.item(), max(most, ledger.take_peak()[1])
        devices.wait(device)
        seconds.append(time.perf_counter() - began)
        del total
    return {"bytes": most, "seconds": sorted(seconds[1:])[REPEATS // 2], "loss": loss}
