"""The demo: the same seed gives the same bytes, nothing held out is trained on, and base and tokenizer are sound."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import num2words
import pyarrow.parquet as pq
import pytest

from ray_ft.demo import (
    HELDOUT,
    LANGUAGES,
    MARKER,
    PROMPT,
    SPECIAL_TOKENS,
    DemoPaths,
    preference,
    translation,
    write_demo,
)
from ray_ft.errors import DataError
from ray_ft.recipe import TranslationSource

SMALL: dict[str, Any] = {"rows": 601, "hidden_size": 32, "layers": 2}


def train_rows(demo: DemoPaths) -> list[dict[str, str]]:
    plain, zipped, table = demo.train
    text = Path(plain).read_bytes() + gzip.decompress(Path(zipped).read_bytes())
    return [json.loads(line) for line in text.decode().splitlines()] + pq.read_table(table).to_pylist()


def train_rows_of(file: str) -> list[dict[str, Any]]:
    content = Path(file).read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if file.endswith(".gz") else content).splitlines()]


def contents(demo: DemoPaths) -> dict[str, bytes]:
    return {str(p.relative_to(demo.folder)): p.read_bytes() for p in Path(demo.folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return write_demo(str(tmp_path_factory.mktemp("demo")), **SMALL)


@pytest.fixture(scope="module")
def tokenizer(demo: DemoPaths) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.base)


def test_rows_are_true_and_heldout_numbers_never_trained(demo: DemoPaths) -> None:
    train, heldout = train_rows(demo), pq.read_table(demo.heldout).to_pylist()
    assert len(train) == SMALL["rows"]
    assert len(heldout) == HELDOUT * len(LANGUAGES)
    rows = train + heldout
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["source_text"] for row in train}.isdisjoint(row["source_text"] for row in heldout)
    for row in rows:
        number, code = row["id"].split("-")
        assert (row["source_lang_code"], row["target_lang_code"]) == ("en", code)
        assert row["source_text"] == num2words.num2words(int(number), lang="en")
        assert row["target_text"] == num2words.num2words(int(number), lang=code)
    for code in LANGUAGES:
        assert sum(row["target_lang_code"] == code for row in heldout) == HELDOUT
    assert any(int(row["id"].split("-")[0]) < 1000 for row in heldout)


def test_same_seed_same_bytes_other_seed_other_numbers(demo: DemoPaths, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate()
    again = write_demo(str(tmp_path / "again"), **SMALL)
    assert torch.equal(torch.get_rng_state(), before[0])  # the caller's generators are left alone
    assert random.getstate() == before[1]
    assert contents(again) == contents(demo)
    other = write_demo(str(tmp_path / "other"), seed=1, **SMALL)
    assert {row["id"] for row in train_rows(other)} != {row["id"] for row in train_rows(demo)}
    assert contents(other)["base/model.safetensors"] != contents(demo)["base/model.safetensors"]


@pytest.mark.parametrize("task", ["reasoning", "mixture"])
def test_sums_are_true_and_no_pair_is_held_out_and_trained(task: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = write_demo(str(tmp_path / "demo"), task=task, **SMALL)
    files = [path for path in made.train if "translation" not in path]
    assert len(files) == 3 and len(made.train) == (3 if task == "reasoning" else 6)
    train = train_rows(replace(made, train=tuple(files)))
    heldout = pq.read_table(made.heldout if task == "reasoning" else f"{made.heldout}/reasoning.parquet").to_pylist()
    assert len(train) == (SMALL["rows"] if task == "reasoning" else SMALL["rows"] - SMALL["rows"] // 2)
    assert len(heldout) == HELDOUT
    rows = train + heldout
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        one, other = map(int, row["question"].split("+"))
        assert int(row["answer"]) == one + other
        digits, carry = [], 0
        for place, step in zip(("ones", "tens", "hundreds"), row["reasoning"].split(", "), strict=True):
            name, terms = step.split(" ")
            a, b, c, total = map(int, terms.replace("=", "+").split("+"))
            assert (name, c, total) == (place, carry, a + b + c)
            digits.insert(0, str(total if place == "hundreds" else total % 10))
            carry = total // 10
        assert "".join(digits) == row["answer"]
    assert write_demo(str(tmp_path / "demo"), task=task, **SMALL).reused
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    assert len(tokenizer("1278", add_special_tokens=False).input_ids) == 4  # digits one by one
    assert len(tokenizer(" hundreds", add_special_tokens=False).input_ids) == 1


def test_pictures_are_kept_in_three_ways_and_none_is_held_out_and_trained(tmp_path: Path) -> None:
    made = write_demo(str(tmp_path / "demo"), task="vision", rows=9, hidden_size=32, layers=1)
    named, held = ([row["messages"][0]["content"][0] for row in train_rows_of(file)] for file in made.train[:2])
    files = [Path(made.train[0]).parent / part["image"] for part in named]
    pictures = [file.read_bytes() for file in files]
    pictures += [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in held]
    pictures += [row["image"]["bytes"] for row in pq.read_table(made.train[2]).to_pylist()]
    heldout = pq.read_table(made.heldout).to_pylist()
    assert len(set(pictures)) == 9 and len(heldout) == 240
    assert all(content.startswith(b"\x89PNG") for content in pictures)
    assert not set(pictures) & {row["image"]["bytes"] for row in heldout}
    assert write_demo(str(tmp_path / "demo"), task="vision", rows=9, hidden_size=32, layers=1).reused
    files[0].unlink()  # a file that a row names is a part of the demo
    assert not write_demo(str(tmp_path / "demo"), task="vision", rows=9, hidden_size=32, layers=1).reused
    write_demo(str(tmp_path / "demo"), **SMALL)
    assert not any(file.exists() for file in files)


def test_another_task_replaces_the_folder_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    settings = {**SMALL, "rows": 31}
    write_demo(str(tmp_path), **settings)
    mixed = write_demo(str(tmp_path), task="mixture", **settings)
    assert {str(p) for p in (tmp_path / "train").rglob("*") if p.is_file()} == set(mixed.train)
    plain = write_demo(str(tmp_path), task="reasoning", **settings)
    assert not plain.reused
    assert {str(p) for p in (tmp_path / "train").rglob("*") if p.is_file()} == set(plain.train)
    with pytest.raises(DataError, match="no demo of 'poetry'") as caught:
        write_demo(str(tmp_path), task="poetry")
    assert "translation, reasoning" in str(caught.value)
    with pytest.raises(DataError, match="rows = 2 "):
        write_demo(str(tmp_path), task="reasoning", rows=2)


def test_second_call_reuses_and_other_settings_replace(tmp_path: Path) -> None:
    settings = {**SMALL, "rows": 31}
    folder = str(tmp_path / "demo")
    first = write_demo(folder, **settings)
    assert not first.reused
    before = {name: os.stat(name).st_mtime_ns for name in (*first.train, first.heldout)}
    assert write_demo(folder, **settings) == replace(first, reused=True)
    assert {name: os.stat(name).st_mtime_ns for name in before} == before

    os.unlink(first.train[2])  # an incomplete folder is not reused
    assert not write_demo(folder, **settings).reused
    assert os.path.exists(first.train[2])

    changed = write_demo(folder, **{**settings, "rows": 40})
    assert not changed.reused
    assert len(train_rows(changed)) == 40

    with pytest.raises(DataError, match="rows = 1,000,000"):
        write_demo(folder, **{**settings, "rows": 1_000_000})
    assert write_demo(folder, **{**settings, "rows": 40}).reused  # a refused call changes nothing


def test_interrupted_call_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_ft.demo import write as module

    settings = {**SMALL, "rows": 31}
    with monkeypatch.context() as patch:
        killed = replace(translation.TASK, write_base=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setitem(module.TASKS, "translation", killed)
        with pytest.raises(KeyboardInterrupt):
            write_demo(str(tmp_path), **settings)
    made = write_demo(str(tmp_path), **settings)
    assert not made.reused
    assert os.path.exists(os.path.join(made.base, "model.safetensors"))


def test_folder_that_is_no_demo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=MARKER):
        write_demo(str(tmp_path), **SMALL)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(DataError, match="s3://bucket/demo"):
        write_demo("s3://bucket/demo", **SMALL)


def test_tokenizer_round_trips(demo: DemoPaths, tokenizer: Any) -> None:
    rows = train_rows(demo) + pq.read_table(demo.heldout).to_pylist()
    texts = [row[field] for row in rows for field in ("source_text", "target_text")]
    texts += ["user\n", "  two  spaces ,", "안녕 🙂 <b>", "½\t\n\n"]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert tokenizer.unk_token_id not in {token for ids in encoded for token in ids}
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer("one").input_ids[0] == tokenizer.bos_token_id
    words = tokenizer(" seventy-two thousand", add_special_tokens=False).input_ids  # as they stand in the prompt
    assert len(words) == 4


def test_chat_template_is_gemmas(tokenizer: Any) -> None:
    source = TranslationSource(path="-", format="translation", prompt=PROMPT)  # the recipe takes this prompt
    prompt = source.prompt.format(target_lang="French", tgt_lang_code="fr", text="two")
    user, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": " deux "}
    turns = f"<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n"

    def render(*messages: dict[str, Any], **options: Any) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)

    assert render(user, add_generation_prompt=True) == f"<bos>{turns}"
    assert render(user, answer) == f"<bos>{turns}deux<end_of_turn>\n"
    system = {"role": "system", "content": "Be brief."}
    folded = f"<bos>{turns}deux<end_of_turn>\n{turns}".replace("user\n", "user\nBe brief.\n\n", 1)
    assert render(system, user, answer, user, add_generation_prompt=True) == folded
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (system, user, answer, user)]
    assert render(*parts, add_generation_prompt=True) == folded

    ids = tokenizer(folded, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == folded
    for wrong in ([user, user], [answer], [system, answer]):
        with pytest.raises(jinja2.TemplateError, match="must alternate"):
            render(*wrong)


def test_base_loads_whole(demo: DemoPaths, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(demo.base, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model) is Gemma3ForCausalLM
    assert model.dtype == torch.float32
    config = model.config
    assert config.model_type == "gemma3_text"
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()} == {
        "sliding_attention": 1e4,
        "full_attention": 1e6,
    }
    assert config.query_pre_attn_scalar != config.head_dim
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) <= config.vocab_size < len(tokenizer) + 64 <= 1024
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end_of_turn] == [1, 5]
    with torch.no_grad():
        assert model(torch.tensor([[2, 4, 9]])).logits.isfinite().all()


def test_pairs_prefer_one_of_two_right_answers_to_questions_of_the_translations() -> None:
    pairs, translations = preference.draw(80, 0)[""], translation.draw(240, 0)[""]
    for part, rows in ((pairs.train, translations.train), (pairs.heldout, translations.heldout)):
        assert len(part) > 60
        assert {pair["rejected"] for pair in part} <= {row["target_text"] for row in rows}
        assert all(pair["chosen"] != pair["rejected"] for pair in part)
        assert all(pair["prompt"].startswith("Translate to French (fr): ") for pair in part)
        assert sum("nonante" in pair["chosen"] for pair in part) > 10
    assert len(pairs.train) == 80
    with pytest.raises(DataError, match="rows = 2 is not between"):
        preference.draw(2, 0)
