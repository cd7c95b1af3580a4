"""Rows through Ray Data: the order, the names of samples, and rows that are made on the fly in Ray's tasks."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ft import session
from ray_ft.data import ledger, sources, stream
from ray_ft.data import work as works
from ray_ft.data.ledger import Ledger
from ray_ft.data.order import Order
from ray_ft.data.prepare import prepare
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError
from ray_ft.recipe import Recipe, parse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
GLOBAL, WORLD = 8, 2


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with session.ray_running("", session.OBJECT_STORE_BYTES):
        yield


def test_ray_data_delivers_the_order_with_names_from_rows_that_are_not_stored(
    ray_cluster: None,
    make_recipe: Callable[..., Recipe],
    demo: DemoPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(works, "SEGMENT_TOKENS", 900)
    texts = [json.dumps({"text": f"row {n} " + "one two " * (1 + n % 9)}) + "\n" for n in range(400)]
    (tmp_path / "plain.jsonl").write_text("".join(texts[:250]))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress("".join(texts[250:]).encode()))
    mixture = [
        {"format": "text", "path": str(tmp_path / "plain.jsonl")},
        {"format": "text", "path": str(tmp_path / "packed.jsonl.gz"), "weight": 0.5},
    ]
    common = ("data.seq_len=64", "data.shuffle_window=2000", "data.ledger=true", "train.epochs=2", "data.eval=[]")
    orders = []
    for name, cache in (("kept", "auto"), ("light", "off")):
        recipe = make_recipe(*common, f"run.storage={tmp_path / name}", f"data.cache={cache}", sources=mixture)
        spread = stream.spread if cache == "off" else stream.in_process
        orders.append(Order.of(recipe, prepare(recipe, "train", demo.base, spread)))
    kept, light = orders
    assert light.prepared.render is not None and light.prepared.units == kept.prepared.units
    steps = -(-light.rows // GLOBAL)
    start = 2
    expected = list(stream.local_batches(kept, start * GLOBAL, steps * GLOBAL, 0, 1, GLOBAL))

    def shards(stop: int) -> list[Any]:
        rows = stream.training_dataset(light, start * GLOBAL, stop * GLOBAL)
        return stream.deal(rows, WORLD, GLOBAL // WORLD, stream.in_order(None))

    def work(rank: int, shard: Any) -> tuple[list[stream.Batch], bytes]:
        worker, taken = Ledger(), []
        batches = stream.batches(shard, light, start * GLOBAL, rank, WORLD, GLOBAL // WORLD)
        for step, batch in enumerate(batches, start=start + 1):
            worker.add(step, batch)
            taken.append(batch)
        return taken, worker.take()

    with ThreadPoolExecutor(WORLD) as pool:
        results = list(pool.map(work, range(WORLD), shards(steps)))
    taken = sorted((batch for batches, _ in results for batch in batches), key=lambda batch: batch.first)
    for name in ("input_ids", "flags"):
        one, other = (np.concatenate([getattr(b.rows, name) for b in found]) for found in (expected, taken))
        assert np.array_equal(one, other)
    names = [row for batch in expected for row in batch.samples or ()]
    assert [row for batch in taken for row in batch.samples or ()] == names
    entries = [json.loads(line) for line in ledger.merge([lines for _, lines in results]).splitlines()]
    assert [entry["step"] for entry in entries] == list(range(start + 1, steps + 1))
    assert [tuple(row) for entry in entries for row in entry["samples"]] == names

    (tmp_path / "plain.jsonl").write_text("changed\n")
    with pytest.raises(Exception, match="plain") as caught, ThreadPoolExecutor(WORLD) as pool:
        list(pool.map(work, range(WORLD), shards(steps)))
    causes: list[BaseException | None] = [caught.value]
    while causes[-1] is not None:
        causes.append(getattr(causes[-1], "cause", None) or causes[-1].__cause__)
    ours = [cause for cause in causes if isinstance(cause, DataError)]
    assert ours and "plain.jsonl changed since it was prepared" in str(ours[-1])


def test_ray_data_runs_a_few_steps_ahead_and_delivers_all(ray_cluster: None, tmp_path: Path) -> None:
    import ray.data

    rows, block, share = 8_000, 20, 4

    def made(batch: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / str(batch["id"][0])).touch()
        return batch

    dataset = ray.data.range(rows, override_num_blocks=rows // block).map_batches(made, batch_size=None)
    shards = stream.deal(dataset, WORLD, share, stream.in_order(None))
    taken: list[list[int]] = [[] for _ in range(WORLD)]
    ahead: list[int] = []
    together = threading.Barrier(WORLD)

    def work(rank: int) -> None:
        for batch in shards[rank].iter_batches(batch_size=share, prefetch_batches=stream.PREFETCH_STEPS):
            taken[rank].extend(batch["id"].tolist())
            if len(taken[rank]) == 10 * share:  # in step, as training is
                if rank == 0:
                    ahead.append(quiet())
                together.wait(120)

    def quiet() -> int:
        """Blocks that were made, once no more come."""
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < 3:
            if (now := len(list(tmp_path.iterdir()))) != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.1)
        return seen

    with ThreadPoolExecutor(WORLD) as pool:
        list(pool.map(work, range(WORLD)))
    assert ahead[0] * block < rows / 4, f"{ahead[0]} blocks of {rows // block} were made before 10 steps were taken"
    assert taken == [[row for row in range(rows) if row // share % WORLD == rank] for rank in range(WORLD)]


def test_pictures_arrive_with_their_rows(ray_cluster: None, pictures: DemoPaths, tmp_path: Path) -> None:
    words = tmp_path / "words.jsonl"
    turns = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "two"}]
    words.write_text(json.dumps({"messages": turns}) + "\n")  # a row without any
    content = {
        "model": {"path": pictures.base},
        "run": {"name": "run", "storage": str(tmp_path / "runs")},
        "data": {
            "train": [
                {"path": pictures.train[2], "format": "image_question"},
                {"path": list(pictures.train[:2]), "format": "messages"},
                {"path": str(words), "format": "messages"},
            ],
            "images": {},
            "seq_len": 128,
        },
        "train": {"global_batch": GLOBAL, "workers": WORLD},
    }
    recipe = parse(content)
    order = Order.of(recipe, prepare(recipe, "train", pictures.base, stream.spread))
    stop = -(-order.rows // GLOBAL) * GLOBAL  # with padding, which has none either
    (shard,) = stream.deal(stream.training_dataset(order, 0, stop), 1, 4, stream.in_order(None))
    found = list(stream.batches(shard, order, 0, 0, 1, 4))
    expected = list(stream.local_batches(order, 0, stop, 0, 1, 4))
    assert len(found) == len(expected)
    counts = set()
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.rows.input_ids, other.rows.input_ids)
        assert one.rows.pixels is not None and other.rows.pixels is not None
        for ours, theirs in zip(one.rows.pixels, other.rows.pixels, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            counts.add(len(ours))
    assert {0} < counts  # with some and with none, in one batch too
