"""The recipe as a DeepSpeed configuration, and a user's own DeepSpeed JSON merged into it. It imports neither torch
nor DeepSpeed.

What the recipe says is said once: a DeepSpeed JSON may repeat it, leave it open ("auto") or leave it out, but not
contradict it. Keys that the recipe does not speak about are the user's.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray_ft import paths
from ray_ft.errors import RecipeError
from ray_ft.recipe import Train

_AUTO = "auto"
#: Elements; 400 MB in float32, from which on larger messages are no faster.
_BUCKET = 100_000_000


@dataclass(frozen=True)
class Sizes:
    """Elements of the model, by which buffers are sized: largest parameter, largest block, outside blocks, trained."""

    parameter: int
    block: int
    rest: int
    trained: int


#: Where the recipe says what a key of the DeepSpeed JSON says. The rest of the derived keys are tuning, and the user's.
_SAID_BY = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch ÷ (micro_batch × workers)",
    "gradient_clipping": "train.clip_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
    "zero_optimization.stage": "train.strategy",
    "zero_optimization.offload_optimizer.device": "train.zero.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "train.zero.nvme_path",
    "zero_optimization.offload_param.device": "train.zero.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "train.zero.nvme_path",
}

#: Values without which a step would not be the sum that every strategy computes, or weights could not be saved.
_NEEDED: dict[str, Any] = {
    "communication_data_type": "fp32",
    "data_types.grad_accum_dtype": "fp32",
    "data_types.buffer_dtype": None,
    "bf16.check_grad_overflow": True,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "managed_gradient_accumulation": True,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.zenflow": None,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
    "zero_optimization.cpu_offload": None,
    "zero_optimization.cpu_offload_param": None,
    "amp.enabled": False,
    "torch_autocast.enabled": False,
    "compile.deepcompile": False,
    "hybrid_engine.enabled": False,
    "tensor_parallel.autotp_size": 0,
    "sequence_parallel_size": 1,
}

#: Top-level keys that DeepSpeed 0.19 reads; it passes over others, and so over misspelt ones.
_KNOWN = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile compression_training csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last
    disable_allgather disable_python_gc dump_state elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine
    log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
"""

_SCHEDULERS = {"cosine": "WarmupCosineLR", "linear": "WarmupDecayLR", "constant": "WarmupLR"}


def zero_config(train: Train, precision: Literal["bfloat16", "float32"], gpu: bool, sizes: Sizes) -> dict[str, Any]:
    """The configuration for DeepSpeed.

    Args:
        train: with strategy zero1, zero2 or zero3.
        precision: of the computation.
        gpu: whether workers compute on GPUs.

    Raises:
        RecipeError: train.zero.config cannot be read, or contradicts the recipe: names every such key; or nvme where it
            has no effect.
    """
    _check_nvme(train)
    derived = _derived(train, precision, gpu, sizes)
    if train.zero.config is None:
        return derived
    theirs = _read(train.zero.config)
    faults = [*_misspelt(theirs), *_conflicts(theirs, derived), *_optimizer_faults(theirs, train)]
    if faults:
        raise RecipeError(
            f"train.zero.config {train.zero.config} does not fit the recipe:\n" + "\n".join(f"  {f}" for f in faults),
            [
                'remove these keys from the JSON, or set them to "auto": the recipe fills them in',
                "or change the recipe where it says otherwise",
            ],
        )
    kept = {key: value for key, value in theirs.items() if key not in ("optimizer", "scheduler")}
    return _merged(kept, derived)


def _check_nvme(train: Train) -> None:
    if train.zero.offload_optimizer != "nvme":
        return
    for wrong, why in (
        (
            train.strategy != "zero3",
            f"needs zero3, and strategy is {train.strategy}, for which DeepSpeed has cpu alone",
        ),
        (train.optimizer.name == "adafactor", "is for moments of each weight, and adafactor has few to offload"),
    ):
        if wrong:
            raise RecipeError(
                f"train.zero.offload_optimizer: nvme {why}",
                ["set train.zero.offload_optimizer: cpu", "or train.strategy: zero3 with optimizer.name: adamw"],
            )


def _derived(train: Train, precision: str, gpu: bool, sizes: Sizes) -> dict[str, Any]:
    stage = int(train.strategy.removeprefix("zero"))
    bucket = max(min(_BUCKET, sizes.trained), 2)
    bucket += bucket % 2  # DeepSpeed aligns to pairs of elements
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # On CPU there are no streams to overlap; stage 1 reduces only after the last backward pass.
        "overlap_comm": gpu and stage > 1,
        "reduce_bucket_size": bucket,
        "offload_optimizer": _offload(train.zero.offload_optimizer, train.zero.nvme_path, gpu),
    }
    if stage < 3:
        zero["allgather_bucket_size"] = bucket
    else:
        offload = _offload(train.zero.offload_parameters, train.zero.nvme_path, gpu)
        if offload["device"] == "nvme":  # a buffer holds one worker's part of one parameter
            offload |= {"buffer_size": -(-sizes.parameter // train.world_size) + 2, "max_in_cpu": 0}
        zero |= {
            "offload_param": offload,
            "sub_group_size": _BUCKET,  # of which gradients are copied and updated at once
            # A block is gathered by one call, so even its smallest parameter costs no call of its own.
            "stage3_param_persistence_threshold": 0,
            # One block ahead, as FSDP does, beside the one in use and what is outside the blocks.
            "stage3_prefetch_bucket_size": sizes.block,
            "stage3_max_live_parameters": sizes.rest + 3 * sizes.block,
            "stage3_max_reuse_distance": sizes.block,  # the last block stays for the backward pass
        }
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip_norm or 0.0,
        "bf16": {"enabled": precision == "bfloat16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        # In bfloat16 the sum over many micro-batches and workers would lose the small gradients.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }


def _offload(device: str, nvme_path: str | None, gpu: bool) -> dict[str, Any]:
    # Pinned memory is what copies to and from a GPU run at full speed from.
    found: dict[str, Any] = {"device": device, "pin_memory": gpu and device != "none"}
    if device == "nvme":
        found["nvme_path"] = nvme_path
    return found


def _read(location: str) -> dict[str, Any]:
    try:
        content = paths.read_json(location)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"train.zero.config {location!r} cannot be read as JSON: {error}",
            ["give the path or URI of a DeepSpeed configuration file", "or leave it out: the recipe is enough"],
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"train.zero.config {location!r} holds a {type(content).__name__}, not an object",
            ["give a DeepSpeed configuration file: an object with keys such as zero_optimization"],
        )
    return content


def _misspelt(theirs: Mapping[str, Any]) -> Iterator[str]:
    known = _KNOWN.split()
    for key in theirs:
        near = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if near:
            yield f"{key}: DeepSpeed does not know it and would pass over it; did you mean {near[0]!r}?"


def _conflicts(theirs: Mapping[str, Any], derived: Mapping[str, Any]) -> Iterator[str]:
    for path, value in _leaves(theirs):
        if value == _AUTO:
            continue
        said = path if path in _SAID_BY else f"{path}.device"  # null for a whole section is no device
        if path == "fp16.enabled" and value:
            yield f"{path} = {_shown(value)}: activations of Gemma overflow float16; require bf16"
        elif said in _SAID_BY and not _same(value, ours := _at(derived, said)):
            yield f"{path} = {_shown(value)}, and the recipe says {_shown(ours)} ({_SAID_BY[said]})"
        elif path in _NEEDED and not _same(value, _NEEDED[path]):
            yield f"{path} = {_shown(value)}, and ray-ft needs {_shown(_NEEDED[path])}"
        elif value is not None and isinstance(_at(derived, path), Mapping):
            yield f"{path} = {_shown(value)}, and DeepSpeed reads a section there"
    for path, needed in _NEEDED.items():
        if isinstance(value := _at(theirs, path), Mapping):
            yield f"{path} = {_shown(value)}, and ray-ft needs {_shown(needed)}"


def _optimizer_faults(theirs: Mapping[str, Any], train: Train) -> Iterator[str]:
    """The recipe builds the optimizer and its schedule; the JSON's are accepted where they say the same."""
    mine = train.optimizer
    said = {"lr": mine.lr, "betas": list(mine.betas), "eps": mine.eps, "weight_decay": mine.weight_decay}
    for path, value in _leaves(theirs.get("optimizer") or {}, "optimizer."):
        key = path.rpartition(".")[2]
        if path == "optimizer.type":
            if str(value).lower() not in (mine.name, _AUTO):
                yield f"{path} = {_shown(value)}, and the recipe says {_shown(mine.name)} (train.optimizer.name)"
        elif key not in said:
            yield f"{path} = {_shown(value)}: the recipe builds the optimizer, and train.optimizer has no such setting"
        elif value != _AUTO and not _same(value, said[key]):
            yield f"{path} = {_shown(value)}, and the recipe says {_shown(said[key])} (train.optimizer.{key})"
    scheduler = _SCHEDULERS[train.schedule.name]
    for path, value in _leaves(theirs.get("scheduler") or {}, "scheduler."):
        if value != (scheduler if path == "scheduler.type" else _AUTO) and value != _AUTO:
            yield f"{path} = {_shown(value)}: the recipe sets the learning rate (train.schedule: {train.schedule.name})"


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _at(section: Mapping[str, Any], path: str) -> Any:
    found: Any = section
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _same(theirs: Any, ours: Any) -> bool:
    if theirs == ours:  # also 1 and 1.0
        return True
    # Both switched off: null, false and "none" say the same.
    return all(value in (None, False, "none", 0) for value in (theirs, ours))


def _shown(value: Any) -> str:
    return json.dumps(value)


def _merged(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(ours)
    for key, value in theirs.items():
        mine = ours.get(key)
        if isinstance(value, Mapping):
            found[key] = _merged(value, mine if isinstance(mine, Mapping) else {})
        elif value != _AUTO and not (isinstance(mine, Mapping) and value is None):
            found[key] = value
    return found
