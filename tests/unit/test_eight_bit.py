"""AdamW with moments of 8 bits: by bitsandbytes' kernels, which for tests compute on CPUs as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distributed import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ray_ft.errors import ResourceError
from ray_ft.recipe import Optimizer
from ray_ft.span import Span
from ray_ft.strategy import state
from ray_ft.strategy.base import Piece
from ray_ft.train import eight_bit, optim
from ray_ft.train.eight_bit import AdamW8bit

SHAPES = {"matrix": (40, 128), "odd": (17, 301)}
LR, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.95), 1e-8


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


def values(step: int) -> dict[str, torch.Tensor]:
    """Step 0: parameters; then gradients of sizes that differ by column."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: t * torch.logspace(-1, 0, t.shape[1]) for name, t in found.items()} if step else found


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor.to(dtype)) for name, tensor in values(0).items()}


def pieces_of(over: dict[str, nn.Parameter]) -> Callable[[torch.Tensor], Iterator[Piece]]:
    def pieces(tensor: torch.Tensor) -> Iterator[Piece]:
        (name,) = (name for name, parameter in over.items() if parameter is tensor)
        yield Piece(name, 0, Span.whole(tensor), None)

    return pieces


def make(over: dict[str, nn.Parameter], **options: Any) -> AdamW8bit:
    options = {"weight_decay": DECAY, **options}
    return AdamW8bit(over.values(), LR, pieces_of(over), BETAS, EPS, **options)


def steps(optimizer: torch.optim.Optimizer, over: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name, gradient in values(step).items():
            over[name].grad = gradient.to(over[name].dtype)
        optimizer.step()


def moments(optimizer: AdamW8bit, over: dict[str, nn.Parameter]) -> dict[str, dict[str, Span]]:
    return state.moments(optimizer, pieces_of(over), True)


def test_is_refused_on_a_cpu() -> None:
    with pytest.raises(ResourceError, match=r"(?s)adamw_8bit.*'cpu'.*adafactor"):
        optim.build(Optimizer(name="adamw_8bit"), [("a", nn.Parameter(torch.ones(2)))], lambda tensor: [])


def test_takes_the_steps_of_bitsandbytes_own_optimizer(bitsandbytes: Any) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = make(ours)
    steps(optimizer, ours, 1, 5)
    other = bitsandbytes.optim.AdamW8bit(theirs.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    steps(other, theirs, 1, 5)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=5e-6, msg=name)
        held, expected = optimizer.state[ours[name]], other.state[theirs[name]]
        assert torch.equal(held["exp_avg_codes"], expected["state1"].view(-1))
        assert torch.equal(held["exp_avg_sq_codes"], expected["state2"].view(-1))
        assert torch.equal(held["exp_avg_sq_scales"], expected["absmax2"])


def test_stays_near_adamw_of_32_bits(bitsandbytes: Any) -> None:
    ours, theirs = parameters(), parameters()
    steps(make(ours), ours, 1, 20)
    steps(torch.optim.AdamW(theirs.values(), LR, BETAS, EPS, DECAY), theirs, 1, 20)
    for name, begin in values(0).items():
        moved = (theirs[name].detach() - begin).norm()
        assert (ours[name] - theirs[name]).norm() < 0.1 * moved, name


def test_its_state_is_small(bitsandbytes: Any) -> None:
    over = parameters()
    optimizer = make(over)
    steps(optimizer, over, 1, 1)
    held = sum(t.numel() * t.element_size() for of in optimizer.state.values() for t in of.values())
    assert held < 2.06 * sum(parameter.numel() for parameter in over.values())


def test_blocks_change_nothing(bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = parameters(), parameters()
    first, second = make(expected), make(found)
    steps(first, expected, 1, 3)
    monkeypatch.setattr(eight_bit, "BLOCK", 2 * eight_bit.UNIT)
    steps(second, found, 1, 3)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
    monkeypatch.undo()
    whole, parts = moments(first, expected), moments(second, found)
    assert all(torch.equal(span.data, parts[name][key].data) for name, of in whole.items() for key, span in of.items())


def test_bfloat16_weights_follow_those_of_float32(bitsandbytes: Any) -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW8bit([weight], 1e-4, pieces_of({"w": weight}))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)  # each update is 1e-4: rounded to the nearest, nothing would move
        optimizer.step()
    assert weight.detach().float().mean().item() == pytest.approx(0.99, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_go_out_and_in_and_the_steps_continue(bitsandbytes: Any, dtype: torch.dtype) -> None:
    straight, first, second = parameters(dtype), parameters(dtype), parameters(dtype)
    steps(make(straight), straight, 1, 6)

    optimizer = make(first)
    steps(optimizer, first, 1, 3)
    saved = moments(optimizer, first)
    assert {name: set(of) for name, of in saved.items()} == {name: {"step", "exp_avg", "exp_avg_sq"} for name in SHAPES}
    for name, parameter in first.items():
        second[name].data.copy_(parameter.data)

    optimizer = make(second)
    fresh = moments(optimizer, second)
    assert all(torch.equal(second[name], first[name]) for name in SHAPES)  # creating them has moved nothing
    for name, of in saved.items():
        for moment, span in of.items():
            assert not fresh[name][moment].data.any()
            assert span.shape == fresh[name][moment].shape
            fresh[name][moment].data.copy_(span.data)
    del fresh
    state.restored(optimizer)
    steps(optimizer, second, 4, 6)
    for name in SHAPES:
        torch.testing.assert_close(second[name], straight[name], rtol=1e-5, atol=1e-5, msg=name)


def test_what_was_given_for_a_checkpoint_is_not_kept(bitsandbytes: Any) -> None:
    over = parameters()
    optimizer = make(over)
    steps(optimizer, over, 1, 1)
    moments(optimizer, over)["odd"]["exp_avg"].data.zero_()
    assert moments(optimizer, over)["odd"]["exp_avg"].data.count_nonzero() == 0  # the same until a step
    steps(optimizer, over, 2, 2)
    assert not optimizer._given
    assert moments(optimizer, over)["odd"]["exp_avg"].data.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_moves_nothing_where_it_is_to_be_left_out(
    bitsandbytes: Any, dtype: torch.dtype
) -> None:
    over = parameters(dtype)
    optimizer = make(over)
    steps(optimizer, over, 1, 2)

    def held() -> list[torch.Tensor]:
        parts = [value for of in optimizer.state.values() for key, value in of.items() if key != "step"]
        return [tensor.detach().clone() for tensor in (*over.values(), *parts)]

    before = held()
    for broken in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(broken)
        for name, gradient in values(3).items():
            over[name].grad = gradient.to(dtype)
            over[name].grad[3, 3] = torch.nan if broken else 1.0
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, held(), strict=True)]
        assert all(same) if broken else not any(same)


# ---------------------------------------------------------------------------------------------------- quantization


@pytest.mark.parametrize("count", [1, 255, 256, 1000, 4096])
@pytest.mark.parametrize("signed", [True, False])
def test_quantizing_again_what_was_given_changes_nothing(count: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    # As bitsandbytes' maps: symmetric but for 1, which has no counterpart, or without signs.
    means = torch.logspace(-6, 0, 127) * 0.99
    values = torch.cat([-means.flip(0), torch.zeros(1), means, torch.ones(1)])
    values = values if signed else torch.cat([torch.zeros(1), torch.logspace(-6, 0, 255)])
    numbers = torch.randn(count, generator=generator)
    numbers = numbers if signed else numbers.abs()
    numbers[: count // 3] = 0
    if signed and count > 2:
        numbers[-2:] = torch.tensor([-9.0, 8.9])  # the largest is negative, the next has the same code without sign
    codes = torch.zeros(count, dtype=torch.uint8)
    scales = torch.zeros(-(-count // eight_bit.UNIT))
    eight_bit.quantize(numbers, codes, scales, values)
    given = eight_bit.dequantize(codes, scales, values)
    assert (given[numbers != 0] / numbers[numbers != 0] - 1).abs().median() < 0.06
    assert not given[: count // 3].any()
    again, more = codes.clone(), scales.clone()
    for _ in range(5):
        eight_bit.quantize(eight_bit.dequantize(again, more, values), again, more, values)
    assert torch.equal(again, codes)
    torch.testing.assert_close(more, scales, rtol=1e-6, atol=0)


def test_the_codes_mean_what_they_mean_to_bitsandbytes(bitsandbytes: Any) -> None:
    numbers = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    values = bitsandbytes.functional.create_dynamic_map(signed=True)
    codes, kept = bitsandbytes.functional.quantize_blockwise(numbers, code=values, blocksize=eight_bit.UNIT)
    theirs = bitsandbytes.functional.dequantize_blockwise(codes, kept)
    assert torch.equal(eight_bit.dequantize(codes, kept.absmax, values), theirs)


# --------------------------------------------------------------------------------------------------------- sharded


def sharded_steps(rank: int, world: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Steps over a parameter sharded by rows, in halves that are whole units."""
    mesh = init_device_mesh("cpu", (world,))
    over = {"matrix": nn.Parameter(distribute_tensor(values(0)["matrix"].to(dtype), mesh, [Shard(0)]))}

    def pieces(tensor: torch.Tensor) -> Iterator[Piece]:
        assert isinstance(tensor, DTensor)
        local = tensor.detach().to_local().view(-1)
        yield Piece("matrix", 0, Span(local, rank * local.numel(), tuple(tensor.shape)), mesh.get_group())

    optimizer = AdamW8bit(over.values(), LR, pieces, BETAS, EPS, weight_decay=DECAY)
    for step in range(1, 4):
        over["matrix"].grad = distribute_tensor(values(step)["matrix"].to(dtype), mesh, [Shard(0)])
        optimizer.step()
    span = state.moments(optimizer, pieces, rank == 0)["matrix"]["exp_avg_sq"]
    assert span.start == rank * 20 * 128
    return {"matrix": over["matrix"].to_local().detach(), "exp_avg_sq": span.data.view(20, 128)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_over_two_equals_whole(bitsandbytes: Any, dtype: torch.dtype) -> None:
    expected = parameters(dtype)
    optimizer = make(expected)
    steps(optimizer, expected, 1, 3)
    second = moments(optimizer, expected)["matrix"]["exp_avg_sq"].data.view(40, 128)
    ranks = run(2, sharded_steps, dtype)
    assert torch.equal(torch.cat([part["matrix"] for part in ranks]), expected["matrix"])
    assert torch.equal(torch.cat([part["exp_avg_sq"] for part in ranks]), second)
