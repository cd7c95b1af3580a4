"""The arithmetic from manifest and cluster to engine settings, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_ft import quickstart
from ray_ft.artifacts import Manifest
from ray_ft.data.samples import Conversation
from ray_ft.errors import DataError, RecipeError, ServeError
from ray_ft.evaluate import Question
from ray_ft.recipe import Serve
from ray_ft.vllm_needs import CPU_OVERHEAD
from serving import address, app, engine, models, rollout, run
from serving.engine import GIB, Cluster
from serving.models import Model, Served
from serving.run import Replaced

ROOT = Path(__file__).parents[2]
GEMMA_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128},
}
SMALL = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 128, "head_dim": 32}


def content(*, parameters: int = 3_200_000, dtype: str = "float32", positions: int = 2048, **serve: Any) -> Manifest:
    return Manifest(
        "/runs/demo/export",
        {
            "format": 2,
            "run": "demo",
            "step": 3,
            "base": "/models/base",
            "kind": "model",
            "created": "2026-01-01T00:00:00Z",
            "proof": {},
            "files": {},
            "model": {
                "architecture": "Gemma3ForCausalLM", "dtype": dtype, "parameters": parameters,
                "max_position_embeddings": positions,
            },
            "serve": {**Serve().model_dump(mode="json"), "gpus_per_replica": 1, **serve},
        },
    )  # fmt: skip


def model(hf_config: dict[str, Any], adapters: tuple[Served, ...] = (), **given: Any) -> Model:
    manifest = content(**given)
    own = Served("demo", manifest)
    return Model("demo", manifest.folder, manifest.model, hf_config, manifest.serve, own, adapters)


def gpus(count: int, kind: str = "H100") -> Cluster:
    return Cluster(gpus=count, gpu_type=kind, gpu_bytes=int(engine.GPU_GIB[kind] * GIB))


def test_cpu() -> None:
    plan = engine.plan(model(SMALL, max_num_seqs=200), Cluster(node_cpus=2, node_memory=16 * GIB))
    assert (plan.device, plan.replicas, plan.cpus_per_replica) == ("cpu", (1, 1), 2)
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
    plan = engine.plan(model(SMALL, replicas=replicas), cluster)
    assert plan.replicas == (replicas, replicas)
    assert plan.env["OMP_NUM_THREADS"] == str(threads) == str(plan.cpus_per_replica)


def test_cpu_kv_cache_takes_at_most_half_of_what_the_weights_leave() -> None:
    hf = {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    big = model(hf, parameters=2_000_000_000, dtype="bfloat16", positions=131_072)
    plan = engine.plan(big, Cluster(node_cpus=8, node_memory=24 * GIB))
    free = 24 * GIB - 4_000_000_000 - CPU_OVERHEAD
    assert plan.engine["kv_cache_memory_bytes"] == free // 2
    assert plan.engine["dtype"] == "bfloat16"


def test_cpu_without_room_says_what_is_needed() -> None:
    with pytest.raises(ServeError, match=r"can have 4\.0 GiB.*needs \d+\.\d: 11\.9 for the weights") as caught:
        engine.plan(model(SMALL, parameters=3_200_000_000), Cluster(node_cpus=2, node_memory=4 * GIB))
    assert "serve.replicas" in str(caught.value)


def test_a_model_that_sees_is_refused_on_cpu_where_vllm_could_not_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = {"model_type": "other", "text_config": SMALL, "vision_config": {}}
    cluster = Cluster(node_cpus=8, node_memory=24 * GIB)
    for there in (None, object()):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=there: there)
        if there is None:
            with pytest.raises(ServeError, match="by torchvision, which is not installed"):
                engine.plan(model(seeing), cluster)
            assert engine.plan(model({**seeing, "model_type": "gemma3"}), cluster).device == "cpu"
            engine.plan(model(SMALL), cluster)
        else:
            assert engine.plan(model(seeing), cluster).device == "cpu"


def test_a_gemma_3n_is_refused_where_vllm_lacks_timm_or_would_answer_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"text_config": SMALL, "model_type": "gemma3n"}
    cluster = Cluster(node_cpus=8, node_memory=24 * GIB)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "timm" else object())
    with pytest.raises(ServeError, match="by timm, which is not installed"):
        engine.plan(model(whole), cluster)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert engine.plan(model(whole), cluster).device == "cpu"
    with pytest.raises(ServeError, match="leaves the embeddings of each layer out"):
        engine.plan(model({**SMALL, "model_type": "gemma3n_text"}), cluster)


def test_cpu_without_room_for_the_context_says_which_would_fit() -> None:
    hf = {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    cluster = Cluster(node_cpus=8, node_memory=8 * GIB)
    given = {"parameters": 1_000_000_000, "positions": 131_072}
    with pytest.raises(ServeError, match="max_model_len = 8192") as caught:
        engine.plan(model(hf, **given), cluster)
    fits = int(str(caught.value).split("max_model_len to at most ")[1].split()[0])
    engine.plan(model(hf, **given, max_model_len=fits), cluster)
    with pytest.raises(ServeError):
        engine.plan(model(hf, **given, max_model_len=fits + 1), cluster)


def test_gpu() -> None:
    big = model(
        GEMMA_27B, parameters=27_000_000_000, positions=131_072, gpus_per_replica=2, replicas=3, max_num_seqs=200
    )
    plan = engine.plan(big, gpus(8))
    assert (plan.device, plan.gpus_per_replica, plan.replicas) == ("gpu", 2, (3, 3))
    assert plan.engine == {
        "max_model_len": 8192,
        "max_num_seqs": 200,
        "enable_prefix_caching": True,
        "seed": 0,
        "allowed_media_domains": ["none.invalid"],
        "dtype": "bfloat16",  # also of a float32 export
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.9,
    }
    assert "OMP_NUM_THREADS" not in plan.env


def test_gpu_too_small_says_how_many_would_do() -> None:
    given: dict[str, Any] = {"parameters": 27_000_000_000, "positions": 131_072}
    with pytest.raises(ServeError, match=r"gpus_per_replica = 1: .* needs 5\d\.\d GiB") as caught:
        engine.plan(model(GEMMA_27B, **given), gpus(8, "A100-40G"))
    assert "set serve.gpus_per_replica to 2\n" in str(caught.value)
    engine.plan(model(GEMMA_27B, **given, gpus_per_replica=2), gpus(8, "A100-40G"))


def test_gpus_are_sized_for_the_model() -> None:
    """27B in bfloat16 takes 51 GiB: one H100, two A100 of 40 GB, four L4 (heads divide by 4, not by 3)."""
    big = model(GEMMA_27B, parameters=27_432_406_640, positions=131_072, gpus_per_replica=None)
    sizes = {kind: engine.plan(big, gpus(8, kind)).gpus_per_replica for kind in ("H100", "A100-40G", "L4")}
    assert sizes == {"H100": 1, "A100-40G": 2, "L4": 4}


def test_replicas_that_follow_the_load() -> None:
    plan = engine.plan(model(SMALL, replicas=[0, 4], target_requests=8), Cluster(node_cpus=8, node_memory=64 * GIB))
    options = engine.serve_options(plan)
    assert options["num_replicas"] is None
    assert options["autoscaling_config"] == {
        "min_replicas": 0, "initial_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8,
    }  # fmt: skip
    assert plan.cpus_per_replica == 2, "each of the most that there may be has its threads"
    fixed = engine.serve_options(engine.plan(model(SMALL), Cluster(node_memory=64 * GIB)))
    assert fixed["num_replicas"] == 1 and "autoscaling_config" not in fixed
    assert fixed["max_ongoing_requests"] == 64


def test_adapters_share_an_engine() -> None:
    adapters = []
    for name, rank in (("a", 4), ("b", 12)):
        given = content()
        adapters.append(Served(name, Manifest(given.folder, {**given.content, "model": {**given.model, "rank": rank}})))
    plan = engine.plan(model(SMALL, tuple(adapters)), Cluster(node_memory=64 * GIB))
    settings = {key: plan.engine[key] for key in ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank")}
    assert settings == {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 3, "max_lora_rank": 16}
    on_gpu = engine.plan(model(SMALL, tuple(adapters) * 5), gpus(1)).engine
    assert (on_gpu["max_loras"], on_gpu["max_cpu_loras"]) == (8, 10)


def test_a_classifier_needs_no_engine() -> None:
    found = model(SMALL)
    found = dataclasses.replace(found, facts={**found.facts, "architecture": "Gemma3TextForSequenceClassification"})
    plan = engine.plan(found, Cluster(node_cpus=2))
    assert plan.engine == {"max_model_len": 2048} and plan.cpus_per_replica == 2


def test_gpu_advice_beyond_the_cluster_says_so() -> None:
    with pytest.raises(ServeError, match=r"gpus_per_replica to 4 \(the cluster now has 2 GPUs\)"):
        engine.plan(model(GEMMA_27B, parameters=27_000_000_000), gpus(2, "L4"))


def test_gpu_of_unknown_memory_is_not_refused() -> None:
    plan = engine.plan(model(GEMMA_27B, parameters=27_000_000_000), Cluster(gpus=1))
    assert plan.engine["tensor_parallel_size"] == 1


@pytest.mark.parametrize(("replicas", "each", "most"), [(3, 1, "at most 2\n"), (2, 2, "at most 1\n"), (1, 4, None)])
def test_more_gpus_than_this_machine_has(replicas: int, each: int, most: str | None) -> None:
    asked = model(GEMMA_27B, replicas=replicas, gpus_per_replica=each)
    numbers = f"replicas = {replicas} × serve.gpus_per_replica = {each} need {replicas * each} GPUs; this machine has 2"
    with pytest.raises(ServeError, match=numbers) as caught:
        engine.plan(asked, gpus(2))
    ways = str(caught.value)
    assert most in ways if most else "at most" not in ways
    assert ("lower serve.gpus_per_replica" in ways) == (each > 1)
    shared = Cluster(gpus=2, private=False)  # whose autoscaler may add some: Serve waits and says so
    assert engine.plan(asked, shared).replicas == (replicas, replicas)


@pytest.mark.parametrize("kind", ["V100", "P100", "T4"])
def test_gpu_without_bfloat16(kind: str) -> None:
    with pytest.raises(ServeError, match=rf"{kind} GPUs cannot compute in bfloat16.*float16.*overflow") as caught:
        engine.plan(model(SMALL), gpus(1, kind))
    assert "Ampere" in str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "address", "expected"),
    [
        (["A100", "L4"], "10.0.0.1", ("L4", 22.5, False)),
        (["A10G", "V100"], "10.0.0.1", ("V100", 22.5, False)),  # not the smallest, but a replica may land there
        (["T4", "NEW"], "10.0.0.1", ("T4", None, False)),
        (["H100"], "127.0.0.1", ("H100", 80, True)),
    ],
)
def test_cluster_of_some_gpus(
    kinds: list[str], address: str, expected: tuple[str, float | None, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Context:
        def get_node_id(self) -> str:
            return "0"

    nodes = [
        {
            "NodeID": str(number),
            "Alive": True,
            "NodeManagerAddress": address,
            "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 64.0 * GIB, f"accelerator_type:{kind}": 1.0},
        }
        for number, kind in enumerate(kinds)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    found = Cluster.read()
    kind, gib, private = expected
    assert (found.gpus, found.gpu_type, found.private) == (len(kinds), kind, private)
    assert found.gpu_bytes == (None if gib is None else int(gib * GIB))


def test_gpus_must_divide_the_heads() -> None:
    with pytest.raises(ServeError, match="3 does not divide the model's 32 attention heads") as caught:
        engine.plan(model(GEMMA_27B, gpus_per_replica=3), gpus(8))
    assert "2 or 4" in str(caught.value)


def test_context_longer_than_the_model() -> None:
    with pytest.raises(ServeError, match=r"serve\.max_model_len = 4096 is longer than the 2048 positions"):
        engine.plan(model(SMALL, max_model_len=4096), Cluster())


def test_context_default_is_8192_at_most() -> None:
    plan = engine.plan(model(SMALL, positions=131_072), Cluster(node_memory=64 * GIB))
    assert plan.engine["max_model_len"] == 8192


def test_name() -> None:
    assert models.check_name("org/words") == "org/words"
    for name in ("demo:v2", "..", "a/../b", "/etc", "", "a\nb"):
        with pytest.raises(ServeError, match="cannot be a model's name"):
            models.check_name(name)


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
    expected = {"run": ["r"], "replicas": 2, "max_model_len": 64}
    assert app.check_args({"run": "r", "replicas": "2", "max_model_len": "64"}) == expected
    assert app.check_args({"run": "r", "replicas": 2, "max_model_len": 64, "model_name": None}) == expected


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    sizes = {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()} for name, text in files.items()
    }
    (folder / "manifest.json").write_text(json.dumps({**content().content, "files": sizes}))


def test_load_finds_the_export_of_a_run(tmp_path: Path) -> None:
    write(tmp_path / "export", {"config.json": json.dumps(SMALL), "model.safetensors": "abc"})
    for place in (tmp_path, tmp_path / "export", tmp_path.as_uri()):
        (found,) = models.load([str(place)])
        assert found.name == "demo" and found.hf_config == SMALL


def test_load_names_missing_and_short_files(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": json.dumps(SMALL), "model.safetensors": "abcdef", "tokenizer.json": "{}"})
    (tmp_path / "model.safetensors").write_text("abc")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ServeError, match=r"model\.safetensors has 3 bytes instead of 6; tokenizer\.json is missing"):
        models.load([str(tmp_path)])


def test_a_file_that_changed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"config.json": json.dumps(SMALL), "model.safetensors": "abcdef"})
    (tmp_path / "model.safetensors").write_text("abcdeF")
    with pytest.raises(ServeError, match=r"model\.safetensors has another checksum"):
        models.load([str(tmp_path)])
    monkeypatch.setattr(models, "SMALL", 4)  # then the weights are left to the replica
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (found,) = models.load([str(tmp_path)])
    assert found.own is not None
    with pytest.raises(ServeError, match=r"model\.safetensors has another checksum"):
        models.check_weights(found.folder, found.own.manifest.content["files"])


def test_models_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, {"config.json": json.dumps(SMALL)})
    with pytest.raises(ServeError, match="two models have the name 'demo'"):
        models.load([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(ServeError, match="one model name, 'x', for 2 runs"):
        models.load([str(tmp_path / "a"), str(tmp_path / "b")], model_name="x")


def test_an_adapter_may_not_hide_its_base(tmp_path: Path) -> None:
    """vLLM would answer with the base where both have one name."""
    write(tmp_path / "words", {"config.json": json.dumps(SMALL)})
    write(tmp_path / "run", {"adapter_config.json": "{}"})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest |= {"kind": "adapter", "base": str(tmp_path / "words"), "run": "words"}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ServeError, match="an adapter has the name of its base, 'words'"):
        models.load([str(tmp_path / "run")])
    (found,) = models.load([str(tmp_path / "run")], model_name="mine")
    assert [each.name for each in found.served] == ["mine"]


def test_serves_own_tools_need_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_FT_API_KEYS", raising=False)
    write(tmp_path, {"config.json": json.dumps(SMALL)})
    with pytest.raises(ServeError, match="there are no API keys"):
        app.build({"run": str(tmp_path)})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["serve"]["gateway"]["open"] = True
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ServeError, match=r"serve\.gateway\.open asks for no key, and where Serve's own proxy listens"):
        app.build({"run": str(tmp_path)})


def test_keys_file_is_looked_for_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(run, "_ray", lambda *_: pytest.fail("Ray was started"))
    write(tmp_path, {"config.json": json.dumps(SMALL)})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["serve"]["gateway"]["api_keys_file"] = "keys.txt"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    settings, _ = app.gateway_of(models.load([str(tmp_path)]))
    assert settings["api_keys_file"] == str(tmp_path / "keys.txt")
    settings, _ = app.gateway_of(models.load([str(tmp_path)]), "others.txt")
    assert settings["api_keys_file"] == str(tmp_path / "others.txt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ServeError, match=r"keys\.txt.*cannot be read"):
        run.served(str(tmp_path), Replaced(port=port)).__enter__()


def test_another_version_is_another_engine(tmp_path: Path) -> None:
    write(tmp_path / "a", {"config.json": json.dumps(SMALL), "model.safetensors": "1"})
    write(tmp_path / "b", {"config.json": json.dumps(SMALL), "model.safetensors": "2"})
    (one,), (same,), (other,) = (models.load([str(tmp_path / each)]) for each in ("a", "a", "b"))
    assert app.name_of(one) == app.name_of(same) != app.name_of(other)
    (longer,) = models.load([str(tmp_path / "a")], max_model_len=64)
    assert app.name_of(longer) != app.name_of(one)


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
    error = rollout.failure(
        "Deploying failed.\n\x1b[36mray::Server\x1b[39m (pid=77, ip=127.0.0.1)\n  RuntimeError: Engine core failed",
        tmp_path,
    )
    assert str(error).startswith("the model did not start: RuntimeError: The size of tensor a (96)\n")
    assert "gemma3.py" in str(error) and "Worker failed" not in str(error)


def test_failure_without_logs_shows_what_serve_was_told(tmp_path: Path) -> None:
    error = rollout.failure(
        "Error:\n(pid=77)\nTraceback\n  ray_ft.errors.ServeError: model folder is not there", tmp_path
    )
    assert "ray_ft.errors.ServeError: model folder is not there" in error.what


def test_endpoint_command_survives_a_shell() -> None:
    import shlex

    endpoint = run.Endpoint("http://127.0.0.1:1/v1", "it's", chat=True)
    words = shlex.split(endpoint.curl())
    assert words[1] == "http://127.0.0.1:1/v1/chat/completions"
    assert words[3] == "Authorization: Bearer $RAY_FT_API_KEY"
    assert json.loads(words[-1])["model"] == "it's"
    made = run.Endpoint("http://127.0.0.1:1/v1", "x", chat=True, key="rft-1")
    assert "Bearer rft-1" in made.curl() and made.page() == "http://127.0.0.1:1/playground/#key=rft-1"
    assert "Authorization" not in run.Endpoint("http://127.0.0.1:1/v1", "x", chat=True, open=True).curl()
    labels = run.Endpoint("http://127.0.0.1:1/v1", "x", chat=False, classifies=True).curl()
    assert "/v1/classify" in labels and '{"model": "x", "input": "Hello!"}' in labels
    assert "/v1/completions" in run.Endpoint("http://127.0.0.1:1/v1", "x", chat=False).curl()


def test_port_of_another_machine() -> None:
    with pytest.raises(ServeError, match=r"192\.0\.2\.1") as caught:
        address.check_port("192.0.2.1", 8000)
    assert "--host 127.0.0.1" in str(caught.value)


def test_host_that_nobody_knows() -> None:
    with pytest.raises(ServeError, match=r"'nosuchhost\.invalid'") as caught:
        address.check_port("nosuchhost.invalid", 8000)
    assert "Unknown error" not in str(caught.value)
    assert caught.value.ways_out == ("choose an address of this machine: --host 127.0.0.1",)


@pytest.mark.parametrize("port", [99_999, 65_536, -1, 0])
@pytest.mark.parametrize("cluster", ["", "10.0.0.1:6379"])
def test_port_that_is_none(port: int, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    monkeypatch.setattr(run, "_ray", lambda *_: pytest.fail("Ray was started"))
    write(tmp_path, {"config.json": json.dumps(SMALL)})
    for refused in (
        lambda: address.check_port("127.0.0.1", port),
        run.served(str(tmp_path), Replaced(port=port)).__enter__,
    ):
        with pytest.raises(ServeError, match=rf"serve\.port {port} is not a port: they go from 1 to 65535"):
            refused()


# ------------------------------------------------------------------------------------------- quickstart, and proxies


class Echo(BaseHTTPRequestHandler):
    """Answers every request as a model would that says "ok"."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def behind_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of an `Echo` on this machine, where http_proxy names a proxy that does not answer."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_clients_of_this_machine_use_no_proxy(behind_proxy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(quickstart, "START_SECONDS", 60)
    popen = psutil.Popen
    # As `ray-ft serve` does, it ends on SIGINT also where a shell has this process in the background and ignores it.
    sleep = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); print(flush=True); time.sleep(60)"

    def started(_: Any, env: Any) -> psutil.Popen:
        process = popen([sys.executable, "-c", sleep], stdout=subprocess.PIPE)
        process.stdout.readline()  # else it may be told to end before it has heard of signals
        return process

    monkeypatch.setattr(psutil, "Popen", started)
    question = Question(
        "held-out:1", Conversation(({"role": "user", "content": "one"}, {"role": "assistant", "content": "ok"}))
    )
    with quickstart.serving(["serve"], behind_proxy, "k") as url:
        assert quickstart.ask(url, "k", "demo", [question], 8) == ["ok"]
        clock = iter([0.0, 100.0])  # one failure is too late
        monkeypatch.setattr(run, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
        run._wait_for_http(url, lambda phase: None)


@pytest.mark.parametrize(
    ("name", "step", "error"),
    [
        ("recipe.load", "recipe", RecipeError("the recipe is bad")),
        ("held_out_questions", "questions", DataError("no data")),
    ],
)
def test_quickstart_names_the_step(
    name: str, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart, "_ray_ft", lambda *_: None)
    monkeypatch.setattr(f"ray_ft.quickstart.{name}", fail)
    with pytest.raises(SystemExit) as caught:
        quickstart.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"quickstart failed at step {step}: {error}\n"
