"""Adafactor: against the one published with transformers, and on pieces of parameters against whole ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed import run
from torch import nn

from ray_ft.span import Span
from ray_ft.strategy.base import Piece
from ray_ft.train import adafactor
from ray_ft.train.adafactor import Adafactor

SHAPES = {"matrix": (5, 7), "tall": (64, 3), "one_row": (1, 6), "bias": (9,), "experts": (4, 3, 5), "scalar": ()}


def values(step: int) -> dict[str, torch.Tensor]:
    """Step 0: parameters; then gradients: of ordinary size, tiny, huge, and zero in whole rows."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if step:
        scale = (1.0, 1e-6, 1e4)[step % 3]
        found = {name: tensor * scale for name, tensor in found.items()}
        found["matrix"][2] = 0
        found["tall"][:, 1] = 0
    return found


def whole_pieces(over: dict[str, nn.Parameter]) -> Any:
    def pieces(tensor: torch.Tensor) -> Iterator[Piece]:
        (name,) = (name for name, parameter in over.items() if parameter is tensor)
        yield Piece(name, 0, Span.whole(tensor), None)

    return pieces


def whole_run(steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Parameters and the optimizer after some steps on whole parameters."""
    over = {name: nn.Parameter(tensor.to(dtype)) for name, tensor in values(0).items()}
    optimizer = Adafactor(over.values(), 0.02, whole_pieces(over), **options)
    for step in range(1, steps + 1):
        for name, gradient in values(step).items():
            over[name].grad = gradient.to(dtype)
        optimizer.step()
    return {name: p.detach() for name, p in over.items()}, optimizer


def test_equals_that_of_transformers() -> None:
    from transformers.optimization import Adafactor as Theirs

    theirs = {name: nn.Parameter(tensor) for name, tensor in values(0).items()}
    # They factor the last two dimensions; here all but the first are one.
    theirs["experts"] = nn.Parameter(values(0)["experts"].reshape(4, 15))
    other = Theirs(theirs.values(), lr=0.02, weight_decay=0.1, scale_parameter=False, relative_step=False)
    for step in range(1, 9):
        for name, gradient in values(step).items():
            theirs[name].grad = gradient.view(theirs[name].shape)
        other.step()
        ours, _ = whole_run(step, weight_decay=0.1)
        for name, tensor in ours.items():
            expected = theirs[name].detach().view(tensor.shape)
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6, msg=f"{name}, step {step}")


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = whole_run(4, weight_decay=0.1)
    for block in (1, 4, 7, 20):  # elements, parts of rows, one row of the matrix, some rows
        monkeypatch.setattr(adafactor, "BLOCK", block)
        found, _ = whole_run(4, weight_decay=0.1)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7, msg=f"{name}, {block}")


@pytest.mark.parametrize(
    ("start", "count", "width"), [(0, 20, 5), (3, 1, 5), (3, 2, 5), (3, 14, 5), (4, 0, 5), (7, 30, 11)]
)
@pytest.mark.parametrize("size", [1, 3, 5, 12, 100])
def test_blocks_cover_a_run_once(
    start: int, count: int, width: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adafactor, "BLOCK", size)
    whole = torch.arange(60 * width).view(60, width)
    part = whole.view(-1)[start : start + count]
    at = 0
    for block in adafactor._blocks(start, count, width):
        assert block.offset == at
        assert torch.equal(block.of(part), whole[block.rows, block.columns])
        at += block.of(part).numel()
        assert block.of(part).numel() <= size
    assert at == count


def test_clips_the_update_at_root_mean_square_one() -> None:
    parameter = nn.Parameter(torch.zeros(100))
    optimizer = Adafactor([parameter], 1.0, whole_pieces({"a": parameter}))
    for scale in (1e-3, 10.0):  # the second moment lags behind, so the second update would be far larger than 1
        before = parameter.detach().clone()
        parameter.grad = torch.full((100,), scale)
        optimizer.step()
        assert math.isclose((parameter.detach() - before).square().mean().sqrt(), 1.0, rel_tol=1e-5)


def test_the_state_is_factored_whole_and_small() -> None:
    _, optimizer = whole_run(2)
    shapes = {}
    for state in optimizer.state.values():
        assert state["step"] == 2
        shapes |= {key: tuple(value.shape) for key, value in state.items() if key != "step"}
    assert shapes == {
        "matrix/row": (5,),
        "matrix/column": (7,),
        "tall/row": (64,),
        "tall/column": (3,),
        "one_row/row": (1,),
        "one_row/column": (6,),
        "bias/moment": (9,),
        "experts/row": (4,),
        "experts/column": (15,),
        "scalar/moment": (1,),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_moves_nothing_where_it_is_to_be_left_out(dtype: torch.dtype) -> None:
    over = {name: nn.Parameter(tensor.to(dtype)) for name, tensor in values(0).items()}
    optimizer = Adafactor(over.values(), 0.02, whole_pieces(over), weight_decay=0.1)

    def step(number: int, broken: float) -> None:
        for name, gradient in values(1).items():
            over[name].grad = gradient.to(dtype)
            over[name].grad.view(-1)[0] = torch.nan if broken else over[name].grad.view(-1)[0]
        optimizer.found_inf = torch.tensor(broken)
        optimizer.step()

    def held() -> list[torch.Tensor]:
        moments = [v for s in optimizer.state.values() for key, v in s.items() if key != "step"]
        return [tensor.detach().clone() for tensor in (*over.values(), *moments)]

    step(1, 0.0)
    before = held()
    step(2, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))
    step(3, 0.0)
    assert not any(torch.equal(a, b) for a, b in zip(before[: len(over)], held(), strict=False) if a.dim())


def test_bfloat16_weights_follow_float32_ones_where_rounding_to_the_nearest_would_stand_still() -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Adafactor([weight], 1e-4, whole_pieces({"w": weight}))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)  # each update is 1e-4, a fortieth of the distance to the next number
        optimizer.step()
    assert weight.detach().float().mean().item() == pytest.approx(0.99, abs=2e-4)
    assert weight.detach().float().std() < 0.01


# ----------------------------------------------------------------------------------------------------- pieces of it

CUTS = {2: (0, 100, 303), 3: (0, 17, 230, 303)}  # within rows of "tall", "matrix", "one_row"; each rank lacks some


def flat_steps(rank: int, world: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Steps as under ZeRO: all parameters in one flat tensor of which each worker has a run, cut anywhere."""
    low, high = CUTS[world][rank], CUTS[world][rank + 1]

    def flat(step: int) -> torch.Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in values(step).values()])[low:high].to(dtype)

    weights = flat(0).clone()
    group = torch.distributed.group.WORLD

    def pieces(tensor: torch.Tensor) -> Iterator[Piece]:
        begin = 0
        for name, shape in SHAPES.items():
            end = begin + math.prod(shape)
            first, last = max(begin, low), min(end, high)
            first, last = (first, last) if first < last else (begin, begin)
            data = tensor[first - low : last - low] if first < last else tensor[:0]
            yield Piece(name, first - low if first < last else 0, Span(data, first - begin, shape), group)
            begin = end

    optimizer = Adafactor([weights], 0.02, pieces, weight_decay=0.1)
    for step in range(1, 7):
        weights.grad = flat(step)
        optimizer.step()
    return weights, dict(optimizer.state[weights]), low


@pytest.mark.parametrize("world", [2, 3])
def test_runs_cut_anywhere_equal_the_whole(world: int) -> None:
    assert sum(math.prod(shape) for shape in SHAPES.values()) == CUTS[world][-1]
    expected, optimizer = whole_run(6, weight_decay=0.1)
    state = {key: value for held in optimizer.state.values() for key, value in held.items()}
    ranks = run(world, flat_steps, torch.float32)
    found = torch.cat([part for part, _, _ in ranks])
    for name, part in zip(SHAPES, found.split([tensor.numel() for tensor in expected.values()]), strict=True):
        torch.testing.assert_close(part.view(SHAPES[name]), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    for _, held, _ in ranks:
        assert held.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(held[key], value, rtol=1e-5, atol=1e-30, msg=key)


def test_bfloat16_weights_round_alike_however_they_are_cut() -> None:
    expected, _ = whole_run(6, torch.bfloat16, weight_decay=0.1)
    whole = torch.cat([tensor.reshape(-1) for tensor in expected.values()])
    for world in (2, 3):
        found = torch.cat([part for part, _, _ in run(world, flat_steps, torch.bfloat16)])
        # Sums over workers round differently in float32, which now and then decides a bfloat16's last place.
        assert (found == whole).float().mean() > 0.97
        torch.testing.assert_close(found, whole, rtol=2**-6, atol=1e-3)
