"""Batch inference: one row out for each row in, as it was written, and going on after a kill."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ray_ft import generate as generating
from ray_ft import paths
from ray_ft.answers import Sampling, Target, endpoint
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError, ServeError
from ray_ft.generate import Generated, generate
from ray_ft.generate.inputs import Inputs
from ray_ft.generate.outputs import Counts, Output
from ray_ft.recipe import Recipe
from ray_ft.train import launch
from ray_ft.view import View
from tests.unit import fake_openai
from tests.unit.fake_openai import Fake

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    with fake_openai.running() as server:
        yield server


def run(fake: Fake, source: Any, to: Any, **options: Any) -> Generated:
    options = {"batch_size": 4, **options}
    source = [str(one) for one in source] if isinstance(source, list) else str(source)
    return generate(source, Target.of(fake.url), str(to), view=View(), **options)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"id": number, "prompt": f"p{number}"}) + "\n" for number in range(count)))
    return path


def test_rows_keep_their_bytes_their_order_and_their_places(fake: Fake, tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"prompt": "a", "n": 123456789012345678901234, "x": 1.10, "e": 1E400, "u": "\\u00e9 \\ud83d"}',
        b'{ "prompt" : "b","date":"2026-01-02T03:04:05Z" }  ',
        b"",
        b'{"prompt": "broken',
        b'{"prompt": 7}',
        b'{"other": 1}',
        b"[1, 2]",
        b"{}",
        b'{"prompt": "c"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\r\n".join(lines))
    done = run(fake, tmp_path / "in.jsonl", tmp_path / "out.jsonl", part_rows=3)
    assert done.counts == Counts(answered=3, rejected=5, failed=0, tokens=9)
    out = (tmp_path / "out.jsonl").read_bytes().splitlines()
    added = b'"answer": "<a>", "finish_reason": "stop", "error": null, "tokens": 3}'
    assert out[0] == lines[0].removeprefix(b"\xef\xbb\xbf")[:-1] + b", " + added
    assert out[1] == b'{ "prompt" : "b","date":"2026-01-02T03:04:05Z", ' + added.replace(b"<a>", b"<b>")
    errors = [json.loads(line)["error"] for line in out]
    at = f"{tmp_path}/in.jsonl"
    assert [error and error.split(": ")[0] for error in errors] == [
        None,
        None,
        *(f"{at}:{n}" for n in range(4, 9)),
        None,
    ]
    assert "invalid JSON" in errors[2] and "is int, not a string" in errors[3] and "missing field" in errors[4]
    assert json.loads(out[4]) == {
        "other": 1, "answer": None, "finish_reason": "error", "error": errors[4], "tokens": 0
    }  # fmt: skip
    assert json.loads(out[6]) == {"answer": None, "finish_reason": "error", "error": errors[6], "tokens": 0}
    assert sorted(fake.asked) == ["a", "b", "c"]
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_a_prompt_that_is_refused_keeps_its_row(fake: Fake, tmp_path: Path) -> None:
    fake.reply = lambda prompt, attempt: fake_openai.error(400, "too long") if prompt == "p1" else None
    done = run(fake, prompts(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl")
    assert done.counts == Counts(answered=2, rejected=0, failed=1, tokens=6)
    rows = read(tmp_path / "out.jsonl")
    assert [row["answer"] for row in rows] == ["<p0>", None, "<p2>"]
    assert rows[1]["error"] == f"{tmp_path}/in.jsonl:2: the server refused it (400): too long"


ROWS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("messages", {}, {"messages": [{"role": "user", "content": "q"}]}, "q"),
    ("messages", {}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "known"}]}, "q"),
    ("messages", {"field": "turns"}, {"turns": [{"role": "user", "content": "q"}]}, "q"),
    ("prompt_completion", {}, {"prompt": "q"}, "q"),
    ("prompt_completion", {"prompt_field": "question"}, {"question": "q", "completion": ""}, "q"),
    ("prompt", {}, {"prompt": "q <eos>"}, "q <eos>"),
    ("template", {"prompt": "{a}+{b}?"}, {"a": "1", "b": "2"}, "1+2?"),
    (
        "translation",
        {"prompt": "To {target_lang}: {text}"},
        {"source_text": "one", "source_lang_code": "en", "target_lang_code": "fr"},
        "To French: one",
    ),
    ("preference", {}, {"prompt": "q", "chosen": "known"}, "q"),
    (
        "preference",
        {"prompt_field": None},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "known"}]},
        "q",
    ),
]


@pytest.mark.parametrize(("name", "settings", "row", "asked"), ROWS)
def test_formats(
    fake: Fake, tmp_path: Path, name: str, settings: dict[str, Any], row: dict[str, Any], asked: str
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    run(fake, tmp_path / "in.jsonl", tmp_path / "out.jsonl", format=name, settings=settings)
    assert fake.asked == [asked]
    assert ("messages" in fake.bodies[0]) == (name != "prompt")
    assert "known" not in str(fake.bodies)
    (out,) = read(tmp_path / "out.jsonl")
    assert {key: out[key] for key in row} == row and out["answer"] == f"<{asked}>"


@pytest.mark.parametrize("row", [ROWS[0][2], ROWS[3][2], ROWS[7][2]])
def test_a_format_is_told_by_the_columns(fake: Fake, tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "in.jsonl").write_text("not JSON\n" + json.dumps(row))
    run(fake, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert len(fake.asked) == 1


def test_bad_formats_are_said(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"frage": "a"}')
    for options, said in (
        ({}, r"columns of .*in.jsonl \('frage'\) are of no known format: messages \(messages\); prompt_completion"),
        ({"format": "csv"}, "format 'csv' is not known"),
        ({"format": "messages", "settings": {"fild": "x"}}, "format messages: fild: Extra inputs"),
        ({"format": "template"}, "format template: prompt: Field required"),
        ({"settings": {"field": "x"}}, "settings .field. of no format"),
    ):
        with pytest.raises(DataError, match=said):
            run(fake, tmp_path / "in.jsonl", tmp_path / "out.jsonl", **options)
    assert fake.asked == [] and sorted(os.listdir(tmp_path)) == ["in.jsonl"]


def test_compressed_in_and_out_and_several_files(fake: Fake, tmp_path: Path) -> None:
    lines = prompts(tmp_path / "a.jsonl", 5).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    files = [tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst", tmp_path / "a.jsonl"]
    for name, opened in (("out.jsonl.gz", gzip.decompress), ("out.jsonl.zst", _unzstd), ("out.json", bytes)):
        done = run(fake, files, tmp_path / name, part_rows=4)
        rows = [json.loads(line) for line in opened((tmp_path / name).read_bytes()).splitlines()]
        assert [row["answer"] for row in rows] == [f"<p{number}>" for number in range(5)] * 3
        assert done.counts.rows == 15


def _unzstd(content: bytes) -> bytes:
    import io

    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True).read()


def test_parquet_keeps_its_types(fake: Fake, tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", None, "c"],
            "at": pa.array([datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), None, None], pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.10"), None, Decimal("2.00")], pa.decimal128(9, 2)),
            "small": pa.array([1, 2, 3], pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    done = run(fake, tmp_path / "in.parquet", tmp_path / "out.parquet", part_rows=2)
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.select(table.column_names).equals(table)
    assert out["answer"].to_pylist() == ["<a>", None, "<c>"] and done.counts == Counts(2, 1, 0, 6)
    assert out["error"].to_pylist()[1].startswith(f"{tmp_path}/in.parquet:2: field 'prompt' is null")
    with pytest.raises(DataError, match=r"in.parquet:1 holds a value that JSON has no form for[\s\S]*\.parquet"):
        run(fake, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    pq.write_table(table.select(["prompt", "small"]), tmp_path / "plain.parquet")
    run(fake, tmp_path / "plain.parquet", tmp_path / "plain.jsonl")
    assert read(tmp_path / "plain.jsonl")[0] == {
        "prompt": "a", "small": 1, "answer": "<a>", "finish_reason": "stop", "error": None, "tokens": 3
    }  # fmt: skip


def test_lines_to_parquet_unless_that_would_alter_them(fake: Fake, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": 2}\n{"prompt": "c", "later": "x"}\n')
    run(fake, source, tmp_path / "out.parquet", part_rows=2)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["n"], row["later"], row["answer"]) for row in rows] == [
        (1, None, "<a>"), (2, None, "<b>"), (None, "x", "<c>")
    ]  # fmt: skip
    source.write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": 2.5}\n')
    with pytest.raises(DataError, match=r"of several types[\s\S]*\.jsonl"):
        run(fake, source, tmp_path / "other.parquet")
    source.write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "2"}\n')
    with pytest.raises(DataError, match="do not fit a Parquet table unchanged"):
        run(fake, source, tmp_path / "third.parquet")


def test_columns_of_the_input_are_not_replaced(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "answer": "mine"}')
    with pytest.raises(DataError, match=r"in.jsonl:1 has a column 'answer' of its own[\s\S]*--prefix"):
        run(fake, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    run(fake, tmp_path / "in.jsonl", tmp_path / "out.jsonl", prefix="model_", overwrite=True)
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["answer"], row["model_answer"]) == ("mine", "<a>")


def test_bad_places_are_said(fake: Fake, tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", 2)
    with pytest.raises(DataError, match="tells no format"):
        run(fake, source, tmp_path / "out.csv")
    with pytest.raises(DataError, match="is one of the inputs"):
        run(fake, source, source, overwrite=True)
    with pytest.raises(DataError, match="matches no file"):
        run(fake, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(DataError, match=r"there already[\s\S]*--overwrite"):
        run(fake, source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "precious" and fake.asked == []
    run(fake, source, tmp_path / "out.jsonl", overwrite=True)
    assert len(read(tmp_path / "out.jsonl")) == 2


# ------------------------------------------------------------------------------------------------------------ resume


def test_rows_that_ask_nothing_are_not_all_held(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": n, "prompt": f"p{n}" if n in (0, 17, 39) else ""}) + "\n" for n in range(40)]
    source.write_text("".join(lines))
    given, rows, commit = [0], Inputs.rows, Output.commit
    ahead: list[int] = []

    def counted(*arguments: Any) -> Iterator[Any]:
        for row in rows(*arguments):
            given[0] += 1
            yield row

    def committed(output: Output, number: int, part: Any) -> Counts:
        ahead.append(given[0] - 5 * number)
        return commit(output, number, part)

    monkeypatch.setattr(Inputs, "rows", counted)
    monkeypatch.setattr(Output, "commit", committed)
    monkeypatch.setattr(generating, "READ_ROWS", 10)
    done = run(fake, source, tmp_path / "out.jsonl", part_rows=5, format="prompt_completion")
    assert done.counts == Counts(3, 37, 0, 9)
    assert len(ahead) == 8 and max(ahead) <= 10
    found = [(row["id"], row["answer"]) for row in read(tmp_path / "out.jsonl")]
    assert found == [(n, f"<p{n}>" if n in (0, 17, 39) else None) for n in range(40)]


KILLED = """
import sys
from ray_ft.answers import Target
from ray_ft.generate import generate
from ray_ft.view import View
source, url, to, part_rows = sys.argv[1:]
generate(source, Target.of(url), to, view=View(), batch_size=2, part_rows=int(part_rows))
"""


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_killed_run_goes_on_behind_its_last_part(fake: Fake, tmp_path: Path, name: str) -> None:
    source, to, parts = prompts(tmp_path / "in.jsonl", 40), tmp_path / name, tmp_path / f"{name}.parts"
    killed = threading.Event()

    def reply(prompt: str, attempt: int) -> None:
        if int(prompt[1:]) >= 24:  # it ends no sooner
            killed.wait(100)

    fake.reply = reply
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), fake.url, str(to), "4"], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        wait_for(lambda: len(committed(parts)) >= 3, process)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(30)
        killed.set()
    assert not to.exists()
    kept = 4 * len(committed(parts))
    assert 12 <= kept < 40
    (parts / "part-000099.0-0-0-0.jsonl.1234.partial").write_text("left by whoever was killed while writing")
    done = run(fake, source, to, part_rows=7)  # the parts that are there keep their size
    assert (done.reused, done.counts) == (kept, Counts(answered=40, tokens=120))
    times = [fake.asked.count(f"p{number}") for number in range(40)]
    assert set(times[:kept]) == {1}, "a row of a finished part was asked again"
    assert set(times[kept + 4 + 2 * 2 + 4 :]) == {1}  # beyond the part under way and what was read ahead of it
    rows = pq.read_table(to).to_pylist() if name.endswith("parquet") else read(to)
    assert [(row["id"], row["answer"]) for row in rows] == [(number, f"<p{number}>") for number in range(40)]
    assert not parts.exists()


def committed(parts: Path) -> list[Path]:
    return [path for path in parts.glob("part-*") if not path.name.endswith(".partial")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.005)


def interrupted(fake: Fake, tmp_path: Path, **options: Any) -> Path:
    """A call that ended after its first part, at a server that failed."""
    source = prompts(tmp_path / "in.jsonl", 12)
    fake.reply = lambda prompt, attempt: fake_openai.error(403, "stop") if prompt == "p9" else None
    with pytest.raises(ServeError, match="403"):
        run(fake, source, tmp_path / "out.jsonl", part_rows=4, batch_size=1, **options)
    assert len(list((tmp_path / "out.jsonl.parts").glob("part-*"))) == 2
    fake.reply = lambda prompt, attempt: None
    return source


def test_other_settings_inputs_or_models_do_not_go_on(fake: Fake, tmp_path: Path) -> None:
    source = interrupted(fake, tmp_path)
    to = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"max_new_tokens was 256, is 9[\s\S]*--overwrite"):
        run(fake, source, to, sampling=Sampling(max_new_tokens=9))
    with pytest.raises(DataError, match=r"prefix was .*, is \"m_\""):
        run(fake, source, to, prefix="m_")
    with pytest.raises(DataError, match="format was"):
        run(fake, source, to, format="prompt")
    fake.models = ["other"]
    with pytest.raises(DataError, match='model was "tiny", is "other"'):
        run(fake, source, to)
    fake.models = ["tiny"]
    with source.open("a") as stream:
        stream.write('{"prompt": "more"}\n')
    with pytest.raises(DataError, match=r"inputs: .*in.jsonl changed"):
        run(fake, source, to)
    asked = len(fake.asked)
    done = run(fake, source, to, overwrite=True)
    assert (done.reused, done.counts.rows, len(fake.asked) - asked) == (0, 13, 13)


def test_what_was_killed_while_the_file_was_put_together(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing is asked again, whether the file was there already or not."""
    source, to = prompts(tmp_path / "in.jsonl", 10), tmp_path / "out.jsonl"

    def killed(_: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(paths, "delete_dir", killed)
        with pytest.raises(KeyboardInterrupt):
            run(fake, source, to, part_rows=4)
    assert to.exists() and (tmp_path / "out.jsonl.parts").exists()
    assert run(fake, source, to).reused == 10
    assert len(fake.asked) == 10 and len(read(to)) == 10 and not (tmp_path / "out.jsonl.parts").exists()


def test_locations_may_be_uris(fake: Fake, tmp_path: Path) -> None:
    paths.write_text("memory://in/a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n')
    done = run(fake, "memory://in/a.jsonl", "memory://out/b.jsonl", part_rows=1)
    assert done.location == "memory://out/b.jsonl" and paths.list_dir("memory://out") == ["b.jsonl"]
    assert [json.loads(line)["answer"] for line in paths.read_text("memory://out/b.jsonl").splitlines()] == [
        "<a>",
        "<b>",
    ]


# ------------------------------------------------------------------------------------------------------------ a run


def test_a_run_is_asked_as_its_recipe_says(make_recipe: Callable[..., Recipe], demo: DemoPaths, tmp_path: Path) -> None:
    """The recipe's own translation prompt, without a word about it; a row with a special token is not obeyed."""
    settings = make_recipe("train.max_steps=1")
    launch.train(settings, View())
    rows = pq.read_table(demo.heldout).slice(0, 5).to_pylist()
    rows[3]["source_text"] = "one <end_of_turn>"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target, sampling = Target.of(settings.run.dir.root), Sampling(max_new_tokens=4)
    done = generate(
        str(tmp_path / "in.jsonl"), target, str(tmp_path / "out.jsonl"), view=View(), sampling=sampling,
        batch_size=2, device="cpu", part_rows=2,
    )  # fmt: skip
    assert (done.counts.answered, done.counts.rejected) == (4, 1)
    out = read(tmp_path / "out.jsonl")
    assert "special token '<end_of_turn>'" in out[3]["error"]
    from ray_ft import answers

    prompt = {"role": "user", "content": f"Translate to French (fr): {rows[0]['source_text']}"}
    if rows[0]["target_lang_code"] == "es":
        prompt["content"] = prompt["content"].replace("French (fr)", "Spanish (es)")
    with answers.opened(target, device="cpu") as engine:
        (expected,) = engine.answers([answers.Prompt(messages=[prompt])], sampling)
    assert (out[0]["answer"], out[0]["tokens"]) == (expected.text, expected.tokens)
