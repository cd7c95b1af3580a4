"""The optimizer within the backward pass: the same steps, with few gradients at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from distributed import run
from distributed import weights as whole_weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from ray_ft import recipe
from ray_ft.span import Span
from ray_ft.strategy.base import Layout
from ray_ft.strategy.fsdp import FSDP
from ray_ft.strategy.replicated import Replicated
from ray_ft.train import optim

LAYERS, WIDTH, WORDS, STEPS = 6, 16, 40, 4
LR = 1e-2
SETTINGS = {name: recipe.Optimizer(name=name, lr=1.0, weight_decay=0.1) for name in ("adafactor", "adamw")}
POISONED = "blocks.2.up.bias"


class Poison(torch.autograd.Function):
    """The identity; `poison` is added to the first element of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, poison: float) -> torch.Tensor:
        ctx.poison = poison
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_add(0, torch.tensor([0]), torch.tensor([ctx.poison])), None


class Block(nn.Module):
    poison = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = Poison.apply(self.up.bias, self.poison)
        return x + self.down(torch.relu(nn.functional.linear(self.norm(x), self.up.weight, bias)))


class Net(nn.Module):
    """Tied embeddings, used at the beginning and, in chunks that are computed again, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        total = x.new_zeros(())
        for part, targets in zip(x[:, :-1].flatten(0, 1).split(7), ids[:, 1:].flatten().split(7), strict=True):
            total = total + checkpoint(self._loss, part, targets, use_reentrant=False)
        return total

    def _loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(x), targets, reduction="sum")


class Training:
    """Of a net under a strategy, with the optimizer within the backward pass or after it."""

    def __init__(self, name: str, within: bool, rank: int = 0, world: int = 1, sharded: bool = False) -> None:
        torch.manual_seed(0)
        begin = dict(Net().named_parameters())
        with torch.device("meta"):
            self.net = Net()
        self.rank, self.world, self.within = rank, world, within
        self.live: dict[str, nn.Parameter] = {}
        self.updates = dict.fromkeys(begin, 0)
        self.most_live = 0
        layout = Layout(rank, world, torch.device("cpu"), torch.float32)
        self.strategy = FSDP(layout, recipe.FSDP(), within) if sharded else Replicated(layout, within)

        def fill(spans: Mapping[str, Span]) -> None:
            for key, span in spans.items():
                span.data.copy_(begin[key].detach().view(-1)[span.start : span.stop])

        def make(parameters: Iterable[tuple[str, nn.Parameter]], pieces: Any) -> torch.optim.Optimizer:
            parameters = list(parameters)
            for key, parameter in parameters:
                self.live[key] = parameter
                parameter.register_post_accumulate_grad_hook(self._count)
            return optim.build(SETTINGS[name], parameters, pieces)

        self.strategy.setup(self.net, self.net.blocks, fill, make)

    def _count(self, parameter: torch.Tensor) -> None:
        """Called when a gradient is there, before the optimizer."""
        self.updates[next(name for name, other in self.live.items() if other is parameter)] += 1
        self.most_live = max(self.most_live, sum(p.numel() for p in self.live.values() if p.grad is not None))

    def step(self, number: int) -> float:
        """Returns the norm of the gradient."""
        ids = torch.randint(0, WORDS, (4, 15), generator=torch.Generator().manual_seed(number))
        self.strategy.begin(LR)
        self.strategy.backward(self.strategy.module(ids.chunk(self.world)[self.rank]) / 56, last=True)
        if self.within:
            assert all(parameter.grad is None for parameter in self.live.values())
        return self.strategy.step(None).item()

    def weights(self) -> dict[str, torch.Tensor]:
        return whole_weights(self.strategy)


def train(rank: int, world: int, name: str, within: bool, sharded: bool = False) -> tuple[dict[str, Any], list[float]]:
    made = Training(name, within, rank, world, sharded)
    norms = [made.step(number) for number in range(STEPS)]
    if within:
        assert set(made.updates.values()) == {STEPS}  # the tied one too: once, with the sum of both uses
        block = sum(p.numel() for p in made.net.blocks[0].parameters())
        rest = WORDS * WIDTH
        assert made.most_live <= (max(block, rest) if sharded else rest)
    return made.weights(), norms


def compare(found: tuple[dict[str, Any], list[float]], expected: tuple[dict[str, Any], list[float]]) -> None:
    for name, weight in expected[0].items():
        torch.testing.assert_close(found[0][name], weight, rtol=1e-5, atol=1e-5, msg=name)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_takes_the_steps_of_the_same_optimizer_after_the_backward_pass(name: str) -> None:
    after, within = train(0, 1, name, within=False), train(0, 1, name, within=True)
    assert all(torch.equal(within[0][key], weight) for key, weight in after[0].items())
    assert within[1] == pytest.approx(after[1], rel=1e-6)
    torch.manual_seed(0)
    begin = dict(Net().named_parameters())
    assert not any(torch.equal(begin[key], weight) for key, weight in after[0].items())


def on_two(rank: int, world: int) -> list[Any]:
    """With Adafactor and AdamW, whole and sharded; then what a gradient with NaN on rank 0 alone leaves unmoved."""
    cases = [(name, sharded) for name in SETTINGS for sharded in (False, True)]
    found: list[Any] = [train(rank, world, name, True, sharded) for name, sharded in cases]
    return found + [poisoned_step(Training(name, True, rank, world, sharded)) for name, sharded in cases]


def poisoned_step(made: Training) -> tuple[set[str], float]:
    """Names of the parameters that a step left as they were, all others finite, and the step's norm."""
    made.step(0)
    before = made.weights()
    made.net.blocks[2].poison = torch.nan if made.rank == 0 else 0.0
    norm = made.step(1)
    after = made.weights()
    assert all(weight.isfinite().all() for weight in after.values())
    return {name for name, weight in after.items() if torch.equal(weight, before[name])}, norm


def test_two_workers_take_the_steps_of_one_whole_or_sharded() -> None:
    expected = [train(0, 1, name, within=False) for name in SETTINGS]
    for found in run(2, on_two):
        for at in range(2):
            compare(found[2 * at], expected[at])
            compare(found[2 * at + 1], expected[at])
        for unmoved, norm in found[4:]:
            assert unmoved == {POISONED}
            assert norm != norm


@pytest.mark.parametrize("name", SETTINGS)
def test_a_gradient_that_is_not_finite_leaves_its_weight_alone(name: str) -> None:
    unmoved, norm = poisoned_step(Training(name, True))
    assert unmoved == {POISONED}
    assert norm != norm


@pytest.mark.parametrize("within", [True, False])
def test_a_strategy_that_is_let_go_of_frees_its_parameters(within: bool) -> None:
    """A process that trains one model after another has no memory for what the hooks would keep of the first."""
    with torch.device("meta"):
        net = Net()
    strategy = Replicated(Layout(0, 1, torch.device("cpu"), torch.float32), within)

    def fill(spans: Mapping[str, Span]) -> None:
        for span in spans.values():
            span.data.fill_(0.01)

    def make(parameters: Iterable[tuple[str, nn.Parameter]], pieces: Any) -> torch.optim.Optimizer:
        return optim.build(SETTINGS["adafactor"], list(parameters), pieces)

    strategy.setup(net, net.blocks, fill, make)
    strategy.begin(LR)
    strategy.backward(strategy.module(torch.arange(30).view(2, 15)) / 28, last=True)
    strategy.step(None)
    refs = [weakref.ref(parameter) for parameter in net.parameters()]
    assert len(refs) == 2 + LAYERS * 5 - 1
    del net, strategy
    gc.collect()
    assert all(ref() is None for ref in refs)
