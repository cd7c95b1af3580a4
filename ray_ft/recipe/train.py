"""Training: strategy, optimizer, schedule, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ray_ft import paths
from ray_ft.recipe.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

#: Tags of the two forms of `train.workers`, which pydantic puts into the location of an error.
FORMS = ("number", "range")
Workers = Annotated[
    Annotated[int, Field(ge=0), Tag(FORMS[0])] | Annotated[tuple[Count, Count], Tag(FORMS[1])],
    Discriminator(lambda value: FORMS[isinstance(value, list | tuple)]),
]


class Optimizer(Section):
    name: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    """AdamW (decoupled weight decay), Adafactor (factored second moments), or AdamW with 8-bit moments (GPU)."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to biases, norms and embeddings."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term added to the denominator."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Precision in which trained weights are kept; bfloat16: half the memory, updates rounded stochastically."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is there, so that only one layer's gradients exist at once."""


class Schedule(Section):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate that the decay ends at, as a share of the peak."""


class Checkpoint(Section):
    every: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Committed checkpoints that are kept."""
    background: bool = True
    """Write from a copy in host memory while training goes on; false: training waits, and no copy is needed."""


class Failures(Section):
    """What a run survives, and for how long it waits. With workers: 0 there are none to start again."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Failures in a row, without a new checkpoint between them, that are survived; 0: the first one ends the run."""
    max_preemptions: Annotated[int, Field(ge=0)] | None = None
    """Preemptions of nodes or workers that are survived, beside max_failures; null: any number."""
    hang_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 90
    """A worker that does not answer for so long is taken for dead."""
    collective_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600
    """Workers that wait for each other for longer have failed."""
    wait_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1800
    """How long a run waits for room for its workers, at the start and after losing a node."""
    grow_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60
    """Elastic runs: seconds between looks for room for more workers."""


class FSDP(Section):
    """Settings of strategy fsdp."""

    replicas: Annotated[int, Field(ge=1)] | Literal["nodes"] = 1
    """Groups of workers that each hold a whole copy in shards (HSDP); nodes: one on each node."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimizer state in host memory; the optimizer then runs on the CPU."""
    reshard_after_forward: bool | Annotated[int, Field(ge=2)] = True
    """Free a block's gathered weights after its forward pass; a number: keep them sharded over that many workers."""
    prefetch: Annotated[int, Field(ge=0)] = 0
    """Blocks whose gathering is started ahead; 0: PyTorch's own choice, the next one."""


class Zero(Section):
    """Settings of strategies zero1, zero2 and zero3."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state and float32 weights are kept; none: on the GPU."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters are kept between uses (zero3 only); none: on the GPU."""
    nvme_path: str | None = None
    """Local folder of each node for what is offloaded to nvme."""
    config: str | None = None
    """Your own DeepSpeed JSON; the recipe fills in what it leaves out, and refuses what contradicts the recipe."""

    @field_validator("config")
    @classmethod
    def _absolute(cls, config: str | None) -> str | None:
        return paths.absolute(config) if config else None

    @model_validator(mode="after")
    def _nvme_has_a_place(self) -> Zero:
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
            raise ValueError("offloading to nvme needs nvme_path: a folder on each node's local disk")
        return self


class Preference(Section):
    """Settings of preference tuning, which the format of the data's sources (preference) asks for."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO's logistic loss; hinge: SLiC's; ipo: a square, which does not push margins without end."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """How closely the model is held to the reference: larger, more closely. For ipo the regularisation τ."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose answers are taken to stand the wrong way round (sigmoid only)."""

    @model_validator(mode="after")
    def _smooths_labels_of_a_likelihood(self) -> Preference:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing: {self.label_smoothing} is for loss: sigmoid, and loss is {self.loss}; set "
                "label_smoothing: 0, or loss: sigmoid"
            )
        return self


class Train(Section):
    strategy: Literal["fsdp", "zero1", "zero2", "zero3", "none"] = "fsdp"
    """fsdp: parameters, gradients and optimizer sharded over the workers (FSDP2); zero1, zero2, zero3: DeepSpeed, which
    shards the optimizer, gradients too, parameters too; none: replicated on each worker."""
    workers: Workers = 1
    """Ray Train workers, one device each. [min, max]: elastic, as many as there is room for, with one global batch.
    0: in this process, without Ray and without sharding, for a debugger."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs, or may come to have some."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that each worker reserves; also its number of compute threads on CPU."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs; each takes `weight` passes over each source."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps to train, in place of epochs."""
    global_batch: Annotated[int, Field(ge=1)] = 16
    """Rows of seq_len tokens in one optimizer step, over all workers."""
    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Rows in one forward pass on one worker."""
    fsdp: FSDP = FSDP()
    zero: Zero = Zero()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    gradient_checkpointing: bool | Annotated[float, Field(gt=0, lt=1)] = False
    """Recompute each layer in the backward pass instead of keeping its activations; a number: only that share of the
    language model's layers, the first ones, so that the memory that is left saves time."""
    loss_chunk: Annotated[int, Field(ge=1)] = 1024
    """Target tokens whose logits exist at once; the rest of the vocabulary × sequence never materialises."""
    preference: Preference = Preference()
    class_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | Literal["balanced"] | None = None
    """Of labels: by how much each counts in the training's loss, 1 where not named; balanced: all labels alike, however
    many rows each has. Only their ratios matter: over the training rows they are made to average 1."""
    eval_every: Annotated[int, Field(ge=1)] | Literal["epoch"] | None = None
    """Steps between evaluations on data.eval; epoch: after each; null: only after the last step."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint: Checkpoint = Checkpoint()
    failures: Failures = Failures()

    @property
    def in_process(self) -> bool:
        """Whether the run has no workers and needs no Ray."""
        return self.workers == 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have, ascending: those of a range that share the batch evenly."""
        if isinstance(self.workers, int):
            return (max(self.workers, 1),)
        low, high = self.workers
        return tuple(n for n in range(low, high + 1) if self.global_batch % (self.micro_batch * n) == 0)

    @property
    def world_size(self) -> int:
        """Workers, as many as the run may have."""
        return self.sizes[-1]

    @property
    def accumulation(self) -> int:
        """Forward passes of one worker per optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    @property
    def rows_per_worker(self) -> int:
        """Rows of one worker per optimizer step."""
        return self.global_batch // self.world_size

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        if isinstance(self.workers, tuple):
            low, high = self.workers
            if low > high:
                raise ValueError(
                    f"workers: [{low}, {high}] is [min, max], and min is the larger; write [{high}, {low}]"
                )
            if not self.sizes:
                raise ValueError(
                    f"no number of workers from {low} to {high} shares global_batch: {self.global_batch} evenly in "
                    f"micro-batches of {self.micro_batch}; change global_batch or micro_batch, or widen workers"
                )
            return self
        unit = self.micro_batch * self.world_size
        if self.global_batch % unit:
            below, above = self.global_batch // unit * unit, -(-self.global_batch // unit) * unit
            per_worker = self.global_batch // self.world_size if self.global_batch % self.world_size == 0 else 0
            micro = [m for m in range(1, per_worker + 1) if per_worker % m == 0]
            nearest = " or ".join(str(v) for v in (below, above) if v)
            ways = f"nearest valid global_batch: {nearest}"
            if micro:
                ways += f"; or keep it with micro_batch: {min(micro, key=lambda m: abs(m - self.micro_batch))}"
            raise ValueError(
                f"accumulation = global_batch ÷ (micro_batch × workers) = {self.global_batch} ÷ "
                f"({self.micro_batch} × {self.world_size}) is not a whole number; {ways}"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_this_strategy(self) -> Train:
        # A setting that nothing reads would look as if it had an effect.
        if self.zero != Zero() and not self.strategy.startswith("zero"):
            raise ValueError(
                f"zero: is read by zero1, zero2 and zero3, and strategy is {self.strategy}; remove it (train.zero={{}})"
            )
        if self.fsdp != FSDP() and self.strategy != "fsdp":
            raise ValueError(
                f"fsdp: is read by strategy fsdp, and strategy is {self.strategy}; remove it (train.fsdp={{}})"
            )
        if self.zero.offload_parameters != "none" and self.strategy != "zero3":
            raise ValueError(
                f"zero.offload_parameters: {self.zero.offload_parameters} needs sharded parameters, and strategy is "
                f"{self.strategy}; set strategy: zero3, or offload_parameters: none"
            )
        replicas = self.fsdp.replicas
        for workers in () if self.in_process or not isinstance(replicas, int) else self.sizes:
            assert isinstance(replicas, int)
            if workers % replicas:
                raise ValueError(f"fsdp.replicas: {replicas} does not divide workers: {workers}")
            size, group = self.fsdp.reshard_after_forward, workers // replicas
            if not isinstance(size, bool) and group % size:
                raise ValueError(f"fsdp.reshard_after_forward: {size} does not divide a group of {group} workers")
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Train:
        optimizer = self.optimizer
        if optimizer.weights == "bfloat16" and optimizer.name == "adamw":
            raise ValueError(
                "optimizer.weights: bfloat16 needs an optimizer that rounds stochastically; "
                "set optimizer.name: adafactor or adamw_8bit, or weights: float32"
            )
        if self.strategy.startswith("zero"):
            # DeepSpeed owns its flat float32 copy of the weights and updates it after the backward pass.
            for key, value, other in (
                ("weights", optimizer.weights, "float32"),
                ("in_backward", optimizer.in_backward, False),
                ("name", optimizer.name if optimizer.name == "adamw_8bit" else "", ""),
            ):
                if value != other:
                    raise ValueError(
                        f"optimizer.{key}: {value} is for strategy fsdp and none, and strategy is {self.strategy}; "
                        "set strategy: fsdp, or leave it out"
                    )
        if optimizer.in_backward:
            accumulating = self.global_batch // (self.micro_batch * self.sizes[0])
            if self.clip_norm is not None:
                raise ValueError(
                    f"optimizer.in_backward updates before the whole gradient's norm is known, and clip_norm is "
                    f"{self.clip_norm}; set clip_norm: null (adafactor clips each update itself), or in_backward: false"
                )
            if accumulating > 1:
                raise ValueError(
                    f"optimizer.in_backward updates in every backward pass, and a step has {accumulating}; "
                    f"set micro_batch: {self.global_batch // self.sizes[0]}, or in_backward: false"
                )
        return self
