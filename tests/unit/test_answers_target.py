"""What a person names: a run, a model or an endpoint; and prompts as tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_ft.answers import Answer, Prompt, Sampling, Target
from ray_ft.answers.prompt import Encoder, Rendered
from ray_ft.data.render import Renderer, load_tokenizer
from ray_ft.data.samples import Conversation, Joined
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError, ServeError


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("HTTPS://api.example.org/v1/", "https://api.example.org/v1"),
        ("https://example.org/llm", "https://example.org/llm/v1"),
    ],
)
def test_endpoints(text: str, location: str) -> None:
    assert Target.of(text, "m") == Target("endpoint", location, "m")


@pytest.mark.parametrize("text", ["http://", "http://host/v1?key=1", "http://host/#x"])
def test_urls_that_are_no_base(text: str) -> None:
    with pytest.raises(ServeError, match="no base URL"):
        Target.of(text)


def test_a_key_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ServeError, match="RAY_FT_API_KEY") as caught:
        Target.of("http://me:sesame@127.0.0.1:8000")
    assert "sesame" not in str(caught.value)


def test_runs_and_folders(tmp_path: Path, demo: DemoPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    assert Target.of(str(tmp_path / "run")) == Target("run", str(tmp_path / "run"))
    assert Target.of(f"file://{tmp_path}/run") == Target("run", f"file://{tmp_path}/run")
    assert Target.of(demo.base) == Target("folder", demo.base)
    assert Target.of("google/gemma-3-1b-it") == Target("folder", "google/gemma-3-1b-it")
    monkeypatch.chdir(tmp_path)
    assert Target.of("run").location == str(tmp_path / "run")


@pytest.mark.parametrize("text", ["nothing-there", "./org/name", "file:///nothing/there", "{empty}"])
def test_anything_else_names_all_three_ways(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing that can be asked") as caught:
        Target.of(text.format(empty=tmp_path))
    said = str(caught.value)
    assert "ray-ft train" in said and "hub id" in said and "http://" in said


def test_a_model_name_is_for_endpoints(demo: DemoPaths) -> None:
    with pytest.raises(ModelError, match="'m'"):
        Target.of(demo.base, "m")


@pytest.mark.parametrize(
    "fields", [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}]
)
def test_sampling_is_checked(fields: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="cannot be sampled"):
        Sampling(**fields)  # type: ignore[arg-type]


def test_a_prompt_is_one_of_two() -> None:
    for given in ({}, {"messages": [], "text": "a"}):
        with pytest.raises(ValueError, match="either"):
            Prompt(**given)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ tokens

TURNS = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "ninety-nine"},
    {"role": "assistant", "content": "quatre-vingt-dix-neuf"},
    {"role": "user", "content": "seven"},
]


@pytest.fixture
def encoder(demo: DemoPaths) -> Encoder:
    return Encoder(load_tokenizer(demo.base), context=64, listed_stops=[9])


def test_a_conversation_is_what_training_renders(encoder: Encoder, demo: DemoPaths) -> None:
    """The prompt's tokens are the tokens of the trained row, up to its answer; one <bos>."""
    answer = {"role": "assistant", "content": "sept"}
    trained = Renderer(encoder.tokenizer).encode([Conversation((*TURNS, answer))])[0]
    found = encoder.encode(Prompt(messages=TURNS), Sampling())
    assert isinstance(found, Rendered)
    assert found.ids == trained.ids[: len(found.ids)].tolist()  # type: ignore[union-attr]
    assert trained.trained.nonzero()[0][-1] >= len(found.ids) and not trained.trained[len(found.ids) - 1]  # type: ignore[union-attr]
    assert trained.trained[len(found.ids)]  # type: ignore[union-attr]
    assert found.ids.count(encoder.tokenizer.bos_token_id) == 1


def test_parts_of_text_are_joined(encoder: Encoder) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "se"}, {"type": "text", "text": "ven"}]}]
    whole = [{"role": "user", "content": "seven"}]
    assert encoder.encode(Prompt(messages=parts), Sampling()) == encoder.encode(Prompt(messages=whole), Sampling())


@pytest.mark.parametrize("text", ["seven plus", "<bos>seven plus"])
def test_text_begins_with_one_bos_as_in_training(encoder: Encoder, text: str) -> None:
    trained = Renderer(encoder.tokenizer).encode([Joined(text, " two")])[0]
    found = encoder.encode(Prompt(text=text), Sampling())
    assert isinstance(found, Rendered) and found.ids == trained.ids[: len(found.ids)].tolist()  # type: ignore[union-attr]
    assert found.ids.count(encoder.tokenizer.bos_token_id) == 1


def test_room_ends_with_the_context(encoder: Encoder) -> None:
    found = encoder.encode(Prompt(text=" seven" * 60), Sampling(max_new_tokens=10))
    assert isinstance(found, Rendered) and found.room == 64 - len(found.ids) < 10
    tokens = len(encoder.encode(Prompt(text=" seven" * 5), Sampling()).ids)  # type: ignore[union-attr]
    long = encoder.encode(Prompt(text=" seven" * (63 * 5 // (tokens - 1) + 5)), Sampling())
    assert isinstance(long, Answer) and long.finish == "error" and "a context of 64" in str(long.error)
    assert long.prompt_tokens >= 64


def test_a_refusal_of_the_template_is_an_answer(encoder: Encoder) -> None:
    found = encoder.encode(Prompt(messages=[TURNS[1], TURNS[1]]), Sampling())
    assert isinstance(found, Answer) and "refused by the chat template: Conversation roles" in str(found.error)


def test_an_answer_ends_with_a_stop_or_its_room(encoder: Encoder) -> None:
    rendered = Rendered([2, 7, 8], room=4)
    word = encoder.tokenizer.encode("sept", add_special_tokens=False)[0]
    end = encoder.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert encoder.stops == {9, encoder.tokenizer.eos_token_id, end}
    text = encoder.tokenizer.decode([word])
    assert encoder.answer(rendered, [word, end, word]) == Answer(text, "stop", 3, 2)
    assert encoder.answer(rendered, [word, 9, word]).tokens == 2
    assert encoder.answer(rendered, [word] * 6) == Answer(text * 4, "length", 3, 4)
