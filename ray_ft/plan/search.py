"""The cheapest setting that fits, and what to change where none does. Every answer has been planned itself.

Searched are only settings that leave the result of training as it is: strategy, micro-batch, checkpointing, offloading,
replicas. What changes the result (optimizer, adapters, sequence length) is proposed where nothing fits otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray_ft.errors import RecipeError
from ray_ft.plan.fleet import Fleet
from ray_ft.plan.planner import Plan, Planner
from ray_ft.recipe import FSDP, Recipe, Zero

MICRO_BATCHES = (1, 2, 4, 8, 16)
MOST_NODES = 16

_OFFLOAD = "train.zero.offload_optimizer=cpu"
_VARIANTS = (
    ("none",),
    ("fsdp",),
    ("fsdp", "train.fsdp.replicas=nodes"),
    ("fsdp", "train.fsdp.cpu_offload=true"),
    ("zero1",),
    ("zero2",),
    ("zero3",),
    ("zero2", _OFFLOAD),
    ("zero3", _OFFLOAD),
    ("zero3", _OFFLOAD, "train.zero.offload_parameters=cpu"),
)


@dataclass(frozen=True)
class Way:
    """A change after which the recipe fits. `says`: the change in words; `options`: of the command line, if any."""

    says: str
    plan: Plan
    options: str = ""


def cheapest(planner: Planner, fleet: Fleet, changes: Sequence[str] = ()) -> list[Plan]:
    """The best setting of each strategy that fits the fleet, the fastest first: on a given fleet time is money.

    Args:
        changes: overrides that come before those of the settings.
    """
    best = []
    for strategy, *settings in _VARIANTS:
        if _pointless(planner.recipe, strategy, settings, fleet):
            continue
        overrides = [*changes, *_reset(planner.recipe), f"train.strategy={strategy}", *settings]
        found = list(_fitting(planner, fleet, overrides))
        if found:
            best.append(min(found, key=_rank))
    return sorted(best, key=_rank)


def _rank(plan: Plan) -> tuple[float, float]:
    # Of settings that are equally fast, to 1%, the one that leaves most room.
    return -round(math.log(plan.speed.tokens_per_second), 2), plan.memory.total


def _fitting(planner: Planner, fleet: Fleet, overrides: Sequence[str]) -> Iterator[Plan]:
    for checkpointing in ("false", "true"):
        for micro in MICRO_BATCHES:
            setting = [*overrides, f"train.micro_batch={micro}", f"train.gradient_checkpointing={checkpointing}"]
            try:
                if not planner.could_fit(fleet, setting):
                    return
                plan = planner.plan(fleet, setting)
            except RecipeError:
                continue  # settings that do not go together, or rows that do not divide
            if not plan.memory.fits_well:
                break  # nor will more rows at once
            yield plan


def _pointless(recipe: Recipe, strategy: str, settings: Sequence[str], fleet: Fleet) -> bool:
    """One GPU shares nothing with others; one node needs no copy for each node; 8-bit moments are for GPUs alone."""
    alone = fleet.gpus == 1 and strategy.startswith("zero") and not settings
    copies = fleet.nodes == 1 and "train.fsdp.replicas=nodes" in settings
    return (
        alone or copies or (recipe.train.optimizer.name == "adamw_8bit" and "train.fsdp.cpu_offload=true" in settings)
    )


def _reset(recipe: Recipe) -> list[str]:
    """Settings of the strategy that the recipe names would be refused under another."""
    train = recipe.train
    changed = (("fsdp", train.fsdp != FSDP()), ("zero", train.zero != Zero()))
    return [f"train.{section}={{}}" for section, differs in changed if differs]


def ways_out(planner: Planner, fleet: Fleet) -> Iterator[Way]:
    """What makes the recipe fit, the least intrusive first: hardware, then what changes how it is trained."""
    recipe = planner.recipe
    yield from _more_gpus(planner, fleet)
    yield from _other_gpus(planner, fleet)
    optimizer = ["train.optimizer.name=adafactor"]
    in_backward = [
        *optimizer,
        "train.optimizer.weights=bfloat16",
        "train.optimizer.in_backward=true",
        "train.clip_norm=null",
    ]
    lora = ["model.adapter={name: lora}"]
    if recipe.train.optimizer != recipe.train.optimizer.model_copy(update={"weights": "float32", "in_backward": False}):
        lora += ["train.optimizer.weights=float32", "train.optimizer.in_backward=false"]
    changes: list[tuple[str, list[str]]] = []
    if recipe.train.optimizer.name != "adafactor":
        changes.append(("Adafactor: its state is a thousandth of AdamW's", optimizer))
    if not recipe.train.optimizer.in_backward and recipe.model.adapter is None:
        changes.append(("weights in bfloat16, updated within the backward pass", in_backward))
    if recipe.model.adapter is None:
        changes.append(("adapters in place of the weights (LoRA)", lora))
    if recipe.model.quantize is None:
        adapter = lora if recipe.model.adapter is None else []
        changes.append(("adapters over a base in 4 bits (QLoRA)", [*adapter, "model.quantize=nf4"]))
    seq_len = recipe.data.seq_len
    while seq_len >= 512:
        seq_len //= 2
        changes.append((f"rows of {seq_len} tokens", [f"data.seq_len={seq_len}"]))
    shortened = False
    for says, overrides in changes:
        if "seq_len" in overrides[0] and shortened:
            continue
        found = cheapest(planner, fleet, overrides)
        if found:
            shortened |= "seq_len" in overrides[0]
            yield Way(says, found[0])


def _more_gpus(planner: Planner, fleet: Fleet) -> Iterator[Way]:
    """The larger fleet of the same GPU that costs least."""
    if fleet.nodes == 1:
        sizes = [(1, count) for count in (2, 4, 8) if count > fleet.gpus_per_node]
    else:
        sizes = []
    per_node = max(fleet.gpus_per_node, 8) if fleet.nodes == 1 else fleet.gpus_per_node
    nodes = max(fleet.nodes, 1)
    while (nodes := nodes * 2) <= MOST_NODES:
        sizes.append((nodes, per_node))
    found = []
    for nodes, per_node in sizes:
        larger = Fleet(fleet.name, fleet.gpu, nodes, per_node)
        options = f"--gpu {fleet.name} --nodes {nodes} --gpus-per-node {per_node}"
        found += [Way(f"{larger.gpus} GPUs", plan, options) for plan in cheapest(planner, larger)[:1]]
    # More GPUs cost little more where they are used as well: of equal cost, to 5%, the fewest.
    if found:
        least = min(way.plan.dollars(1) for way in found)
        yield next(way for way in found if way.plan.dollars(1) <= 1.05 * least)


def _other_gpus(planner: Planner, fleet: Fleet) -> Iterator[Way]:
    """The cheapest GPU with more memory, as many of them."""
    larger = [
        (gpu.dollars_per_gpu_hour, name)
        for name, gpu in planner.prices.gpus.items()
        if gpu.memory_gib > fleet.gpu.memory_gib
    ]
    for _, name in sorted(larger):
        other = Fleet(name, planner.prices.gpus[name], fleet.nodes, fleet.gpus_per_node)
        if found := cheapest(planner, other):
            options = f"--gpu {name} --nodes {fleet.nodes} --gpus-per-node {fleet.gpus_per_node}"
            yield Way(other.label, found[0], options)
            return
