"""Saves on storage that fails: an object store with faults of every kind, and a disk that is full."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run
from faulty import Faulty
from test_saver import SIZE, check, make, names, quick, save, state_of, total  # noqa: F401 - quick is a fixture

from ray_ft import paths, retry
from ray_ft.errors import StorageError
from ray_ft.span import Span
from ray_ft.train import checkpoint
from ray_ft.train.saver import Saver

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 with the bucket "runs"."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # moto keeps its buckets in this process, whatever server they came through: another test's would be here too.
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset, timeout=60).close()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="runs")
    yield f"{host}:{port}"
    server.stop()


def at(address: str) -> str:
    return f"s3://runs/checkpoints?endpoint_override={address}&scheme=http&region=us-east-1"


def make_at(address: str, rank: int = 0, world: int = 1, **options: Any) -> tuple[Saver, list[str]]:
    """A saver whose checkpoints and ledger are reached through `address`."""
    lines: list[str] = []
    settings: dict[str, Any] = {"keep": 2, "details": {}, "background": True, **options}
    ledger = at(address).replace("checkpoints", "ledger")
    return Saver(at(address), rank=rank, world=world, say=lines.append, ledger_folder=ledger, **settings), lines


def on_s3(rank: int, world: int, address: str, steps: int, big: int) -> list[Any]:
    os.environ.update(ENVIRONMENT)
    retry.FIRST_WAIT = 0.02
    keeper, lines = make_at(address, rank, world)
    for step in range(1, steps + 1):
        spans = state_of(rank, world, step)
        spans[f"model/big{rank}"] = Span.whole(torch.full((big,), float(step)))  # an upload in several parts
        line = b'{"step": %d, "first": %d, "samples": [["a:1"]]}\n' % (step, step * world + rank)
        keeper.begin(step, spans, line)
        keeper.finish(total)
    return [keeper.newest, keeper.failed_in_a_row, lines]


@pytest.mark.slow
@pytest.mark.timeout(900)  # over two minutes where others use the machine
def test_saves_and_restores_get_through_an_object_store_that_fails_again_and_again(server: str) -> None:
    big = 3 << 20  # 12 MiB, over pyarrow's 10 MiB parts
    with Faulty(server, 0, busy=0.15, reset=0.05, slow=0.05) as faulty:
        answers = run(2, on_s3, faulty.address, 3, big, seconds=800)
        assert answers == [[3, 0, []]] * 2
        made = dict(faulty.counts)
        assert all(made[fault] >= 3 for fault in ("busy", "reset", "slow")), made
        retry_wait, retry.FIRST_WAIT = retry.FIRST_WAIT, 0.02
        found = checkpoint.newest(at(faulty.address), on_broken=lambda location, why: pytest.fail(why))
        assert found is not None and found.step == 3
        spans = {f"model/big{rank}": Span.whole(torch.zeros(big)) for rank in range(2)}
        spans["model/a"] = Span.whole(torch.zeros(SIZE))
        checkpoint.restore(found.location, spans, partial=True)
        retry.FIRST_WAIT = retry_wait
    assert torch.equal(spans["model/a"].data, torch.arange(float(SIZE)) + 3)
    assert all((spans[f"model/big{rank}"].data == 3).all() for rank in range(2))
    # Seen past the faults: two whole checkpoints, nothing that helped to write them, and the ledger.
    place = at(server)
    assert checkpoint.steps(place) == [2, 3]
    for _, location in checkpoint.folders(place):
        checkpoint.verify(location)
        shards = [f"shard_{rank:05d}.safetensors" for rank in range(2)]
        assert paths.list_dir(location) == ["COMMITTED", "index.json", *shards, "state.json"]
    ledger = place.replace("checkpoints", "ledger")
    assert paths.list_dir(ledger) == [f"step_{step:08d}.jsonl" for step in (1, 2, 3)]


@pytest.mark.slow
def test_an_object_store_that_never_answers_stops_no_training_and_nothing_is_taken_for_broken(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 2)  # pyarrow tries several times within each
    with Faulty(server, 0) as faulty:
        keeper, lines = make_at(faulty.address)
        save(keeper, 1)
        faulty.rates = {"busy": 1.0}
        began, longest = time.monotonic(), 0.0
        keeper.begin(2, state_of(0, 1, 2))
        while keeper.pending is not None:  # the loop's steps
            assert time.monotonic() - began < 120
            step = time.monotonic()
            keeper.advance(*keeper.signals())
            longest = max(longest, time.monotonic() - step)
            time.sleep(0.01)
        assert longest < 5
        assert (keeper.newest, keeper.failed_in_a_row) == (1, 1)
        assert keeper.last_error is not None and "503" in keeper.last_error
        assert lines[-1].startswith("the checkpoint of step 2 was not written: worker 0: OSError")
        assert lines[-1].endswith("training goes on, that of step 1 is the newest")
        told: list[str] = []
        began = time.monotonic()
        with pytest.raises(StorageError, match="cannot be read") as caught:
            checkpoint.newest(at(faulty.address), on_broken=lambda location, why: told.append(why))
        assert time.monotonic() - began < 120 and not told
        assert "run.storage" in str(caught.value)
        faulty.rates = {}
        found = checkpoint.newest(at(faulty.address))
        assert found is not None and found.step == 1
        save(keeper, 3)
        assert (keeper.newest, keeper.failed_in_a_row) == (3, 0)
    # What the failed save may have left is gone too.
    assert [step for step, _ in checkpoint.folders(at(server))] == [1, 3]


def test_rights_that_are_missing_are_told_at_once(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, _ = make_at(server)
    monkeypatch.setattr(keeper, "_folder", keeper._folder.replace("//runs/", "//no-such-bucket/"))
    monkeypatch.setattr(retry, "FIRST_WAIT", 200)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 200)
    began = time.monotonic()
    save(keeper, 1)
    assert keeper.failed_in_a_row == 1 and time.monotonic() - began < 100
    assert "no-such-bucket" in str(keeper.last_error)


# ---------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "ray-ft-test", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill_the_disk(rank: int, world: int, folder: str) -> list[Any]:
    """Save steps 1 to 5; before step 2 somebody else fills the disk, before step 4 makes room again."""
    filler, disk = Path(folder).parent / "filler", Path(folder).parent
    keeper, lines = make(folder, rank, world)
    found = []
    for step in range(1, 6):
        if rank == 0 and step == 2:
            filler.write_bytes(bytes(free(disk) - (200 << 10)))
        if rank == 0 and step == 4:
            filler.unlink()
        before = free(disk)
        torch.distributed.barrier()
        spans = {"model/a": Span.whole(torch.full((1 << 16,), float(step)), owner=rank == 0)}  # 256 KiB
        spans["model/b"] = Span.whole(torch.full((1 << 10,), float(step)), owner=rank == 1)
        keeper.begin(step, spans)
        keeper.finish(total)
        torch.distributed.barrier()
        committed = [at for at, _ in checkpoint.committed(folder)]
        found.append((keeper.newest, keeper.failed_in_a_row, committed, free(disk) >= before))
        torch.distributed.barrier()
    return [found, lines, keeper.last_error]


def test_on_a_full_disk_a_save_is_abandoned_gives_its_space_back_and_costs_nothing_else(disk: Path) -> None:
    folder = disk / "checkpoints"
    (found, lines, error), (others, _, _) = run(2, fill_the_disk, str(folder))
    assert found[0][:3] == (1, 0, [1])
    assert found[1] == (1, 1, [1], True)
    assert found[2] == (1, 2, [1], True)
    assert found[3][:3] == (4, 0, [1, 4])
    assert found[4] == (5, 0, [4, 5], True)
    assert [entry[:2] for entry in others] == [entry[:2] for entry in found]
    assert len(lines) == 2 and "No space left on device" in lines[0] and "step 1 is the newest" in lines[0]
    assert error is not None and error.startswith("worker 0: OSError: [Errno 28]")
    assert names(disk) == ["checkpoints"] and len(names(folder)) == 2
    for step, location in checkpoint.committed(str(folder)):
        spans = {"model/a": Span.whole(torch.zeros(1 << 16)), "model/b": Span.whole(torch.zeros(1 << 10))}
        checkpoint.restore(location, spans)
        assert all((span.data == step).all() for span in spans.values())
