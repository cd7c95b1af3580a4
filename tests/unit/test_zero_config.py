"""The recipe as a DeepSpeed configuration, and what of a user's own JSON is taken over, filled in and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_ft.errors import RecipeError
from ray_ft.recipe import Train
from ray_ft.strategy import zero_config as module
from ray_ft.strategy.zero_config import Sizes, zero_config

SIZES = Sizes(parameter=3000, block=5000, rest=4000, trained=20_001)


def train(strategy: str = "zero3", **settings: Any) -> Train:
    return Train.model_validate(
        {"strategy": strategy, "workers": 4, "global_batch": 32, "micro_batch": 2, **settings},
    )


def config(settings: Train, precision: Any = "bfloat16", gpu: bool = True) -> dict[str, Any]:
    return zero_config(settings, precision, gpu, SIZES)


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The configuration with a user's JSON merged in."""

    def merge(theirs: Any, strategy: str = "zero3", zero: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        file = tmp_path / "ds.json"
        file.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
        return config(train(strategy, zero={**(zero or {}), "config": str(file)}, **more))

    return merge


# ------------------------------------------------------------------------------------------------------------- derived


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", [True, False])
def test_the_recipe_is_a_configuration_that_deepspeed_reads(stage: int, precision: Any, gpu: bool) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = train(f"zero{stage}", clip_norm=0.7, workers=1, global_batch=8)
    read = DeepSpeedConfig(config(settings, precision, gpu))
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (8, 2, 4)
    assert (read.gradient_clipping, read.bfloat16_config.enabled) == (0.7, precision == "bfloat16")
    assert (read.grad_accum_dtype, str(read.communication_data_type)) == ("fp32", "torch.float32")
    assert not read.float16_config.enabled and read.bfloat16_config.check_grad_overflow
    assert (read.zero_allow_untested_optimizer, read.zero_force_ds_cpu_optimizer) == (True, False)
    zero = read.zero_config
    assert (int(zero.stage), zero.overlap_comm, zero.reduce_bucket_size) == (stage, gpu and stage > 1, 20_002)
    if stage == 3:
        assert (zero.prefetch_bucket_size, zero.max_live_parameters) == (5000, 19_000)
        assert (zero.max_reuse_distance, zero.param_persistence_threshold) == (5000, 0)


def test_no_clipping_is_zero() -> None:
    assert config(train(clip_norm=None))["gradient_clipping"] == 0


def test_offloading_is_pinned_where_there_is_a_gpu_to_copy_to() -> None:
    settings = train(zero={"offload_optimizer": "cpu", "offload_parameters": "nvme", "nvme_path": "/local"})
    for gpu in (True, False):
        zero = config(settings, gpu=gpu)["zero_optimization"]
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": gpu}
        buffers = {"buffer_size": 752, "max_in_cpu": 0}  # a quarter of the largest parameter, and two elements more
        assert zero["offload_param"] == {"device": "nvme", "pin_memory": gpu, "nvme_path": "/local", **buffers}
    assert config(train("zero2"))["zero_optimization"]["offload_optimizer"]["device"] == "none"


@pytest.mark.parametrize(
    ("strategy", "optimizer", "says"), [("zero2", "adamw", "needs zero3"), ("zero3", "adafactor", "adafactor")]
)
def test_nvme_is_refused_where_it_would_do_nothing(strategy: str, optimizer: str, says: str) -> None:
    zero = {"offload_optimizer": "nvme", "nvme_path": "/local"}
    with pytest.raises(RecipeError, match=says):
        config(train(strategy, zero=zero, optimizer={"name": optimizer}))


# ---------------------------------------------------------------------------------------------------------- the user's


def test_what_is_left_open_is_filled_in_and_what_the_recipe_does_not_say_is_taken_over(merged: Any) -> None:
    theirs = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale_window": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 123,
            "stage3_prefetch_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": None,
        },
        "steps_per_print": 7,
        "flops_profiler": {"enabled": True},
    }
    found = merged(theirs, zero={"offload_optimizer": "cpu"})
    derived = config(train(zero={"offload_optimizer": "cpu"}))
    zero = found["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (123, 5000)
    assert (zero["offload_optimizer"], zero["offload_param"]["device"]) == (
        {"device": "cpu", "pin_memory": False},
        "none",
    )
    assert (found["steps_per_print"], found["flops_profiler"]) == (7, {"enabled": True})
    assert found["fp16"] == {"enabled": False, "loss_scale_window": 1000}
    assert "optimizer" not in found and "scheduler" not in found  # the recipe builds both
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "bf16", "data_types"):
        assert found[key] == derived[key]


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"train_batch_size": 64}, "train_batch_size = 64, and the recipe says 32 (train.global_batch)"),
        ({"train_micro_batch_size_per_gpu": 1}, "and the recipe says 2 (train.micro_batch)"),
        ({"gradient_accumulation_steps": 1}, "and the recipe says 4 (train.global_batch ÷"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5, and the recipe says 1.0 (train.clip_norm)"),
        ({"bf16": {"enabled": False}}, "bf16.enabled = false, and the recipe says true (model.dtype)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true: activations of Gemma overflow float16; require bf16"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2, and the recipe says 3 (train.strategy)"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'offload_optimizer.device = "cpu", and the recipe says "none" (train.zero.offload_optimizer)',
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            'zero_optimization.offload_param.nvme_path = "/x", and the recipe says null (train.zero.nvme_path)',
        ),
        ({"optimizer": {"type": "Adafactor"}}, 'optimizer.type = "Adafactor", and the recipe says "adamw"'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, "and the recipe says 0.0001 (train.optimizer.lr)"),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, "train.optimizer has no such setting"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type = "WarmupLR": the recipe sets the learning rate'),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5}}}, "warmup_num_steps = 5"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'grad_accum_dtype = "bf16", and ray-ft needs "fp32"'),
        ({"data_types": {"buffer_dtype": "bf16"}}, 'buffer_dtype = "bf16", and ray-ft needs null'),
        ({"communication_data_type": "fp16"}, 'communication_data_type = "fp16", and ray-ft needs "fp32"'),
        ({"zero_optimization": {"round_robin_gradients": True}}, "and ray-ft needs false"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": True}, "zero_optimization = true, and DeepSpeed reads a section there"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload = true"),
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'?"),
    ],
)
def test_what_contradicts_the_recipe_is_refused_by_name(merged: Any, theirs: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        merged(theirs)
    assert says in str(caught.value)
    assert "ds.json" in caught.value.what and len(caught.value.ways_out) == 2


def test_all_contradictions_are_named_at_once(merged: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        merged({"train_batch_size": 1, "gradient_clipping": 9, "zero_optimization": {"stage": 1}})
    faults = [line.split(" = ")[0].strip() for line in caught.value.what.splitlines()[1:]]
    assert faults == ["train_batch_size", "gradient_clipping", "zero_optimization.stage"]


def test_switched_off_is_the_same_however_it_is_written(merged: Any) -> None:
    theirs = {"gradient_clipping": 0, "zero_optimization": {"offload_optimizer": {"device": "none"}, "zenflow": None}}
    assert merged(theirs, clip_norm=None)["gradient_clipping"] == 0
    assert merged({"zero_optimization": {"offload_optimizer": None}})["zero_optimization"]["offload_optimizer"]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_what_is_not_a_json_object_is_refused(merged: Any, content: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.zero\.config"):
        merged(content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.json"):
        config(train(zero={"config": str(tmp_path / "missing.json")}))


def test_a_section_set_to_null_contradicts_a_device(merged: Any) -> None:
    with pytest.raises(RecipeError, match='offload_optimizer = null, and the recipe says "cpu"'):
        merged({"zero_optimization": {"offload_optimizer": None}}, zero={"offload_optimizer": "cpu"})


def test_deepspeed_reads_every_key_that_is_called_known() -> None:
    """Otherwise a misspelt key could be called known, or a new one misspelt."""
    import deepspeed

    text = "\n".join(path.read_text() for path in Path(deepspeed.__file__).parent.rglob("*.py"))
    unread = [key for key in module._KNOWN.split() if f'"{key}"' not in text and f"'{key}'" not in text]
    assert unread == []


def test_deepspeed_is_not_needed() -> None:
    code = "import sys, ray_ft.strategy.zero_config; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
