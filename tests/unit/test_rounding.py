"""Stochastic rounding: unbiased, at most to a neighbour, and a function of the element alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from ray_ft.train import rounding

SEED = rounding.seed_of(1, 2, "a")


def added(target: torch.Tensor, update: torch.Tensor, start: int = 0, seed: int = SEED) -> torch.Tensor:
    found = target.clone()
    rounding.add(found, update, start, seed)
    return found


def neighbours(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of float32 numbers: the largest bfloat16 not above in magnitude, and the next one."""
    inner = total.view(torch.int32) & ~0xFFFF
    return inner.view(torch.float32), (inner + 0x10000).view(torch.float32)


def test_the_mean_over_many_seeds_is_the_sum_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.randn(64, generator=generator) * 3).bfloat16()
    update = torch.randn(64, generator=generator) * 1e-3  # far below half a unit in the last place
    total = target.float() + update
    seeds = 4000
    mean = sum(added(target, update, seed=rounding.seed_of(0, step, "w")).double() for step in range(seeds)) / seeds
    low, high = neighbours(total)
    share = ((total - low) / (high - low)).double()
    deviation = (high - low).abs() * (share * (1 - share) / seeds).sqrt()
    assert ((mean - total) / deviation.clamp_min(1e-12)).abs().max() < 5
    assert ((mean - total) / deviation.clamp_min(1e-12)).square().mean() < 2
    nearest = total.bfloat16().double()
    assert (mean - total).abs().mean() < 0.1 * (nearest - total).abs().mean()  # which rounding to the nearest leaves


def test_a_sum_becomes_one_of_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-38, 30, 20000)
    target = (torch.randn(20000, generator=generator) * scale).bfloat16()
    update = torch.randn(20000, generator=generator) * scale * 0.1
    low, high = neighbours(target.float() + update)
    found = added(target, update).float()
    assert ((found == low) | (found == high)).all()
    assert 0.3 < (found == low).float().mean() < 0.7  # both occur


def test_sums_that_bfloat16_holds_stay_exact() -> None:
    target = torch.tensor([0.0, 1.0, -1.5, 3.0, -0.0078125, 3.38953139e38]).bfloat16()
    for seed in range(50):
        assert torch.equal(added(target, torch.zeros(6), seed=seed), target)
        assert torch.equal(added(target, target.float(), seed=seed)[:5], (target * 2)[:5])


def test_infinities_and_nan_stay() -> None:
    quiet, payload = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    update = torch.tensor([float("inf"), -float("inf"), float(quiet), 1.0, float(payload)])
    update.view(torch.int32)[[2, 4]] = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32)
    target = torch.tensor([1.0, 1.0, 1.0, float("inf"), 0.0]).bfloat16()
    for seed in range(50):
        found = added(target, update, seed=seed)
        assert found[0] == float("inf")
        assert found[1] == -float("inf")
        assert found[3] == float("inf")
        assert found[[2, 4]].isnan().all()


@pytest.mark.parametrize("start", [0, (1 << 31) - 700, (1 << 32) - 700, 5 << 32], ids=hex)
def test_the_result_does_not_depend_on_the_cut(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    target, update = torch.randn(1500, generator=generator).bfloat16(), torch.randn(1500, generator=generator)
    whole = added(target, update, start)
    for cuts in ([0, 1500], [0, 1, 2, 700, 701, 1500], [0, 699, 699, 1024, 1500]):
        parts = [added(target[a:b], update[a:b], start + a) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(rounding, "BLOCK", 37)
    assert torch.equal(added(target, update, start), whole)
    assert not torch.equal(added(target, update, start + 1), whole)


def test_steps_parameters_and_seeds_round_differently() -> None:
    target, update = torch.ones(2000).bfloat16(), torch.full((2000,), 0.5 / 128)
    found = [
        added(target, update, seed=rounding.seed_of(*key))
        for key in ((0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (0, 1, "b"))
    ]
    for at, one in enumerate(found):
        for other in found[at + 1 :]:
            assert 0.45 < (one == other).float().mean() < 0.55


@pytest.mark.parametrize("start", [0, 123456789, 7 << 32])
def test_the_bits_are_uniform_and_neighbours_are_independent(start: int) -> None:
    count = 1 << 18
    for seed in (0, 1, SEED):
        bits = rounding._bits(start, count, seed, torch.device("cpu"))
        assert bits.min() >= 0
        assert bits.max() <= 0xFFFF
        for values in (bits >> 8, bits & 0xFF):
            expected = count / 256
            chi = ((torch.bincount(values, minlength=256) - expected).square() / expected).sum()
            assert 150 < chi < 390  # 255 degrees of freedom: mean 255, deviation 22.6
        numbers = bits.double() / 65536 - 0.5
        for apart in (1, 2, 256, 5376):
            correlation = (numbers[:-apart] * numbers[apart:]).mean() * 12
            assert abs(correlation) < 5 / count**0.5


def test_float32_is_added_to_plainly() -> None:
    target, update = torch.randn(10), torch.randn(10)
    assert torch.equal(added(target, update), target + update)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_bits_are_the_same_on_a_gpu() -> None:
    target, update, start = torch.randn(100000).bfloat16(), torch.randn(100000), (1 << 32) - 50000
    assert torch.equal(added(target.cuda(), update.cuda(), start).cpu(), added(target, update, start))
