"""How fast the device multiplies matrices: the ceiling that training is measured against.

bfloat16 on random numbers (zeros draw less power, and run faster than any model can), back to back for as long as it
takes for clocks to settle. Large squares show the device's best; the products of Gemma's own layers at 4,096 tokens
show what a model of these shapes could reach if nothing else took time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu.cases import SIZES, config_of

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting

TOKENS = 4096
SQUARES = (4096, 8192, 16384)
CHUNK = 1024  # target tokens whose logits exist at once: `train.loss_chunk`


def layer_products(config: Any, tokens: int) -> dict[str, tuple[int, int, int, int]]:
    """Name → (rows, inner, columns, how often in the model) of the products of a forward pass."""
    text = config.get_text_config()
    width, head = text.hidden_size, text.head_dim
    asked, kept, inner = text.num_attention_heads * head, text.num_key_value_heads * head, text.intermediate_size
    layers = text.num_hidden_layers
    return {
        "queries": (tokens, width, asked, layers),
        "keys, values": (tokens, width, kept, 2 * layers),
        "output": (tokens, asked, width, layers),
        "gate, up": (tokens, width, inner, 2 * layers),
        "down": (tokens, inner, width, layers),
        "logits": (min(CHUNK, tokens), width, text.vocab_size, max(tokens // CHUNK, 1)),
    }


def timed(shape: tuple[int, int, int], device: torch.device, seconds: float) -> float:
    """FLOP/s of a product [rows, inner] × [inner, columns], over `seconds` after a warm-up."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    # As a linear layer has its weight: [columns, inner].
    right = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
    out = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)

    def go(times: int) -> float:
        devices.wait(device)
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right.t(), out=out)
        devices.wait(device)
        return time.perf_counter() - began

    go(3)
    times = max(int(seconds / max(go(5) / 5, 1e-7)), 5)
    return 2.0 * rows * inner * columns * times / go(times)


def measure(setting: Setting) -> None:
    """Rows: `shape`, `flops` (of one product), `rate` (FLOP/s), and of a model's products `model` and `share` (how much
    of its products' FLOPs they are)."""
    device = torch.device(setting.device)
    squares = (64, 128) if setting.small else SQUARES
    for side in squares:
        rate = timed((side, side, side), device, 0.01 if setting.small else 1.5)
        setting.emit({"shape": [side] * 3, "name": "square", "rate": rate})
    for size in reversed(SIZES):
        products = layer_products(config_of(size, setting.small), 64 if setting.small else TOKENS)
        whole = sum(rows * inner * columns * times for rows, inner, columns, times in products.values())
        for name, (rows, inner, columns, times) in products.items():
            if setting.left < 2:
                setting.emit({"name": name, "model": size, "why": "the time was over"})
                continue
            rate = timed((rows, inner, columns), device, 0.01 if setting.small else 0.4)
            share = rows * inner * columns * times / whole
            shape = [rows, inner, columns]
            setting.emit({"shape": shape, "name": name, "model": size, "rate": rate, "share": share})


def harmonic(rows: list[dict[str, Any]], model: str) -> float | None:
    """FLOP/s of all of a model's products, one after the other; None where one of them was not measured."""
    found = [row for row in rows if row.get("model") == model]
    if not found or any("rate" not in row for row in found):
        return None
    return 1 / sum(row["share"] / row["rate"] for row in found)
