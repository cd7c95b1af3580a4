"""The report of a run: what stands on the page, for whole runs and for those of which little is there."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ray_ft import paths
from ray_ft.artifacts import RunDir
from ray_ft.data import stream
from ray_ft.data.order import Order
from ray_ft.errors import StorageError
from ray_ft.recipe import Recipe
from ray_ft.report import charts, report
from ray_ft.report.blocks import number
from ray_ft.report.evaluated import form
from ray_ft.report.reading import Record
from ray_ft.train import launch
from ray_ft.train.metrics import MetricsLog
from ray_ft.train.schedule import total_steps
from ray_ft.view import View

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="hacked=1">'
ROW = {"loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_second": 1234.5, "step_seconds": 0.5, "memory_gib": 1.25}


class Page(HTMLParser):
    """A page taken apart: its text, its tags, and what they point to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.links, self.rows = html, [], [], []  # type: ignore[var-annotated]
        self._pieces: list[str] = []
        self._skip = False
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self._pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("script", "style")
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "srcset") and value]

    def handle_endtag(self, tag: str) -> None:
        self._skip = False

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self._pieces.append(data)

    @property
    def figures(self) -> list[dict[str, Any]]:
        found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', self.html, re.DOTALL)
        assert found
        return json.loads(found[1])

    def figure(self, title: str) -> dict[str, Any]:
        titles = re.findall(r"<figcaption>(.*?)(?: <small>.*)?</figcaption>", self.html)
        return self.figures[[unescape(one) for one in titles].index(title)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory that holds a recipe and nothing else."""
    run = RunDir(str(tmp_path / "runs" / "one"))
    recipe = {
        "run": {"name": "one", "storage": str(tmp_path / "runs"), "seed": 0},
        "model": {"path": "google/gemma-3-1b-it", "adapter": None},
        "data": {"train": [{"path": ["a.jsonl"], "format": "text", "weight": 1.0}], "eval": [], "seq_len": 64},
        "train": {"workers": 2, "strategy": "fsdp", "global_batch": 4, "epochs": 1, "max_steps": None, "log_every": 1},
    }
    paths.write_text(run.recipe, f"# resolved by ray-ft; sha256 {'ab' * 32}\n{yaml.safe_dump(recipe)}")
    return run


def made(run: RunDir) -> Page:
    return Page(Path(report(run.root, View())).read_text(encoding="utf-8"))


def write_metrics(run: RunDir, rows: list[dict[str, Any]]) -> None:
    paths.write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------- a whole run


def test_a_trained_run_is_shown_with_all_it_has(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"source_text": "cut\n' + json.dumps({"source_text": HOSTILE}) + "\n")
    recipe = make_recipe("train.max_steps=3", "train.eval_every=2", "train.log_every=1", "data.max_bad_rows=0.5")
    source = recipe.data.train[0].model_dump(mode="json")
    recipe = make_recipe(
        "train.max_steps=3", "train.eval_every=2", "train.log_every=1", "data.max_bad_rows=0.5",
        sources=[source, {**source, "path": [str(bad), source["path"][0]]}],
    )  # fmt: skip
    launch.train(recipe, View())
    page = made(recipe.run.dir)
    rows = [json.loads(line) for line in Path(recipe.run.dir.metrics).read_text().splitlines()]
    assert page.figure("Loss")["data"][0]["y"] == [row["loss"] for row in rows]
    assert page.figure("Loss")["data"][1]["x"] == [2, 3]
    for title in ("Learning rate", "Gradient norm", "Throughput", "Waiting for data", "Peak memory of a worker"):
        assert len(page.figure(title)["data"][0]["y"]) == 3
    assert page.figure("Length of samples")["data"][0]["type"] == "bar"
    # Both sources have the same file last, and the second one more: they are told apart by their names.
    by_source = page.figure("Training loss by source")["data"]
    names = [line["name"] for line in by_source]
    assert names[1] == "bad.jsonl, part-0.jsonl" and names[0].startswith("part-0.jsonl, part-1")
    assert [line["y"] for line in by_source] == [
        [row[f"loss/data.train.{at}"] for row in rows if f"loss/data.train.{at}" in row] for at in (0, 1)
    ]
    assert "complete after 3 steps" in page.text
    assert f"sha256 {recipe.sha256}" in page.text
    for reject in map(json.loads, Path(recipe.run.dir.rejects).read_text().splitlines()):
        assert f"{reject['reason']} {reject['file']}:{reject['line']} {reject['detail']}" in page.text
    stats = paths.read_json(recipe.run.dir.stats)["train"]
    assert f"{stats['rows']:,} {stats['used']:,} 2 0" in page.text  # rows in, used, rejected, cut
    assert "ray-ft evaluate" in page.text
    assert "ray-ft export" in page.text
    assert "shuffle_window: 8000000" in page.text  # of the recipe, where nobody set it
    assert "Failures and restarts None that left a trace" in page.text


def test_what_is_to_come_is_counted_as_training_counts_it(make_recipe: Callable[..., Recipe]) -> None:
    for overrides in (["data.train.0.weight=0.7", "train.epochs=3"], ["train.global_batch=16"], ["train.max_steps=7"]):
        recipe = make_recipe(*overrides)
        job = launch.prepare_data(recipe, View(), stream.in_process)
        run = recipe.run.dir
        recipe.save()
        paths.write_json(run.stats, {split: found.stats() for split, found in job.splits.items()})
        assert Record.read(run.root).state.total == total_steps(recipe, Order.of(recipe, job.train))


# ----------------------------------------------------------------------------------------------- self-contained, safe


def test_the_page_needs_nothing_else_and_lets_nothing_out(run: RunDir) -> None:
    write_metrics(run, [{"step": 1, **ROW}])
    page = made(run)
    assert [link for link in page.links if not link.startswith(("#", "data:,"))] == []
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "embed", "form", "base")]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline'; img" in policy  # of styles alone
    assert policy.count("unsafe") == 1
    assert "http" not in policy


def test_text_from_data_is_shown_and_never_run(run: RunDir) -> None:
    write_metrics(run, [{"step": 1, **ROW}])
    paths.write_json(run.stats, {"train": {"rows": 1, "used": 0, "rejected": {HOSTILE: 1}, "lengths": {}}})
    paths.write_text(run.rejects, json.dumps({"file": HOSTILE, "line": 1, "reason": HOSTILE, "detail": HOSTILE}) + "\n")
    row = {"prompt": [{"role": "user", "content": HOSTILE}], "reference": HOSTILE, "answer": HOSTILE, "origin": HOSTILE}
    side = {"loss": 1.0, "scores": {HOSTILE: 1.0}}
    labels = {"per_label": {HOSTILE: {"f1": 1.0}}}
    labels["confusion"] = {"labels": [HOSTILE], "answers": [HOSTILE], "counts": [[1]]}  # type: ignore[dict-item]
    paths.write_json(
        run.evaluation,
        {
            "step": 1, "engine": HOSTILE, "model": side, "base": side, "samples": [row], "worst": [row],
            "signatures": {"bleu": HOSTILE}, "labels": labels,
            "difference": {HOSTILE: {"value": 1, "low": 0, "high": 2, "p": 0.1}},
            "groups": {"source": {HOSTILE: {"rows": 1, "model": {HOSTILE: 1}, "base": None}}},
        },
    )  # fmt: skip
    paths.write_json(paths.join(run.export, "manifest.json"), {"checks": {HOSTILE: HOSTILE}, "created": HOSTILE})
    paths.write_text(run.at("logs", "worker-0.txt"), HOSTILE)
    page = made(run)
    assert page.text.count(HOSTILE) > 15
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3  # the figures, Plotly, and what draws
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    labels_shown = page.figure("Confusion of labels")["data"][0]["x"]
    assert labels_shown == [charts.plain(HOSTILE)]
    assert "<" not in labels_shown[0]  # Plotly's labels know some tags


def test_credentials_of_uris_are_on_no_page(run: RunDir) -> None:
    secret, key = "Zm9vYmFy/secret+value", "AKIAEXAMPLEKEY"
    text = Path(run.recipe).read_text()
    uri = f"s3://{key}:{secret.replace('/', '%2F')}@bucket/data/*.jsonl?endpoint_override=host&token=tok-12345"
    Path(run.recipe).write_text(text.replace("a.jsonl", uri))
    paths.write_text(run.at("logs", "worker-0.txt"), f"OSError: cannot read {uri}\nalso {secret} and tok-12345\n")
    paths.write_json(run.evaluation, {"step": 1, "model": {"no_loss": f"cannot open {uri}"}})
    page = made(run)
    for part in (secret, secret.replace("/", "%2F"), key, "tok-12345"):
        assert part not in page.html
    assert "s3://bucket/data/*.jsonl" in page.text


# ------------------------------------------------------------------------------------------------ what is not there


def test_sources_of_one_name_are_told_apart_and_only_so_many_are_drawn(run: RunDir) -> None:
    content = yaml.safe_load(Path(run.recipe).read_text())
    content["data"]["train"] = [{"path": [f"{at}/<a>.jsonl"], "format": "text"} for at in range(11)]
    content["data"]["eval"] = [{"path": ["held.jsonl"], "format": "text"}, {"path": ["b/"], "format": "text"}]
    paths.write_text(run.recipe, yaml.safe_dump(content))
    losses = {f"loss/data.train.{at}": float(at) for at in range(11)}
    held = {"eval_loss": 1.0, "eval_loss/data.eval.0": 2.0, "eval_loss/data.eval.1": 3.0}
    write_metrics(run, [{"step": 1, **ROW, **losses}, {"step": 2, **ROW, **losses, **held}])
    page = made(run)
    lines = page.figure("Training loss by source")["data"]
    assert [line["name"] for line in lines] == [f"&lt;a&gt;.jsonl ({at})" for at in range(9)]
    assert len({(line["line"]["color"], line["line"]["dash"]) for line in lines}) == 9
    assert "the first 9 of 11" in page.text
    assert [(line["name"], line["x"], line["y"]) for line in page.figure("Held-out loss by source")["data"]] == [
        ("held.jsonl", [2], [2.0]),
        ("b", [2], [3.0]),
    ]
    write_metrics(run, [{"step": 1, **ROW}])  # a run of one source has none of it
    assert "by source" not in made(run).text.lower().replace("per source", "")


def test_a_run_without_metrics_says_so(run: RunDir) -> None:
    page = made(run)
    assert "nothing trained yet" in page.text
    assert "This run has no metrics yet. ray-ft train RECIPE" in page.text
    assert "The data is not prepared yet." in page.text
    assert "This run names no held-out data" in page.text
    assert f"Not exported yet. ray-ft export {run.root}" in page.text
    assert "evaluate.during: {every: 500}" in page.text
    assert page.figures == []


def test_no_such_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is no run directory.*\n.*ray-ft train") as caught:
        report(str(tmp_path / "none"), View())
    assert caught.value.ways_out
    with pytest.raises(StorageError, match="memory://none/run' is no run directory") as caught:
        report("memory://user:topsecret@none/run", View())
    assert "topsecret" not in str(caught.value)


def test_a_run_on_an_object_store_is_read_and_written_there(run: RunDir) -> None:
    write_metrics(run, [{"step": 1, **ROW}])
    paths.write_text(run.at("checkpoints", "step_00000001-ab", "COMMITTED"), "{}")
    here = Record.read(run.root)
    there = RunDir("memory://bucket/runs/one")
    paths.upload_dir(run.root, there.root)
    try:
        assert report(there.root, View()) == f"{there.root}/report.html"
        page = Page(paths.read_text(there.report))
        assert page.figure("Loss")["data"][0]["y"] == [2.5]
        assert f"run directory {there.root} " in page.text
        assert Record.read(there.root).state.saved == here.state.saved == 1
    finally:
        paths.delete_dir(there.root)


def test_a_place_that_cannot_be_written_is_an_error(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"the report cannot be written to .*file/report.html"):
        report(run.root, View(), str(tmp_path / "file" / "report.html"))


def test_damaged_files_are_left_out_and_named(run: RunDir) -> None:
    Path(run.metrics).write_text(json.dumps({"step": 1, **ROW}) + '\n{"step": 2,\nnull\n{"step": 3, "lo')
    paths.write_text(run.stats, '{"train":')
    paths.write_text(run.evaluation, "[]")
    page = made(run)
    assert len(page.figure("Loss")["data"][0]["y"]) == 1
    assert f"{run.metrics}: lines 2, 3: no JSON object" in page.text  # the last one was being written: no fault
    assert f"{run.stats}: no valid JSON" in page.text
    assert f"{run.evaluation}: no JSON object" in page.text
    assert "Not evaluated yet" in page.text or "names no held-out data" in page.text


def test_numbers_that_are_not_finite_leave_a_gap(run: RunDir) -> None:
    write_metrics(run, [{"step": 1, **ROW}, {"step": 2, **ROW, "loss": float("nan"), "grad_norm": float("inf")}])
    page = made(run)
    assert page.figure("Loss")["data"][0]["x"] == [1]
    assert page.figure("Gradient norm")["data"][0]["x"] == [1]


# ----------------------------------------------------------------------------------------------------- where it stands


@pytest.mark.parametrize(
    ("age", "committed", "kind"),
    [(0, None, "training"), (3600, None, "stopped"), (0, 2, "training"), (3600, 3, "complete"), (0, 3, "complete")],
)
def test_a_run_that_wrote_lately_is_training(run: RunDir, age: int, committed: int | None, kind: str) -> None:
    write_metrics(run, [{"step": 1, **ROW}, {"step": 2, **ROW}])
    paths.write_json(run.stats, {"train": {"packed_by_source": {"0": 12}, "lengths": {}}})  # 3 steps of 4 rows
    os.utime(run.metrics, (time.time() - age,) * 2)
    if committed is not None:
        paths.write_text(run.at("checkpoints", f"step_{committed:08d}-ab", "COMMITTED"), "{}")
    state = Record.read(run.root).state
    assert (state.kind, state.total, state.saved) == (kind, 3, committed)
    assert state.step == max(2, committed or 0)


def test_restarts_broken_checkpoints_and_tracebacks_are_listed(run: RunDir) -> None:
    log = MetricsLog(run, 0)
    log.add({"step": 1, **ROW})
    log.add({"step": 2, **ROW})
    log.flush()
    time.sleep(1.1)  # TensorBoard names its files by the second
    log.rewind(1)
    log.close()
    why = "shard_00000 has 3 bytes, 9 were committed"
    paths.write_text(run.at("checkpoints", "step_00000004-cd.broken", "WHY"), f"{why}\n")
    paths.write_text(run.at("logs", "worker-1.txt"), "Traceback\nRuntimeError: lost the link\n")
    page = made(run)
    assert "went on after step 1" in page.text
    assert f"step_00000004-cd {why}" in page.text
    assert "Last traceback of worker-1.txt" in page.text
    assert "RuntimeError: lost the link" in page.text


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_is_shown_beside_its_base(run: RunDir) -> None:
    """A report as `ray_ft.evaluate` makes it, of answers that are known."""
    from ray_ft.answers.target import Answer
    from ray_ft.data.samples import Conversation
    from ray_ft.evaluate import report as made_by
    from ray_ft.evaluate.losses import Loss
    from ray_ft.evaluate.questions import Question

    wanted = ["eins", "zwei", "drei", "vier"] * 3
    given, before = ["eins", "zwei", "zwei", "vier"] * 3, ["x"] * 12
    questions = [
        Question(
            f"heldout.jsonl:{at}",
            Conversation(({"role": "user", "content": f"ask {at}"}, {"role": "assistant", "content": text})),
            "heldout.jsonl",
            ("en", "de"),
        )
        for at, text in enumerate(wanted)
    ]

    def system(name: str, texts: list[str], loss: float) -> made_by.System:
        answers = [Answer(text, "stop", 3, 1) for text in texts]
        return made_by.System(name, "transformers", Loss(loss, 100, 10), answers)

    content = yaml.safe_load(Path(run.recipe).read_text())
    content["data"]["train"] = [{"path": "a.jsonl", "format": "text"}]
    content["evaluate"] = {"labels": ["eins", "zwei", "drei", "vier"]}
    del content["train"]
    recipe = Recipe.model_validate(content)
    found = made_by.build(
        {"run": "one", "step": 9}, recipe, questions, system("m", given, 1.5), system("b", before, 3.0)
    )
    paths.write_json(run.evaluation, found)
    page = made(run)
    assert "12 held-out rows, answered with transformers by the model of step 9." in page.text
    for name, value in found["model"]["scores"].items():
        assert form(name, value) in page.text, name
    by = found["difference"]["exact_match"]
    assert f"0.000 0.750 +0.750 [+{by['low']:.3f}, +{by['high']:.3f}]" in page.text
    assert page.figure("Improvement over the base model")["data"][0]["x"]
    confusion = page.figure("Confusion of labels")["data"][0]
    assert confusion["z"] == found["labels"]["confusion"]["counts"]
    assert np.sum(confusion["z"]) == 12
    assert "ask 2" in page.text
    for text in found["signatures"].values():
        assert text in page.text
    assert "Per language pair: base model → model" in page.text
    assert len(re.findall(r'class="side good"', page.html)) >= 9  # three of four answers equal their reference


def test_validations_beside_training_are_lines_over_steps(run: RunDir) -> None:
    for step, match in ((20, 0.5), (100, 0.75), (10, 0.25)):
        content = {
            "step": step,
            "scores": {"exact_match": match, "chrf": 40.0},
            "samples": [{"prompt": "two", "answer": "zwo" if step < 100 else "zwei", "reference": "zwei"}],
            "prompts": [{"prompt": "Hello!", "answer": f"said after {step}"}],
        }
        paths.write_json(paths.join(run.validations, f"step_{step:08d}.json"), content)
    page = made(run)
    line = page.figure("Shares over steps")["data"][0]
    assert (line["x"], line["y"]) == ([10, 20, 100], [0.25, 0.5, 0.75])
    assert page.figure("Scores over steps")["data"][0]["name"] == "chrf"
    assert "Hello! step 10 said after 10 step 20 said after 20 step 100 said after 100" in page.text
    assert "two step 10 zwo step 20 zwo step 100 = reference zwei reference zwei" in page.text


def test_an_older_evaluation_or_export_says_what_renews_it(run: RunDir) -> None:
    paths.write_text(run.at("checkpoints", "step_00000005-ab", "COMMITTED"), "{}")
    paths.write_json(run.evaluation, {"step": 4, "model": {"loss": 1.0, "scores": {}}})
    checks = {
        "keys": {"passed": True, "compared": 12, "missing": []},
        "logits": {"passed": True, "largest_difference": 1.5e-6},
        "logits_vllm": {"left_out": "not asked for"},
    }
    paths.write_json(paths.join(run.export, "manifest.json"), {"step": 4, "kind": "model", "checks": checks})
    page = made(run)
    assert f"The newest checkpoint is of step 5. ray-ft evaluate {run.root}" in page.text
    assert f"The newest checkpoint is of step 5. ray-ft export {run.root}" in page.text
    assert "logits passed largest difference 1.50e-06" in page.text
    assert "keys passed compared 12, missing none" in page.text
    assert "logits vllm left out not asked for" in page.text


# ----------------------------------------------------------------------------------------------------------------- size


def test_long_runs_are_thinned_out_and_every_evaluation_stays(run: RunDir) -> None:
    rows: list[dict[str, Any]] = [{"step": step, **ROW} for step in range(1, 10_001)]
    for row in rows[::1234]:
        row["eval_loss"] = 3.0
    write_metrics(run, rows)
    page = made(run)
    training, held_out = page.figure("Loss")["data"]
    assert charts.POINTS <= len(training["x"]) <= charts.POINTS + 9
    assert (training["x"][0], training["x"][-1]) == (1, 10_000)
    assert len(held_out["x"]) == len(rows[::1234])
    assert "2,000 of 10,000 rows" in page.text
    assert len(page.html) < 7_000_000  # of which Plotly is 4.8 MB


def test_a_page_stays_readable_however_much_a_run_holds(run: RunDir) -> None:
    evaluations = ({"eval_loss": 3.0} if step % 2 else {} for step in range(20_000))
    write_metrics(run, [{"step": step, **ROW, **more} for step, more in enumerate(evaluations)])
    sample = {"prompt": "p" * 20_000, "reference": "r", "answer": "a" * 20_000, "base_answer": "b", "origin": "f:1"}
    labels = [f"label {number}" for number in range(300)]
    confusion = {"labels": labels, "answers": labels, "counts": [[1] * 300] * 300}
    found = {"step": 1, "model": {"loss": 1.0}, "samples": [sample] * 300, "worst": [sample] * 300}
    paths.write_json(run.evaluation, {**found, "labels": {"accuracy": 0.5, "confusion": confusion}})
    paths.write_text(paths.join(run.logs, "worker.log"), "e" * 1_000_000 + "\nthe last line")
    page = made(run)
    training, held_out = page.figure("Loss")["data"]
    assert len(training["x"]) <= 2 * charts.POINTS and len(held_out["x"]) <= 2 * charts.POINTS
    assert held_out["x"][-1] == 19_999
    assert page.text.count("The first 50 of 300") == 2
    assert "… (16,000 more characters)" in page.text
    assert "The confusion of 300 labels is too large" in page.text
    assert "the last line" in page.text and "e" * 30_000 not in page.html
    assert len(page.html) < 9_000_000


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "—"), (0, "0"), (12345, "12,345"), (0.5, "0.5"), (1234.5, "1,234"), (2.0, "2"), (1e-5, "1.00e-05"),
     ("a", "a"), (0.123456, "0.1235"), (-3.21, "-3.21"), (123456.7, "123,457")],
)  # fmt: skip
def test_numbers_for_people(value: Any, shown: str) -> None:
    assert number(value) == shown
