"""AdamW with moments of 8 bits, in blocks that share a scale (Dettmers et al. 2022), by bitsandbytes' kernels.

A weight's state takes 2 bytes and 1/32, in place of 8. It works on each worker's own run of a weight, sharded or not.
Weights in bfloat16 are rounded stochastically. For checkpoints the moments are given as float32 in host memory, 8 bytes
for each element of this worker, and quantized again once they have been filled. Limit: GPUs, since on CPUs bitsandbytes
computes with unpacked copies of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ray_ft.errors import ResourceError
from ray_ft.strategy.base import Piece
from ray_ft.train import rounding

UNIT = 256  # elements that share a scale: what bitsandbytes' kernels are compiled for
BLOCK = 1 << 24  # elements whose float32 update exists at once; of whole units
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign


def check(device: torch.device) -> None:
    """Refuse what this optimizer is not for.

    Raises:
        ResourceError: weights are not on a GPU, or bitsandbytes is not installed.
    """
    if device.type != "cuda":
        raise ResourceError(
            f"train.optimizer.name = 'adamw_8bit' is for weights on a GPU, and they are on {device.type!r}",
            [
                "train.optimizer.name=adafactor, whose state is smaller still",
                "train.optimizer.name=adamw",
                "train.device=cuda, where GPUs are, and train.fsdp.cpu_offload=false",
            ],
        )
    _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ResourceError(
            f"train.optimizer.name = 'adamw_8bit' needs bitsandbytes, which does not load here: {error}",
            ["pip install bitsandbytes==0.50.2", "or set train.optimizer.name=adafactor"],
        ) from error
    return bitsandbytes.functional


class AdamW8bit(torch.optim.Optimizer):
    """State of a tensor: "step"; codes (uint8, by element) and scales (float32, by `UNIT`) of each of `MOMENTS`.

    Where ``found_inf`` is set (a scalar tensor, as torch's fused optimizers have it) and not zero, weights and moments
    stay as they are, decided without waiting for the device; the step is counted all the same.

    Args:
        groups: parameters, or groups of them with a ``weight_decay`` (decoupled) of their own.
        pieces: the named runs of which one of the tensors consists; asked in each step.
        seed: of the rounding of weights in bfloat16.
    """

    found_inf: torch.Tensor | None

    def __init__(
        self,
        groups: Any,
        lr: float,
        pieces: Callable[[torch.Tensor], Iterable[Piece]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._pieces, self._seed = pieces, seed
        self._kernel = _bitsandbytes().optimizer_update_8bit_blockwise
        self._maps: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._given: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        self._given.clear()
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._step_one(tensor, group)

    def _step_one(self, tensor: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, state = _flat(tensor.grad), self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for moment in MOMENTS:
                state[f"{moment}_codes"] = torch.zeros_like(gradient, dtype=torch.uint8)
                state[f"{moment}_scales"] = gradient.new_zeros(-(-gradient.numel() // UNIT), dtype=torch.float32)
        state["step"] += 1
        for piece in self._pieces(tensor):
            # A kernel's units begin at the beginning of a tensor.
            assert piece.offset == 0
            assert piece.span.data.numel() == gradient.numel()
            self._step_piece(piece, gradient, state, group)

    def _step_piece(
        self, piece: Piece, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]
    ) -> None:
        step, span = int(state["step"].item()), piece.span
        found_inf = getattr(self, "found_inf", None)
        seed = rounding.seed_of(self._seed, step, piece.name)
        for start in range(0, gradient.numel(), BLOCK):
            stop = min(start + BLOCK, gradient.numel())
            weight = span.data[start:stop]
            held = [
                state[f"{moment}_{part}"][at]
                for part, at in (("codes", slice(start, stop)), ("scales", slice(start // UNIT, -(-stop // UNIT))))
                for moment in MOMENTS
            ]
            before = [part.clone() for part in held] if found_inf is not None else []
            # The kernel adds to what it is given: to zeros, so that what it adds can be rounded by other means.
            update = torch.zeros_like(weight, dtype=torch.float32)
            self._kernel(
                "adam",
                gradient[start:stop].float(),
                update,
                held[0],
                held[1],
                *group["betas"],
                0.0,  # of other optimizers, as the next
                0.0,
                group["eps"],
                step,
                group["lr"],
                *(self._map(moment, weight.device) for moment in MOMENTS),
                held[2],
                held[3],
                0.0,  # weight decay, of which it would find no weight
            )
            if group["weight_decay"]:
                update.add_(weight, alpha=-group["lr"] * group["weight_decay"])
            if found_inf is not None:
                skip = found_inf > 0
                update.masked_fill_(skip, 0.0)
                for part, old in zip(held, before, strict=True):
                    part.copy_(torch.where(skip, old, part))
            rounding.add(weight, update, span.start + start, seed)

    # ------------------------------------------------------------------------------------------------- checkpoints

    @torch.no_grad()
    def unpacked(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a tensor that has one, as numbers: "step", "exp_avg", "exp_avg_sq" (float32, in host memory).

        The same tensors each time until the next step, or until `pack` has taken what they have been filled with.
        """
        state = self.state[tensor]
        if tensor not in self._given:
            device = state["exp_avg_codes"].device
            self._given[tensor] = {
                moment: dequantize(state[f"{moment}_codes"], state[f"{moment}_scales"], self._map(moment, device))
                for moment in MOMENTS
            }
        return {"step": state["step"], **self._given[tensor]}

    @torch.no_grad()
    def pack(self) -> None:
        """Take over what the tensors given by `unpacked` have been filled with."""
        for tensor, moments in self._given.items():
            state = self.state[tensor]
            for moment, values in moments.items():
                codes, scales = state[f"{moment}_codes"], state[f"{moment}_scales"]
                quantize(values, codes, scales, self._map(moment, codes.device))
        self._given.clear()

    def _map(self, moment: str, device: torch.device) -> torch.Tensor:
        if (moment, device) not in self._maps:
            found = _bitsandbytes().create_dynamic_map(signed=MOMENTS[moment])
            self._maps[moment, device] = found.to(device)
        return self._maps[moment, device]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).reshape(-1)


# ---------------------------------------------------------------------------------------------------- quantization


def dequantize(codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What codes stand for: float32 [elements], in host memory.

    Args:
        codes: uint8 [elements].
        scales: float32, of `UNIT` elements each.
        values: float32 [256], ascending: what the codes mean at a scale of 1.
    """
    found = torch.empty(codes.numel(), dtype=torch.float32, device="cpu")
    for start in range(0, codes.numel(), BLOCK):
        part = slice(start, min(start + BLOCK, codes.numel()))
        units = _units(values[codes[part].int()])
        units *= scales[start // UNIT : start // UNIT + len(units)].unsqueeze(1)
        found[part] = units.view(-1)[: part.stop - start]
    return found


def quantize(numbers: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
    """Fill codes and scales so that they stand for the nearest to `numbers`, and for just what `dequantize` gave.

    bitsandbytes' own function scales by the largest magnitude, which its map holds as 1 but not as −1: there each
    passage through a checkpoint would shrink the units whose largest number is negative. Here it is always held.
    """
    bounds = (values[1:] + values[:-1]) / 2
    for start in range(0, numbers.numel(), BLOCK):
        part = slice(start, min(start + BLOCK, numbers.numel()))
        units = _units(numbers[part].to(codes.device))
        high, low = units.amax(dim=1), units.amin(dim=1)
        scale = torch.where(high > -low, high, low / values[0]) if values[0] < 0 else high
        # Of a unit of zeros any scale would do but the one that divides by it.
        found = torch.bucketize(units / torch.where(scale > 0, scale, 1.0).unsqueeze(1), bounds)
        codes[part] = found.view(-1)[: part.stop - start].to(torch.uint8)
        scales[start // UNIT : start // UNIT + len(units)] = scale


def _units(numbers: torch.Tensor) -> torch.Tensor:
    """[units, UNIT], the last one filled up with zeros."""
    return torch.nn.functional.pad(numbers, (0, -numbers.numel() % UNIT)).view(-1, UNIT)
