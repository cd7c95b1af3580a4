"""Updates of weights kept in bfloat16: rounded stochastically, by random bits that depend on nothing but the element.

Rounding to the nearest would lose every update below 2⁻⁹ of its weight, so that training with a small learning rate
stands still. Here a sum is rounded up with the probability of its distance from the lower neighbour: what is lost once
comes back on average. The bits are a hash of (seed, step, parameter, element), not a generator's: the result depends
neither on how a parameter is cut up nor on the order of updates, and workers with copies keep equal ones.
"""

from __future__ import annotations

import hashlib

import torch

BLOCK = 1 << 24  # elements whose float32 sum and random bits exist at once: 64 MiB each


def seed_of(seed: int, step: int, name: str) -> int:
    """64 bits for one parameter's update in one step."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest(), "little")


@torch.no_grad()
def add(target: torch.Tensor, update: torch.Tensor, start: int, seed: int) -> None:
    """Add an update to a run of a weight, in place: stochastically rounded in bfloat16, plainly in float32.

    Args:
        target: float32 or bfloat16, one dimension.
        update: float32, as long as `target`.
        start: offset of the first element in the flattened weight.
        seed: of this weight and step (see `seed_of`).
    """
    if target.dtype == torch.bfloat16:
        add_stochastic(target, update, start, seed)
    else:
        target.add_(update)


@torch.no_grad()
def add_stochastic(target: torch.Tensor, update: torch.Tensor, start: int, seed: int) -> None:
    """As `add` for bfloat16: each sum becomes one of its two neighbours, and on average itself.

    Sums that bfloat16 holds exactly stay what they are, as do infinities and NaN.
    """
    at = 0
    while at < target.numel():
        first = start + at
        # The hash sees the lower 32 bits of the index; the upper ones, the same in all of a block, go into its keys.
        size = min(BLOCK, target.numel() - at, (first | 0xFFFFFFFF) + 1 - first)
        part = target[at : at + size]
        total = part.float().add_(update[at : at + size])
        random = _bits(first, size, seed, target.device)
        rounded = (random.add_(total.view(torch.int32)) & ~0xFFFF).view(torch.float32)
        # In a NaN the addition could carry into the sign or leave an infinity behind.
        part.copy_(torch.where(total.isfinite(), rounded, total))
        at += size


def _bits(first: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    """16 random bits for each element from `first` on, as int32 from 0 to 65535.

    The integer hash "lowbias32" (Wellons, Hash Function Prospector, 2018), with half of the seed before and half of it
    between its multiplications, so that other seeds give other sequences and not parts of the same one.
    """
    low, high = first & 0xFFFFFFFF, first >> 32
    before = (seed ^ high * 0x9E3779B9) & 0xFFFFFFFF
    between = seed >> 32 & 0xFFFFFFFF
    x = torch.arange(size, dtype=torch.int32, device=device)
    x.add_(_signed(low)).bitwise_xor_(_signed(before))
    _fold(x, 16).mul_(_signed(0x7FEB352D)).bitwise_xor_(_signed(between))
    _fold(x, 15).mul_(_signed(0x846CA68B))
    return _right(_fold(x, 16), 16)


def _fold(x: torch.Tensor, by: int) -> torch.Tensor:
    return x.bitwise_xor_(_right(x, by))


def _right(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift of unsigned numbers: torch's own would copy the sign."""
    return (x >> by).bitwise_and_((1 << 32 - by) - 1)


def _signed(value: int) -> int:
    """The int32 with the bits of an unsigned number."""
    return value - (1 << 32) if value >> 31 else value
