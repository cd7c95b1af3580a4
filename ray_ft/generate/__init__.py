"""Batch inference: every row of JSONL or Parquet files answered, in order, one row out for each row in.

The work is done in parts that are committed one by one; whoever kills it loses the part under way, and the same command
goes on behind the last one. Limits: one target file; one process at a time per target.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ft import answers, artifacts
from ray_ft.answers import Engine, EngineName, Prompt, Sampling, Target
from ray_ft.errors import DataError
from ray_ft.generate.inputs import FORMATS, Format, Inputs, Row
from ray_ft.generate.outputs import Answered, Counts, Output
from ray_ft.recipe import ImageQuestionSource, TextSource
from ray_ft.view import View

__all__ = ["generate", "Generated", "FORMATS"]

PART_ROWS = 500
#: Rows that are given to an engine in one go. An engine waits for a batch of prompts, which in a file whose rows ask
#: nothing never fills: without an end all of it would be held. As many as vLLM takes for one start.
READ_ROWS = 100_000


@dataclass(frozen=True)
class Generated:
    """What was done: the file, its rows, how many of them earlier calls had answered, and the seconds of this one."""

    location: str
    counts: Counts
    reused: int
    seconds: float


def generate(
    source: str | Sequence[str],
    target: Target,
    to: str,
    *,
    view: View,
    format: str | None = None,
    settings: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
    engine: EngineName = "auto",
    batch_size: int = 32,
    device: str = "auto",
    gpus: int = 0,
    prefix: str = "",
    overwrite: bool = False,
    part_rows: int = PART_ROWS,
) -> Generated:
    """Answer every row of some files.

    A row that cannot be read, that asks nothing or that gets no answer keeps its place, with the reason in ``error``.

    Args:
        source: files, folders, globs or URIs; JSONL (also .gz, .zst) or Parquet.
        to: file or URI to write; JSONL (also .gz, .zst) or Parquet, by its name. It has all columns of the input,
            unchanged, and ``answer``, ``finish_reason``, ``error``, ``tokens``.
        format: how rows ask, one of `FORMATS`; None: as the run's recipe says, else by the columns of the first row.
        settings: of the format, as in a recipe: ``{"prompt_field": "question"}``.
        engine, batch_size, device, gpus: see `answers.opened`.
        prefix: of the added columns' names.
        overwrite: begin again, and replace what is there.
        part_rows: rows that are committed together, and at most are lost.

    Raises:
        DataError: the input or output cannot be used, or the parts that are there are of something else.
        RayFtError: the target does not answer.
    """
    began, sampling = time.monotonic(), sampling or Sampling()
    inputs = Inputs.of(source)
    output = Output.of(to, inputs.files, prefix)
    form = _format(format, settings or {}, inputs, target)
    with answers.opened(target, engine, batch_size=batch_size, device=device, gpus=gpus) as asked:
        state: dict[str, Any] = {
            "inputs": inputs.stamps(),
            "target": {**asked.identity, "engine": asked.name},
            "settings": {
                **dataclasses.asdict(sampling),
                "prefix": prefix,
                "format": form.source.model_dump(mode="json", exclude={"path", "weight"}) | {"name": form.name},
            },
            "part_rows": part_rows,
        }
        state, total = output.begin(state, overwrite=overwrite), inputs.count()
        done = output.committed()
        reused = sum(counts.rows for _, counts in done)
        if reused:
            view.line(f"{reused} of {total} rows are answered already")
        if reused < total:
            _answer(inputs, form, asked, sampling, output, reused, total, state["part_rows"], view)
    parts = output.committed()
    counts = sum((counts for _, counts in parts), Counts())
    if counts.rows != total:
        raise DataError(
            f"{counts.rows} rows were written for {total} in the input: it has changed meanwhile",
            ["leave the input alone, and begin again: --overwrite"],
        )
    output.assemble([name for name, _ in parts])
    return Generated(output.location, counts, reused, time.monotonic() - began)


def _format(name: str | None, settings: Mapping[str, Any], inputs: Inputs, target: Target) -> Format:
    files = [file.uri for file in inputs.files]
    if name is not None:
        return Format.of(name, settings, files)
    if settings:
        raise DataError(f"settings ({', '.join(settings)}) of no format", ["name the format: --format NAME"])
    candidates = [Format.of(name, {}, files) for name in ("messages", "prompt_completion", "translation")]
    if target.kind == "run":
        candidates = [*_of_run(target.location), *candidates]
    return inputs.recognised(candidates)


def _of_run(location: str) -> list[Format]:
    """How the run's own rows ask, the held-out ones first; those that show an image are not asked here."""
    from ray_ft import recipe
    from ray_ft.answers.found import refuse_labels

    settings = recipe.load(artifacts.RunDir(location).recipe)
    refuse_labels(location, settings.model.labels)
    sources = [*settings.data.eval, *settings.data.train]
    asking = (source for source in sources if not isinstance(source, TextSource | ImageQuestionSource))
    return [Format.from_source(source) for source in asking]


def _answer(
    inputs: Inputs,
    form: Format,
    engine: Engine,
    sampling: Sampling,
    output: Output,
    skip: int,
    total: int,
    part_rows: int,
    view: View,
) -> None:
    """Answer the rows behind the first `skip`, part by part."""
    rows = inputs.rows(form, engine.special, skip)
    # Rows that the engine has read ahead of its answers, and those that ask nothing, at their places.
    waiting: deque[Row] = deque()
    more = True

    def prompts() -> Iterator[Prompt]:
        nonlocal more
        more = False
        for row in itertools.islice(rows, READ_ROWS):
            more = True
            waiting.append(row)
            if isinstance(row.asked, Prompt):
                yield row.asked

    def answered() -> Iterator[Answered]:
        while more:
            for answer in engine.answers(prompts(), sampling):
                while not isinstance(waiting[0].asked, Prompt):
                    yield Answered(waiting.popleft(), None)
                yield Answered(waiting.popleft(), answer)
            while waiting:
                yield Answered(waiting.popleft(), None)

    number, part = skip // part_rows, list[Answered]()
    with view.progress("answering") as progress:
        progress(skip, total)
        for done, one in enumerate(answered(), start=skip + 1):
            part.append(one)
            if len(part) == part_rows:
                output.commit(number, part)
                number, part = number + 1, []
            progress(done, total)
        if part:
            output.commit(number, part)
