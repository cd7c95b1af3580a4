"""The loss falls on the answers and the markers that end them, on nothing else, and <bos> stands once."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ray_ft.data import render as module
from ray_ft.data.render import Renderer, Tokens, load_tokenizer, special_tokens
from ray_ft.data.samples import Conversation, Joined, Sample
from ray_ft.data.sources import Reject
from ray_ft.data.surfaces import surfaces_of
from ray_ft.demo import DemoPaths
from ray_ft.errors import ModelError

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def talk(*contents: str, system: str | None = None) -> Conversation:
    turns = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    return Conversation(tuple(([{"role": "system", "content": system}] if system else []) + turns))


SHORT = talk("Translate: one", "un")
LONG = talk("Translate: one", "un", "and two?", "deux é 😀", "three", "trois", system="Be brief.")


@pytest.fixture(scope="module")
def renderer(demo: DemoPaths) -> Renderer:
    return Renderer(load_tokenizer(demo.base))


@pytest.fixture
def with_template(demo: DemoPaths) -> Any:
    def make(template: str) -> Renderer:
        tokenizer = AutoTokenizer.from_pretrained(demo.base)  # its own: loaded ones are shared
        tokenizer.chat_template = template
        return Renderer(tokenizer)

    return make


def encode(renderer: Renderer, sample: Sample) -> Tokens:
    (tokens,) = renderer.encode([sample])
    assert isinstance(tokens, Tokens), tokens
    assert tokens.ids.dtype == np.int32 and tokens.trained.dtype == bool and tokens.ids.shape == tokens.trained.shape
    return tokens


def trained_pieces(renderer: Renderer, tokens: Tokens) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    for at in np.flatnonzero(tokens.trained).tolist():
        if not runs or runs[-1][-1] != at - 1:
            runs.append([])
        runs[-1].append(at)
    return [renderer.tokenizer.decode(tokens.ids[run].tolist()) for run in runs]


# --------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("sample", [SHORT, LONG])
def test_bos_stands_once_and_first(renderer: Renderer, sample: Conversation) -> None:
    ids = encode(renderer, sample).ids
    assert ids[0] == renderer.bos and (ids == renderer.bos).sum() == 1


def test_the_loss_is_on_the_answer_and_its_end_of_turn_alone(renderer: Renderer) -> None:
    tokens = encode(renderer, SHORT)
    assert trained_pieces(renderer, tokens) == ["un<end_of_turn>"]
    whole = "<bos><start_of_turn>user\nTranslate: one<end_of_turn>\n<start_of_turn>model\nun<end_of_turn>\n"
    assert renderer.tokenizer.decode(tokens.ids.tolist()) == whole


def test_every_answer_of_a_conversation_is_trained_and_no_question(renderer: Renderer) -> None:
    pieces = trained_pieces(renderer, encode(renderer, LONG))
    assert pieces == ["un<end_of_turn>", "deux é 😀<end_of_turn>", "trois<end_of_turn>"]


def test_an_answer_that_repeats_the_prompt_is_found_where_it_stands(renderer: Renderer) -> None:
    tokens = encode(renderer, talk("one", "one"))
    assert trained_pieces(renderer, tokens) == ["one<end_of_turn>"]
    assert tokens.trained[-4:].any() and not tokens.trained[: len(tokens) - 4].any()


@pytest.mark.parametrize("sample", [SHORT, LONG, talk("a b", "  padded answer \n")])
def test_the_prompt_and_the_trained_answer_are_the_whole(renderer: Renderer, sample: Conversation) -> None:
    """What the model is asked at inference, plus what it is to answer, is token by token what it was trained on."""
    tokens = encode(renderer, sample)
    prompt = renderer.tokenizer(renderer.prompt_text(sample), add_special_tokens=False).input_ids
    templated = renderer.tokenizer.apply_chat_template(
        list(sample.prompt), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt == templated
    answer = renderer.tokenizer(sample.answer.strip() + "<end_of_turn>", add_special_tokens=False).input_ids
    newline = renderer.tokenizer("\n", add_special_tokens=False).input_ids
    assert tokens.ids.tolist() == prompt + answer + newline
    last = slice(len(prompt), len(prompt) + len(answer))
    assert tokens.trained[last].all() and not tokens.trained[last.stop :].any()
    assert tokens.ids[last].tolist() == answer
    if sample.prompt == sample.prompt[-1:]:
        assert not tokens.trained[: len(prompt)].any()


def test_samples_of_one_call_do_not_change_each_other(renderer: Renderer) -> None:
    samples = [SHORT, talk("assistant first?", "x"), Joined("", "plain"), LONG, Joined("a", "b")]
    for alone, together in zip(samples, renderer.encode(samples), strict=True):
        assert isinstance(together, Tokens)
        np.testing.assert_array_equal(encode(renderer, alone).ids, together.ids)
        np.testing.assert_array_equal(encode(renderer, alone).trained, together.trained)


def test_nothing_to_encode_gives_nothing(renderer: Renderer) -> None:
    assert renderer.encode([]) == []


# ------------------------------------------------------------------------------------------------------ plain text


def test_plain_text_is_trained_whole_between_bos_and_eos(renderer: Renderer) -> None:
    tokens = encode(renderer, Joined("", "twenty one"))
    assert renderer.tokenizer.decode(tokens.ids.tolist()) == "<bos>twenty one<eos>"
    assert tokens.trained.tolist() == [False] + [True] * (len(tokens) - 1)


def test_joined_text_trains_the_answer_and_the_end(renderer: Renderer) -> None:
    sample = Joined("twenty", " one")
    tokens = encode(renderer, sample)
    assert renderer.tokenizer.decode(tokens.ids.tolist()) == "<bos>twenty one<eos>"
    assert trained_pieces(renderer, tokens) == [" one<eos>"]
    prompt = renderer.tokenizer(renderer.prompt_text(sample), add_special_tokens=False).input_ids
    assert prompt == tokens.ids[: len(prompt)].tolist() and tokens.trained[len(prompt) :].all()


def test_a_token_across_the_border_of_prompt_and_answer_is_trained(renderer: Renderer) -> None:
    """Or the first word of every answer would be untrained where the prompt ends with a space."""
    tokens = encode(renderer, Joined("twenty ", "one"))
    assert trained_pieces(renderer, tokens) == [" one<eos>"]


def test_bos_that_the_text_brings_is_not_doubled(renderer: Renderer) -> None:
    ids = encode(renderer, Joined("", "<bos>one")).ids
    assert (ids == renderer.bos).sum() == 1


def test_a_tokenizer_without_bos_and_eos_adds_none_and_cannot_train_its_first_token(demo: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokens = encode(Renderer(tokenizer), Joined("", "one two"))
    assert tokenizer.decode(tokens.ids.tolist()) == "one two"
    assert not tokens.trained[0] and tokens.trained[1:].all() and len(tokens) > 1


# ------------------------------------------------------------------------------------------------------- templates


def test_stop_tokens_are_the_end_of_text_and_the_end_of_a_turn(renderer: Renderer, with_template: Any) -> None:
    end_of_turn = renderer.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert renderer.stop_ids() == sorted([renderer.tokenizer.eos_token_id, end_of_turn])
    assert with_template(CHATML).stop_ids() == [renderer.eos]
    without_end = CHATML.replace("<eos>", "")
    assert with_template(without_end).stop_ids() == [renderer.eos]  # the answer's last letter is no stop token
    assert with_template("").stop_ids() == [renderer.eos]


def test_a_conversation_that_the_template_refuses_is_rejected_and_its_neighbours_are_not(renderer: Renderer) -> None:
    refused = Conversation((SHORT.turns[0], *SHORT.turns))
    before, result, after = renderer.encode([SHORT, refused, LONG])
    assert isinstance(result, Reject) and result.reason == "refused by the chat template"
    assert "alternate" in result.detail
    np.testing.assert_array_equal(encode(renderer, SHORT).ids, before.ids)  # type: ignore[union-attr]
    np.testing.assert_array_equal(encode(renderer, LONG).ids, after.ids)  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", ["{{ 1 + messages[0].content }}", "{{ messages[0].nothing.at_all }}"])
def test_a_template_that_fails_on_a_row_rejects_the_row(with_template: Any, fault: str) -> None:
    (result,) = with_template(CHATML + fault).encode([SHORT])
    assert isinstance(result, Reject) and result.reason == "refused by the chat template"


def test_an_answer_that_nothing_precedes_is_rejected(with_template: Any) -> None:
    (result,) = with_template(CHATML).encode([Conversation(SHORT.turns[1:])])
    assert isinstance(result, Reject) and result.reason == "refused by the chat template"


FORGETS = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '(gone)' }}")


def test_a_template_that_rewrites_earlier_answers_rejects_only_conversations_of_several(with_template: Any) -> None:
    renderer = with_template(FORGETS)
    one, several = renderer.encode([SHORT, LONG])
    assert trained_pieces(renderer, one) == [" un<eos>"]
    assert isinstance(several, Reject) and "renders a turn differently" in several.detail


def test_a_template_whose_generation_prompt_is_not_what_it_renders_is_rejected(with_template: Any) -> None:
    (result,) = with_template(CHATML.replace("assistant: {% endif", "model: {% endif")).encode([SHORT])
    assert isinstance(result, Reject) and "no loss mask" in result.detail


# -------------------------------------------------------------------------------------------------- special tokens


def test_special_tokens_are_found_in_text_as_the_tokenizer_finds_them(renderer: Renderer) -> None:
    assert renderer.special is not None
    for token in ("<bos>", "<eos>", "<unk>", "<pad>", "<start_of_turn>", "<end_of_turn>"):
        found = renderer.special.search(f"a{token}b")
        assert found and found[0] == token
        ids = renderer.tokenizer(f"a{token}b", add_special_tokens=False).input_ids
        assert renderer.tokenizer.convert_tokens_to_ids(token) in ids
    assert not renderer.special.search("<bos <eos> ".replace("<eos>", "< eos>"))


def test_added_tokens_are_special_only_where_they_say_so(demo: DemoPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens(
        [AddedToken("<a>", special=True), AddedToken("<a><b>", special=True), AddedToken("word", single_word=True)],
        special_tokens=True,
    )
    pattern = special_tokens(tokenizer)
    assert pattern is not None
    assert pattern.findall("<think><a><b><a> word swords") == ["<a><b>", "<a>", "word"]  # the longest that fits


# --------------------------------------------------------------------------------------------------- far too long


@pytest.mark.parametrize(
    "sample",
    [
        Joined("", "one two three four " * 5000),
        Joined("", "x" * 100_000),
        Joined("", " " * 90_000 + "one two " * 5000),
        Joined("twenty " * 20_000, "one"),
        talk("Translate: " + "one two " * 9000, "un"),
        talk("Translate: one", "un deux " * 9000, "and?", "trois"),
    ],
)
def test_a_text_far_too_long_is_tokenized_only_as_far_as_is_needed(renderer: Renderer, sample: Sample) -> None:
    enough = 64
    whole = encode(renderer, sample)
    begun = encode(Renderer(renderer.tokenizer, enough), sample)
    assert whole.whole and not begun.whole and enough < len(begun) < len(whole) / 2 and len(begun) > 2 * enough
    np.testing.assert_array_equal(begun.ids[:enough], whole.ids[:enough])
    np.testing.assert_array_equal(begun.trained[:enough], whole.trained[:enough])


def test_a_tokenizer_that_leaves_out_white_space_is_given_more(demo: DemoPaths) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    own = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), own])
    begins = " " * 60_000 + "one two " * 30
    assert len(encode(Renderer(tokenizer, enough=8), Joined("", begins + " " * 500_000))) < 90  # and not two, for cut
    for text, whole in ((begins, True), (" " * 60_000 + "one two " * 9000, False)):
        begun = encode(Renderer(tokenizer, enough=8), Joined("", text))
        np.testing.assert_array_equal(begun.ids[:8], encode(Renderer(tokenizer), Joined("", text)).ids[:8])
        assert len(begun) > 8 and begun.whole is whole


def test_a_text_that_may_fit_is_tokenized_whole(renderer: Renderer) -> None:
    text = "".join(sorted(renderer.tokenizer.get_vocab(), key=len)[-1:])  # the longest token: the fewest per character
    sample = Joined("", "one two three four" * 20 + text)
    short = Renderer(renderer.tokenizer, enough=len(encode(renderer, sample)) - 1)
    assert encode(short, sample).whole
    np.testing.assert_array_equal(encode(short, sample).ids, encode(renderer, sample).ids)


def test_many_characters_are_tokenized_part_by_part_and_nothing_changes(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[Sample] = [Joined("", "plain"), LONG, talk("assistant first?", "x"), Joined("a", "b"), SHORT] * 4
    at_once = renderer.encode(samples)
    for characters in (1, 7, 100):
        monkeypatch.setattr(module, "ENCODE_CHARACTERS", characters)
        for one, other in zip(renderer.encode(samples), at_once, strict=True):
            assert isinstance(one, Tokens) and isinstance(other, Tokens)
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.trained, other.trained)


# --------------------------------------------------------------------------------------------------------- loading


def test_a_folder_without_a_tokenizer_is_refused_though_its_config_names_one(demo: DemoPaths, tmp_path: Path) -> None:
    shutil.copy(Path(demo.base) / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "tokenizer.json" in str(caught.value)


def test_a_damaged_tokenizer_is_refused(demo: DemoPaths, tmp_path: Path) -> None:
    folder = shutil.copytree(demo.base, tmp_path / "base")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(str(folder))


def _of_words() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="?"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["?"], show_progress=False)
    )
    return made


def _of_bytes() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=True)  # spaces belong to no token's place
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(["<mark>"])
    return made


def _of_pieces() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="?", special_tokens=["?"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def _falling_back_to_bytes() -> Tokenizer:
    vocab = {name: at for at, name in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abo", "ab"])}
    made = Tokenizer(models.BPE(vocab, [("a", "b")], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")  # as Gemma's has it: no words, one text
    return made


PIECES = [
    "a",
    "b",
    "o",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "ﬁ",
    "😀",
    "👩‍🚀",
    "the",
    "boat",
    "<mark>",
    "\u200b",
    "İ",
    "漢",
    "▁",
    "Ġ",
]
CORPUS = ["the bird, the boy and the bee", "about a boat: abba, bob!", "un deux trois été"]


@pytest.mark.parametrize("make", [_of_words, _of_bytes, _of_pieces, _falling_back_to_bytes])
def test_the_tokens_of_an_answer_are_those_that_hold_a_character_of_it(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        for start in range(len(text)):
            for end in range(start, len(text) + 1):
                wanted = ((starts >= start) | (ends > start)) & (starts < end)
                found = np.zeros(len(encoding), bool)
                found[module._held(encoding, start, end)] = True
                np.testing.assert_array_equal(found, wanted, err_msg=f"{text!r}[{start}:{end}], {encoding.offsets}")


def _of_untrimmed_bytes() -> Tokenizer:
    made = _of_bytes()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def _of_small_letters() -> Tokenizer:
    made = _of_untrimmed_bytes()
    made.normalizer = normalizers.Lowercase()
    return made


@pytest.mark.parametrize("make", [_of_untrimmed_bytes, _falling_back_to_bytes, _of_small_letters])
def test_the_bytes_of_tokens_place_them_as_their_offsets_do(make: Callable[[], Tokenizer]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    surfaces = surfaces_of(tokenizer)
    assert surfaces is not None
    rng, placed_texts = random.Random(0), 0
    for _ in range(300):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        placed = surfaces.place(np.array(encoding.ids, dtype=np.int32), text)
        changed = "▁" in text if make is _falling_back_to_bytes else make is _of_small_letters and text != text.lower()
        assert (placed is None) is changed, text
        if placed is None:
            continue
        placed_texts += 1
        for start in range(len(text)):
            for end in range(start, len(text) + 1):
                wanted, found = np.zeros((2, len(encoding)), bool)
                wanted[module._held(encoding, start, end)] = True
                found[placed.held(start, end)] = True
                np.testing.assert_array_equal(found, wanted, err_msg=f"{text!r}[{start}:{end}], {encoding.offsets}")
    assert placed_texts > 100


def test_runs_of_spaces_that_are_added_tokens_too_are_placed() -> None:
    made = _falling_back_to_bytes()
    vocab = {**made.get_vocab(), "▁▁": 261}
    made.model = models.BPE(vocab, [("a", "b"), ("▁", "▁")], byte_fallback=True)
    made.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    ids = tokenizer.backend_tokenizer.encode("a  b", add_special_tokens=False).ids
    surfaces = surfaces_of(tokenizer)
    assert 261 in ids and surfaces is not None
    assert surfaces.place(np.array(ids, dtype=np.int32), "a  b") is not None


def test_a_tokenizer_that_draws_its_merges_has_the_mask_of_the_tokens_that_it_gave(
    demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MANY", 1)
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    backend = tokenizer.backend_tokenizer
    backend.normalizer, backend.model.dropout = normalizers.NFC(), 0.5
    for sample in [Joined("e\u0301 question: ", "a e\u0301 answer")] * 40:
        tokens = Renderer(tokenizer).encode([sample])[0]
        assert isinstance(tokens, Tokens)
        text = tokenizer.decode(tokens.ids[tokens.trained][:-1])
        assert text.strip() == "a é answer", text


@pytest.mark.parametrize("make", [_of_words, _of_pieces, _of_bytes])
def test_a_tokenizer_whose_tokens_do_not_spell_its_texts_or_that_leaves_spaces_out_has_to_count(
    make: Callable[[], Tokenizer],
) -> None:
    assert surfaces_of(PreTrainedTokenizerFast(tokenizer_object=make())) is None


def test_texts_that_their_tokens_do_not_spell_are_tokenized_with_offsets(
    demo: DemoPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    samples: list[Sample] = [Joined(f"e\u0301 {word}: ", "a e\u0301 b") for word in ("one", "two", "three")]
    samples += [Joined("plain: ", f"one e\u0301 {word}") for word in ("one", "two")] + [SHORT, Joined("é 漢: ", "😀 e")]
    slow = Renderer(tokenizer).encode(samples)
    monkeypatch.setattr(module, "MANY", 1)
    one_by_one, at_once = Renderer(tokenizer), Renderer(tokenizer)
    first = [one_by_one.encode([sample])[0] for sample in samples]
    assert one_by_one._counting  # it has met a batch of nothing else
    for found in (first, at_once.encode([*samples, *[SHORT] * 9])):
        for one, other in zip(found, slow, strict=False):
            assert isinstance(one, Tokens) and isinstance(other, Tokens)
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.trained, other.trained)
    assert not at_once._counting
