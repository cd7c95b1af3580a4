"""What each part takes on one GPU and in one machine's memory, at each phase of a step; the fullest phase decides.

Sizes of shards are exact: FSDP2 cuts dimension 0 into equal chunks and pads the last, ZeRO-3 cuts the flattened
parameter. Activations come from `trace`. Limits: the fullest worker is reckoned with; every token of a row is taken to
be a target; what libraries hold for themselves are the constants in gpus.yaml.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ray_ft.model import recompute
from ray_ft.plan import optimizer
from ray_ft.plan.cut import FP32, Cut
from ray_ft.plan.fleet import GIB, Constants, Fleet
from ray_ft.plan.shapes import ROOT, Parameter, Shapes
from ray_ft.plan.trace import Numbers, Trace, Tracer
from ray_ft.recipe import Recipe, Train
from ray_ft.train import objective

Parts = dict[str, float]

WEIGHTS, MASTER, GATHERED = "weights", "weights in float32", "gathered weights"
GRADIENTS, REDUCING, OPTIMIZER = "gradients", "gradients being summed", "optimizer"
ACTIVATIONS, LOGITS, BUFFERS = "activations", "logits", "buffers"
CONTEXT, NCCL, SLACK = "CUDA context, workspaces", "NCCL", "allocator slack"
COPY = "checkpoint's copy"  # in host memory alone
#: In the order of reports.
PARTS = (
    WEIGHTS,
    MASTER,
    GATHERED,
    GRADIENTS,
    REDUCING,
    OPTIMIZER,
    ACTIVATIONS,
    LOGITS,
    BUFFERS,
    CONTEXT,
    NCCL,
    SLACK,
)
BEFORE = "asking the base before training"  # a phase of preference tuning of whole weights
MARGIN = 0.05  # of a GPU that is left free by settings that are recommended
ZERO_BUCKET = 100_000_000  # elements; what ray_ft.strategy.zero_config sets for buckets and sub-groups


@dataclass(frozen=True)
class Memory:
    """Bytes. `phases`: phase of a step → parts on one GPU; `host`: parts in the memory of one machine."""

    phases: dict[str, Parts]
    host: Parts
    gpu_limit: float
    host_limit: float

    @property
    def fullest(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> Parts:
        """Of the fullest phase, in the order of reports."""
        return self.phases[self.fullest]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu_limit and self.host_total <= self.host_limit

    @property
    def fits_well(self) -> bool:
        """With room for what the estimate may lack."""
        return self.total <= (1 - MARGIN) * self.gpu_limit and self.host_total <= self.host_limit


def estimate(
    shapes: Shapes, tracer: Tracer, recipe: Recipe, fleet: Fleet | None = None, constants: Constants | None = None
) -> Memory:
    """Memory of the recipe on a fleet; without one, on CPU: of what a step allocates alone.

    Args:
        shapes: read with the recipe's settings of model, optimizer and strategy.
    """
    train = recipe.train
    compute = torch.bfloat16 if shapes.compute == 2 else torch.float32
    kept = next((p.itemsize for p in shapes.parameters if p.trained), shapes.compute)
    # FSDP and ZeRO compute with copies in the precision of the computation; without sharding autocast makes them.
    trained = (torch.float32 if kept == FP32 else torch.bfloat16) if train.strategy == "none" else compute
    setting = train.gradient_checkpointing
    numbers = Numbers(compute, trained, bool(setting))
    # Of layers that are recomputed, and of the others.
    first, others = (
        tracer.activations(Numbers(compute, trained, checkpointing), train.micro_batch)
        for checkpointing in (bool(setting), setting is True)
    )
    tokens = train.micro_batch * recipe.data.seq_len
    step = _Step(
        shapes,
        train,
        Cut.of(train, fleet.nodes if fleet else 1),
        first,
        others,
        tracer.loss(numbers, tokens, train.loss_chunk),
    )
    phases = dict(step.phases())
    if fleet is None:
        return Memory(phases, dict(step.host), float("inf"), float("inf"))
    assert constants is not None
    if recipe.data.task == "preference" and objective.reference_of(recipe) == "rows":
        phases[BEFORE] = dict(step.base_alone())
    for parts in phases.values():
        parts[CONTEXT] = (constants.context_gib + constants.workspace_gib) * GIB
        parts[NCCL] = constants.nccl_gib * GIB if train.world_size > 1 else 0.0
        parts[SLACK] = constants.slack * sum(parts[part] for part in parts if part not in (CONTEXT, NCCL))
    host = {part: size * fleet.gpus_per_node for part, size in step.host.items()}
    if train.checkpoint.background:
        # Without sharding one worker of the whole run has it all; no machine has more than that.
        copies = 1 if train.strategy == "none" else fleet.gpus_per_node
        host[COPY] = checkpointed(shapes, train, step.cut) * copies
    host["workers' processes"] = constants.host_process_gib * GIB * fleet.gpus_per_node
    host["system, Ray"] = constants.host_node_gib * GIB
    limit = fleet.gpu.host_gib * fleet.gpus_per_node * constants.host_usable * GIB
    return Memory(phases, host, fleet.gpu.memory_gib * GIB, limit)


def standing(shapes: Shapes, train: Train, cut: Cut) -> tuple[Parts, Parts]:
    """Weights and optimizer: what is there all the time. Parts on the GPU, and in host memory for one worker."""
    on_gpu: Parts = {}
    host: Parts = {}
    trained = [p for p in shapes.parameters if p.trained]
    weights = sum(p.nbytes if p.quantized else cut.largest(p) * p.itemsize for p in shapes.parameters)
    state = optimizer.state(train.optimizer, trained, [cut.share(p) for p in trained])
    # In float32 ZeRO-3 updates the partitions that it computes with; else it has the trained weights a second time.
    apart = train.strategy in ("zero1", "zero2") or (train.strategy == "zero3" and shapes.compute != FP32)
    master = sum(cut.share(p) for p in trained) * FP32 if apart else 0.0
    for part, size, place in (
        (WEIGHTS, weights, "cpu" if train.fsdp.cpu_offload else train.zero.offload_parameters),
        (OPTIMIZER, state, "cpu" if train.fsdp.cpu_offload else train.zero.offload_optimizer),
        (MASTER, master, train.zero.offload_optimizer),
    ):
        if place != "nvme":
            (host if place == "cpu" else on_gpu)[part] = size
    return on_gpu, host


def checkpointed(shapes: Shapes, train: Train, cut: Cut) -> float:
    """Bytes that one worker writes into a checkpoint, and copies first: trained weights and the optimizer's state.

    ZeRO saves its float32 weights; 8-bit moments are saved in float32.
    """
    trained = [p for p in shapes.parameters if p.trained]
    zero = train.strategy.startswith("zero")
    weights = sum(cut.share(p) * (FP32 if zero else p.itemsize) for p in trained)
    saved = train.optimizer
    if saved.name == "adamw_8bit":
        saved = saved.model_copy(update={"name": "adamw"})
    return weights + optimizer.state(saved, trained, [cut.share(p) for p in trained])


def could_fit(shapes: Shapes, recipe: Recipe, fleet: Fleet) -> bool:
    """Whether weights and optimizer alone leave any room: known without tracing a layer."""
    on_gpu, _ = standing(shapes, recipe.train, Cut.of(recipe.train, fleet.nodes))
    return sum(on_gpu.values()) < fleet.gpu.memory_gib * GIB


@dataclass
class _Step:
    """One step of training on the fullest worker, phase by phase.

    `trace` is of layers as the first ones are run, `others` as those behind the share that is recomputed.
    """

    shapes: Shapes
    train: Train
    cut: Cut
    trace: Trace
    others: Trace
    loss: tuple[float, float]

    def __post_init__(self) -> None:
        shapes, cut = self.shapes, self.cut
        self.compute = shapes.compute
        self.text = shapes.text_blocks
        self.root = shapes.group(ROOT)
        self.groups = {index: shapes.group(index) for index in self.text}
        self.trained = [p for p in shapes.parameters if p.trained]
        head, embedding = (shapes.named(name) for name in shapes.head)
        self.head_gradient = head.numel if head.trained else 0
        self.embedding_gradient = embedding.numel if embedding.trained else 0
        again = recompute.recomputed(len(self.text), self.train.gradient_checkpointing)
        self.blocks = [
            (self.trace if at < again else self.others).blocks[shapes.blocks[index]]
            for at, index in enumerate(self.text)
        ]
        self.later = [0.0, *itertools.accumulate(block.kept_later for block in self.blocks)]
        self.now = [0.0, *itertools.accumulate(block.kept for block in self.blocks)]
        self.accumulates = self.train.accumulation > 1
        self.unpacked = max((p.numel for p in shapes.parameters if p.quantized), default=0) * self.compute
        self.base, self.host = standing(shapes, self.train, cut)
        self.base[BUFFERS] = shapes.buffers
        self.buckets = 0.0
        if cut.strategy.startswith("zero"):
            # In float32; two where summing overlaps with the backward pass. ZeRO-3 keeps them between steps.
            bucket = min(ZERO_BUCKET, sum(p.numel for p in self.trained)) * FP32
            self.buckets = bucket * (1 if cut.strategy == "zero1" else 2)
        if cut.strategy == "zero3":
            self.base[REDUCING], self.buckets = self.buckets, 0.0
        if self._gradients_on_host and not self.train.optimizer.in_backward:
            self.host[GRADIENTS] = sum(map(self._gradient, self.trained))

    # --------------------------------------------------------------------------------------------------- gradients

    @property
    def _gradients_on_host(self) -> bool:
        return self.train.fsdp.cpu_offload or self.train.zero.offload_optimizer != "none"

    def _gradient(self, parameter: Parameter) -> float:
        """Bytes of a parameter's gradient as it is added up over a step."""
        if not parameter.trained:
            return 0.0
        cut = self.cut
        if cut.strategy == "zero1":
            return parameter.numel * FP32
        return cut.share(parameter) * (FP32 if cut.strategy.startswith("zero") else parameter.itemsize)

    def _gradients(self, parameters: Iterable[Parameter]) -> float:
        if self._gradients_on_host or self.train.optimizer.in_backward:
            return 0.0
        return sum(map(self._gradient, parameters))

    def _before(self) -> float:
        """Gradients of the micro-batches before this one."""
        # Allocated once: ZeRO-3's buffer, and ZeRO-1's sums where they are not of the gradients' own precision.
        constant = self.cut.strategy == "zero3" or (self.cut.strategy == "zero1" and self.compute != FP32)
        return self._gradients(self.trained) if self.accumulates or constant else 0.0

    # -------------------------------------------------------------------------------------------------------- phases

    def base_alone(self) -> Iterator[tuple[str, float]]:
        """Parts on a GPU that holds the whole base and computes forwards alone, as `ray_ft.train.references` does."""
        yield WEIGHTS, self.compute * sum(p.numel for p in self.shapes.parameters if not p.adapter)
        yield ACTIVATIONS, self.trace.before + max(block.forward for block in self.blocks)
        yield LOGITS, self.loss[0]
        yield BUFFERS, self.shapes.buffers

    def phases(self) -> Iterator[tuple[str, Parts]]:
        """The fullest moment of each phase. Parts on the GPU."""
        moments: dict[str, list[Parts]] = {
            "forward pass": list(self._forward()),
            "loss": list(self._loss()),
            "backward pass": list(self._backward()),
            "end of the backward pass": list(self._end()),
            "optimizer's step": list(self._update()),
        }
        for phase, found in moments.items():
            fullest = max(found, key=lambda parts: sum(parts.values()))
            yield phase, {part: fullest[part] for part in PARTS if fullest.get(part)}

    def _with(self, **more: float) -> Parts:
        names = {"gathered": GATHERED, "gradients": GRADIENTS, "reducing": REDUCING, "optimizer": OPTIMIZER}
        names |= {"activations": ACTIVATIONS, "logits": LOGITS}
        parts = dict(self.base)
        for name, size in more.items():
            parts[names[name]] = parts.get(names[name], 0.0) + size
        return parts

    def _unsharded(self, index: int) -> float:
        """Bytes of a block's gathered weights; 0 where they are never apart from the kept ones."""
        if self.cut.strategy not in ("fsdp", "zero3"):
            return 0.0
        return self.cut.unsharded(self.root if index == ROOT else self.groups[index]) * self.compute

    def _in_flight(self, index: int) -> float:
        """Bytes of the message in which a block's weights arrive, before they are copied to their places."""
        return self._unsharded(index) if self.cut.shards > 1 else 0.0

    def _stays(self, blocks: Iterable[int]) -> float:
        """Bytes of gathered weights that stay with blocks from the forward to the backward pass."""
        setting = self.train.fsdp.reshard_after_forward
        if setting is True or self.cut.strategy != "fsdp":
            return 0.0
        return sum(map(self._unsharded, blocks)) / (setting or 1)

    def _forward(self) -> Iterator[Parts]:
        root, before = self._unsharded(ROOT), self._before()
        first = self._in_flight(ROOT) + self._in_flight(self.text[0])
        yield self._with(gathered=root + first, gradients=before, activations=self.trace.before)
        for at, index in enumerate(self.text):
            gathered = root + self._unsharded(index) + self._in_flight(index) + self._stays(self.text[:at])
            activations = self.trace.before + self.now[at] + self.blocks[at].forward + self.unpacked
            yield self._with(gathered=gathered, gradients=before, activations=activations)

    def _loss(self) -> Iterator[Parts]:
        gathered = self._unsharded(ROOT) + self._in_flight(self.text[-1]) + self._stays(self.text)
        before = self._before()
        around = self.trace.before + self.others.after
        for kept, logits in zip((self.now[-1], self.later[-1]), self.loss, strict=True):
            yield self._with(gathered=gathered, gradients=before, activations=around + kept, logits=logits)

    def _backward(self) -> Iterator[Parts]:
        """Blocks from the last to the first: activations go, gradients come."""
        root, summed = self._unsharded(ROOT), self.cut.strategy == "fsdp"
        waiting = self.head_gradient * self._gradient_itemsize  # until the embedding's own gradient is added to it
        message, arrived = self.buckets, 0.0
        for at in reversed(range(len(self.text))):
            index, block = self.text[at], self.blocks[at]
            ahead = sum(map(self._in_flight, self.text[max(at - max(self.train.fsdp.prefetch, 1), 0) : at]))
            stays = self._stays(self.text[:at])
            gathered, before = root + self._unsharded(index) + ahead + stays, self._before() or arrived
            if self.cut.strategy == "zero3":
                gathered += self._unsharded(index)  # DeepSpeed keeps the last block beside the next
            kept = self.trace.before + self.later[at + 1] + self.unpacked
            held = self.cut.shards > 1 or summed or not self.accumulates
            own = block.backward_held if held else block.backward
            mine, updating = [p for p in self.groups[index] if p.trained], 0.0
            if self.train.optimizer.in_backward and not summed:
                own, updating = block.backward, self._scratch(mine)
            yield self._with(
                gathered=gathered,
                gradients=before + waiting,
                reducing=message,
                optimizer=updating,
                activations=kept + max(own, 0.0),
            )
            arrived += self._gradients(mine)
            if summed and mine:
                message, extra = self._summing(mine)
                yield self._with(
                    gathered=root + ahead + stays,
                    gradients=(self._before() or arrived) + waiting,
                    reducing=message + extra,
                    activations=self.trace.before + self.later[at],
                )
        self._message, self._arrived, self._waiting = message, arrived, waiting

    @property
    def _gradient_itemsize(self) -> int:
        """Of a gradient as autograd hands it on: that of what the parameter is computed with."""
        if self.cut.strategy == "none":
            return next((p.itemsize for p in self.trained), self.compute)
        return self.compute

    def _summing(self, parameters: list[Parameter]) -> tuple[float, float]:
        """Bytes of FSDP's sum of gradients: the message, which stays until the next one, and what goes at once."""
        message = self.cut.unsharded(parameters) * FP32
        result = message / self.cut.shards
        lowered = any(p.itemsize != FP32 for p in parameters) or self._gradients_on_host
        arrives = self.train.optimizer.in_backward or self.accumulates or lowered  # else it is the gradient
        own = sum(p.numel for p in parameters) * self.compute  # copied into the message, then freed
        alone = message if self.cut.shards == 1 else 0.0  # one worker divides it by 1, out of place
        updating = 0.0
        if self.train.optimizer.in_backward:
            updating = sum(map(self.cut.share, parameters)) * parameters[0].itemsize + self._scratch(parameters)
        return message, max(own, (result if arrives else 0.0) + alone, updating)

    def _end(self) -> Iterator[Parts]:
        """The embedding's gradient, which comes last, and the sums of all that is in no block."""
        mine = [p for p in self.root if p.trained]
        two = (self.head_gradient + self.embedding_gradient) * self._gradient_itemsize
        gradients = (self._before() or self._arrived) + two
        if self.cut.strategy == "fsdp":
            root = self._unsharded(ROOT)
            yield self._with(gathered=root, gradients=gradients, reducing=self._message, activations=self.trace.before)
            if mine:
                message, extra = self._summing(mine)
                done = self._before() or self._gradients(self.trained)
                yield self._with(gradients=done, reducing=message + extra)
            return
        # DeepSpeed casts what it sums to float32, one parameter larger than a bucket at a time.
        cast = max((p.numel for p in mine), default=0) * FP32 if self.cut.strategy.startswith("zero") else 0.0
        updating = self._scratch(mine) if self.train.optimizer.in_backward else 0.0
        yield self._with(
            gathered=self._unsharded(ROOT),
            gradients=gradients,
            reducing=cast + self.buckets,
            optimizer=updating,
            activations=self.trace.before,
        )

    def _scratch(self, parameters: list[Parameter]) -> float:
        return optimizer.scratch(self.train.optimizer, parameters, [self.cut.share(p) for p in parameters])

    def _update(self) -> Iterator[Parts]:
        if self.train.fsdp.cpu_offload or self.train.zero.offload_optimizer != "none":
            yield self._with()
            return
        shares = [self.cut.share(p) for p in self.trained]
        gradients = self._gradients(self.trained)
        if self.cut.strategy in ("zero1", "zero2"):
            gradients += sum(shares) * FP32  # flattened for the optimizer beside what it was flattened from
        if self.cut.strategy == "zero3":
            gradients += min(max(ZERO_BUCKET, max(shares)), sum(shares)) * FP32
        yield self._with(gradients=gradients, optimizer=self._scratch(self.trained))
