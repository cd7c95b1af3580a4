"""Every kind of training from raw rows to answers over HTTP, each as its quickstart's recipe has it, on two cores.

    python -m benchmarks.tasks [TASK …] [--folder FOLDER] [--to docs/tasks.md]

Of each task, by the public command line: `ray-ft demo`, `train`, `evaluate` beside the untrained base on held-out rows,
`export` with its checks, `serve`, and the same held-out rows asked over HTTP. Its row of the table between the markers
of `--to` is replaced, those of other tasks stay. The exit status is 1 where a score is below its target, trained or
over HTTP, or where a step failed. A folder that is kept (--folder) is gone on with: what is trained there is not
trained again, and minutes are then those of an earlier call, or of what was left to do.

A further task is one entry of `TASKS`; one that is not asked by chat says how it is asked.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ft import artifacts, paths, recipe
from ray_ft.data import sources
from ray_ft.data.formats import columns_used
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Labelled
from ray_ft.evaluate import held_out_questions
from ray_ft.evaluate.report import TITLES, form
from ray_ft.evaluate.scores import Scorer, label_report
from ray_ft.quickstart import StepFailed, ask, free_port, serving
from ray_ft.recipe import Recipe

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tasks -->", "<!-- /tasks -->"
COLUMNS = ("task", "score", "base", "trained", "target", "over HTTP", "minutes to train", "export")
BATCH = 50  # texts to be labelled in one request
MINUTES = "minutes.json"  # in a run's folder: what its training took


def asked_by_chat(settings: Recipe, run: str) -> dict[str, float]:
    """Serve a run's export and ask it the held-out questions over HTTP. Returns the scores of what it answers."""
    questions = held_out_questions(settings, settings.evaluate.max_rows)
    port, key = free_port(), secrets.token_urlsafe(32)
    with serving(["serve", run, "--port", str(port)], port, key) as url:
        name = settings.serve.model_name or settings.run.name
        answers = ask(url, key, name, questions, settings.evaluate.max_new_tokens)
    scorer = Scorer(
        [question.reference for question in questions],
        [question.target_language for question in questions],
        settings.evaluate.labels,
        [question.thinking for question in questions],
    )
    return scorer.scores(scorer.scored(answers))


def asked_for_labels(settings: Recipe, run: str) -> dict[str, float]:
    """Serve a run's export and ask it over HTTP for the labels of the held-out texts. Returns the scores of them."""
    import httpx

    names = settings.model.labels
    (source,) = settings.data.eval
    rows = [
        sample
        for file in sources.find_files(source)
        for chunk in sources.chunks_of(file, 0)
        for row in sources.read_rows(chunk, columns_used(source))
        if isinstance(row.content, dict)
        and isinstance(sample := to_sample(source, row.content, labels=names), Labelled)
    ]
    port, key = free_port(), secrets.token_urlsafe(32)
    with serving(["serve", run, "--port", str(port)], port, key) as url:
        model = settings.serve.model_name or settings.run.name
        found: list[str] = []
        for start in range(0, len(rows), BATCH):
            body = {"model": model, "input": [row.text for row in rows[start : start + BATCH]]}
            reply = httpx.post(
                f"{url}/classify", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120, trust_env=False
            )
            reply.raise_for_status()
            found += [each["label"] for each in reply.json()["data"]]
    report = label_report(found, [names[row.label] for row in rows], names)
    assert report is not None
    return {score: report[score] for score in ("accuracy", "macro_f1")}


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        recipe: its file in configs/, without the ending.
        demo: what `ray-ft demo --task` calls its data.
        targets: score → what the trained model has to reach on held-out rows, and over HTTP.
        asked: from (recipe, run) the same scores of answers over HTTP, but those in `OFFLINE`.
        after: the task whose export it begins from; None: an untrained base.
    """

    recipe: str
    demo: str
    targets: dict[str, float]
    asked: Callable[[Recipe, str], dict[str, float]] = asked_by_chat
    after: str | None = None


#: Scores of what a model finds likely, which no endpoint tells.
OFFLINE = frozenset({"reward_accuracy"})

TASKS = {
    "translation": Task("quickstart", "translation", {"exact_match": 0.9}),
    "reasoning": Task("reasoning_quickstart", "reasoning", {"answer_match": 0.8}),
    "mixture": Task("mixture_quickstart", "mixture", {"exact_match": 0.8, "answer_match": 0.8}),
    "labels": Task("labels_quickstart", "labels", {"accuracy": 0.95, "macro_f1": 0.95}, asked_for_labels),
    # Its answers become others, not better ones: of what it says, a little is the preferred words to the letter.
    "preference": Task(
        "preference_quickstart", "preference", {"reward_accuracy": 0.9, "exact_match": 0.05}, after="translation"
    ),
    "vision": Task("vision_quickstart", "vision", {"exact_match": 0.9}),
}


@dataclass(frozen=True)
class Row:
    """One score of one task."""

    score: str
    base: float | None
    trained: float | None
    target: float
    http: float | None
    minutes: float | None
    exported: str

    @property
    def reached(self) -> bool:
        found = [self.trained, *([] if self.score in OFFLINE else [self.http])]
        return all(value is not None and value >= self.target for value in found)

    def cells(self, task: str) -> tuple[str, ...]:
        values = [form(self.score, value) for value in (self.base, self.trained, self.target)]
        http = "none tells" if self.score in OFFLINE else form(self.score, self.http)
        minutes = "–" if self.minutes is None else f"{self.minutes:.1f}"
        return (task, TITLES.get(self.score, self.score), *values, http, minutes, self.exported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--folder", type=Path, help="where demos and runs are kept; default: a temporary folder")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "tasks.md", help="file with the table")
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    to = options.to.resolve()
    before = _split(to.read_text(encoding="utf-8"), to)  # a file without markers is found before anything is trained
    with tempfile.TemporaryDirectory(prefix="ray_ft_tasks_") as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # the recipes' paths begin there
        found = {name: _rows(name, TASKS[name]) for name in options.tasks or TASKS}
        os.chdir(ROOT)
    text = _replaced(before, found)
    to.write_text(text, encoding="utf-8")
    print(_split(text, to)[1])
    below = [name for name, rows in found.items() if not all(row.reached for row in rows)]
    if below:
        sys.exit(f"below target: {', '.join(below)}")


def _rows(name: str, task: Task) -> list[Row]:
    path = str(ROOT / "configs" / f"{task.recipe}.yaml")
    report: dict[str, Any] = {}
    http: dict[str, float] = {}
    minutes, exported = None, "no"
    try:
        if task.after:
            _exported(task.after)
        _verb(name, "demo", "--task", task.demo)
        settings = recipe.load(path)
        run = settings.run.dir.root
        minutes = _trained(name, path, run)
        _verb(name, "evaluate", run)
        report = paths.read_json(settings.run.dir.evaluation)
        _verb(name, "export", run)
        checks = paths.read_json(paths.join(settings.run.dir.export, artifacts.MANIFEST))["checks"]
        exported = f"{len(checks)} checks"
        http = task.asked(settings, run)
    except StepFailed as failure:
        print(f"{name}: {failure}", file=sys.stderr, flush=True)
    sides = [report.get(side) or {} for side in ("base", "model")]
    rows = []
    for score, target in task.targets.items():
        base, trained = (((side.get("scores") or {}) | (side.get("statistics") or {})).get(score) for side in sides)
        rows.append(Row(score, base, trained, target, http.get(score), minutes, exported))
    return rows


def _exported(name: str) -> None:
    """Train and export what another task begins from, where that is not done yet."""
    task = TASKS[name]
    path = str(ROOT / "configs" / f"{task.recipe}.yaml")
    _verb(name, "demo", "--task", task.demo)
    run = recipe.load(path).run.dir
    if not paths.exists(paths.join(run.export, artifacts.MANIFEST)):
        _trained(name, path, run.root)
        _verb(name, "export", run.root)


def _trained(name: str, path: str, run: str) -> float:
    """Train. Returns minutes: of an earlier call where that did it all."""
    kept = Path(run, MINUTES)
    if kept.exists():
        return float(json.loads(kept.read_text()))
    began = time.monotonic()
    _verb(name, "train", path)
    minutes = (time.monotonic() - began) / 60
    kept.write_text(json.dumps(minutes))
    return minutes


def _verb(name: str, *arguments: str) -> None:
    print(f"{name}: ray-ft {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "ray_ft", *arguments], check=False).returncode
    if code:
        raise StepFailed(f"ray-ft {' '.join(arguments)} exited with {code}")


def _split(text: str, to: Path) -> tuple[str, str, str]:
    """What is before, between and behind the markers."""
    before, begin, rest = text.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{to} has no place for the table: {BEGIN} and {END}")
    return before, table.strip(), after


def _replaced(parts: tuple[str, str, str], found: dict[str, list[Row]]) -> str:
    """The file with the rows of the tasks in `found` new, in the order of `TASKS`."""
    before, table, after = parts
    lines: dict[str, list[str]] = {name: [] for name in TASKS}
    for line in table.splitlines()[2:]:
        name = line.strip("| ").split(" | ")[0]
        if name in lines and name not in found:
            lines[name].append(line)
    for name, rows in found.items():
        lines[name] = [f"| {' | '.join(row.cells(name))} |" for row in rows]
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join('---' if at < 2 else '---:' for at in range(len(COLUMNS)))}|"]
    body = [line for some in lines.values() for line in some]
    return "\n".join([before + BEGIN, *head, *body, END + after])


if __name__ == "__main__":
    main()
