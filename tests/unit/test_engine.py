"""The arithmetic from manifest and cluster to engine settings, and what is refused before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_ft.errors import ServeError
from ray_ft.paths import Manifest
from serving import app, engine, run
from serving.engine import GIB, Cluster

ROOT = Path(__file__).parents[2]
GEMMA_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128},
}
SMALL = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 128, "head_dim": 32}


def manifest(*, parameters: int = 3_200_000, dtype: str = "float32", positions: int = 2048, **serve: Any) -> Manifest:
    return Manifest(
        "/runs/demo/export",
        {
            "format": 1,
            "run": "demo",
            "model": {"dtype": dtype, "parameters": parameters, "max_position_embeddings": positions},
            "serve": {
                "model_name": None, "host": "127.0.0.1", "port": 8000, "replicas": 1, "max_model_len": None,
                "max_num_seqs": 64, "gpus_per_replica": 1, **serve,
            },
        },
    )  # fmt: skip


def gpus(count: int, kind: str = "H100") -> Cluster:
    return Cluster(gpus=count, gpu_type=kind, gpu_bytes=int(engine.GPU_GIB[kind] * GIB))


def test_cpu() -> None:
    plan = engine.plan(manifest(max_num_seqs=200), SMALL, Cluster(node_cpus=2, node_memory=16 * GIB))
    assert (plan.device, plan.model_name, plan.replicas, plan.cpus_per_replica) == ("cpu", "demo", 1, 2)
    assert plan.engine["dtype"] == "float32"
    assert plan.engine["enforce_eager"] is True
    assert plan.engine["max_model_len"] == 2048
    assert plan.engine["max_num_seqs"] == plan.max_num_seqs == 200
    assert "tensor_parallel_size" not in plan.engine
    assert plan.env["OMP_NUM_THREADS"] == "2"
    # 200 sequences × 2048 tokens × (2 × 4 layers × 1 head × 32 × 4 bytes)
    assert plan.engine["kv_cache_memory_bytes"] == 200 * 2048 * 1024


@pytest.mark.parametrize(("replicas", "nodes", "threads"), [(1, 1, 8), (2, 1, 4), (3, 1, 2), (2, 2, 8), (16, 1, 1)])
def test_cpu_threads_are_shared_by_the_replicas_of_a_node(replicas: int, nodes: int, threads: int) -> None:
    cluster = Cluster(nodes=nodes, node_cpus=8, node_memory=64 * GIB)
    plan = engine.plan(manifest(replicas=replicas), SMALL, cluster)
    assert plan.replicas == replicas
    assert plan.env["OMP_NUM_THREADS"] == str(threads) == str(plan.cpus_per_replica)


def test_cpu_kv_cache_takes_at_most_half_of_what_the_weights_leave() -> None:
    big = manifest(parameters=2_000_000_000, dtype="bfloat16", positions=131_072)
    hf = {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    plan = engine.plan(big, hf, Cluster(node_cpus=8, node_memory=24 * GIB))
    free = 24 * GIB - 4_000_000_000 - engine.CPU_OVERHEAD
    assert plan.engine["kv_cache_memory_bytes"] == free // 2
    assert plan.engine["dtype"] == "bfloat16"


def test_cpu_without_room_says_what_is_needed() -> None:
    with pytest.raises(ServeError, match=r"can have 4\.0 GiB.*needs \d+\.\d: 11\.9 for the weights") as caught:
        engine.plan(manifest(parameters=3_200_000_000), SMALL, Cluster(node_cpus=2, node_memory=4 * GIB))
    assert "serve.replicas" in str(caught.value)


def test_cpu_without_room_for_the_context_says_which_would_fit() -> None:
    hf = {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    cluster = Cluster(node_cpus=8, node_memory=8 * GIB)
    model = manifest(parameters=1_000_000_000, positions=131_072)
    with pytest.raises(ServeError, match="max_model_len = 8192") as caught:
        engine.plan(model, hf, cluster)
    fits = int(str(caught.value).split("max_model_len to at most ")[1].split()[0])
    engine.plan(model, hf, cluster, max_model_len=fits)
    with pytest.raises(ServeError):
        engine.plan(model, hf, cluster, max_model_len=fits + 1)


def test_gpu() -> None:
    model = manifest(parameters=27_000_000_000, positions=131_072, gpus_per_replica=2, replicas=3, max_num_seqs=200)
    plan = engine.plan(model, GEMMA_27B, gpus(8))
    assert (plan.device, plan.gpus_per_replica, plan.replicas) == ("gpu", 2, 3)
    assert plan.engine == {
        "max_model_len": 8192,
        "max_num_seqs": 200,
        "dtype": "bfloat16",  # also of a float32 export
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.9,
    }
    assert "OMP_NUM_THREADS" not in plan.env


def test_gpu_too_small_says_how_many_would_do() -> None:
    model = manifest(parameters=27_000_000_000, positions=131_072)
    with pytest.raises(ServeError, match=r"gpus_per_replica = 1: .* needs 5\d\.\d GiB") as caught:
        engine.plan(model, GEMMA_27B, gpus(8, "A100-40G"))
    assert "set serve.gpus_per_replica to 2\n" in str(caught.value)
    engine.plan(
        manifest(parameters=27_000_000_000, positions=131_072, gpus_per_replica=2), GEMMA_27B, gpus(8, "A100-40G")
    )


def test_gpu_advice_beyond_the_cluster_says_so() -> None:
    with pytest.raises(ServeError, match=r"gpus_per_replica to 4 \(the cluster now has 2 GPUs\)"):
        engine.plan(manifest(parameters=27_000_000_000), GEMMA_27B, gpus(2, "L4"))


def test_gpu_of_unknown_memory_is_not_refused() -> None:
    plan = engine.plan(manifest(parameters=27_000_000_000), GEMMA_27B, Cluster(gpus=1))
    assert plan.engine["tensor_parallel_size"] == 1


def test_gpus_must_divide_the_heads() -> None:
    with pytest.raises(ServeError, match="3 does not divide the model's 32 attention heads") as caught:
        engine.plan(manifest(gpus_per_replica=3), GEMMA_27B, gpus(8))
    assert "2 or 4" in str(caught.value)


def test_context_longer_than_the_model() -> None:
    with pytest.raises(ServeError, match=r"serve\.max_model_len = 4096 is longer than the 2048 positions"):
        engine.plan(manifest(max_model_len=4096), SMALL, Cluster())


def test_context_default_is_8192_at_most() -> None:
    plan = engine.plan(manifest(positions=131_072), SMALL, Cluster(node_memory=64 * GIB))
    assert plan.engine["max_model_len"] == 8192


def test_name() -> None:
    assert engine.plan(manifest(model_name="org/words"), SMALL, Cluster()).model_name == "org/words"
    assert engine.plan(manifest(model_name="a"), SMALL, Cluster(), model_name="b").model_name == "b"
    with pytest.raises(ServeError, match="':'"):
        engine.plan(manifest(model_name="demo:v2"), SMALL, Cluster())


# ------------------------------------------------------------------------------------------------------ application


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "needs the argument 'run'"),
        ({"run": ""}, "needs the argument 'run'"),
        ({"run": "r", "replica": 2}, "did you mean 'replicas'"),
        ({"run": "r", "colour": "red"}, "known: run"),
        ({"run": "r", "replicas": "two"}, "replicas = 'two'"),
        ({"run": "r", "replicas": 0}, "at least 1"),
        ({"run": "r", "max_model_len": "7"}, "at least 8"),
        ({"run": "r", "max_model_len": 8.5}, "not a whole number"),
    ],
)
def test_bad_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        app.check_args(args)


def test_arguments_as_text_or_numbers() -> None:
    expected = {"run": "r", "replicas": 2, "max_model_len": 64}
    assert app.check_args({"run": "r", "replicas": "2", "max_model_len": "64"}) == expected
    assert app.check_args({"run": "r", "replicas": 2, "max_model_len": 64, "model_name": None}) == expected


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    sizes = {name: {"bytes": len(text), "sha256": ""} for name, text in files.items()}
    (folder / "manifest.json").write_text(json.dumps({**manifest().content, "files": sizes}))


def test_load_finds_the_export_of_a_run(tmp_path: Path) -> None:
    write(tmp_path / "export", {"config.json": json.dumps(SMALL), "model.safetensors": "abc"})
    for place in (tmp_path, tmp_path / "export", tmp_path.as_uri()):
        found, hf = app.load(str(place))
        assert found.run == "demo" and hf == SMALL


def test_load_names_missing_and_short_files(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": json.dumps(SMALL), "model.safetensors": "abcdef", "tokenizer.json": "{}"})
    (tmp_path / "model.safetensors").write_text("abc")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ServeError, match=r"model\.safetensors has 3 bytes instead of 6; tokenizer\.json is missing"):
        app.load(str(tmp_path))


def test_planning_loads_neither_torch_nor_ray() -> None:
    code = "import sys, serving.engine, serving.app, serving.run; print({'torch', 'ray', 'vllm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------------- running


def test_failure_shows_the_workers_error(tmp_path: Path) -> None:
    (tmp_path / "worker-ab-01000000-77.out").write_text(
        "(Worker pid=9) INFO 11-21 02:58:41 [model.py:1] Loading\n"
        "(Worker pid=9) ERROR 11-21 02:58:41 [executor.py:953] Traceback (most recent call last):\n"
        '(Worker pid=9) ERROR 11-21 02:58:41 [executor.py:953]   File "gemma3.py", line 5, in load\n'
        "(Worker pid=9) ERROR 11-21 02:58:41 [executor.py:953] RuntimeError: The size of tensor a (96)\n"
        "(EngineCore pid=8) ERROR 11-21 02:58:42 [core.py:3] RuntimeError: Worker failed\n"
    )
    error = run._failure(
        "Deploying failed.\n\x1b[36mray::Server\x1b[39m (pid=77, ip=127.0.0.1)\n  RuntimeError: Engine core failed",
        tmp_path,
    )
    assert str(error).startswith("the model did not start: RuntimeError: The size of tensor a (96)\n")
    assert "gemma3.py" in str(error) and "Worker failed" not in str(error)


def test_failure_without_logs_shows_what_serve_was_told(tmp_path: Path) -> None:
    error = run._failure("Error:\n(pid=77)\nTraceback\n  ray_ft.errors.ServeError: model folder is not there", tmp_path)
    assert "ray_ft.errors.ServeError: model folder is not there" in error.what


def test_endpoint_command_survives_a_shell() -> None:
    import shlex

    endpoint = run.Endpoint("http://127.0.0.1:1/v1", "it's", chat=True)
    words = shlex.split(endpoint.curl())
    assert words[1] == "http://127.0.0.1:1/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "it's"
    assert "/v1/completions" in run.Endpoint("http://127.0.0.1:1/v1", "x", chat=False).curl()


def test_port_of_another_machine() -> None:
    with pytest.raises(ServeError, match=r"192\.0\.2\.1") as caught:
        run.check_port("192.0.2.1", 8000)
    assert "--host 127.0.0.1" in str(caught.value)
