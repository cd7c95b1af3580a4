"""A row becomes exactly the sample that its format says, or the reason why it is none."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ray_ft.data.formats import columns_used, language_name
from ray_ft.data.rows import to_sample
from ray_ft.data.samples import Conversation, Joined
from ray_ft.data.sources import Reject
from ray_ft.errors import RecipeError
from ray_ft.recipe import (
    MessagesSource,
    PromptCompletionSource,
    Source,
    TemplateSource,
    TextSource,
    TranslationSource,
    parse,
)

MESSAGES = MessagesSource(format="messages", path="x")
PAIR = PromptCompletionSource(format="prompt_completion", path="x")
TEXT = TextSource(format="text", path="x")
TRANSLATION = TranslationSource(
    format="translation",
    path="x",
    prompt="{source_lang}|{src_lang_code}|{target_lang}|{tgt_lang_code}|{text}",
)
TEMPLATE = TemplateSource(format="template", path="x", prompt="Q: {question} {{x}}", completion="{why}: {answer}")
ROW = {"source_text": "cat", "target_text": "chat", "source_lang_code": "en", "target_lang_code": "fr"}
LONE = "a\ud800b"


def chat(prompt: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def reject(source: Source, row: dict[str, Any]) -> Reject:
    result = to_sample(source, row)
    assert isinstance(result, Reject), result
    return result


# --------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("source", "row", "expected"),
    [
        (TEXT, {"text": " a {b}\n"}, Joined("", " a {b}\n")),
        (PAIR, {"prompt": "a", "completion": " b "}, chat("a", " b ")),
        (PAIR.model_copy(update={"chat": False}), {"prompt": "a", "completion": " b"}, Joined("a", " b")),
        (TRANSLATION, ROW, chat("English|en|French|fr|cat", "chat")),
        (TEMPLATE, {"question": "{why}", "why": "w", "answer": "a"}, chat("Q: {why} {x}", "w: a")),
        (
            TEMPLATE.model_copy(update={"chat": False}),
            {"question": "q", "why": "", "answer": "a", "more": 1},
            Joined("Q: q {x}", ": a"),
        ),
    ],
)
def test_each_format_reads_its_columns_and_alters_nothing(source: Source, row: dict[str, Any], expected: Any) -> None:
    assert to_sample(source, row) == expected


def test_columns_may_have_other_names() -> None:
    pair = PAIR.model_copy(update={"prompt_field": "q", "completion_field": "a"})
    assert to_sample(pair, {"q": "1", "a": "2", "prompt": "x", "completion": "y"}) == chat("1", "2")
    assert to_sample(TEXT.model_copy(update={"field": "body"}), {"body": "b", "text": "t"}) == Joined("", "b")
    translation = TRANSLATION.model_copy(update={"source_field": "s", "target_field": "t"})
    assert to_sample(translation, {**ROW, "s": "dog", "t": "chien"}) == chat("English|en|French|fr|dog", "chien")
    renamed = MESSAGES.model_copy(update={"field": "turns"})
    assert to_sample(renamed, {"turns": messages(("user", "a"), ("assistant", "b"))["messages"]}) == chat("a", "b")


def test_codes_fixed_for_all_rows_win_over_the_columns() -> None:
    fixed = TRANSLATION.model_copy(update={"source_lang_code": "de", "target_lang_code": "pt-BR"})
    assert to_sample(fixed, ROW) == chat("German|de|Portuguese (Brazil)|pt-BR|cat", "chat")
    assert to_sample(fixed, {"source_text": "a", "target_text": "b"}) == chat(
        "German|de|Portuguese (Brazil)|pt-BR|a", "b"
    )


def test_names_of_languages_may_be_given() -> None:
    named = TRANSLATION.model_copy(update={"source_lang_name": "Old English", "target_lang_name": "Norman"})
    assert to_sample(named, ROW) == chat("Old English|en|Norman|fr|cat", "chat")


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("en", "English"),
        ("pt-BR", "Portuguese (Brazil)"),
        ("zh_Hans", "Chinese (Simplified)"),
        ("sr_Cyrl_RS", "Serbian (Cyrillic, Serbia)"),
        ("xx", "xx"),
        ("fr_XX", "fr_XX"),
        ("not a code", "not a code"),
        ("", ""),
    ],
)
def test_the_name_of_a_language_is_that_of_its_code_or_the_code(code: str, name: str) -> None:
    assert language_name(code) == name


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        (MESSAGES, {"messages"}),
        (TEXT, {"text"}),
        (PAIR, {"prompt", "completion"}),
        (TEMPLATE, {"question", "why", "answer"}),
        (TRANSLATION, set(ROW)),
        (TRANSLATION.model_copy(update={"source_lang_code": "en"}), set(ROW) - {"source_lang_code"}),
        (
            TRANSLATION.model_copy(update={"source_lang_code": "en", "target_lang_code": "fr"}),
            {"source_text", "target_text"},
        ),
    ],
)
def test_columns_used_are_those_without_which_a_row_is_rejected(source: Source, columns: set[str]) -> None:
    assert columns_used(source) == columns
    whole = {
        **ROW,
        **messages(("user", "a"), ("assistant", "b")),
        **dict.fromkeys(("text", "prompt", "completion", "question", "why", "answer"), "a"),
    }
    assert not isinstance(to_sample(source, {name: whole[name] for name in columns}), Reject)
    for column in columns:
        assert isinstance(to_sample(source, {name: v for name, v in whole.items() if name != column}), Reject)


# --------------------------------------------------------------------------------------------------------- rejects

ONE_FIELD = [
    (TEXT, {}, "text"),
    (PAIR, {"completion": "b"}, "prompt"),
    (PAIR, {"prompt": "a"}, "completion"),
    (TEMPLATE, {"why": "w", "answer": "a"}, "question"),
    *((TRANSLATION, {k: v for k, v in ROW.items() if k != name}, name) for name in ROW),
]


@pytest.mark.parametrize(("source", "row", "field"), ONE_FIELD)
def test_a_field_that_is_not_text_is_rejected_by_name_and_kind(source: Source, row: dict[str, Any], field: str) -> None:
    assert reject(source, row).reason == f"missing field {field!r}"
    for value, kind in ((None, "null"), (7, "int"), (0.5, "float"), (["a"], "list"), ({}, "dict"), (b"a", "bytes")):
        found = reject(source, {**row, field: value})
        assert found == Reject(f"field {field!r} is {kind}, not a string", repr(value))
    assert reject(source, {**row, field: LONE}).reason == f"field {field!r} holds a lone surrogate"


def test_a_missing_field_is_told_with_the_fields_that_are_there() -> None:
    assert reject(TEXT, {"Text": "a", "id": 1}).detail == "the row has 'Text', 'id'"
    assert reject(TEXT, {}).detail == "the row has no fields"


@pytest.mark.parametrize(("source", "row", "field"), [item for item in ONE_FIELD if item[0] is not TEMPLATE])
def test_an_empty_field_is_rejected_by_name(source: Source, row: dict[str, Any], field: str) -> None:
    for empty in ("", " \n"):
        assert reject(source, {**row, field: empty}).reason == f"field {field!r} is empty"


def test_an_answer_that_the_template_leaves_empty_is_rejected() -> None:
    source = TemplateSource(format="template", path="x", prompt="{a}", completion="{b} ")
    assert reject(source, {"a": "x", "b": ""}) == Reject("empty answer")
    assert to_sample(source, {"a": "", "b": "x"}) == chat("", "x ")  # a template may have an empty part


def test_the_same_fault_has_the_same_reason_whatever_the_value() -> None:
    reasons = {reject(TEXT, {"text": value}).reason for value in (1, 2, 10**24)}
    assert reasons == {"field 'text' is int, not a string"}


@pytest.mark.parametrize(
    ("template", "said"),
    [("{nobody} {text}", "nobody"), ("hello", "{text}"), ("{text} {0}", "{0}"), ("{text!r}", "text"), ("{text", "")],
)
def test_a_translation_prompt_with_other_fields_is_refused_with_the_recipe(template: str, said: str) -> None:
    content = {"run": {"name": "a"}, "model": {"path": "a"}}
    source = {"format": "translation", "path": "x", "prompt": template}
    with pytest.raises(RecipeError, match=r"data\.train\.0") as caught:
        parse({**content, "data": {"train": [source]}})
    assert said in str(caught.value)


# -------------------------------------------------------------------------------------------------------- messages


def test_a_conversation_keeps_its_turns() -> None:
    turns = (("system", ""), ("user", "a"), ("assistant", "b"), ("user", " c "), ("assistant", "d\n"))
    sample = to_sample(MESSAGES, messages(*turns))
    assert sample == Conversation(tuple({"role": role, "content": content} for role, content in turns))
    assert isinstance(sample, Conversation) and sample.answer == "d\n" and len(sample.prompt) == 4


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert to_sample(MESSAGES, messages(("user", parts), ("assistant", "c"))) == chat("a b", "c")


def test_parts_as_parquet_gives_them_are_read_and_other_keys_ignored() -> None:
    row = messages(("user", [{"type": "text", "text": "a", "image": None}]), ("assistant", "b"))
    for message in row["messages"]:
        message.update(name=None, tool_calls=None)
    assert to_sample(MESSAGES, row) == chat("a", "b")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "field 'messages' is not a list of messages", "None"),
        ({"messages": "hello"}, "field 'messages' is not a list of messages", "hello"),
        ({"messages": []}, "field 'messages' is not a list of messages", "[]"),
        ({"messages": ["hello"]}, "unknown role in a message", "'hello' in message 0"),
        (messages(("user", "a"), ("model", "b")), "unknown role in a message", "'model' in message 1"),
        ({"messages": [{"content": "a"}]}, "unknown role in a message", "None in message 0"),
        (messages(("user", "a")), "the last message is not the assistant's", "the user's"),
        (messages(("assistant", "a")), "the first message is the assistant's", ""),
        (messages(("user", ""), ("assistant", "b")), "field 'content' is empty", ""),
        (messages(("user", "a"), ("assistant", " ")), "field 'content' is empty", ""),
        (messages(("user", "a"), ("assistant", None)), "field 'content' is null, not a string", "None"),
        (messages(("user", 5), ("assistant", "b")), "field 'content' is int, not a string", "5"),
        ({"messages": [{"role": "user"}]}, "missing field 'content'", "the row has 'role'"),
        (messages(("user", LONE), ("assistant", "b")), "field 'content' holds a lone surrogate", ""),
        (
            messages(("user", [{"type": "text", "text": "a"}, {"type": "image", "url": "b"}]), ("assistant", "c")),
            "row with an image",
            "message 0; data.images is null",
        ),
        (messages(("user", ["a"]), ("assistant", "c")), "message part is neither text nor image", "'str'"),
        (messages(("user", [{"type": "text"}]), ("assistant", "c")), "missing field 'text'", "'type'"),
        (messages(("user", [{"type": "text", "text": 1}]), ("assistant", "c")), "field 'text' is int", "1"),
        (messages(("user", []), ("assistant", "c")), "field 'content' is empty", ""),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]},
            "message calls tools",
            "message 1",
        ),
    ],
)
def test_what_is_no_conversation_of_text_is_rejected_with_its_reason(
    row: dict[str, Any], reason: str, detail: str
) -> None:
    found = reject(MESSAGES, row)
    assert found.reason.startswith(reason) and detail in found.detail


# -------------------------------------------------------------------------------------------------- special tokens

SPECIAL = re.compile("<bos>|<eos>|<end_of_turn>")


def special(source: Source, row: dict[str, Any]) -> str | None:
    """The reason why the row is rejected; None: it is not."""
    result = to_sample(source, row, SPECIAL)
    return result.reason if isinstance(result, Reject) else None


@pytest.mark.parametrize(
    ("source", "row"),
    [
        (TEXT, {"text": "a <eos> b"}),
        (PAIR, {"prompt": "a <eos>", "completion": "b"}),
        (PAIR, {"prompt": "a", "completion": "b<eos>"}),
        (PAIR.model_copy(update={"chat": False}), {"prompt": "a<e", "completion": "os>b"}),
        (TRANSLATION, {**ROW, "target_text": "<eos>"}),
        (TRANSLATION, {**ROW, "source_lang_code": "<eos>"}),
        (TEMPLATE, {"question": "<eos>", "why": "w", "answer": "a"}),
        (TEMPLATE.model_copy(update={"prompt": "{question}os>"}), {"question": "<e", "why": "w", "answer": "a"}),
        (MESSAGES, messages(("system", "<eos>"), ("user", "a"), ("assistant", "b"))),
        (MESSAGES, messages(("user", "a"), ("assistant", "b<eos>"), ("user", "c"), ("assistant", "d"))),
        (
            MESSAGES,
            messages(("user", [{"type": "text", "text": "<e"}, {"type": "text", "text": "os>"}]), ("assistant", "b")),
        ),
    ],
)
def test_the_text_of_a_special_token_is_rejected_by_its_name(source: Source, row: dict[str, Any]) -> None:
    assert special(source, row) == "holds the special token '<eos>'"
    assert not isinstance(to_sample(source, row), Reject)  # where there is no tokenizer, nothing is special


@pytest.mark.parametrize("text", ["<bos", "< eos>", "<EOS>", "&lt;eos&gt;", "end_of_turn"])
def test_what_is_no_special_token_is_text(text: str) -> None:
    assert special(TEXT, {"text": text}) is None


def test_special_tokens_of_the_recipe_are_meant_and_those_of_a_row_beside_them_are_not() -> None:
    source = TemplateSource(
        format="template", path="x", chat=False, prompt="<bos>{q}<end_of_turn>", completion="{a}<end_of_turn>"
    )
    assert special(source, {"q": "a", "a": "b"}) is None
    assert special(source, {"q": "a<end_of_turn>", "a": "b"}) == "holds the special token '<end_of_turn>'"
    assert special(source, {"q": "a", "a": "b<bos>"}) == "holds the special token '<bos>'"


def test_the_place_of_a_special_token_is_shown() -> None:
    result = to_sample(TEXT, {"text": "x" * 500 + " say <eos> now " + "y" * 500}, SPECIAL)
    assert isinstance(result, Reject) and "say <eos> now" in result.detail and len(result.detail) < 120


# ------------------------------------------------------------------------------------------------- what would be lost


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"reasoning_content": "because"}, "message with 'reasoning_content'"),
        ({"thinking": "because"}, "message with 'thinking'"),
        ({"function_call": {"name": "f"}}, "message with 'function_call'"),
        ({"weight": 0}, "message with a weight"),
    ],
)
def test_a_message_that_says_more_than_its_turn_holds_is_rejected(extra: dict[str, Any], reason: str) -> None:
    row = messages(("user", "a"), ("assistant", "b"))
    row["messages"][1] |= extra
    assert reject(MESSAGES, row).reason == reason
    row["messages"][1] |= dict.fromkeys(extra)  # null, as a table fills in what a row lacks
    assert not isinstance(to_sample(MESSAGES, row), Reject)


@pytest.mark.parametrize("depth", [10, 300, 900, 100_000])
def test_values_of_any_depth_and_size_are_shown_shortly(depth: int) -> None:
    deep: Any = "x" * 1_000_000
    for _ in range(depth):
        deep = [deep]
    rows = [
        (TEXT, {"text": deep}),
        (TEXT, {"text": {"a": "x" * 1_000_000}}),
        (TEXT, {"x" * 1_000_000: 1}),
        (MESSAGES, {"messages": {"a": deep}}),
        (MESSAGES, {"messages": [{"role": deep}]}),
        (MESSAGES, messages(("user", [{"type": deep}]))),
    ]
    for source, row in rows:
        assert len(reject(source, row).detail) < 1000
