"""What one worker builds: data → model → strategy → restore → train. The architecture on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ray_ft import paths
from ray_ft.data.counts import Counts
from ray_ft.data.identity import explain
from ray_ft.data.ledger import Ledger
from ray_ft.data.order import ORDER, Order
from ray_ft.data.prepare import Prepared, Split
from ray_ft.data.stream import Batch, ahead
from ray_ft.errors import CheckpointError
from ray_ft.model import adapt, adapter, attention, gemma3n, load, quantize, recompute
from ray_ft.model.flops import flops_per_token
from ray_ft.model.loss import decoder_layers
from ray_ft.recipe import Recipe
from ray_ft.span import Span
from ray_ft.strategy import Layout, Strategy, make
from ray_ft.train import checkpoint, objective, optim, rounding
from ray_ft.train.asks import Ask, Restart
from ray_ft.train.keeper import METRICS, Keeper
from ray_ft.train.loop import Link, train
from ray_ft.train.metrics import Meter
from ray_ft.train.saver import Saver
from ray_ft.train.schedule import total_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """A recipe with its data prepared: what every worker receives."""

    recipe: Recipe
    train: Prepared
    held_out: Prepared | None

    @property
    def splits(self) -> dict[Split, Prepared]:
        return {"train": self.train, **({"eval": self.held_out} if self.held_out else {})}

    @property
    def order(self) -> Order:
        return Order.of(self.recipe, self.train)

    def start(self, on_broken: Callable[[str, str], None] | None = None) -> checkpoint.Found | None:
        """The checkpoint to resume from. Asked once for each start: a worker cut off may still commit one later.

        Args:
            on_broken: see `checkpoint.newest`.

        Raises:
            CheckpointError: it belongs to other data or another batch size, so its position means other rows.
        """
        found = checkpoint.newest(self.recipe.run.dir.checkpoints, on_broken)
        for key, value in self.identity().items() if found else ():
            assert found is not None
            if (before := found.state.get(key)) == value:
                continue
            ways = ["train under another run.name", f"or set {key} back to continue this run"]
            what = f"{found.location} was written with {key} = {before!r}, the recipe now has {value!r}"
            if key == "data.train":
                changes = explain(self.recipe.run.storage, str(before), value)
                what = f"the data of run {self.recipe.run.name!r} changed since {found.location}: {'; '.join(changes)}"
                ways[1] = "or put the data and its settings back to continue this run"
            if key == "data.weights":
                ways.append("data.weights stands for data.train.0.weight, data.train.1.weight and so on")
            raise CheckpointError(what, ways)
        return found

    def identity(self) -> dict[str, Any]:
        """What must not change for a run to be continued, so that step, batch and weights keep their meaning."""
        adapter = self.recipe.model.adapter
        return {
            "model.path": self.recipe.model.location,
            # Of an adapter, what the shapes of its tensors do not tell.
            "model.adapter.name": adapter.name if adapter else None,
            "model.adapter.alpha": adapter.alpha if adapter else None,
            "model.quantize": self.recipe.model.quantize,
            "data.train": paths.base_name(self.train.location),
            "train.global_batch": self.recipe.train.global_batch,
            "run.seed": self.recipe.run.seed,
            "data.shuffle": self.recipe.data.shuffle,
            "data.weights": [source.weight for source in self.recipe.data.train],
            "order": ORDER,
            "data.shuffle_window": self.recipe.data.shuffle_window,
        }


#: Gives a worker its batches of steps [start, total).
BatchesFrom = Callable[[Order, int, int], Iterable[Batch]]


def run(
    job: Job,
    found: checkpoint.Found | None,
    layout: Layout,
    batches_from: BatchesFrom,
    link: Link,
) -> int:
    """Build everything, resume where the run stands, train to the end. Returns the steps finished.

    Args:
        found: what `Job.start` said, once for all workers and for who gives them their rows.

    Raises:
        Restart: the workers are wanted anew: they were asked for it, one has to go, or the checkpoint proved damaged.
    """
    recipe = job.recipe
    if layout.device.type == "cpu" and not recipe.train.in_process:
        # Without a limit every worker would start as many threads as the machine has cores.
        torch.set_num_threads(max(int(recipe.train.cpus_per_worker), 1))
    if layout.device.type == "cuda":
        torch.cuda.set_device(layout.device)  # NCCL and `torch.cuda` calls without a device mean this one

    order = job.order
    held_out = Order.once(job.held_out) if job.held_out else None
    total = total_steps(recipe, order)
    start = found.step if found else 0
    rows = found.state.get(METRICS, []) if found else []
    if start >= total:
        if layout.rank == 0:
            link.begin(start, layout.world, 0.0, rows)
        return start
    # Of dropout: other masks on each worker, and others after resuming than at the start.
    torch.manual_seed(rounding.seed_of(recipe.run.seed, start, f"worker {layout.rank}") >> 1)
    # Ray Data takes seconds to deliver its first rows; the model is built meanwhile.
    batches = ahead(batches_from(order, start, total))

    began = time.monotonic()
    built = build(recipe, layout, job.train.counts)
    strategy = built.strategy
    if layout.rank == 0:
        for line in built.lines:
            link.say(line)
    if found:
        restore(found, strategy, link)
    if layout.rank == 0:
        link.begin(start, layout.world, time.monotonic() - began, rows)

    details = {"recipe_sha256": recipe.sha256, "world_size": layout.world, **job.identity()}
    if layout.rank == 0:  # which alone writes them; the gate compares it before an export
        details[load.FINGERPRINT] = load.fingerprint(recipe.model.folder())
    with closing(
        Saver(
            recipe.run.dir.checkpoints,
            recipe.train.checkpoint.keep,
            layout.rank,
            layout.world,
            details,
            recipe.train.checkpoint.background,
            link.say,
            recipe.run.dir.at("ledger"),
            found.step if found else None,
        )
    ) as saver:
        ledger = Ledger() if recipe.data.ledger else None
        resting = not recipe.train.optimizer.in_backward
        keeper = Keeper(saver, partial(state, strategy), partial(sum_over_workers, strategy), ledger, resting)
        meter = Meter(layout, built.flops_per_token)
        finished, asked = train(
            strategy, batches, order, held_out, recipe.train, start, total, keeper, link, meter, objective.of(recipe)
        )
    if asked is Ask.GROW:
        raise Restart(f"there is room for more workers; saved at step {finished}")
    if asked is Ask.LEAVE:
        kept = f"saved at step {finished}" if saver.newest == finished else f"step {finished} could not be saved"
        raise Restart(f"a worker was told to go; {kept}", preempted=True)
    return finished


def restore(found: checkpoint.Found, strategy: Strategy, link: Link) -> None:
    """Fill the strategy from a checkpoint; one that proves damaged is set aside.

    Raises:
        Restart: it was, so the run stands elsewhere now.
    """
    damage = ""
    try:
        checkpoint.restore(found.location, state(strategy))
    except checkpoint.Damaged as error:
        damage = error.what
    rank = strategy.layout.rank
    damages = said_by_all(strategy, damage)
    if any(damages):
        why = next(text for text in damages if text)
        if rank == 0:
            if checkpoint.is_committed(found.location):
                link.say(f"set aside {checkpoint.set_aside(found.location, why)}: {why}")
            else:  # another command of this run has newer ones
                link.say(f"{found.location} was deleted meanwhile")
        said_by_all(strategy, "")  # nobody looks for the newest before it has another name
        raise Restart(f"the checkpoint of step {found.step} is damaged")
    strategy.restored()


def sum_over_workers(strategy: Strategy, values: torch.Tensor) -> torch.Tensor:
    """Of a tensor in host memory, through the device that the workers talk over."""
    return strategy.all_reduce(values.to(strategy.layout.device)).cpu()


def said_by_all(strategy: Strategy, text: str) -> list[str]:
    """What every worker said, by rank."""
    if strategy.layout.world == 1:
        return [text]
    said: list[str] = [""] * strategy.layout.world
    torch.distributed.all_gather_object(said, text)
    return said


@dataclass(frozen=True)
class Built:
    """A strategy that is ready to train; `lines` say to people what was chosen and why."""

    strategy: Strategy
    lines: list[str]
    flops_per_token: float


#: Gives a laid-out model the base's weights: (model, its folder, this worker's spans), as `load.fill`.
Fill = Callable[["PreTrainedModel", str, Mapping[str, Span]], None]


def build(recipe: Recipe, layout: Layout, counts: Counts | None = None, base: Fill = load.fill) -> Built:
    """The recipe's model, laid out over the workers, with the base's weights and a new optimizer, ready to train.

    Args:
        counts: of the training rows; labels are weighted by them.
        base: where the base's weights come from, if not from its folder.
    """
    if recipe.model.quantize:
        quantize.check(layout.device.type)
    folder = recipe.model.folder()
    config = load.load_config(folder, recipe.model.labels)
    images = recipe.data.images is not None
    chosen = attention.choose(recipe.model.attention, layout.device.type, config, layout.dtype, images=images)
    model = load.build(config, chosen.implementation)
    weights = WEIGHTS[recipe.train.optimizer.weights]
    adapted = adapt.adapt(model, recipe.model, weights, layout.dtype, images=images)
    recompute.enable(model, recipe.train.gradient_checkpointing)
    flops = flops_per_token(model)  # before a strategy cuts the parameters up
    module = objective.of(recipe).module(model, recipe, counts)

    def fill(spans: Mapping[str, Span]) -> None:
        base(model, folder, spans)
        if recipe.model.adapter:
            adapter.initialise(model, spans, recipe.run.seed)

    strategy = make(recipe, layout)
    strategy.setup(
        module,
        decoder_layers(model),
        fill,
        make_optimizer=partial(optim.build, recipe.train.optimizer, seed=recipe.run.seed),
    )
    module.train()
    lines = [*adapted.lines, f"attention: {chosen.reason}"]
    if gemma3n.lacks_tower(model):
        lines.append(f"vision_tower is not loaded: {' and '.join(gemma3n.missing())} cannot be imported")
    return Built(strategy, lines, flops)


def state(strategy: Strategy) -> dict[str, Span]:
    """What a checkpoint holds: trained parameters and the optimizer's state, by qualified name. Between steps only."""
    moments = strategy.moments()
    trained = {name for name, parameter in strategy.named_parameters() if parameter.requires_grad}
    return {
        **{f"model/{name}": span for name, span in strategy.spans().items() if name in trained},
        **{f"optim/{name}/{moment}": span for name, held in moments.items() for moment, span in held.items()},
    }
