"""Promise 3, the checkpoint: another number of workers goes on as if nothing had been; a broken one costs no run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import recipe_of, run, run_job, run_jobs
from rich.console import Console

from ray_ft import paths, retry
from ray_ft.data import stream
from ray_ft.demo import DemoPaths
from ray_ft.errors import CheckpointError, StorageError
from ray_ft.span import Span
from ray_ft.train import checkpoint, launch, shards, worker
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


#: strategy × workers; each writes a checkpoint in mid-run, and another one goes on from it.
LEGS = [
    ("adamw", ("fsdp", 1), ("fsdp", 2)),
    ("adamw", ("fsdp", 2), ("zero3", 1)),
    ("adamw", ("zero3", 2), ("none", 1)),
    ("adamw", ("zero1", 2), ("fsdp", 1)),
    ("adamw", ("none", 1), ("zero2", 2)),
    ("adafactor", ("fsdp", 2), ("fsdp", 1)),
    ("adafactor", ("zero3", 2), ("fsdp", 1)),
    ("adafactor", ("fsdp", 1), ("zero3", 2)),
    ("adafactor", ("zero2", 2), ("zero3", 1)),
]


def test_training_goes_on_under_another_strategy_and_number_of_workers_as_if_nothing_had_happened(
    demo: DemoPaths, tmp_path: Path
) -> None:
    def job(name: str, way: tuple[str, int], optimizer: str) -> worker.Job:
        return job_of(demo, tmp_path, *kind(name, way[1], optimizer, way[0]))

    def trained(tasks: list[tuple[int, tuple[worker.Job, int | None]]]) -> dict[int, Any]:
        """Runs (number, (job, stop_after)) on as many workers as each job has; rank 0's answers by number."""
        answers: dict[int, Any] = {}
        for world in (1, 2):
            mine = [(at, task) for at, task in tasks if task[0].recipe.train.workers == world]
            results = run(world, run_jobs, [task for _, task in mine], seconds=240)[0]
            answers |= {at: result for (at, _), result in zip(mine, results, strict=True)}
        return answers

    optimizers = ["adamw", "adafactor"]
    names = [f"{optimizer}-{at}" for at, (optimizer, _, _) in enumerate(LEGS)]
    firsts = [(at, (job(names[at], before, name), 3)) for at, (name, before, _) in enumerate(LEGS)]
    wholes = [(100 + at, (job(f"{name}-whole", ("none", 1), name), None)) for at, name in enumerate(optimizers)]
    answers = trained([*firsts, *wholes])
    seconds = trained([(at, (job(names[at], after, name), None)) for at, (name, _, after) in enumerate(LEGS)])

    for at, (optimizer, before, after) in enumerate(LEGS):
        leg = f"{optimizer}: {before} → {after}"
        _, expected = answers[100 + optimizers.index(optimizer)]
        losses = [row["loss"] for row in expected]
        assert len(losses) == STEPS
        assert losses[0] - losses[-1] > 0.1
        assert answers[at][0] == 3
        rows = [*answers[at][1], *seconds[at][1]]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=2e-5), leg
        assert rows[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=2e-5), leg

        # The optimizer's moments, tensor by tensor: whoever wrote them, they are the same.
        ends = [at_step(tmp_path / run / "checkpoints", STEPS) for run in (f"{optimizer}-whole", names[at])]
        expected_tensors, tensors = (read_all(str(end)) for end in ends)
        assert tensors.keys() == expected_tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected_tensors[key], rtol=1e-3, atol=1e-4, msg=f"{leg}: {key}")


def at_step(folder: Path, step: int) -> Path:
    """The one committed checkpoint of a step."""
    [location] = [location for found, location in checkpoint.committed(str(folder)) if found == step]
    return Path(location)


def read_all(location: str) -> dict[str, torch.Tensor]:
    index = checkpoint.index(location)
    tensors = {key: torch.full(stored.shape, float("nan"), dtype=stored.dtype) for key, stored in index.items()}
    checkpoint.restore(location, {key: Span.whole(tensor) for key, tensor in tensors.items()})
    return tensors


def test_without_the_moments_the_losses_would_differ(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # else the test above would prove nothing about them
    job = job_of(demo, tmp_path)
    _, whole = run_job(0, 1, job_of(demo, tmp_path, "run.name=whole"))
    run_job(0, 1, job, stop_after=3)
    real = checkpoint.restore

    def weights_only(location: str, spans: dict[str, Span]) -> None:
        real(location, {key: span for key, span in spans.items() if key.startswith("model/")})

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
    file = next(folder.glob("shard_*"))
    os.truncate(file, file.stat().st_size - 1)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (truncate, "shard_00000.safetensors"),
    "missing file": (lambda folder: next(folder.glob("shard_*")).unlink(), "shard_00000.safetensors"),
    "missing index": (lambda folder: (folder / "index.json").unlink(), "index.json"),
    "missing state": (lambda folder: (folder / "state.json").unlink(), "state.json"),
    "empty marker": (lambda folder: (folder / "COMMITTED").write_text(""), "Expecting value"),
    "cut marker": (lambda folder: (folder / "COMMITTED").write_text('{"files": {"a'), "Unterminated"),
    "other marker": (lambda folder: (folder / "COMMITTED").write_text("[]"), ""),
    "marker without sizes": (lambda folder: (folder / "COMMITTED").write_text('{"files": null}'), "it lacks what"),
    "empty file": (lambda folder: os.truncate(folder / "shard_00000.safetensors", 0), "has 0 bytes"),
    "longer file": (lambda folder: os.truncate(folder / "shard_00000.safetensors", 1 << 24), "has 16777216 bytes"),
    "flipped marker": (lambda folder: flip(folder / "COMMITTED"), "COMMITTED is not what was written"),
    "flipped index": (lambda folder: flip(folder / "index.json"), "index.json has other bytes"),
    "flipped state": (lambda folder: flip(folder / "state.json"), "state.json has other bytes"),
    "another index": (lambda folder: same_size(folder / "index.json"), "index.json has other bytes"),
    "another state": (lambda folder: same_size(folder / "state.json"), "state.json has other bytes"),
    "edited marker": (lambda folder: edit(folder / "COMMITTED", b'"bytes": ', b'"bytes": 1'), "its checksum does not"),
}


def flip(file: Path, at: int | None = None) -> None:
    """Another bit in the middle, or at `at`."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


def same_size(file: Path) -> None:
    """Good JSON of the same length that says something else."""
    file.write_bytes(b"{}" + b" " * (file.stat().st_size - 2))


def edit(file: Path, old: bytes, new: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_set_aside_by_name_and_the_one_before_it_is_used(damage: str, copied: Path) -> None:
    folder = folder_of(copied)
    (do, named) = DAMAGES[damage]
    last = at_step(folder, 6)
    do(last)
    found = checkpoint.newest(str(folder))  # only looking: nothing is renamed
    assert found is not None and found.step == 4
    assert last.exists()
    told: list[tuple[str, str]] = []
    found = checkpoint.newest(str(folder), on_broken=lambda location, why: told.append((location, why)))
    assert found is not None and found.step == 4
    [(location, why)] = told
    assert location == f"{last}.broken"
    assert (Path(location) / "WHY").read_text() == why + "\n"
    assert str(last) in why and named in why
    assert checkpoint.steps(str(folder)) == [2, 4]


def test_a_second_broken_checkpoint_of_a_step_replaces_none_that_was_set_aside(copied: Path) -> None:
    folder = folder_of(copied)
    last = at_step(folder, 6)
    for _ in range(2):
        shutil.copytree(at_step(folder, 4), last, dirs_exist_ok=True)
        truncate(last)
        checkpoint.newest(str(folder), on_broken=lambda location, why: None)
    assert len(list(folder.glob("*.broken*"))) == 2


def test_after_damage_the_run_ends_as_it_had_ended(
    demo: DemoPaths, trained: tuple[Path, list[float]], copied: Path
) -> None:
    job = job_of(demo, copied, "train.checkpoint={every: 2, keep: 9}")
    truncate(last := at_step(folder_of(copied), 6))
    (unfinished := at_step(folder_of(copied), 4)).joinpath("COMMITTED").unlink()  # killed while saving
    lines: list[str] = []
    view = View(Console(quiet=True))
    view.line = lines.append  # type: ignore[method-assign]
    outcome = launch.train(job.recipe, view)
    assert outcome.finished == STEPS
    assert any("set aside" in line and f"{last}.broken" in line for line in lines)
    assert any("resuming run at step 2 of 6" in line for line in lines)
    losses = [row["loss"] for row in read_metrics(job.recipe.run.dir)]
    assert losses[-4:] == trained[1][-4:]
    assert checkpoint.steps(str(folder_of(copied))) == [2, 4, 6]
    assert not unfinished.exists()  # what never counted is tidied up once there is something newer


@pytest.mark.parametrize("form", [1, 2, 4])
def test_another_versions_checkpoint_is_refused_and_left_where_it_is(
    demo: DemoPaths, copied: Path, monkeypatch: pytest.MonkeyPatch, form: int
) -> None:
    folder = at_step(folder_of(copied), 6)
    if form < checkpoint.FORMAT:  # as version 2 and before had it: sizes alone
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**state, "format": form}))
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != "COMMITTED"}
        (folder / "COMMITTED").write_text(json.dumps({"files": sizes}))
    else:
        monkeypatch.setattr(checkpoint, "FORMAT", form)
        parts: Any = []
        checkpoint.commit(str(folder), 6, parts, {})
        monkeypatch.undo()
    with pytest.raises(checkpoint.OtherFormat, match=f"is in format {form}, this version reads 3"):
        job_of(demo, copied, "train.checkpoint={every: 2, keep: 9}")
    with pytest.raises(checkpoint.OtherFormat):
        checkpoint.restore(str(folder), {})
    assert checkpoint.steps(str(folder_of(copied))) == [2, 4, 6]


def test_a_shard_that_does_not_reach_the_storage_stops_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # such as a local folder where workers are on several machines
    real = shards.write

    def elsewhere(folder: str, *args: Any) -> Any:
        return real(str(tmp_path / "elsewhere"), *args)

    monkeypatch.setattr(shards, "write", elsewhere)
    with pytest.raises(CheckpointError, match=r"lacks shard_00000\.safetensors, which other workers wrote"):
        checkpoint.save(str(tmp_path / "here"), 1, {"model/a": Span.whole(torch.ones(3))}, {}, 0, 1)
    assert checkpoint.steps(str(tmp_path / "here")) == []


def test_uncommitted_checkpoints_do_not_count(copied: Path) -> None:
    folder = folder_of(copied)
    (at_step(folder, 6) / "COMMITTED").unlink()
    found = checkpoint.newest(str(folder), on_broken=lambda location, why: pytest.fail("it is not broken"))
    assert found is not None and found.step == 4
    assert checkpoint.newest(str(folder / "nothing")) is None


def test_the_marker_is_written_last_and_lists_all_files(copied: Path) -> None:
    folder = at_step(folder_of(copied), 6)
    listing = json.loads((folder / "COMMITTED").read_text())["files"]
    files = {file.name: file.stat() for file in folder.iterdir()}
    marker = files.pop("COMMITTED")
    assert {name: facts["bytes"] for name, facts in listing.items()} == {n: stat.st_size for n, stat in files.items()}
    assert {name for name, facts in listing.items() if "checksum" in facts} == {"index.json", "state.json"}
    assert all(stat.st_mtime_ns <= marker.st_mtime_ns for stat in files.values())


def test_only_the_newest_are_kept(demo: DemoPaths, tmp_path: Path, trained: tuple[Path, list[float]]) -> None:
    run_job(0, 1, job_of(demo, tmp_path, "train.checkpoint={every: 1, keep: 2}"))
    assert [step for step, _ in checkpoint.folders(str(folder_of(tmp_path)))] == [5, 6]
    assert len(os.listdir(folder_of(tmp_path))) == 2
    assert checkpoint.steps(str(folder_of(trained[0]))) == [2, 4, 6]


# ------------------------------------------------------------------------------------------- bytes that are not read


def test_every_region_of_a_shard_is_checked_as_it_is_read_and_damage_costs_one_checkpoint(copied: Path) -> None:
    folder = folder_of(copied)
    last = at_step(folder, 6)
    tensors = read_all(str(last))
    file = last / "shard_00000.safetensors"
    size = file.stat().st_size
    header = checkpoint.index(str(last))[next(iter(tensors))].runs[0].header[0]
    for place in (0, 9, header - 1, header, header + 1000, size // 2, size - 1):
        flip(file, place)
        found = checkpoint.newest(str(folder))
        assert found is not None and found.step == 6  # to read gigabytes before each resume would take minutes
        with pytest.raises(checkpoint.Damaged, match="has other bytes than were written") as caught:
            read_all(str(last))
        error = caught.value
        assert error.file == file.name and str(file) in error.what
        assert (error.tensor is None) == (place < header)
        assert error.tensor is None or error.tensor in error.what
        assert error.offset is not None and error.offset <= place < error.offset + shards.BLOCK
        flip(file, place)
    for key, tensor in read_all(str(last)).items():
        assert torch.equal(tensor, tensors[key])

    flip(file, size - 1)
    aside = checkpoint.set_aside(str(last), "what restore said")
    assert aside == f"{last}.broken" and checkpoint.steps(str(folder)) == [2, 4]
    found = checkpoint.newest(str(folder))
    assert found is not None and found.step == 4
    read_all(found.location)


def test_storage_that_does_not_answer_is_no_broken_checkpoint(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    folder = folder_of(copied)
    location = str(at_step(folder, 6))
    tensors = {key: Span.whole(tensor) for key, tensor in read_all(location).items()}
    real, calls = paths.filesystem, []

    def fails(times: int) -> Any:
        calls.clear()

        def filesystem(place: str) -> Any:
            calls.append(place)
            if len(calls) <= times:
                raise OSError("AWS Error SLOW_DOWN during GetObject operation: HTTP status 503")
            return real(place)

        return filesystem

    told: list[str] = []
    for times, answered in ((3, True), (10**6, False)):
        monkeypatch.setattr(paths, "filesystem", fails(times))
        if answered:
            found = checkpoint.newest(str(folder), on_broken=lambda location, why: told.append(why))
            assert found is not None and found.step == 6
            continue
        with pytest.raises(StorageError, match="SLOW_DOWN") as caught:
            checkpoint.newest(str(folder), on_broken=lambda location, why: told.append(why))
        assert str(folder) in str(caught.value) and len(calls) == retry.ATTEMPTS
        with pytest.raises(StorageError, match="SLOW_DOWN"):
            checkpoint.restore(location, tensors)
    monkeypatch.setattr(paths, "filesystem", real)
    assert told == [] and checkpoint.steps(str(folder)) == [2, 4, 6]


def test_what_no_waiting_mends_is_not_waited_for(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(location: str) -> bytes:
        raise PermissionError(13, "Permission denied", location)

    monkeypatch.setattr(paths, "read_bytes", refused)
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=lambda seconds: pytest.fail("it was waited for")))
    with pytest.raises(StorageError, match="Permission denied"):
        checkpoint.newest(str(folder_of(copied)), on_broken=lambda location, why: pytest.fail("it is not broken"))


# ------------------------------------------------------------------------------------------------ what may not change


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.global_batch=16", "was written with train.global_batch = "),
        ("data.seq_len=128", "the data of run 'run' changed since .*: data.seq_len was 96, is 128"),
        ("data.train.0.weight=2", "was written with data.weights = "),
        ("run.seed=1", "was written with run.seed = "),
        ("data.shuffle=false", "was written with data.shuffle = "),
        ("data.shuffle_window=64", "was written with data.shuffle_window = "),
    ],
)
def test_what_would_give_steps_another_meaning_is_refused(
    demo: DemoPaths, copied: Path, override: str, said: str
) -> None:
    before = paths.read_text(str(copied / "run" / "data" / "stats.json"))
    with pytest.raises(CheckpointError, match=said) as caught:
        job_of(demo, copied, override)
    assert paths.read_text(str(copied / "run" / "data" / "stats.json")) == before
    assert "back to continue this run" in str(caught.value)
    assert "run.name" in str(caught.value)


def test_another_width_of_the_model_is_refused_by_name(copied: Path) -> None:
    location = str(at_step(folder_of(copied), 6))
    spans = {key: Span.whole(tensor) for key, tensor in read_all(location).items()}
    name = next(key for key in spans if key.endswith("q_proj.weight"))
    with pytest.raises(CheckpointError, match="does not fit this recipe") as caught:
        checkpoint.restore(location, {**spans, name: Span.whole(torch.zeros(5, 5))})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ([], ["train.optimizer.name=adafactor"], "it lacks optim/"),
        (["train.optimizer.name=adafactor"], [], "it lacks optim/"),
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
    # No command was there to log the first steps; those since the checkpoint before came with the one of step 3.
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx(trained[1][2:], rel=1e-6)
    assert paths.list_dir(recipe.run.dir.tensorboard)
    assert paths.exists(recipe.run.dir.recipe) and paths.exists(recipe.run.dir.stats)

    # A broken one on an object store, where files cannot be renamed in place.
    [(_, _), (_, last)] = checkpoint.committed(folder)
    paths.write_bytes(paths.join(last, "shard_00000.safetensors"), b"cut")
    told: list[str] = []
    found = checkpoint.newest(folder, on_broken=lambda location, why: told.append(f"{location}: {why}"))
    assert found is not None and found.step == 4
    was = f"{last}/shard_00000.safetensors has 3 bytes, {size_of(f'{last}.broken')} were committed"
    assert told == [f"{last}.broken: {was}"]
    assert checkpoint.steps(folder) == [4]


def size_of(location: str) -> int:
    return paths.read_json(paths.join(location, "COMMITTED"))["files"]["shard_00000.safetensors"]["bytes"]
