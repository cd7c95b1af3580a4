"""The planner from a recipe to its answer: configs, fleets and prices, speed, the search, what is printed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ray_ft import plan as planning
from ray_ft import recipe as recipes
from ray_ft.cli import app
from ray_ft.errors import ModelError, RecipeError, ResourceError
from ray_ft.model import load
from ray_ft.plan import fleet, memory, search, shapes, speed
from ray_ft.plan.cut import Cut
from ray_ft.plan.fleet import GIB, Fleet
from ray_ft.plan.planner import Planner
from ray_ft.recipe import Recipe

PRICES = fleet.load_prices()
TOTALS = {"1b": 999_885_952, "4b": 4_300_079_472, "12b": 12_187_325_040, "27b": 27_432_406_640}


def content_of(**train: Any) -> dict[str, Any]:
    return {
        "run": {"name": "plan"},
        "model": {"path": "google/gemma-3-1b-it"},
        "data": {"train": [{"path": "rows.jsonl", "format": "text"}], "seq_len": 1024},
        "train": {"global_batch": 16, **train},
    }


def recipe_of(*overrides: str, **train: Any) -> Recipe:
    content = content_of(**train)
    for override in overrides:
        recipes.apply_override(content, override)
    return recipes.parse(content)


def fleet_of(name: str = "h100-80", nodes: int = 1, gpus: int = 1) -> Fleet:
    return Fleet(name, PRICES.gpus[name], nodes, gpus)


def planner_of(recipe: Recipe) -> Planner:
    return Planner(recipe, shapes.find_config(recipe.model.path), PRICES)


# ----------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("size", TOTALS)
@pytest.mark.parametrize("kind", ["it", "pt"])
def test_shipped_configs_have_the_published_number_of_parameters(size: str, kind: str) -> None:
    config = shapes.find_config(f"google/gemma-3-{size}-{kind}")
    model = load.build(config, "sdpa", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == TOTALS[size]


def test_27b_scales_attention_by_168_and_not_by_its_heads() -> None:
    text = shapes.find_config("google/gemma-3-27b-it").get_text_config()
    assert (text.head_dim, text.query_pre_attn_scalar) == (128, 168)
    assert text.layer_types.count("full_attention") == 10
    assert text.rope_parameters["full_attention"]["factor"] == 8.0


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    settings = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    file.write_text(json.dumps(settings | {"intermediate_size": 128, "vocab_size": 512}))
    found = planning.answer(recipe_of("model.path=some/where"), config=str(file))
    assert found.plan.shapes.total == 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    with pytest.raises(ModelError, match="cannot be read"):
        planning.answer(recipe_of(), config=str(tmp_path / "missing.json"))
    file.write_text("[]")
    with pytest.raises(ModelError, match="no usable config"):
        planning.answer(recipe_of(), config=str(file))


def test_preferences_cost_a_second_forward_pass_or_the_whole_base_before_training() -> None:
    pairs = "data.train=[{path: /a, format: preference}]"
    planner = planner_of(recipe_of("model.adapter={name: lora}"))
    plain, twice = (planner.plan(fleet_of(), overrides) for overrides in ((), (pairs,)))
    assert twice.memory.phases == plain.memory.phases
    assert 1.3 < twice.speed.compute / plain.speed.compute < 1.6
    whole = planner_of(recipe_of(pairs)).plan(fleet_of()).memory
    before = whole.phases[memory.BEFORE]
    assert before["weights"] == 2 * TOTALS["1b"]
    assert memory.BEFORE not in plain.memory.phases


# ------------------------------------------------------------------------------------------------------------ fleets


def test_an_unknown_gpu_names_near_ones() -> None:
    with pytest.raises(ResourceError, match="unknown") as caught:
        fleet.choose(PRICES, 1, "h100")
    assert any("h100-80" in way for way in caught.value.ways_out)


@pytest.mark.parametrize(
    ("workers", "nodes", "per_node", "expected"),
    [
        (16, None, None, (2, 8)),
        (4, None, None, (1, 4)),
        (0, None, None, (1, 1)),
        (8, 2, None, (2, 4)),
        (1, 2, 8, (2, 8)),
    ],
)
def test_the_fleet_follows_from_the_workers(
    workers: int, nodes: int | None, per_node: int | None, expected: tuple[int, int]
) -> None:
    found = fleet.choose(PRICES, workers, None, nodes, per_node)
    assert (found.name, found.nodes, found.gpus_per_node) == ("h100-80", *expected)


def test_bad_numbers_of_machines_are_refused() -> None:
    with pytest.raises(ResourceError, match="--nodes 0"):
        fleet.choose(PRICES, 1, None, 0)
    with pytest.raises(ResourceError, match="evenly"):
        fleet.choose(PRICES, 9, None, 2)
    with pytest.raises(ResourceError, match="--tokens"):
        planning.answer(recipe_of(), tokens=0)


def test_prices_of_ones_own_replace_what_they_name(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(yaml.safe_dump({"gpus": {"h100-80": {"dollars_per_gpu_hour": 2.0}}}))
    found = fleet.load_prices(str(file))
    assert found.gpus["h100-80"].dollars_per_gpu_hour == 2.0
    assert found.gpus["h100-80"].memory_gib == PRICES.gpus["h100-80"].memory_gib
    assert found.gpus["l4-24"] == PRICES.gpus["l4-24"]
    file.write_text("gpus: {h100-80: {dollars_per_gpu_hour: -1}}")
    with pytest.raises(ResourceError, match=r"gpus\.h100-80\.dollars_per_gpu_hour"):
        fleet.load_prices(str(file))
    file.write_text("gpus: {h100-80: {dollar: 1}}")
    with pytest.raises(ResourceError, match="dollar"):
        fleet.load_prices(str(file))
    file.write_text("- 1")
    with pytest.raises(ResourceError, match="list"):
        fleet.load_prices(str(file))
    with pytest.raises(ResourceError, match="cannot be read"):
        fleet.load_prices(str(tmp_path / "missing.yaml"))


# ------------------------------------------------------------------------------------------------------------- speed


def test_arithmetic_of_a_step() -> None:
    """One GPU, nothing to send: tokens × FLOPs ÷ (peak × utilisation), and the update at memory speed."""
    plan = planner_of(recipe_of(strategy="none")).plan(fleet_of())
    gpu, found = plan.fleet.gpu, plan.shapes
    attended = 0.0
    for at in range(26):
        places = 1024 if at % 6 == 5 else 512
        attended += 4 * 4 * 256 * (places - places * (places - 1) / 2048)
    assert speed.attention_flops(found, 1024) == pytest.approx(attended)
    flops = (
        16 * 1024 * (6 * (TOTALS["1b"] - sum(p.numel for p in found.parameters if len(p.shape) == 1)) + 3 * attended)
    )
    assert plan.speed.compute == pytest.approx(flops / (gpu.bf16_tflops * 1e12 * gpu.utilisation))
    assert plan.speed.update == pytest.approx(TOTALS["1b"] * 28 / (gpu.memory_gbps * 1e9))
    assert plan.speed.communication == 0
    assert plan.speed.hours(plan.speed.tokens_per_second * 7200) == pytest.approx(2)
    assert plan.dollars(plan.speed.tokens_per_second * 3600) == pytest.approx(gpu.dollars_per_gpu_hour)


def test_recomputing_takes_time_and_no_useful_flops() -> None:
    planner = planner_of(recipe_of(strategy="none"))
    once, twice = (planner.plan(fleet_of(), [f"train.gradient_checkpointing={on}"]) for on in ("false", "true"))
    assert 1.15 < twice.speed.step / once.speed.step < 1.35
    assert twice.speed.mfu < once.speed.mfu


def test_a_slow_network_shows_and_copies_per_node_spare_it() -> None:
    planner = planner_of(recipe_of("train.fsdp.replicas=nodes", workers=16, global_batch=64))
    apart = planner.plan(fleet_of("a100-80", 2, 8))
    across = planner.plan(fleet_of("a100-80", 2, 8), ["train.fsdp.replicas=1"])
    assert across.speed.communication > 1.5 * apart.speed.communication  # which sums between nodes once a step
    assert across.memory.parts["weights"] < apart.memory.parts["weights"]
    faster = planner.plan(fleet_of("h100-80", 2, 8), ["train.fsdp.replicas=1"])
    assert (
        across.speed.communication > 4 * faster.speed.communication
    )  # 6.25 against 50 GB/s, where NVLink is the limit


def test_what_copies_sum_between_them_is_hidden_by_the_last_backward_pass_alone() -> None:
    planner = planner_of(recipe_of("train.fsdp.replicas=nodes", workers=16, global_batch=64))
    found = planner.plan(fleet_of("h100-80", 2, 8))
    trained = TOTALS["1b"]
    summed = 2 * (1 / 2) * trained / 8 * 4 / 50e9  # each of 2 copies' 8 shards in float32, by its own way out
    inside = found.speed.communication - summed
    assert 0 < inside < found.speed.compute
    root = sum(p.numel for p in found.shapes.group(shapes.ROOT)) / trained  # the embedding's gradient comes last
    assert found.speed.step == pytest.approx(found.speed.compute + summed * root + found.speed.update)
    # A network so slow that the backward pass (two thirds of the computing, at least) cannot hide it.
    slow = planner.plan(fleet_of("a100-80", 2, 8))
    exposed = slow.speed.step - slow.speed.update - slow.speed.compute
    assert 8 * summed - slow.speed.compute < exposed < 8 * summed - 0.6 * slow.speed.compute / 4
    more = planner.plan(
        fleet_of("a100-80", 2, 8), ["train.global_batch=256"]
    )  # with more micro-batches, still one pass
    assert more.recipe.train.accumulation == 4 * slow.recipe.train.accumulation
    assert more.speed.step - more.speed.compute == pytest.approx(slow.speed.step - slow.speed.compute, rel=0.01)


def sent_of(plan: Any) -> speed._Sent:
    train = plan.recipe.train
    return speed._Sent(plan.shapes, train, Cut.of(train, plan.fleet.nodes), plan.fleet, PRICES.constants, twice=False)


def test_copies_that_share_the_fabric_with_their_gathering_sum_where_nothing_is_gathered() -> None:
    planner = planner_of(recipe_of(workers=8, global_batch=64, fsdp={"replicas": 2}))
    plan = planner.plan(fleet_of(gpus=8))
    sent = speed._Sent(
        plan.shapes, plan.recipe.train, Cut.of(plan.recipe.train, 1), plan.fleet, PRICES.constants, False
    )
    assert sent.left_for_copies(3.0, 2.0) == 1.0
    assert sent.left_for_copies(2.0, 3.0) == 0.0


def test_a_ring_over_nodes_carries_between_them_what_each_worker_sends() -> None:
    plan = planner_of(recipe_of(workers=16)).plan(fleet_of("h100-80", 2, 8))
    sent = speed._Sent(
        plan.shapes, plan.recipe.train, Cut.of(plan.recipe.train, 2), plan.fleet, PRICES.constants, False
    )
    gpu = plan.fleet.gpu
    assert sent._ring(1e9, 16) == pytest.approx(15 / 16 / (8 * gpu.network_gbps))
    assert sent._ring(1e9, 8) == pytest.approx(7 / 8 / gpu.link_gbps)
    assert sent._ring(1e9, 1) == 0


# ------------------------------------------------------------------------------------------------------------ search


def test_settings_fit_are_sorted_and_can_be_pasted(tmp_path: Path) -> None:
    recipe = recipe_of(workers=2)
    planner = planner_of(recipe)
    found = search.cheapest(planner, fleet_of(gpus=2))
    assert {plan.recipe.train.strategy for plan in found} >= {"none", "fsdp", "zero1", "zero3"}
    rates = [plan.speed.tokens_per_second for plan in found]
    assert all(a >= 0.98 * b for a, b in itertools.pairwise(rates))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content_of(workers=2)))
    for plan in found:
        assert plan.memory.fits_well
        pasted = recipes.load(str(file), plan.overrides)
        assert planner_of(pasted).plan(plan.fleet).memory.total == pytest.approx(plan.memory.total)
        assert (pasted.train.optimizer, pasted.data, pasted.model) == (
            recipe.train.optimizer,
            recipe.data,
            recipe.model,
        )


def test_settings_of_another_strategy_do_not_stand_in_the_way() -> None:
    recipe = recipe_of("train.zero.offload_optimizer=cpu", strategy="zero3", workers=2)
    found = search.cheapest(planner_of(recipe), fleet_of(gpus=2))
    assert "fsdp" in {plan.recipe.train.strategy for plan in found}


def test_where_nothing_fits_every_way_out_does() -> None:
    small = {"gpus": {"tiny-2": PRICES.gpus["l4-24"].model_copy(update={"memory_gib": 7.0, "host_gib": 16.0})}}
    prices = PRICES.model_copy(update={"gpus": {**small["gpus"], "l4-24": PRICES.gpus["l4-24"]}})
    recipe = recipe_of(workers=1, loss_chunk=128)
    planner = Planner(recipe, shapes.find_config(recipe.model.path), prices)
    place = Fleet("tiny-2", prices.gpus["tiny-2"], 1, 1)
    assert not planner.plan(place).fits
    assert search.cheapest(planner, place) == []
    ways = list(search.ways_out(planner, place))
    assert all(way.plan.fits for way in ways)
    said = " ".join(way.says for way in ways)
    for expected in ("GPUs", "l4-24", "LoRA", "QLoRA"):
        assert expected in said
    more = ways[0].plan.fleet
    assert more.gpus > 1
    assert f"--nodes {more.nodes} --gpus-per-node {more.gpus_per_node}" in ways[0].options
    changed = next(way for way in ways if "QLoRA" in way.says).plan.recipe
    assert changed.model.quantize == "nf4"


def test_workers_that_do_not_divide_the_batch_are_an_error_with_ways_out() -> None:
    with pytest.raises(RecipeError, match="global_batch"):
        planning.answer(recipe_of(), gpus_per_node=7)


# ---------------------------------------------------------------------------------------------------- 27B, by hand


def test_the_sums_worked_by_hand_in_the_docs() -> None:
    """docs/plan.md, "27B by hand": 27,432,406,640 parameters, of which text passes through 27,009,346,304."""
    recipe = recipe_of(
        "model.path=google/gemma-3-27b-it",
        "train.gradient_checkpointing=true",
        "train.optimizer.name=adamw",
        workers=8,
    )
    planner, place = planner_of(recipe), fleet_of(gpus=8)
    plan = planner.plan(place)
    text, tower = 27_009_346_304, 27_432_406_640 - 27_009_346_304
    assert plan.shapes.trained == text
    step = plan.memory.phases["optimizer's step"]
    assert step["weights"] / GIB == pytest.approx((4 * text + 2 * tower) / 8 / GIB, rel=2e-3)  # 12.7
    assert step["gradients"] / GIB == pytest.approx(4 * text / 8 / GIB, rel=2e-3)  # 12.6
    assert step["optimizer"] / GIB == pytest.approx(8 * text / 8 / GIB, rel=2e-3)  # 25.2
    factored = planner.plan(place, ["train.optimizer.name=adafactor"])
    assert factored.memory.parts["optimizer"] < 0.2 * GIB
    assert factored.fits
    alone = planner.plan(
        fleet_of("h200-141"),
        [
            "train.strategy=none",
            "train.global_batch=1",
            "train.optimizer.name=adafactor",
            "train.optimizer.weights=bfloat16",
            "train.optimizer.in_backward=true",
            "train.clip_norm=null",
        ],
    )
    assert alone.memory.parts["weights"] == 2 * 27_432_406_640
    assert alone.memory.parts.get("gradients", 0) <= 2 * 2 * 262_208 * 5376  # the embedding's alone
    assert alone.fits
    assert alone.memory.total < 80 * GIB


def test_qlora_holds_the_base_in_4_bits() -> None:
    planner = planner_of(recipe_of("model.adapter={name: lora}", strategy="none"))
    plain, packed = (planner.plan(fleet_of(), overrides) for overrides in ([], ["model.quantize=nf4"]))
    linear = 26 * (1152 * (1024 + 256 + 256) + 1024 * 1152 + 3 * 1152 * 6912)
    saved = plain.memory.parts["weights"] - packed.memory.parts["weights"]
    assert saved == pytest.approx(linear * (2 - 0.516), rel=1e-3)
    assert plain.shapes.trained == packed.shapes.trained < 0.03 * plain.shapes.total
    assert packed.speed.tokens_per_second < plain.speed.tokens_per_second


# --------------------------------------------------------------------------------------------------------------- cli


def run_cli(tmp_path: Path, *arguments: str, **train: Any) -> Any:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content_of(**train)))
    return CliRunner().invoke(app, ["plan", str(file), *arguments])


def test_the_command_prints_parts_speed_and_settings(tmp_path: Path) -> None:
    result = run_cli(tmp_path, "train.max_steps=1000", workers=2)
    assert result.exit_code == 0, result.output
    for expected in (
        "weights",
        "optimizer",
        "allocator slack",
        "fits:",
        "tokens/s",
        "16,384,000 tokens",
        "ray-ft train",
    ):
        assert expected in result.output
    assert "train.max_steps=1000" in result.output.rsplit("ray-ft train", 1)[1]


def test_json_says_the_same_and_1_means_that_it_does_not_fit(tmp_path: Path) -> None:
    result = run_cli(tmp_path, "--gpu", "l4-24", "--json", "--tokens", "1e6", strategy="none", micro_batch=16)
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert found["gpu_bytes"] == pytest.approx(sum(found["gpu_parts"].values()))
    assert found["gpu_bytes"] > found["gpu_limit_bytes"] == 22.0 * GIB
    assert found["tokens"] == 1e6
    assert found["dollars"] == pytest.approx(found["hours"] * PRICES.gpus["l4-24"].dollars_per_gpu_hour)
    assert all(one["fits"] for one in found["settings"] + found["ways_out"])
    assert found["settings"]


def test_tokens_of_prepared_data(tmp_path: Path) -> None:
    recipe = recipe_of(f"run.storage={tmp_path}", "train.epochs=3")
    assert planning._tokens(recipe, None) is None
    Path(recipe.run.dir.stats).parent.mkdir(parents=True)
    Path(recipe.run.dir.stats).write_text(json.dumps({"train": {"packed_by_source": {"0": 100}, "seq_len": 1024}}))
    assert planning._tokens(recipe, None) == (3 * 100 * 1024, "the run's prepared data")
    shorter = recipe_of(f"run.storage={tmp_path}", "data.seq_len=512")
    assert planning._tokens(shorter, None) is None


def test_output_is_readable_where_there_is_no_terminal(tmp_path: Path) -> None:
    answer = planning.answer(recipe_of(workers=1))
    with open(tmp_path / "out.txt", "w+") as stream:
        answer.show(Console(file=stream, width=120, highlight=False), "recipe.yaml")
        stream.seek(0)
        text = stream.read()
    assert "per billion tokens" in text
    assert max(map(len, text.splitlines()[:-1])) <= 120
