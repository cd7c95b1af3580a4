"""A row to a sample, or to the reason why it is none: the recipe's formats, nothing altered silently."""

from __future__ import annotations

import re
import reprlib
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ray_ft.data import thinking
from ray_ft.data.images import BadImage, ImageReader
from ray_ft.data.lines import Reject
from ray_ft.recipe import (
    AnswerSource,
    ImageQuestionSource,
    LabelsSource,
    MessagesSource,
    PreferenceSource,
    PromptCompletionSource,
    Source,
    TemplateSource,
    TextSource,
    Thinking,
    TranslationSource,
    template_fields,
)

KNOWN = 20  # labels that a reject names
ROLES = ("system", "user", "assistant")
LOST = ("function_call", "reasoning_content", "thinking")  # keys of a message with content that no turn here carries

_repr = reprlib.Repr()  # of values of any size and depth, which plain repr would hold whole, or not survive
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlevel = 3


@dataclass(frozen=True)
class Conversation:
    """Turns for the chat template; every assistant turn from number `first` on is trained. Each turn is {"role",
    "content"}.

    Attributes:
        thinking: how what they think is marked, and whether it is trained; None: nothing is.
        images: checked files of the images, in the order of the turns. The content of a turn with images is a list of
            {"type": "text", "text"} and {"type": "image"}; of any other it is text.
    """

    turns: tuple[dict[str, Any], ...]
    first: int = 0
    thinking: Thinking | None = None
    images: tuple[bytes, ...] = ()

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        """All turns before the last answer."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        return str(self.turns[-1]["content"])

    @property
    def answers(self) -> list[str]:
        """Every one, the last included."""
        return [turn["content"] for turn in self.turns if turn["role"] == "assistant"]


@dataclass(frozen=True)
class Joined:
    """Text without a chat template: `answer` follows `prompt` and is trained; plain text has an empty prompt."""

    prompt: str
    answer: str
    thinking: Thinking | None = None

    @property
    def answers(self) -> list[str]:
        return [self.answer]


@dataclass(frozen=True)
class Labelled:
    """A text, as it is, and the number of its label."""

    text: str
    label: int


Asked = Conversation | Joined  # what a model can be asked


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt: the one that is preferred, and the other."""

    chosen: Asked
    rejected: Asked


Sample = Asked | Labelled | Pair


def preferred(sample: Asked | Pair) -> Asked:
    """What is to be answered: of a pair the preferred one."""
    return sample.chosen if isinstance(sample, Pair) else sample


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reject = Reject(reason, detail)


def to_sample(
    source: Source,
    row: dict[str, Any],
    special: re.Pattern[str] | None = None,
    *,
    labels: Sequence[str] = (),
    images: ImageReader | None = None,
) -> Sample | Reject:
    """What the source's format makes of one row.

    Args:
        labels: `model.labels`, which rows of format labels name.
        images: reads the images that the row names; None: rows with images are rejected.
        special: finds the tokenizer's special tokens (`Renderer.special`). A row that holds the text of one is
            rejected: the tokenizer would make the token itself of it, so that a quoted ``<end_of_turn>`` ends the
            turn. Those that the recipe's own templates hold are meant.
    """
    try:
        if isinstance(source, LabelsSource):
            sample: Sample = Labelled(_text(row, source.field), _label(row, source.label_field, labels))
        else:
            sample = _READERS[type(source)](source, row)
        if special:
            _check_special(source, sample, special)
        if isinstance(source, AnswerSource) and source.thinking:
            assert isinstance(sample, Asked)
            sample = _thinking(sample, source.thinking)
        return _with_images(sample, images)
    except _Unusable as unusable:
        return unusable.reject


def _with_images(sample: Sample, images: ImageReader | None) -> Sample:
    """The sample with what its readers left in place of images read, last of all: it takes longest."""
    if isinstance(sample, Pair):
        answers = [one for one in (sample.chosen, sample.rejected) if isinstance(one, Conversation)]
        if any(isinstance(turn["content"], list) for one in answers for turn in one.turns):
            raise _Unusable("pair with an image", "preferences are learnt from text alone")
    if not isinstance(sample, Conversation) or all(isinstance(turn["content"], str) for turn in sample.turns):
        return sample
    turns, files = [], list[bytes]()
    for number, turn in enumerate(sample.turns):
        if isinstance(turn["content"], list):
            if images is None:
                raise _Unusable("row with an image", f"message {number}; data.images is null")
            try:
                files += [images.read(part["image"]) for part in turn["content"] if part["type"] == "image"]
            except BadImage as bad:
                raise _Unusable(bad.reason, bad.detail) from None
            parts = [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]
            turn = {**turn, "content": parts}
        turns.append(turn)
    return replace(sample, turns=tuple(turns), images=tuple(files))


def text_of(content: str | list[dict[str, Any]]) -> str:
    """Of a turn's content, the texts alone."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _thinking(sample: Asked, tags: Thinking) -> Asked:
    for number, answer in enumerate(sample.answers):
        if found := thinking.fault(answer, tags):
            reason, detail = found
            raise _Unusable(reason, f"{detail}, in answer {number}" if len(sample.answers) > 1 else detail)
    return replace(sample, thinking=tags)


def _check_special(source: Source, sample: Sample, special: re.Pattern[str]) -> None:
    # Of the texts as they are joined: the token may come about where two of them meet.
    if isinstance(sample, Pair):
        _check_special(source, sample.chosen, special)
        _check_special(source, sample.rejected, special)
        return
    if isinstance(sample, Conversation):
        texts = [text_of(turn["content"]) for turn in sample.turns]
    elif isinstance(sample, Labelled):
        texts = [sample.text]
    else:
        texts = [sample.prompt + sample.answer]
    if not any(map(special.search, texts)):
        return
    meant = Counter(token for text in _literals(source) for token in special.findall(text))
    for text in texts:
        for match in special.finditer(text):
            if meant[match[0]]:
                meant[match[0]] -= 1
                continue
            around = text[max(match.start() - 20, 0) : match.end() + 20]
            raise _Unusable(f"holds the special token {match[0]!r}", f"the model would obey it: {around!r}")


def _literals(source: Source) -> Iterator[str]:
    """What the recipe itself writes into the samples of a source."""
    if isinstance(source, TranslationSource | TemplateSource):
        templates = [source.prompt, *([source.completion] if isinstance(source, TemplateSource) else [])]
        yield from (text for template in templates for text, *_ in string.Formatter().parse(template))


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


def _value(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise _Unusable(
            f"missing field {field!r}", f"the row has {', '.join(map(_repr.repr, list(row)[:8])) or 'no fields'}"
        )
    return row[field]


def _text(row: dict[str, Any], field: str, *, empty_ok: bool = False) -> str:
    value = _value(row, field)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise _Unusable(f"field {field!r} is {kind}, not a string", _repr.repr(value))
    if not empty_ok and not value.strip():
        raise _Unusable(f"field {field!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unusable(f"field {field!r} holds a lone surrogate", "half of a UTF-16 pair; not text") from None
    return value


def _label(row: dict[str, Any], field: str, labels: Sequence[str]) -> int:
    """The number of a label that a row gives by name or by number. A name goes first: it may look like a number."""
    value = _value(row, field)
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if type(value) is int and 0 <= value < len(labels):
        return value
    if value is None or type(value) not in (str, int):
        kind = "null" if value is None else type(value).__name__
        raise _Unusable(f"field {field!r} is {kind}, neither a label's name nor its number", _repr.repr(value))
    some = ", ".join(f"{number} {name!r}" for number, name in enumerate(labels[:KNOWN]))
    more = f" … ({len(labels)})" if len(labels) > KNOWN else ""
    raise _Unusable("unknown label", f"{_repr.repr(value)}; model.labels has {some}{more}")


def _asked(prompt: str, answer: str, chat: bool) -> Asked:
    if not answer.strip():
        raise _Unusable("empty answer")
    if not chat:
        return Joined(prompt, answer)
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def _messages(source: MessagesSource, row: dict[str, Any]) -> Asked:
    return Conversation(_whole(_turns(row, source.field)))


def _whole(turns: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """A conversation's turns, if it begins with somebody who asks and ends with an answer."""
    if turns[0]["role"] == "assistant":
        raise _Unusable("the first message is the assistant's", "nothing stands before it that it could answer")
    if turns[-1]["role"] != "assistant":
        raise _Unusable("the last message is not the assistant's", f"it is the {turns[-1]['role']}'s")
    return turns


def _turns(row: dict[str, Any], field: str) -> tuple[dict[str, Any], ...]:
    """The messages in a column, each checked by itself."""
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise _Unusable(f"field {field!r} is not a list of messages", _repr.repr(messages))
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise _Unusable(
                "unknown role in a message", f"{_repr.repr(role)} in message {number}; known: {', '.join(ROLES)}"
            )
        if message.get("tool_calls"):
            raise _Unusable("message calls tools", f"message {number}; the calls would be lost")
        if lost := [key for key in LOST if message.get(key)]:
            raise _Unusable(f"message with {lost[0]!r}", f"message {number}; it would be lost")
        if message["role"] == "assistant" and message.get("weight") not in (None, 1):
            raise _Unusable("message with a weight", f"message {number}; every assistant turn is trained alike")
        turns.append({"role": message["role"], "content": _content(message)})
    return tuple(turns)


def _content(message: dict[str, Any]) -> str | list[dict[str, Any]]:
    """Text; or parts, where one is an image, of which "image" holds what `ImageReader.read` takes."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [_part(part, message.get("role")) for part in content]
        if any(part["type"] == "image" for part in parts):
            return parts
        message = {**message, "content": "".join(part["text"] for part in parts)}
    return _text(message, "content", empty_ok=message.get("role") == "system")


def _part(part: Any, role: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text":
        return {"type": "text", "text": _text(part, "text", empty_ok=True)}
    if kind not in ("image", "image_url"):
        raise _Unusable("message part is neither text nor image", f"type {_repr.repr(kind)}")
    if role != "user":
        raise _Unusable("image in a message that is not the user's", f"it is the {role}'s")
    keys = ("image_url",) if kind == "image_url" else ("image", "path", "url", "bytes")
    found = next((part[key] for key in keys if part.get(key) is not None), None)
    if found is None:
        raise _Unusable("no image", f"a part of type {kind!r} holds none of {', '.join(keys)}")
    return {"type": "image", "image": found}


def _prompt_completion(source: PromptCompletionSource, row: dict[str, Any]) -> Asked:
    return _asked(_text(row, source.prompt_field), _text(row, source.completion_field), source.chat)


def _template(source: TemplateSource, row: dict[str, Any]) -> Asked:
    fields = {name: _text(row, name, empty_ok=True) for name in sorted(columns_used(source))}
    return _asked(source.prompt.format(**fields), source.completion.format(**fields), source.chat)


def _translation(source: TranslationSource, row: dict[str, Any]) -> Asked:
    source_code = source.source_lang_code or _text(row, source.source_lang_code_field)
    target_code = source.target_lang_code or _text(row, source.target_lang_code_field)
    prompt = source.prompt.format(
        source_lang=language_name(source_code) if source.source_lang_name == "auto" else source.source_lang_name,
        src_lang_code=source_code,
        target_lang=language_name(target_code) if source.target_lang_name == "auto" else source.target_lang_name,
        tgt_lang_code=target_code,
        text=_text(row, source.source_field),
    )
    return _asked(prompt, _text(row, source.target_field), chat=True)


def _image_question(source: ImageQuestionSource, row: dict[str, Any]) -> Asked:
    if row.get(source.image_field) is None:
        raise _Unusable("no image", f"field {source.image_field!r} is missing or null")
    parts = [
        {"type": "image", "image": row[source.image_field]},
        {"type": "text", "text": _text(row, source.question_field)},
    ]
    answer = _text(row, source.answer_field)
    return Conversation(({"role": "user", "content": parts}, {"role": "assistant", "content": answer}))


def _plain(source: TextSource, row: dict[str, Any]) -> Asked:
    return Joined("", _text(row, source.field))


def _preference(source: PreferenceSource, row: dict[str, Any]) -> Pair:
    fields = (source.chosen_field, source.rejected_field)
    if not source.chat:
        assert source.prompt_field is not None
        prompt = _text(row, source.prompt_field, empty_ok=True)
        pair: Pair = Pair(*(Joined(prompt, _text(row, field)) for field in fields))
    else:
        asked = () if source.prompt_field is None else _prompt(row, source.prompt_field)
        answers = [_answer(row, field, asked) for field in fields]
        # Where both go on with what the prompt column lacks (or there is none), that is asked too.
        same = 0
        while same < min(map(len, answers)) and answers[0][same] == answers[1][same]:
            same += 1
        if any(len(turns) == same for turns in answers):
            equal = len(answers[0]) == len(answers[1])
            raise _Unusable("chosen and rejected are the same" if equal else "one answer is the beginning of the other")
        if other := [turns[same] for turns in answers if turns[same]["role"] != "assistant"]:
            raise _Unusable("the prompts of chosen and rejected differ", f"in a message of the {other[0]['role']}")
        pair = Pair(*(Conversation(_whole(turns), same) for turns in answers))
    if pair.chosen == pair.rejected:
        raise _Unusable("chosen and rejected are the same")
    return pair


def _prompt(row: dict[str, Any], field: str) -> tuple[dict[str, Any], ...]:
    """What is asked, as turns of which the last is to be answered."""
    if not isinstance(row.get(field), list):
        return ({"role": "user", "content": _text(row, field)},)
    turns = _turns(row, field)
    if turns[-1]["role"] != "user":
        raise _Unusable("the prompt's last message is not the user's", f"it is the {turns[-1]['role']}'s")
    return turns


def _answer(row: dict[str, Any], field: str, asked: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The whole conversation that an answer makes with its prompt."""
    if not isinstance(row.get(field), list):
        if not asked:
            raise _Unusable(
                f"field {field!r} is not a list of messages", "without a prompt's column it holds the prompt, too"
            )
        return (*asked, {"role": "assistant", "content": _text(row, field)})
    turns = _turns(row, field)
    if not asked or turns[0]["role"] == "assistant":
        return (*asked, *turns)
    # Whole conversations beside a prompt: a string is then their last question, perhaps after a system message.
    begins = turns[: len(asked)] == asked
    if not begins and len(asked) == 1 and turns[0]["role"] == "system":
        begins = turns[1:2] == asked
    if not begins:
        raise _Unusable(f"field {field!r} holds another prompt", _repr.repr(turns[0]["content"]))
    return turns


_READERS: dict[type[Source], Callable[[Any, dict[str, Any]], Asked | Pair]] = {
    MessagesSource: _messages,
    PromptCompletionSource: _prompt_completion,
    TemplateSource: _template,
    TranslationSource: _translation,
    TextSource: _plain,
    PreferenceSource: _preference,
    ImageQuestionSource: _image_question,
}
