"""The recipe's formats: which columns each of them needs, and what it makes of a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ray_ft.data.samples import Asked, Conversation, Joined, Pair
from ray_ft.data.values import Unusable, complete, messages_in, shown, text_in
from ray_ft.recipe import (
    ImageQuestionSource,
    LabelsSource,
    MessagesSource,
    PreferenceSource,
    PromptCompletionSource,
    Source,
    TemplateSource,
    TextSource,
    TranslationSource,
    template_fields,
)


def columns_used(source: Source) -> set[str]:
    """Columns without which no row of the source can be used."""
    match source:
        case MessagesSource() | TextSource():
            return {source.field}
        case LabelsSource():
            return {source.field, source.label_field}
        case PromptCompletionSource():
            return {source.prompt_field, source.completion_field}
        case PreferenceSource():
            prompt = set() if source.prompt_field is None else {source.prompt_field}
            return prompt | {source.chosen_field, source.rejected_field}
        case TemplateSource():
            return template_fields(source.prompt) | template_fields(source.completion)
        case TranslationSource():
            codes = {source.source_lang_code_field} if source.source_lang_code is None else set()
            codes |= {source.target_lang_code_field} if source.target_lang_code is None else set()
            return {source.source_field, source.target_field} | codes
        case ImageQuestionSource():
            return {source.image_field, source.question_field, source.answer_field}
    raise TypeError(f"no reader for {type(source).__name__}")


@lru_cache(maxsize=1024)
def language_name(code: str) -> str:
    """English name of a language code (en, pt-BR, zh_Hans, sr_Cyrl_RS); an unknown code is its own name.

    Names come from the CLDR tables in Babel.
    """
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(code.replace("-", "_")).get_display_name("en") or code
    except (UnknownLocaleError, ValueError):
        return code


def _asked(prompt: str, answer: str, chat: bool) -> Asked:
    if not answer.strip():
        raise Unusable("empty answer")
    if not chat:
        return Joined(prompt, answer)
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def _messages(source: MessagesSource, row: dict[str, Any]) -> Asked:
    return Conversation(complete(messages_in(row, source.field)))


def _prompt_completion(source: PromptCompletionSource, row: dict[str, Any]) -> Asked:
    return _asked(text_in(row, source.prompt_field), text_in(row, source.completion_field), source.chat)


def _template(source: TemplateSource, row: dict[str, Any]) -> Asked:
    fields = {name: text_in(row, name, empty_ok=True) for name in sorted(columns_used(source))}
    return _asked(source.prompt.format(**fields), source.completion.format(**fields), source.chat)


def _translation(source: TranslationSource, row: dict[str, Any]) -> Asked:
    source_code = source.source_lang_code or text_in(row, source.source_lang_code_field)
    target_code = source.target_lang_code or text_in(row, source.target_lang_code_field)
    prompt = source.prompt.format(
        source_lang=language_name(source_code) if source.source_lang_name == "auto" else source.source_lang_name,
        src_lang_code=source_code,
        target_lang=language_name(target_code) if source.target_lang_name == "auto" else source.target_lang_name,
        tgt_lang_code=target_code,
        text=text_in(row, source.source_field),
    )
    return _asked(prompt, text_in(row, source.target_field), chat=True)


def _image_question(source: ImageQuestionSource, row: dict[str, Any]) -> Asked:
    if row.get(source.image_field) is None:
        raise Unusable("no image", f"field {source.image_field!r} is missing or null")
    parts = [
        {"type": "image", "image": row[source.image_field]},
        {"type": "text", "text": text_in(row, source.question_field)},
    ]
    answer = text_in(row, source.answer_field)
    return Conversation(({"role": "user", "content": parts}, {"role": "assistant", "content": answer}))


def _plain(source: TextSource, row: dict[str, Any]) -> Asked:
    return Joined("", text_in(row, source.field))


def _preference(source: PreferenceSource, row: dict[str, Any]) -> Pair:
    fields = (source.chosen_field, source.rejected_field)
    if not source.chat:
        assert source.prompt_field is not None
        prompt = text_in(row, source.prompt_field, empty_ok=True)
        pair: Pair = Pair(*(Joined(prompt, text_in(row, field)) for field in fields))
    else:
        asked = () if source.prompt_field is None else _prompt(row, source.prompt_field)
        answers = [_answer(row, field, asked) for field in fields]
        # Where both go on with what the prompt column lacks (or there is none), that is asked too.
        same = 0
        while same < min(map(len, answers)) and answers[0][same] == answers[1][same]:
            same += 1
        if any(len(turns) == same for turns in answers):
            equal = len(answers[0]) == len(answers[1])
            raise Unusable("chosen and rejected are the same" if equal else "one answer is the beginning of the other")
        if other := [turns[same] for turns in answers if turns[same]["role"] != "assistant"]:
            raise Unusable("the prompts of chosen and rejected differ", f"in a message of the {other[0]['role']}")
        pair = Pair(*(Conversation(complete(turns), same) for turns in answers))
    if pair.chosen == pair.rejected:
        raise Unusable("chosen and rejected are the same")
    return pair


def _prompt(row: dict[str, Any], field: str) -> tuple[dict[str, Any], ...]:
    """What is asked, as turns of which the last is to be answered."""
    if not isinstance(row.get(field), list):
        return ({"role": "user", "content": text_in(row, field)},)
    turns = messages_in(row, field)
    if turns[-1]["role"] != "user":
        raise Unusable("the prompt's last message is not the user's", f"it is the {turns[-1]['role']}'s")
    return turns


def _answer(row: dict[str, Any], field: str, asked: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The whole conversation that an answer makes with its prompt."""
    if not isinstance(row.get(field), list):
        if not asked:
            raise Unusable(
                f"field {field!r} is not a list of messages", "without a prompt's column it holds the prompt, too"
            )
        return (*asked, {"role": "assistant", "content": text_in(row, field)})
    turns = messages_in(row, field)
    if not asked or turns[0]["role"] == "assistant":
        return (*asked, *turns)
    # Whole conversations beside a prompt: a string is then their last question, perhaps after a system message.
    begins = turns[: len(asked)] == asked
    if not begins and len(asked) == 1 and turns[0]["role"] == "system":
        begins = turns[1:2] == asked
    if not begins:
        raise Unusable(f"field {field!r} holds another prompt", shown(turns[0]["content"]))
    return turns


READERS: dict[type[Source], Callable[[Any, dict[str, Any]], Asked | Pair]] = {
    MessagesSource: _messages,
    PromptCompletionSource: _prompt_completion,
    TemplateSource: _template,
    TranslationSource: _translation,
    TextSource: _plain,
    PreferenceSource: _preference,
    ImageQuestionSource: _image_question,
}
