"""One prompt on the command line: what is sent, what is printed, what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from ray_ft import cli
from ray_ft.answers import Sampling, Target
from ray_ft.chat import chat
from ray_ft.demo import DemoPaths
from ray_ft.errors import DataError, ModelError, RecipeError
from tests.unit import fake_openai
from tests.unit.fake_openai import Fake


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_openai.running() as server:
        yield server


def test_text_out(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    answer = chat(Target.of(fake.url), "hello", system="be kind", sampling=Sampling(max_new_tokens=5))
    assert capsys.readouterr().out == "<hello>\n" and answer.text == "<hello>"
    assert fake.bodies[0]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
    ]
    assert fake.bodies[0]["max_tokens"] == 5


def test_json_out(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    chat(Target.of(fake.url), "hello", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found.pop("seconds") < 60
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert found == {"model": "tiny", "answer": "<hello>", "finish_reason": "stop", "usage": usage}


def test_an_image_is_embedded(fake: Fake, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    chat(Target.of(fake.url), "what is it?", image=str(tmp_path / "a.png"))
    seen, text = fake.bodies[0]["messages"][0]["content"]
    head, _, body = seen["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == (tmp_path / "a.png").read_bytes()
    assert text == {"type": "text", "text": "what is it?"}


def test_raw_is_given_as_it_is(fake: Fake) -> None:
    chat(Target.of(fake.url), "once upon", raw=True)
    assert fake.bodies[0]["prompt"] == "once upon"
    with pytest.raises(DataError, match="--raw"):
        chat(Target.of(fake.url), "once upon", raw=True, system="no")


def test_what_cannot_be_answered(fake: Fake, demo: DemoPaths, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for options, said in (
        ({"image": str(tmp_path / "none.png")}, "cannot be read"),
        ({"image": "a.txt"}, "no known kind"),
        ({"image": "https://example.org/a.png"}, "nothing is fetched"),
    ):
        with pytest.raises(DataError, match=said):
            chat(Target.of(fake.url), "a", **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="empty"):
        chat(Target.of(fake.url), " ")
    fake.reply = lambda prompt, attempt: fake_openai.error(400, "too long")
    with pytest.raises(DataError, match=r"no answer: the server refused it \(400\): too long"):
        chat(Target.of(fake.url), "a")
    with pytest.raises(ModelError, match="does not see"):
        chat(Target.of(demo.base), "a", image=str(tmp_path / "a.png"), device="cpu")


def test_the_command_lines_options_arrive(fake: Fake) -> None:
    runner = CliRunner()
    options = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "3", "--device", "cpu"]
    assert runner.invoke(cli.app, ["chat", fake.url, "hello", *options]).exit_code == 0
    sent = fake.bodies[0]
    assert (sent["temperature"], sent["top_p"], sent["seed"], sent["max_tokens"]) == (0.5, 0.9, 7, 3)
    refused = runner.invoke(cli.app, ["chat", fake.url, "hello", "--device", "tpu"])
    assert isinstance(refused.exception, RecipeError) and "--device tpu" in refused.exception.what


def test_a_model_folder_answers_here(demo: DemoPaths, capsys: pytest.CaptureFixture[str]) -> None:
    answer = chat(Target.of(demo.base), "seven", sampling=Sampling(max_new_tokens=4), device="cpu")
    assert answer.tokens == 4 and capsys.readouterr().out == answer.text + "\n"
