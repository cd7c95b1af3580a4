"""Promise 3, the checkpoint: another number of workers goes on as if nothing had been; a broken one costs no run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import recipe_of, run, run_job, run_jobs
from rich.console import Console

from ray_ft import paths
from ray_ft.data import stream
from ray_ft.demo import DemoPaths
from ray_ft.errors import CheckpointError
from ray_ft.train import checkpoint, launch, worker
from ray_ft.train.metrics import read_metrics
from ray_ft.view import View

QUIET = View(Console(quiet=True))
STEPS = 6
TRAINING = [f"train.max_steps={STEPS}", "train.schedule.warmup_steps=2", "train.optimizer.weight_decay=0.1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job_of(demo: DemoPaths, storage: Path, *overrides: str) -> worker.Job:
    return launch.prepare_job(recipe_of(demo, storage, *TRAINING, *overrides), QUIET, stream.in_process)


# ------------------------------------------------------------------------------------------- other numbers of workers


def kind(name: str, world: int, optimizer: str, strategy: str = "fsdp") -> list[str]:
    settings = {"workers": world, "strategy": strategy, "optimizer.name": optimizer, "micro_batch": 2}
    return [f"run.name={name}", *(f"train.{key}={value}" for key, value in settings.items())]


def test_training_goes_on_at_another_number_of_workers_as_if_nothing_had_happened(
    demo: DemoPaths, tmp_path: Path
) -> None:
    def job(name: str, world: int, optimizer: str, strategy: str = "fsdp") -> worker.Job:
        return job_of(demo, tmp_path, *kind(name, world, optimizer, strategy))

    optimizers = ["adamw", "adafactor"]
    both = {name: [(job(f"{name}-12", 1, name), 3), (job(f"{name}-whole", 1, name), None)] for name in optimizers}
    first = run(1, run_jobs, [*both["adamw"], *both["adafactor"]])[0]
    halves, whole = dict(zip(optimizers, first[::2], strict=True)), dict(zip(optimizers, first[1::2], strict=True))

    two = [(job(f"{name}-12", 2, name), None) for name in optimizers]  # 1 → 2
    two += [(job(f"{name}-21", 2, name), 3) for name in optimizers]
    two += [(job("adamw-2n", 2, "adamw"), 3)]
    on_two = run(2, run_jobs, two)[0]  # rank 0 logs

    one = [(job(f"{name}-21", 1, name), None) for name in optimizers]  # 2 → 1
    one += [(job("adamw-2n", 1, "adamw", "none"), None)]  # and under the other strategy
    on_one = run(1, run_jobs, one)[0]

    def losses(*runs: tuple[int, list[dict[str, float]]]) -> list[float]:
        return [row["loss"] for _, rows in runs for row in rows]

    for at, name in enumerate(optimizers):
        expected = losses(whole[name])
        assert len(expected) == STEPS
        assert expected[0] - expected[-1] > 0.1
        assert halves[name][0] == 3
        assert losses(halves[name], on_two[at]) == pytest.approx(expected, rel=2e-5), f"{name} 1 → 2"
        assert losses(on_two[2 + at], on_one[at]) == pytest.approx(expected, rel=2e-5), f"{name} 2 → 1"
        evaluations = [r[-1][1][-1]["eval_loss"] for r in ([whole[name]], [on_two[at]], [on_one[at]])]
        assert evaluations == pytest.approx(evaluations[:1] * 3, rel=2e-5)
    assert losses(on_two[4], on_one[2]) == pytest.approx(losses(whole["adamw"]), rel=2e-5)

    # The optimizer's moments, tensor by tensor: written by one and by two workers they are the same.
    for name in optimizers:
        ends = [f"{tmp_path}/{name}-{how}/checkpoints/{checkpoint.name(STEPS)}" for how in ("whole", "12", "21")]
        expected_tensors, *others = [read_all(end) for end in ends]
        assert any(key.startswith("optim.") for key in expected_tensors)
        for tensors in others:
            assert tensors.keys() == expected_tensors.keys()
            for key, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected_tensors[key], rtol=1e-3, atol=1e-4, msg=key)


def read_all(location: str) -> dict[str, torch.Tensor]:
    metadata = checkpoint.read_metadata(location)
    tensors = {key: torch.full(tuple(m.size), float("nan"), dtype=m.properties.dtype) for key, m in metadata.items()}
    nested: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optim": {}}
    for key, tensor in tensors.items():
        section, _, name = key.partition(".")
        nested[section][name] = tensor
    checkpoint.restore(location, nested, world=1)
    return tensors


def test_without_the_moments_the_losses_would_differ(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # else the test above would prove nothing about them
    job = job_of(demo, tmp_path)
    _, whole = run_job(0, 1, job_of(demo, tmp_path, "run.name=whole"))
    run_job(0, 1, job, stop_after=3)
    real = checkpoint.restore

    def weights_only(location: str, tensors: dict[str, Any], world: int) -> None:
        real(location, {"model": tensors["model"]}, world)

    monkeypatch.setattr(checkpoint, "restore", weights_only)
    _, rest = run_job(0, 1, job)
    assert [row["loss"] for row in rest] != pytest.approx([row["loss"] for row in whole[3:]], rel=1e-3)


# ------------------------------------------------------------------------------------------------ broken and unfinished


@pytest.fixture(scope="module")
def trained(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Storage with a whole run that keeps all its checkpoints (steps 2, 4, 6), and its losses."""
    storage = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    _, rows = run_job(0, 1, job_of(demo, storage, "train.checkpoint={every: 2, keep: 9}"))
    return storage, [row["loss"] for row in rows]


@pytest.fixture
def copied(trained: tuple[Path, list[float]], tmp_path: Path) -> Path:
    shutil.copytree(trained[0], tmp_path / "storage")
    return tmp_path / "storage"


def folder_of(storage: Path) -> Path:
    return storage / "run" / "checkpoints"


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (truncate, "__0_0.distcp"),
    "missing file": (lambda folder: next(folder.glob("*.distcp")).unlink(), "__0_0.distcp"),
    "missing metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata"),
    "missing state": (lambda folder: (folder / "state.json").unlink(), "state.json"),
    "empty marker": (lambda folder: (folder / "COMMITTED").write_text(""), "Expecting value"),
    "cut marker": (lambda folder: (folder / "COMMITTED").write_text('{"files": {"a'), "Unterminated"),
    "other marker": (lambda folder: (folder / "COMMITTED").write_text("[]"), ""),
    "marker without sizes": (lambda folder: (folder / "COMMITTED").write_text('{"files": null}'), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_set_aside_by_name_and_the_one_before_it_is_used(damage: str, copied: Path) -> None:
    folder = folder_of(copied)
    (do, named) = DAMAGES[damage]
    do(folder / checkpoint.name(6))
    found = checkpoint.newest(str(folder))  # only looking: nothing is renamed
    assert found is not None and found.step == 4
    assert (folder / checkpoint.name(6)).exists()
    told: list[tuple[str, str]] = []
    found = checkpoint.newest(str(folder), on_broken=lambda location, why: told.append((location, why)))
    assert found is not None and found.step == 4
    [(location, why)] = told
    assert location == str(folder / f"{checkpoint.name(6)}.broken")
    assert os.path.isdir(location)
    assert named in why
    assert checkpoint.steps(str(folder)) == [2, 4]


def test_a_second_broken_checkpoint_of_a_step_replaces_none_that_was_set_aside(copied: Path) -> None:
    folder = folder_of(copied)
    for _ in range(2):
        shutil.copytree(folder / checkpoint.name(4), folder / checkpoint.name(6), dirs_exist_ok=True)
        truncate(folder / checkpoint.name(6))
        checkpoint.newest(str(folder), on_broken=lambda location, why: None)
    assert len(list(folder.glob("*.broken*"))) == 2


def test_after_damage_the_run_ends_as_it_had_ended(
    demo: DemoPaths, trained: tuple[Path, list[float]], copied: Path
) -> None:
    job = job_of(demo, copied, "train.checkpoint={every: 2, keep: 9}")
    truncate(folder_of(copied) / checkpoint.name(6))
    (folder_of(copied) / checkpoint.name(4) / "COMMITTED").unlink()  # killed while saving
    lines: list[str] = []
    view = View(Console(quiet=True))
    view.line = lines.append  # type: ignore[method-assign]
    outcome = launch.train(job.recipe, view)
    assert outcome.finished == STEPS
    assert any("set aside" in line and f"{checkpoint.name(6)}.broken" in line for line in lines)
    assert any("resuming run at step 2 of 6" in line for line in lines)
    losses = [row["loss"] for row in read_metrics(job.recipe.run.dir)]
    assert losses[-4:] == trained[1][-4:]
    assert checkpoint.steps(str(folder_of(copied))) == [2, 4, 6]


def test_uncommitted_checkpoints_do_not_count(copied: Path) -> None:
    folder = folder_of(copied)
    (folder / checkpoint.name(6) / "COMMITTED").unlink()
    found = checkpoint.newest(str(folder), on_broken=lambda location, why: pytest.fail("it is not broken"))
    assert found is not None and found.step == 4
    assert checkpoint.newest(str(folder / "nothing")) is None


def test_the_marker_is_written_last_and_lists_all_files(copied: Path) -> None:
    folder = folder_of(copied) / checkpoint.name(6)
    listing = json.loads((folder / "COMMITTED").read_text())["files"]
    files = {file.name: file.stat() for file in folder.iterdir()}
    marker = files.pop("COMMITTED")
    assert listing == {name: stat.st_size for name, stat in files.items()}
    assert all(stat.st_mtime_ns <= marker.st_mtime_ns for stat in files.values())


def test_only_the_newest_are_kept(demo: DemoPaths, tmp_path: Path, trained: tuple[Path, list[float]]) -> None:
    run_job(0, 1, job_of(demo, tmp_path, "train.checkpoint={every: 1, keep: 2}"))
    assert sorted(os.listdir(folder_of(tmp_path))) == [checkpoint.name(5), checkpoint.name(6)]
    assert checkpoint.steps(str(folder_of(trained[0]))) == [2, 4, 6]


# ------------------------------------------------------------------------------------------------ what may not change


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.global_batch=16", "train.global_batch"),
        ("data.seq_len=128", "data.train"),
        ("run.seed=1", "run.seed"),
        ("data.shuffle=false", "data.shuffle"),
        ("data.shuffle_window=64", "data.shuffle_window"),
    ],
)
def test_what_would_give_steps_another_meaning_is_refused(
    demo: DemoPaths, copied: Path, override: str, key: str
) -> None:
    before = paths.read_text(str(copied / "run" / "data" / "stats.json"))
    with pytest.raises(CheckpointError, match=f"was written with {key} = ") as caught:
        job_of(demo, copied, override)
    assert paths.read_text(str(copied / "run" / "data" / "stats.json")) == before
    assert f"set {key} back" in str(caught.value)
    assert "run.name" in str(caught.value)


def test_another_width_of_the_model_is_refused_by_name(copied: Path) -> None:
    location = str(folder_of(copied) / checkpoint.name(6))
    tensors = read_all(location)
    name = next(key for key in tensors if key.endswith("q_proj.weight"))
    model = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model[name.removeprefix("model.")] = torch.zeros(5, 5)
    with pytest.raises(CheckpointError, match="does not fit this recipe") as caught:
        checkpoint.restore(location, {"model": model}, world=1)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ([], ["train.optimizer.name=adafactor"], "it lacks optim."),
        (["train.optimizer.name=adafactor"], [], "it lacks optim."),
        (["model.freeze=['*embed*']"], [], "embed_tokens"),
        ([], ["model.freeze=['*embed*']"], "embed_tokens"),  # else the embedding would be the base's again, silently
    ],
)
def test_another_optimizer_or_other_frozen_parameters_are_refused_by_name(
    before: list[str], after: list[str], named: str, demo: DemoPaths, tmp_path: Path
) -> None:
    run_job(0, 1, job_of(demo, tmp_path, "train.max_steps=1", *before))
    with pytest.raises(CheckpointError, match="does not fit this recipe") as caught:
        run_job(0, 1, job_of(demo, tmp_path, "train.max_steps=2", *after))
    assert checkpoint.name(1) in str(caught.value)
    assert named in str(caught.value)
    assert "run.name" in str(caught.value)


# --------------------------------------------------------------------------------------------------- object stores


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 of one's own, found by the environment, as on a real cluster."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    for key in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(key, raising=False)
    boto3.client("s3").create_bucket(Bucket="runs")
    yield "s3://runs/some/where"
    server.stop()


def test_a_whole_run_on_s3_stops_resumes_and_ends_as_on_a_disk(
    demo: DemoPaths, bucket: str, trained: tuple[Path, list[float]]
) -> None:
    recipe = recipe_of(demo, bucket, *TRAINING, "train.checkpoint={every: 2, keep: 2}")
    job = launch.prepare_job(recipe, QUIET, stream.in_process)
    run_job(0, 1, job, stop_after=3)
    folder = recipe.run.dir.checkpoints
    assert checkpoint.steps(folder) == [2, 3]

    outcome = launch.train(recipe, QUIET)
    assert outcome.complete
    assert checkpoint.steps(folder) == [4, 6]
    rows = read_metrics(recipe.run.dir)
    assert [row["step"] for row in rows] == [4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx(trained[1][3:], rel=1e-6)
    assert paths.list_dir(recipe.run.dir.tensorboard)
    assert paths.exists(recipe.run.dir.recipe) and paths.exists(recipe.run.dir.stats)

    # A broken one on an object store, where files cannot be renamed in place.
    last = paths.join(folder, checkpoint.name(6))
    paths.write_bytes(paths.join(last, "__0_0.distcp"), b"cut")
    told: list[str] = []
    found = checkpoint.newest(folder, on_broken=lambda location, why: told.append(f"{location}: {why}"))
    assert found is not None and found.step == 4
    assert told == [f"{last}.broken: __0_0.distcp has 3 bytes, {size_of(f'{last}.broken')} were committed"]
    assert checkpoint.steps(folder) == [4]


def size_of(location: str) -> int:
    return paths.read_json(paths.join(location, "COMMITTED"))["files"]["__0_0.distcp"]
