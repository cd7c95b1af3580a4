"""What vLLM is told, on GPUs and on CPU, and why it failed where it did; that it answers is in tests/integration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_ft.answers import plan
from ray_ft.errors import ModelError, ResourceError
from ray_ft.vllm_failure import cause

GIB = 1 << 30


def model(tmp_path: Path, gib: float, *, heads: int = 32, dtype: str = "bfloat16") -> Any:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(int(gib * GIB))  # a hole: its size is all that counts
    text = SimpleNamespace(
        num_attention_heads=heads, num_key_value_heads=16, head_dim=128, num_hidden_layers=60, hidden_size=4096
    )
    config = SimpleNamespace(get_text_config=lambda: text, to_dict=lambda: vars(text), dtype=dtype)
    return SimpleNamespace(name="m", folder=str(tmp_path), context=8192, config=config)


@pytest.mark.parametrize(
    ("gib", "gpus", "card", "split", "engines"),
    [(2, 8, 80, 1, 8), (54, 8, 80, 1, 8), (57, 8, 80, 2, 4), (57, 3, 80, 2, 1), (54, 8, 24, 4, 2), (140, 8, 80, 4, 2)],
)
def test_as_few_gpus_for_an_engine_as_hold_the_model(
    tmp_path: Path, gib: float, gpus: int, card: int, split: int, engines: int
) -> None:
    found = plan.plan_gpus(model(tmp_path, gib), gpus, card * GIB)
    assert (found.gpus, found.engines, found.kwargs["tensor_parallel_size"]) == (split, engines, split)
    assert found.kwargs["dtype"] == "bfloat16" and found.kwargs["max_model_len"] == 8192


def test_float32_weights_take_half_in_bfloat16(tmp_path: Path) -> None:
    assert plan.plan_gpus(model(tmp_path, 100, dtype="float32"), 8, 80 * GIB).gpus == 1


def test_a_split_divides_the_heads(tmp_path: Path) -> None:
    assert plan.plan_gpus(model(tmp_path, 60, heads=9), 8, 40 * GIB).gpus == 3


@pytest.mark.parametrize(
    ("gpus", "heads", "said"),
    [(1, 32, r"1 GPU\(s\) of 80 GiB.*4 of them \(tensor parallel\) would hold it"), (8, 1, "no number of them")],
)
def test_too_large_a_model_says_what_tensor_parallel_would_do(tmp_path: Path, gpus: int, heads: int, said: str) -> None:
    with pytest.raises(ResourceError, match=said):
        plan.plan_gpus(model(tmp_path, 140, heads=heads), gpus, 80 * GIB)


def test_on_cpu_the_cache_takes_half_of_what_is_left_at_most(tmp_path: Path) -> None:
    per_token = 2 * 60 * 16 * 128 * 2  # keys and values, layers, heads, size, bytes
    what = model(tmp_path, 4)
    found = plan.plan_cpu(what, 6, 30 * GIB)
    assert found.kwargs["kv_cache_memory_bytes"] == (30 - 4 - 2) * GIB // 2
    assert (found.gpus, found.cpus, found.env["OMP_NUM_THREADS"]) == (0, 6, "6")
    plenty = plan.plan_cpu(what, 6, 900 * GIB)
    assert plenty.kwargs["kv_cache_memory_bytes"] == plan.MAX_NUM_SEQS_CPU * 8192 * per_token
    with pytest.raises(ResourceError, match=r"the largest node has 12\.0"):
        plan.plan_cpu(what, 6, 12 * GIB)


def test_a_model_that_vllm_would_answer_for_as_another_is_refused(tmp_path: Path) -> None:
    what = model(tmp_path, 4)
    what.config.to_dict = lambda: {"model_type": "gemma3n_text"}
    for refused in (lambda: plan.plan_cpu(what, 6, 30 * GIB), lambda: plan.plan_gpus(what, 8, 80 * GIB)):
        with pytest.raises(ModelError, match="leaves the embeddings of each layer out"):
            refused()


def test_the_cause_is_what_the_engine_wrote_first(tmp_path: Path) -> None:
    told = "actor died, \x1b[36mray::MapWorker()\x1b[39m (pid=77, ip=127.0.0.1)\nRuntimeError: Engine core failed."
    assert cause(told, tmp_path)[0] == "RuntimeError: Engine core failed."
    (tmp_path / "worker-ab-77.out").write_text(
        "\x1b[0;36m(EngineCore pid=9)\x1b[0;0m ERROR 11-21 17:10:05 [core.py:1] Traceback\n"
        "\x1b[0;36m(EngineCore pid=9)\x1b[0;0m ERROR 11-21 17:10:05 [core.py:1] ValueError: no such layer\n"
        "(EngineCore pid=9) RuntimeError: gave up\n"
    )
    assert cause(told, tmp_path)[0] == "ValueError: no such layer"
    assert cause("", tmp_path)[0] == "no reason given"
