"""The planner's memory against what the allocator really gave out: steps of tiny models under the true strategies."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ray_ft import recipe as recipes
from ray_ft.model import adapt, recompute
from ray_ft.model.loss import LossModel, decoder_layers
from ray_ft.plan import memory, shapes
from ray_ft.plan.cut import per_rank_parameter_bytes
from ray_ft.plan.trace import Tracer
from ray_ft.recipe import Recipe
from ray_ft.strategy import Layout, make
from ray_ft.train import optim
from tests.unit import distributed

SEQ_LEN, ROWS, CHUNK = 384, 1, 128
TOLERANCE = 0.15
ROUNDS = 4


def recipe_of(strategy: str, world: int, *overrides: str) -> Recipe:
    content: dict[str, Any] = {
        "run": {"name": "plan"},
        "model": {"path": "nowhere/tiny"},
        "data": {"train": [{"path": "rows.jsonl", "format": "text"}], "seq_len": SEQ_LEN},
        "train": {
            "strategy": strategy,
            "workers": world,
            "micro_batch": ROWS,
            "global_batch": ROWS * world,
            "loss_chunk": CHUNK,
        },
    }
    for override in overrides:
        recipes.apply_override(content, override)
    return recipes.parse(content)


def tiny(recipe: Recipe, compute: torch.dtype, tied: bool = True) -> Any:
    """A Gemma 3 on the meta device whose every part is visible: 2M weights in the embedding, 1M in each layer."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=compute, attn_implementation="sdpa")
    kept = compute if recipe.train.strategy.startswith("zero") else getattr(torch, recipe.train.optimizer.weights)
    adapt.adapt(model, recipe.model, kept, compute)
    return model


def predicted(recipe: Recipe, compute: torch.dtype) -> memory.Memory:
    model = tiny(recipe, compute)
    found = shapes.read(model, recipe, compute)
    tracer = Tracer(model, [kind for kind in found.blocks if kind is not None], SEQ_LEN)
    return memory.estimate(found, tracer, recipe)


def measured(rank: int, world: int, cases: list[tuple[Recipe, torch.dtype]]) -> list[int]:
    """The most bytes that the CPU's allocator had given out at once, on this rank, in each case."""
    return [_measured(rank, world, recipe, compute) for recipe, compute in cases]


def _measured(rank: int, world: int, recipe: Recipe, compute: torch.dtype) -> int:
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(rank, world, recipe, compute)
    # By address: what gloo's own threads free is not seen until the address is given out again.
    given: dict[int, int] = {}
    live = most = 0
    for fields in sorted(_allocations(profiler), key=lambda event: event.start_time_ns):
        address, size = fields.extra_fields.ptr, fields.extra_fields.alloc_size
        live -= given.pop(address, 0)
        if size > 0:
            given[address] = size
            live += size
            most = max(most, live)
    return most


def _allocations(profiler: Any) -> Iterator[Any]:
    from torch._C._profiler import _EventType

    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event


def _train(rank: int, world: int, recipe: Recipe, compute: torch.dtype) -> None:
    train, model = recipe.train, tiny(recipe, compute)
    recompute.enable(model, train.gradient_checkpointing)
    strategy = make(recipe, Layout(rank, world, torch.device("cpu"), compute))

    def fill(spans: Any) -> None:
        model.tie_weights()
        for span in spans.values():
            span.data.uniform_(-0.02, 0.02)
        for buffer in model.buffers():
            nn.init.ones_(buffer)

    module = LossModel(model, train.loss_chunk)
    strategy.setup(module, decoder_layers(model), fill, partial(optim.build, train.optimizer, seed=0))
    module.train()
    positions = (torch.arange(SEQ_LEN) % 200).expand(ROWS, -1).contiguous()  # two documents in each row
    for _ in range(2):
        strategy.begin(1e-4)
        for micro in range(train.accumulation):
            ids = torch.randint(0, 8192, (ROWS, SEQ_LEN))
            with strategy.precision():
                loss = strategy.module(ids, positions, ids.clone()).sum()
            strategy.backward(loss / 1000, last=micro == train.accumulation - 1)
            del loss
        strategy.step(train.clip_norm)


IN_BACKWARD = (
    "train.optimizer.name=adafactor",
    "train.optimizer.weights=bfloat16",
    "train.optimizer.in_backward=true",
    "train.clip_norm=null",
)
CASES: dict[int, list[tuple[str, str, tuple[str, ...]]]] = {
    world: [
        (strategy, precision, (f"train.optimizer.name={name}", f"train.gradient_checkpointing={checkpointing}"))
        for strategy in (["none", "fsdp"] if world == 1 else ["fsdp"])
        for precision in ("float32", "bfloat16")
        for name in ("adamw", "adafactor")
        for checkpointing in ("false", "true")
    ]
    + [
        ("fsdp", "bfloat16", (f"train.global_batch={2 * ROWS * world}", "train.gradient_checkpointing=true")),
        ("fsdp", "bfloat16", (*IN_BACKWARD, "train.gradient_checkpointing=true")),
        ("fsdp", "bfloat16", ("model.adapter={name: lora}",)),
        ("fsdp", "bfloat16", ("model.adapter={name: lora}", "train.gradient_checkpointing=0.5")),
        ("fsdp", "float32", ("train.fsdp.reshard_after_forward=false", "train.gradient_checkpointing=true")),
    ]
    + [
        ("none", "bfloat16", (*IN_BACKWARD, "train.gradient_checkpointing=true")),
        ("none", "bfloat16", ("model.adapter={name: dora}", "train.gradient_checkpointing=true")),
        ("none", "float32", ("model.freeze=[input_embeddings]", f"train.global_batch={2 * ROWS * world}")),
        ("none", "bfloat16", (*IN_BACKWARD, "train.gradient_checkpointing=0.5")),
    ][: 4 if world == 1 else 0]
    for world in (1, 2)
}


@pytest.mark.parametrize("world", [1, 2])
def test_the_peak_is_within_15_percent_of_the_allocators(world: int) -> None:
    recipes_of_cases = [
        (recipe_of(strategy, world, *overrides), getattr(torch, precision))
        for strategy, precision, overrides in CASES[world]
    ]
    plans = [predicted(recipe, compute) for recipe, compute in recipes_of_cases]
    least = [float("inf")] * len(plans)
    for _ in range(ROUNDS):
        # A measurement can only be too large, by what gloo's threads freed unseen: of several the least is right.
        wrong = [at for at, plan in enumerate(plans) if abs(plan.total / least[at] - 1) > TOLERANCE]
        if not wrong:
            break
        found = distributed.run(world, measured, [recipes_of_cases[at] for at in wrong], seconds=240)
        for number, at in enumerate(wrong):
            least[at] = min(least[at], *(rank[number] for rank in found))
    lines = [
        f"{plan.total / most - 1:+.1%} of {most / 2**20:.1f} MiB, in the {plan.fullest}: {case}"
        for case, plan, most in zip(CASES[world], plans, least, strict=True)
    ]
    print("\n".join(lines))
    assert not [
        line for line, plan, most in zip(lines, plans, least, strict=True) if abs(plan.total / most - 1) > TOLERANCE
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_not_planned_too_small(stage: int) -> None:
    """On CPU DeepSpeed has one bucket where the plan, made for GPUs, has two; here they are as large as the model."""
    recipe = recipe_of(f"zero{stage}", 1, "train.gradient_checkpointing=true")
    ((most,),) = distributed.run(1, measured, [(recipe, torch.bfloat16)])
    assert 0.9 * most < predicted(recipe, torch.bfloat16).total < 1.4 * most


# ------------------------------------------------------------------------------------------------------------ shards


@pytest.fixture
def fake_group() -> Any:
    """A process group of any size in this process, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    started: list[int] = []

    def start(rank: int, world: int) -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        started.append(world)

    yield start
    if started:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("rank", "replicas"), [(0, 1), (5, 1), (6, 1), (5, 2)])
def test_bytes_of_a_rank_are_those_of_the_wrapped_model(fake_group: Any, rank: int, replicas: int) -> None:
    """7 workers of 7 do not divide any dimension: the last chunks are short."""
    from ray_ft.strategy.fsdp import FSDP

    world = 7 if replicas == 1 else 6
    fake_group(rank, world)
    recipe = recipe_of("fsdp", world, f"train.fsdp.replicas={replicas}", "model.freeze=[input_embeddings]")
    model = tiny(recipe, torch.bfloat16)
    found = shapes.read(model, recipe, torch.bfloat16)
    strategy = FSDP(Layout(rank, world, torch.device("cpu"), torch.bfloat16), recipe.train.fsdp)
    strategy.wrap(LossModel(model, CHUNK), decoder_layers(model))
    kept = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    assert per_rank_parameter_bytes(found, recipe.train, rank) == kept


def test_zero3_pads_each_flattened_parameter() -> None:
    recipe = recipe_of("zero3", 7)
    model = tiny(recipe, torch.bfloat16)
    found = shapes.read(model, recipe, torch.bfloat16)
    each = {per_rank_parameter_bytes(found, recipe.train, rank) for rank in range(7)}
    assert each == {sum(-(-p.numel() // 7) * 2 for p in model.parameters())}


# ------------------------------------------------------------------------------------------------------------- parts


def test_what_each_setting_saves() -> None:
    """Parts answer to the settings that are about them, by the amounts that arithmetic says."""
    base = predicted(recipe_of("fsdp", 4, "train.optimizer.name=adamw"), torch.bfloat16)
    count = sum(p.numel() for p in tiny(recipe_of("fsdp", 4), torch.bfloat16).parameters())
    assert base.phases["optimizer's step"]["weights"] == pytest.approx(count, rel=0.01)  # 4 bytes over 4 workers
    assert base.phases["optimizer's step"]["optimizer"] == pytest.approx(2 * count, rel=0.01)
    assert base.phases["optimizer's step"]["gradients"] == pytest.approx(count, rel=0.01)
    factored = predicted(recipe_of("fsdp", 4, "train.optimizer.name=adafactor"), torch.bfloat16)
    assert factored.phases["loss"]["optimizer"] < base.phases["loss"]["optimizer"] / 20
    recomputed = predicted(recipe_of("fsdp", 4, "train.gradient_checkpointing=true"), torch.bfloat16)
    assert recomputed.phases["loss"]["activations"] < base.phases["loss"]["activations"] / 4
    offloaded = predicted(recipe_of("fsdp", 4, "train.fsdp.cpu_offload=true"), torch.bfloat16)
    assert "weights" not in offloaded.parts
    assert offloaded.host["weights"] == base.parts["weights"]
    copies = predicted(recipe_of("fsdp", 4, "train.fsdp.replicas=2"), torch.bfloat16)
    assert copies.parts["weights"] == pytest.approx(2 * base.parts["weights"], rel=0.01)
    smaller = predicted(recipe_of("fsdp", 4, "train.loss_chunk=64"), torch.bfloat16)
    # Log-probabilities and their gradient of 64 tokens less, in float32.
    saved = base.phases["loss"]["logits"] - smaller.phases["loss"]["logits"]
    assert saved == pytest.approx(2 * 64 * 8192 * 4, rel=0.02)


def test_zero_stages_share_ever_more() -> None:
    by_stage = [predicted(recipe_of(f"zero{stage}", 4), torch.bfloat16) for stage in (1, 2, 3)]
    steps = [one.phases["optimizer's step"] for one in by_stage]
    assert steps[0]["weights"] == steps[1]["weights"] > 3.9 * steps[2]["weights"]
    assert steps[0]["gradients"] > 2 * steps[1]["gradients"]
    assert len({round(step["optimizer"], -3) for step in steps}) == 1
    offloaded = predicted(recipe_of("zero3", 4, "train.zero.offload_optimizer=cpu"), torch.bfloat16)
    assert "optimizer" not in offloaded.parts
    assert offloaded.host["optimizer"] == pytest.approx(steps[2]["optimizer"])


def test_eager_attention_keeps_the_scores_and_sdpa_does_not() -> None:
    recipe = recipe_of("none", 1)
    kept = {}
    for attention in ("sdpa", "eager"):
        model = tiny(recipe, torch.float32)
        model.set_attn_implementation(attention)
        found = shapes.read(model, recipe, torch.float32)
        tracer = Tracer(model, [kind for kind in found.blocks if kind is not None], SEQ_LEN)
        numbers = memory.Numbers(torch.float32, torch.float32, False)
        (block,) = tracer.activations(numbers, 1).blocks.values()
        kept[attention] = block.kept
    square = 4 * SEQ_LEN * SEQ_LEN
    assert kept["eager"] - kept["sdpa"] == pytest.approx(3 * square, rel=0.01)  # 4 heads, less the mask in float32
