"""vLLM inside Ray Data and transformers answer alike, and Ray says nothing of its own meanwhile.

One vLLM engine is started, on CPU, for a random Gemma 3 of 130,432 parameters: some 40 s on two free cores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_ft import answers, session
from ray_ft.answers import Prompt, Sampling, Target, local
from ray_ft.generate import generate
from ray_ft.view import View
from tests.integration.test_serving import write_export

pytestmark = [pytest.mark.slow, pytest.mark.serve, pytest.mark.timeout(600)]

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    write_export(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2, "kind": "model"}))
    return folder


@pytest.fixture(scope="module")
def connected() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with session.connected():
            yield


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_vllm_and_transformers_answer_alike(
    connected: None, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    questions = [f"{a} {b} " * (1 + at % 3) for at, a in enumerate(NUMBERS) for b in NUMBERS[:3]]
    questions[7] = "one " * 300  # longer than the context of 256
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions) + '{"prompt": 1}\n')
    capfd.readouterr()
    for engine in ("vllm", "transformers"):
        done = generate(
            str(source), Target.of(str(export)), str(tmp_path / f"{engine}.jsonl"), view=View(), engine=engine,
            sampling=SHORT, batch_size=4, device="cpu", part_rows=10,
        )  # fmt: skip
        assert (done.counts.answered, done.counts.failed, done.counts.rejected) == (29, 1, 1)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    fast, slow = rows(tmp_path / "vllm.jsonl"), rows(tmp_path / "transformers.jsonl")
    assert fast == slow
    assert [row["prompt"] for row in fast] == [*questions, 1]
    assert "no room in a context of 256" in fast[7]["error"]
    assert len({row["answer"] for row in fast}) > 20  # that they agree means something


def test_copies_of_a_model_answer_in_order(connected: None, export: Path) -> None:
    """As on several GPUs, in actors on CPU."""
    prompts = [Prompt(messages=[{"role": "user", "content": f"{a} {b}"}]) for a in NUMBERS for b in NUMBERS[:2]]
    read = []

    def stream() -> Iterator[Prompt]:
        for prompt in prompts:
            read.append(prompt)
            yield prompt

    with answers.opened(Target.of(str(export)), "transformers", device="cpu", batch_size=2) as engine:
        expected = list(engine.answers(prompts, SHORT))
        several = local.Transformers(engine._what, 2, "cpu", actors=2)  # type: ignore[attr-defined]
        found = several.answers(stream(), SHORT)
        first = next(found)
        assert len(read) <= 2 * 2 * 2 + 2  # two batches for each copy, and the one that was submitted last
        assert [first, *found] == expected
        several.close()
