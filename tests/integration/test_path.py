"""The path on a real Ray: prepare → train (FSDP2, two workers) → evaluate → export, on one cluster for the module."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from ray_ft import evaluate, paths, session
from ray_ft import recipe as recipe_module
from ray_ft.artifacts import Manifest
from ray_ft.data import ledger, stream
from ray_ft.data.prepare import prepare
from ray_ft.demo import PROMPT, DemoPaths
from ray_ft.errors import CheckpointError, DataError, ExportError, ModelError, ResourceError
from ray_ft.evaluate import during
from ray_ft.export import export
from ray_ft.recipe import Recipe
from ray_ft.span import Span
from ray_ft.train import checkpoint, launch, shards
from ray_ft.train.metrics import read_metrics
from ray_ft.view import View
from tests.integration.servers import command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 6


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with session.ray_running("", session.OBJECT_STORE_BYTES):
        yield


@pytest.fixture
def view() -> View:
    return View(Console(quiet=True))


Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes recipes over the demo; runs of the whole module share one storage, and with it the prepared data."""
    folder = tmp_path_factory.mktemp("runs")
    rows = {"format": "translation", "prompt": PROMPT}
    content = {
        "run": {"name": "test", "storage": str(folder)},
        "model": {"path": demo.base},
        "data": {
            "train": [{"path": list(demo.train), **rows}],
            "eval": [{"path": demo.heldout, **rows}],
            "seq_len": 128,
        },
        "train": {"strategy": "none", "workers": 0, "global_batch": 8, "micro_batch": 4},
    }
    (folder / "base.yaml").write_text(json.dumps(content))
    return lambda **changes: recipe_module.load(
        str(folder / "base.yaml"), [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    )


@pytest.fixture(scope="module")
def trained(ray_cluster: None, make: Make) -> Recipe:
    """A run of `STEPS` steps on two FSDP2 workers, evaluated on the way."""
    recipe = make(**on_ray(name="trained"))
    outcome = launch.train(recipe, View(Console(quiet=True)))
    assert outcome.complete
    return recipe


def on_ray(**changes: Any) -> dict[str, Any]:
    settings = {
        "run.name": changes.pop("name"),
        "train.workers": 2,
        "train.cpus_per_worker": 0.5,
        "train.strategy": "fsdp",
        "train.max_steps": STEPS,
        "train.global_batch": 8,
        "train.micro_batch": 2,
        "train.log_every": 1,
        "train.eval_every": 3,
        "train.checkpoint.every": 2,
        "train.optimizer.lr": 3e-3,
        "evaluate.max_rows": 12,
        "evaluate.max_new_tokens": 8,
    }
    return settings | changes


def losses(recipe: Recipe) -> list[float]:
    return [row["loss"] for row in read_metrics(recipe.run.dir)]


def test_two_fsdp_workers_on_ray_train_as_one_process_does(trained: Recipe, make: Make, view: View) -> None:
    alone = make(**on_ray(name="alone", **{"train.workers": 0, "train.strategy": "none"}))
    launch.train(alone, view)
    np.testing.assert_allclose(losses(trained), losses(alone), rtol=2e-5)
    ours, theirs = (read_metrics(r.run.dir) for r in (trained, alone))
    np.testing.assert_allclose(
        [r["eval_loss"] for r in ours if "eval_loss" in r],
        [r["eval_loss"] for r in theirs if "eval_loss" in r],
        rtol=2e-5,
    )


def test_labels_are_trained_by_two_workers_as_by_one_and_judged_on_every_row(
    ray_cluster: None, make: Make, label_files: tuple[str, str], view: View
) -> None:
    train, heldout = ([{"path": file, "format": "labels"}] for file in label_files)
    labels = {"model.labels": ["en", "fr", "es", "de"], "data.train": train, "data.eval": heldout}
    labels |= {"train.class_weights": "balanced", "train.strategy": "zero3"}
    recipe = make(**on_ray(name="labels", **labels))
    launch.train(recipe, view)
    alone = make(**on_ray(name="labels-alone", **labels | {"train.workers": 0, "train.strategy": "none"}))
    launch.train(alone, view)
    for key in ("loss", "accuracy", "eval_loss", "eval_accuracy"):
        ours, theirs = ([row[key] for row in read_metrics(r.run.dir) if key in row] for r in (recipe, alone))
        assert len(ours) >= 2
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, err_msg=key)
    found = evaluate.evaluate(recipe.run.dir.root, view)
    last = read_metrics(recipe.run.dir)[-1]
    assert found["rows"] == 400
    assert found["model"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
    assert found["model"]["scores"]["accuracy"] == pytest.approx(last["eval_accuracy"], abs=1e-6)
    assert found["base"]["name"] == "always 'en'"
    assert paths.read_json(recipe.run.dir.evaluation) == found


def test_a_run_in_two_parts_ends_as_one_in_one(trained: Recipe, make: Make, view: View) -> None:
    # The schedule must not notice the break, so it is constant in both.
    constant = {"train.schedule.name": "constant"}
    whole = make(**on_ray(name="whole", **constant, **{"train.workers": 0, "train.strategy": "none"}))
    launch.train(whole, view)
    first = make(**on_ray(name="parts", **constant, **{"train.max_steps": 4}))
    launch.train(first, view)
    rest = make(**on_ray(name="parts", **constant, **{"train.workers": 1, "train.micro_batch": 4}))
    launch.train(rest, view)  # and on another number of workers
    np.testing.assert_allclose(losses(rest), losses(whole), rtol=2e-5)


def test_killed_and_preempted_workers_cost_no_row_and_change_no_loss(
    ray_cluster: None, make: Make, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train.max_steps": 60, "data.ledger": True, "train.failures.max_failures": 1}
    alone = make(**on_ray(name="undisturbed", **settings, **{"train.workers": 0, "train.strategy": "none"}))
    launch.train(alone, view)
    recipe = make(**on_ray(name="disturbed", **settings))
    said: list[str] = []
    monkeypatch.setattr(view, "line", said.append)

    def disturb() -> None:
        for times, (step, number) in enumerate(((5, signal.SIGKILL), (20, signal.SIGTERM)), start=1):
            while (read_metrics(recipe.run.dir) or [{"step": 0}])[-1]["step"] < step:
                time.sleep(0.02)
            children = psutil.Process().children(recursive=True)
            [process for process in children if "RayTrainWorker" in command_line(process)][-1].send_signal(number)
            while sum("training goes on" in line for line in said) < times:
                time.sleep(0.02)

    disturbing = threading.Thread(target=disturb, daemon=True)
    disturbing.start()
    assert launch.train(recipe, view).complete
    disturbing.join(1)

    assert any("died; failure 1 of 1" in line for line in said)
    assert any("a worker was told to go; saved at step" in line and "preemption 1" in line for line in said)
    assert [row["step"] for row in read_metrics(recipe.run.dir)] == list(range(1, 61))
    np.testing.assert_allclose(losses(recipe), losses(alone), rtol=2e-5)
    used, expected = (ledger.read(one.run.dir) for one in (recipe, alone))
    assert used == expected and list(used) == list(range(1, 61))


def test_ray_data_prepares_the_same_rows_as_one_process(ray_cluster: None, make: Make, tmp_path: Path) -> None:
    parts = []
    for name, spread in (("ray", stream.spread), ("here", stream.in_process)):
        recipe = make(**{"run.storage": str(tmp_path / name)})
        parts.append(prepare(recipe, "train", recipe.model.path, spread))
    assert parts[0].units == parts[1].units
    one, other = (p.read(p.units) for p in parts)
    assert np.array_equal(one.input_ids, other.input_ids)
    assert np.array_equal(one.flags, other.flags)


def test_evaluation_finds_the_loss_that_training_reported(trained: Recipe, view: View) -> None:
    report = evaluate.evaluate(trained.run.dir.root, view)
    reported = [row["eval_loss"] for row in read_metrics(trained.run.dir) if "eval_loss" in row][-1]
    assert report["model"]["loss"] == pytest.approx(reported, rel=1e-5)
    assert report["base"]["loss"] > report["model"]["loss"] + 0.1  # of the weights that training began with
    assert report["base"]["target_tokens"] == report["model"]["target_tokens"]
    assert (report["step"], report["engine"], report["rows"]) == (STEPS, "transformers", 12)
    assert "nrefs:1" in report["signatures"]["chrf"]
    assert json.loads(paths.read_text(trained.run.dir.evaluation)) == report
    assert len(paths.read_json(trained.run.dir.examples)["examples"]) == 12


def test_preferences_on_two_workers_as_in_one_process_and_evaluated(
    ray_cluster: None, pair_files: tuple[str, str], make: Make, view: View, tmp_path: Path
) -> None:
    train, heldout = ([{"path": file, "format": "preference"}] for file in pair_files)
    settings = {"data.train": train, "data.eval": heldout, "data.seq_len": 192, "train.max_steps": 3}
    recipe = make(**on_ray(name="pairs", **settings))
    launch.train(recipe, view)
    storage = str(tmp_path)  # where nothing that Ray Data has computed lies
    alone = make(
        **on_ray(name="alone", **settings, **{"train.workers": 0, "train.strategy": "none", "run.storage": storage})
    )
    launch.train(alone, view)
    rows, others = (read_metrics(one.run.dir) for one in (recipe, alone))
    names = ("loss", "reward_margin", "eval_loss", "eval_reward_accuracy", "eval_reward_margin")
    for row, other in zip(rows, others, strict=True):
        expected = {name: other[name] for name in names if name in other}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    report = evaluate.evaluate(recipe.run.dir.root, view)
    model, base = report["model"], report["base"]
    assert model["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)
    assert model["statistics"]["reward_margin"] == pytest.approx(rows[-1]["eval_reward_margin"], rel=1e-4)
    assert model["target_pairs"] == base["target_pairs"] == 30 and model["perplexity"] is None
    assert base["statistics"]["reward_margin"] == 0


def test_validation_goes_on_beside_the_training_and_holds_no_step_up(
    ray_cluster: None, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, last_step, meanwhile = during._Validator.answer, 200, 20

    class Slow(during._Validator):
        def answer(self, prompts: Any) -> during.Answered:
            """Not before training has gone on by some steps, for which one that is held up would wait for ever."""
            begun, until = step(), time.monotonic() + 240
            while step() < min(begun + meanwhile, last_step):
                assert time.monotonic() < until, "training does not go on"
                time.sleep(0.1)
            return answer(self, prompts)

    def step() -> int:
        return int((read_metrics(recipe.run.dir) or [{"step": 0}])[-1]["step"])

    monkeypatch.setattr(during, "_Validator", Slow)
    out = io.StringIO()
    settings = {"evaluate.during": {"every": 10, "max_rows": 4, "gpus": 0}, "train.max_steps": last_step}
    settings |= {"train.checkpoint.every": 10, "train.eval_every": 100, "train.checkpoint.keep": 100}
    recipe = make(**on_ray(name="validated", **settings))
    outcome = launch.train(recipe, View(Console(file=out, soft_wrap=True)), beside=[during.Validation(recipe)])
    assert outcome.complete
    assert "failed" not in out.getvalue()
    assert len(read_metrics(recipe.run.dir)) == last_step
    results = paths.list_dir(recipe.run.dir.validations)
    # One beside the training at least, and the last; checkpoints between were passed over.
    assert results[-1] == "step_00000200.json" and 2 <= len(results) <= last_step / meanwhile + 1
    last = paths.read_json(paths.join(recipe.run.dir.validations, results[-1]))
    assert (last["step"], last["rows"], last["failed"]) == (last_step, 4, 0)
    report = evaluate.evaluate(recipe.run.dir.root, View(Console(quiet=True)), base=False)
    answers = {row["origin"]: row["answer"] for row in report["samples"]}
    asked = {row["origin"]: row["answer"] for row in last["samples"]}
    assert all(answers[origin] == text for origin, text in asked.items() if origin in answers)
    assert "validation of step 200: exact match" in out.getvalue()
    assert [name for name in paths.list_dir(recipe.run.dir.tensorboard) if name == "validation"]


def test_the_export_is_what_was_trained(trained: Recipe, view: View, demo: DemoPaths) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = export(trained.run.dir.root, view, vllm=False)
    assert Manifest.load(trained.run.dir.root).content == manifest.content
    assert manifest.content["step"] == STEPS
    assert manifest.model["stop_token_ids"] == [1, 5]
    model, info = AutoModelForCausalLM.from_pretrained(manifest.folder, output_loading_info=True)
    assert not any(info.values())
    base = AutoModelForCausalLM.from_pretrained(demo.base)
    assert not torch.equal(model.model.norm.weight, base.model.norm.weight)
    tokenizer = AutoTokenizer.from_pretrained(manifest.folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(demo.base).chat_template
    for name, facts in manifest.content["files"].items():
        assert Path(manifest.folder, name).stat().st_size == facts["bytes"]
    assert not [name for name in os.listdir(trained.run.dir.root) if name.startswith(".export-")]


@pytest.fixture
def copied(trained: Recipe, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may damage."""
    return Path(
        shutil.copytree(trained.run.dir.root, tmp_path / "copy", ignore=shutil.ignore_patterns("export", "ray"))
    )


def damage(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the newest checkpoint's weights."""
    found = checkpoint.newest(str(run / "checkpoints"))
    assert found is not None
    index = checkpoint.index(found.location)
    tensors = {key: torch.empty(stored.shape, dtype=stored.dtype) for key, stored in index.items()}
    spans = {key: Span.whole(tensor) for key, tensor in tensors.items()}
    checkpoint.restore(found.location, spans)
    change({key.removeprefix("model/"): tensor for key, tensor in tensors.items() if key.startswith("model/")})
    checkpoint.commit(found.location, found.step, [shards.write(found.location, 0, spans)], found.state)


def test_export_refuses_weights_that_are_not_finite(copied: Path, view: View) -> None:
    damage(copied, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ExportError, match=r"model\.norm\.weight holds values that are not finite"):
        export(str(copied), view, vllm=False)
    assert not (copied / "export").exists()


def test_export_refuses_what_is_still_the_base(copied: Path, view: View, demo: DemoPaths) -> None:
    from safetensors.torch import load_file

    base = load_file(os.path.join(demo.base, "model.safetensors"))
    damage(copied, lambda tensors: [tensor.copy_(base[name]) for name, tensor in tensors.items()] and None)
    with pytest.raises(ExportError, match="no tensor differs from the base"):
        export(str(copied), view, vllm=False)


def test_a_base_in_several_files_is_exported_in_several(
    trained: Recipe, demo: DemoPaths, make: Make, view: View
) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(demo.base, Path(trained.run.storage) / "two-files"))
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, base / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    paths.write_json(str(base / "model.safetensors.index.json"), {"metadata": {}, "weight_map": index})
    recipe = make(**on_ray(name="two-files-run", **{"model.path": str(base), "train.workers": 0}))
    launch.train(recipe, view)
    manifest = export(recipe.run.dir.root, view, vllm=False)
    assert len([name for name in manifest.content["files"] if name.endswith(".safetensors")]) == 2


def test_an_export_replaces_nothing_but_an_export(copied: Path, view: View, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="hold"):
        export(str(copied), view, to=str(precious))
    assert (precious / "thesis.txt").read_text() == "years of work"
    for _ in range(2):  # new, then over itself
        export(str(copied), view, to=str(tmp_path / "new"), vllm=False)
    assert sorted(os.listdir(tmp_path)) == ["copy", "new", "precious"]


def test_an_export_needs_no_raw_data(copied: Path, view: View) -> None:
    resolved = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(resolved.replace("/train/part-", "/gone/part-").replace("heldout", "gone"))
    assert export(str(copied), view, vllm=False).content["step"] == STEPS


def test_a_failed_export_keeps_the_one_before(copied: Path, view: View) -> None:
    export(str(copied), view, vllm=False)
    before = Manifest.load(str(copied)).content
    damage(copied, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    with pytest.raises(ExportError):
        export(str(copied), view, vllm=False)
    assert Manifest.load(str(copied)).content == before


def test_what_is_no_run_is_named(tmp_path: Path, make: Make, view: View) -> None:
    with pytest.raises(CheckpointError, match="no run directory"):
        export(str(tmp_path), view)
    recipe = make(**{"run.name": "untrained"})
    recipe.save()
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        export(recipe.run.dir.root, view)


def test_too_many_workers_are_refused_at_once(ray_cluster: None, make: Make, view: View) -> None:
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"train\.workers = 64") as caught:
        launch.train(make(**on_ray(name="many", **{"train.workers": 64, "train.global_batch": 128})), view)
    assert time.monotonic() - began < 10
    assert any("fewer train.workers" in way for way in caught.value.ways_out)
    with pytest.raises(ResourceError, match="GPU"):
        launch.train(make(**on_ray(name="gpus", **{"train.device": "cuda"})), view)


def test_a_workers_error_arrives_as_what_it_is(
    ray_cluster: None, make: Make, demo: DemoPaths, tmp_path: Path, view: View
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(demo.base, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = make(**on_ray(name="broken", **{"model.path": str(broken)}))
    with pytest.raises(ModelError, match=r"1 missing \(model\.layers\.0\.self_attn\.q_proj\.weight\)"):
        launch.train(recipe, view)
    logs = recipe.run.dir.at("logs")  # of whichever worker came to it first: the others are ended then
    told = [paths.read_text(paths.join(logs, name)) for name in paths.list_dir(logs) if name.startswith("worker-")]
    assert told and all("Traceback" in text for text in told)


def test_fewer_rows_than_workers_still_train(ray_cluster: None, make: Make, tmp_path: Path, view: View) -> None:
    row = {"source_text": "one", "target_text": "un", "source_lang_code": "en", "target_lang_code": "fr"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    changes = {"data.train.0.path": str(tmp_path / "one.jsonl"), "data.eval": [], "train.max_steps": 2}
    recipe = make(**on_ray(name="one-row", **changes))
    assert launch.train(recipe, view).complete
    assert losses(recipe)[1] < losses(recipe)[0]


def test_bad_data_stops_the_run_before_any_worker(ray_cluster: None, make: Make, tmp_path: Path, view: View) -> None:
    (tmp_path / "bad.jsonl").write_text('{"source_text": 1}\nnot json\n')
    recipe = make(**on_ray(name="bad", **{"data.train.0.path": str(tmp_path / "bad.jsonl")}))
    with pytest.raises(DataError, match="all 2 rows were rejected"):
        launch.train(recipe, view)
    recipe = make(**on_ray(name="none", **{"data.train.0.path": str(tmp_path / "*.none.jsonl")}))
    with pytest.raises(DataError, match="matches no file"):
        launch.train(recipe, view)


def test_memory_is_bounded_whatever_the_size_of_the_file(make: Make, tmp_path: Path) -> None:
    """Twenty-four chunks take no more memory than the first two; measured in a process of its own."""
    row = {"source_text": "one " * 50, "target_text": "un " * 50, "source_lang_code": "en", "target_lang_code": "fr"}
    line = json.dumps(row) + "\n"
    (tmp_path / "large.jsonl").write_text(line * (24 * 2**20 // len(line)))
    recipe = make(**{"data.train.0.path": str(tmp_path / "large.jsonl"), "run.storage": str(tmp_path / "runs")})
    recipe.save()
    script = """
import resource, sys
from ray_ft import recipe
from ray_ft.data import prepare, sources, stream, work
sources.CHUNK_BYTES, work.SEGMENT_TOKENS = 1 << 20, 1 << 18
peak = lambda done, total: print(done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
settings = recipe.load(sys.argv[1])
prepare.prepare(settings, "train", settings.model.path, stream.in_process, peak)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, recipe.run.dir.recipe], capture_output=True, text=True, check=True
    )
    peaks = dict(map(int, line.split()) for line in done.stdout.splitlines())
    assert len(peaks) >= 24
    assert peaks[max(peaks)] <= peaks[2] + 24, f"MiB: {peaks}"


def begun(recipe: Recipe, folder: Path, until: Callable[[psutil.Popen], bool]) -> psutil.Popen:
    """`ray-ft train` of a recipe as a command, once it is so far."""
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "ray_ft", "train", str(file)]
    with open(folder / "out.txt", "wb") as out:
        process = psutil.Popen(command, stdout=out, stderr=out)
    wait(process, folder, lambda: until(process))
    return process


def wait(process: psutil.Popen, folder: Path, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, said(folder)
        time.sleep(0.05)


def said(folder: Path) -> str:
    """What the command printed; line breaks are spaces."""
    return " ".join((folder / "out.txt").read_text(errors="replace").split())


def test_ctrl_c_leaves_a_run_that_continues_and_no_process(make: Make, tmp_path: Path) -> None:
    changes = {"train.max_steps": 2000, "train.checkpoint.every": 2000, "train.eval_every": None, "data.eval": []}
    recipe = make(**on_ray(name="interrupted", **changes, **{"run.storage": str(tmp_path)}))
    process = begun(recipe, tmp_path, lambda _: bool(read_metrics(recipe.run.dir)))
    family = process.children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 130, said(tmp_path)
    assert "the same command continues" in said(tmp_path)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    found = checkpoint.newest(recipe.run.dir.checkpoints)
    assert found is not None
    assert found.step == read_metrics(recipe.run.dir)[-1]["step"]


@pytest.mark.parametrize("when", ["workers start", "a step is under way"])
def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(make: Make, tmp_path: Path, when: str) -> None:
    slow = {"train.global_batch": 512, "train.micro_batch": 8, "train.max_steps": 3, "train.epochs": 10}
    recipe = make(**on_ray(name="impatient", **slow, **{"run.storage": str(tmp_path)}))

    def is_time(process: psutil.Popen) -> bool:
        if when == "a step is under way":
            return bool(read_metrics(recipe.run.dir))
        return any("ray::SynchronizationActor" in command_line(one) for one in process.children(recursive=True))

    process = begun(recipe, tmp_path, is_time)
    family = process.children(recursive=True)
    process.send_signal(signal.SIGINT)
    wait(process, tmp_path, lambda: "Ctrl-C again to stop at once" in said(tmp_path))
    time.sleep(1.1)  # within a second of the first, a second one is taken for the same
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, said(tmp_path)
    assert "the same command continues" not in said(tmp_path), "it saved first"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
