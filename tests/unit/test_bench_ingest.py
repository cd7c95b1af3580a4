"""The ingest benchmark: its rows, that all sides make the same tokens, and the figures computed from given timings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import conversations, ingest, ingest_run, processes
from benchmarks.peers import packages
from benchmarks.processes import Peak
from ray_ft.data import stream
from ray_ft.data.prepare import prepare
from ray_ft.demo import DemoPaths


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    conversations.write(file, "conversations", 400_000, conversations.words())
    return file


@pytest.mark.parametrize("kind", conversations.KINDS)
def test_rows_are_as_many_bytes_as_asked_whole_and_each_another(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    block = len(conversations.block(kind, ["one"]))
    conversations.write(file, kind, 2 * block + 1000, ["one"])
    lines = file.read_bytes().splitlines()
    assert 2 * block + 1000 <= file.stat().st_size < 2 * block + 10_000
    assert len(set(lines)) == len(lines) > 2 * conversations.BLOCK_ROWS
    assert all(json.loads(line)["messages"] for line in lines)


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(SystemExit, match="free"):
        conversations.write(tmp_path / "rows.jsonl", "sentences", 1000, ["one"])
    assert not list(tmp_path.iterdir())


def test_sizes() -> None:
    assert conversations.size("50MB") == 50_000_000 and conversations.size("1.5gb") == 1_500_000_000
    with pytest.raises(ValueError, match="50"):
        conversations.size("50")


def test_the_tokenizers_peer_makes_the_tokens_that_ray_ft_trains_on(
    demo: DemoPaths, rows: Path, tmp_path: Path
) -> None:
    wanted = ingest_run.settings(rows, demo.base, tmp_path)
    counts = prepare(wanted, "train", demo.base, stream.in_process).counts
    assert counts.used == counts.rows == rows.read_bytes().count(b"\n")  # every row fits
    ingest.write_texts(texts := tmp_path / "texts.jsonl", wanted, demo.base)
    told, result = tmp_path / "settings.json", tmp_path / "result.json"
    told.write_text(json.dumps({"model": demo.base, "texts": str(texts), "processes": 2, "result": str(result)}))
    script = packages.ROOT / "benchmarks" / "peers" / "raw_tokenizers.py"
    subprocess.run([sys.executable, script, told], check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    found = json.loads(result.read_text())
    assert found["tokens"] == counts.tokens and found["seconds"] > 0


def pair(ours: float, raw: float, theirs: float, tokens: int = 100) -> dict[str, dict[str, float]]:
    seconds = {"ray-ft": ours, "tokenizers": raw, "datasets": theirs}
    return {name: {"tokens": 100, "seconds": value} for name, value in seconds.items()} | {
        "datasets": {"tokens": tokens, "seconds": theirs}
    }


def test_figures_are_ratios_of_rates() -> None:
    alone, peer = ingest.rate_figures("sentences", [pair(2.0, 1.0, 3.0), pair(4.0, 4.0, 2.0)])
    assert alone.values == [0.5, 1.0] and peer.values == [1.5, 0.5]
    assert alone.at_least == 0.8 and not alone.reached and peer.at_least == 1.3 and not peer.reached


def test_sides_with_different_numbers_of_tokens_are_refused() -> None:
    ingest.same_tokens([pair(1, 1, 1)])
    with pytest.raises(SystemExit, match="different numbers of tokens"):
        ingest.same_tokens([pair(1, 1, 1), pair(1, 1, 1, tokens=99)])


def test_memory_is_the_largest_input_against_the_smallest() -> None:
    peaks = {"50MB": Peak(100, 300, 50), "500MB": Peak(110, 900, 60), "5GB": Peak(140, 500, 70)}
    (figure,) = ingest.memory_figures(peaks)
    assert figure.values == [1.4] and not figure.reached and "5GB ÷ 50MB" in figure.name
    assert ingest.memory_figures({"50MB": Peak(1, 1, 1)}) == []
    found = {"50MB, data.cache auto": {"tokens": 100, "prepared": 4.0, "first": 1.0, "from the start": 10.0}}
    (first,) = ingest.first_figures(found)
    assert first.values == [1.25]
    assert ingest.memory_table(peaks, found).rows[0][-4:] == ["4.0", "5.0", "10.0", "10"]


def test_a_page_that_two_processes_share_counts_once() -> None:
    size = 64 << 20
    code = (
        f"import mmap, os, time; m = mmap.mmap(-1, {size}); m.write(b'x' * {size}); pid = os.fork(); "
        f"[m[at] for at in range(0, {size}, 4096)]; "  # each page, without the copy that read() makes
        "print(flush=True) if pid else None; time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        watched = psutil.Process(process.pid)
        (child,) = watched.children()
        while child.memory_info().rss < size:  # it reads the pages as well
            pass
        found = processes.of_tree(watched)
        assert size < found.shared_once < 2 * size < found.resident
    finally:
        for one in psutil.Process(process.pid).children():
            one.kill()
        process.kill()
        process.wait()
