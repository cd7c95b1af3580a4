"""How long a step takes, and what a run costs: arithmetic at an assumed utilisation, against what has to be sent.

Limits: rows are taken to be full of tokens; the utilisation is an assumption (gpus.yaml) and the same for every size of
micro-batch; nothing is counted for reading data, evaluating and saving. Read it as an estimate within a factor of 1.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ray_ft.plan.cut import FP32, Cut
from ray_ft.plan.fleet import Constants, Fleet, Prices
from ray_ft.plan.shapes import ROOT, Shapes
from ray_ft.recipe import Recipe, Train
from ray_ft.train import objective

#: Bytes that an update reads and writes per element: gradient, weight twice, moments twice.
_TOUCHED = {"adamw": 4 + 8 + 16, "adamw_8bit": 4 + 8 + 4, "adafactor": 3 * 4 + 8}


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step, in seconds.

    Attributes:
        compute: of matrix products, recomputation included; `communication`: of all that is sent; `update`: of the
            optimizer. Where sending overlaps with computing the longer of the two counts; of what copies of the model
            sum between them, what the last backward pass does not cover.
        mfu: share of the GPUs' peak as metrics.jsonl counts it: without attention scores and recomputation.
    """

    tokens_per_second: float
    step: float
    compute: float
    communication: float
    update: float
    mfu: float

    def hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 3600


def estimate(shapes: Shapes, recipe: Recipe, fleet: Fleet, prices: Prices) -> Speed:
    """Speed of the recipe, whose workers are the fleet's GPUs."""
    train = recipe.train
    tokens = train.global_batch * recipe.data.seq_len
    world = train.world_size
    scores = attention_flops(shapes, recipe.data.seq_len)
    useful = shapes.text_flops + 3 * scores
    passes = float(train.gradient_checkpointing) + asks_twice(recipe)  # forwards, beside the one that learns
    again = passes * (2 * shapes.text_weights + scores)
    factor = prices.utilisation.get(train.strategy, 1.0)
    if recipe.model.quantize:
        factor *= prices.utilisation.get(recipe.model.quantize, 1.0)
    peak = fleet.gpu.bf16_tflops * 1e12
    compute = tokens / world * (useful + again) / (peak * fleet.gpu.utilisation * factor)
    sent = _Sent(shapes, train, Cut.of(train, fleet.nodes), fleet, prices.constants, asks_twice(recipe))
    hidden, exposed, between = sent.while_computing(), sent.after(), sent.between_copies()
    forwards = (1 + asks_twice(recipe)) * (2 * shapes.text_weights + scores)
    backwards = 1 - forwards / (useful + again)
    covered = backwards / train.accumulation * sent.left_for_copies(compute, hidden)
    update = sent.update()
    step = max(compute, hidden) + max(between - covered, between * sent.ends_with()) + exposed + update
    return Speed(
        tokens / step,
        step,
        compute,
        hidden + between + exposed,
        update,
        tokens * shapes.text_flops / step / (peak * world),
    )


def asks_twice(recipe: Recipe) -> bool:
    """Whether every step has a second forward pass, in which preference tuning switches the adapter off."""
    return recipe.data.task == "preference" and objective.reference_of(recipe) == "adapter off"


def attention_flops(shapes: Shapes, seq_len: int) -> float:
    """FLOPs per token of attention scores and their sums, forwards."""
    return score_flops(shapes.attention, seq_len)


def score_flops(attention: Iterable[tuple[int, int]], seq_len: int) -> float:
    """The same of layers as `Shapes.attention` has them: 4 × width × places attended to, on average."""
    total = 0.0
    for window, width in attention:
        places = window - window * (window - 1) / (2 * seq_len)  # the first of a row have fewer behind them
        total += 4 * width * places
    return total


@dataclass(frozen=True)
class _Sent:
    """Seconds of sending, per step."""

    shapes: Shapes
    train: Train
    cut: Cut
    fleet: Fleet
    constants: Constants
    twice: bool

    def while_computing(self) -> float:
        """What is gathered and summed block by block while other blocks compute."""
        train, shapes, cut = self.train, self.shapes, self.cut
        if cut.strategy == "zero2":
            return train.accumulation * self._ring(self._trained() * FP32, cut.world)
        if cut.strategy not in ("fsdp", "zero3"):
            return 0.0
        root = cut.unsharded(shapes.group(ROOT)) * shapes.compute
        blocks = sum(cut.unsharded(shapes.group(index)) for index in shapes.text_blocks) * shapes.compute
        times = 1 if train.fsdp.reshard_after_forward is False else 2 + self.twice  # once for each pass
        seconds = self._ring(root + times * blocks + self._trained() * FP32, cut.shards)
        if train.fsdp.cpu_offload or train.zero.offload_parameters != "none":
            there = 2 * sum(cut.largest(p) * p.itemsize for p in shapes.parameters)
            slowest = self.constants.nvme_gbps if train.zero.offload_parameters == "nvme" else self.fleet.gpu.pcie_gbps
            seconds += there / (slowest * 1e9)
        if self._gradients_leave:
            seconds += self._trained() / cut.shares * FP32 / (self.fleet.gpu.pcie_gbps * 1e9)
        return seconds * train.accumulation

    @property
    def _gradients_leave(self) -> bool:
        return self.train.fsdp.cpu_offload or self.train.zero.offload_optimizer != "none"

    def after(self) -> float:
        """What is summed or gathered once per step, when nothing computes."""
        cut, trained = self.cut, self._trained()
        if cut.strategy in ("none", "zero1", "zero2"):
            summed = 0.0 if cut.strategy == "zero2" else 2 * self._ring(trained * FP32, cut.world)
            spread = 0.0 if cut.strategy == "none" else self._ring(trained * self.shapes.compute, cut.world)
            return summed + spread
        return 0.0

    def between_copies(self) -> float:
        """The all-reduce of each shard's gradients between the copies of the model (HSDP), once per step.

        FSDP2 starts a block's on a stream of its own once the block's gradients are summed within the copy, in the last
        backward pass of a step, and waits for all of them only at the end of that pass (torch 2.13,
        distributed/fsdp/_fully_shard: `foreach_reduce`, `FSDPParamGroup.finalize_backward`).
        """
        cut = self.cut
        groups = cut.world // cut.shards
        if cut.strategy != "fsdp" or groups == 1:
            return 0.0
        between = self.fleet.gpu.network_gbps if self.fleet.nodes > 1 else self.fleet.gpu.link_gbps
        return 2 * (groups - 1) / groups * self._trained() / cut.shards * FP32 / (between * 1e9)

    def left_for_copies(self, compute: float, hidden: float) -> float:
        """Seconds of a step's passes in which the copies could sum: all of them where a copy lies within a node, whose
        gathering leaves the network alone; else those in which nothing is gathered."""
        if self.fleet.nodes > 1 and self.cut.shards <= self.fleet.gpus_per_node:
            return max(compute, hidden)
        return max(compute - hidden, 0.0)

    def ends_with(self) -> float:
        """Share of the trained elements whose gradients come last, behind which nothing computes."""
        shapes = self.shapes
        trained = lambda index: sum(p.numel for p in shapes.group(index) if p.trained)  # noqa: E731
        last = trained(ROOT) or next(filter(None, map(trained, shapes.text_blocks)), 0)
        return last / max(self._trained(), 1)

    def update(self) -> float:
        share = sum(self.cut.share(p) for p in self.shapes.parameters if p.trained)
        touched = share * _TOUCHED[self.train.optimizer.name]
        if not self._gradients_leave:
            return touched / (self.fleet.gpu.memory_gbps * 1e9)
        seconds = touched / (self.constants.host_gbps * 1e9)
        if self.train.zero.offload_optimizer == "nvme":
            seconds += 2 * share * 3 * FP32 / (self.constants.nvme_gbps * 1e9)
        return seconds

    def _trained(self) -> int:
        return sum(p.numel for p in self.shapes.parameters if p.trained)

    def _ring(self, size: float, workers: int) -> float:
        """Seconds in which `workers` gather, or sum into shards, `size` bytes; within and between nodes at once.

        In a ring each worker sends (workers - 1) / workers of all bytes to the next (Patarasuk & Yuan 2009, doi
        10.1016/j.jpdc.2008.09.002), also where the next is on another node. NCCL spreads the bytes over as many rings
        as a node has GPUs with a way to the network, each of which leaves the node by another one.
        """
        if workers == 1:
            return 0.0
        gpu, per_node = self.fleet.gpu, self.fleet.gpus_per_node
        each = size * (workers - 1) / workers
        within = each / (gpu.link_gbps * 1e9) if per_node > 1 else 0.0
        between = each / (gpu.network_gbps * 1e9 * per_node) if workers > per_node else 0.0
        return max(within, between)
