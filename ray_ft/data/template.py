"""A conversation to text: the tokenizer's chat template, rendered as its `apply_chat_template` renders it.

Every row is rendered two times or more, and half of the time of `apply_chat_template` goes into what is the same for
every row: the special tokens are collected, and Jinja's sandbox looks at the same few attributes (`loop.first`) again
and again. Here both are done once. The template is compiled by transformers, with its filters and functions, and runs
in its sandbox. A tokenizer with an `apply_chat_template` of its own is asked by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

VERDICTS = 1024  # attributes whose safety is remembered: a template may make their names of what rows hold


class TemplateRefusal(Exception):
    """The chat template refuses a conversation, or renders it so that no answer can be told in it."""


class ChatTemplate:
    """One tokenizer's template, compiled at the first conversation: a tokenizer for plain text has none.

    What the tokenizer is given afterwards, another template or other special tokens, is not seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._rendered: Callable[[list[Any], bool], str] | None = None

    def render(self, turns: Sequence[dict[str, Any]], answer_next: bool = False) -> str:
        """The text of some turns.

        Args:
            answer_next: whether the text ends where the model is to answer.

        Raises:
            TemplateRefusal: the template refuses them, or there is none, or there are no turns.
        """
        import jinja2

        try:
            if not turns:  # refused by the tokenizer, in its words
                return _as_it_does(self._tokenizer, [], answer_next)
            self._rendered = self._rendered or _renders(self._tokenizer)
            return self._rendered(list(turns), answer_next)
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template is a program: any of them
            raise TemplateRefusal(str(error)) from error


def _renders(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any], bool], str]:
    """(turns, answer next) to text.

    Raises:
        ValueError: the tokenizer has no template, or several and none is the default.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return partial(_as_it_does, tokenizer)
    render = _compiled(tokenizer.get_chat_template()).render
    common: dict[str, Any] = {**tokenizer.special_tokens_map, "tools": None, "documents": None}

    def at_once(turns: list[Any], answer_next: bool) -> str:
        return render(common, messages=turns, add_generation_prompt=answer_next)

    return at_once


def _as_it_does(tokenizer: PreTrainedTokenizerBase, turns: list[Any], answer_next: bool) -> str:
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
    assert isinstance(rendered, str)
    return rendered


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """Compiled once in a process: it takes as long as a hundred rows and more."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(source).environment.overlay()
    environment.is_safe_attribute = remembered(environment.is_safe_attribute)
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # a chain of dicts, walked for each text
    return cast("jinja2.Template", template)


def remembered(ask: Callable[[Any, str, Any], bool]) -> Callable[[Any, str, Any], bool]:
    """A sandbox's `is_safe_attribute`, asked once: it goes by an object's type and the attribute's name alone."""
    verdicts: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(thing: Any, name: str, value: Any) -> bool:
        key = type(thing), name
        if (verdict := verdicts.get(key)) is None:
            verdict = bool(ask(thing, name, value))
            if len(verdicts) < VERDICTS:
                verdicts[key] = verdict
        return verdict

    return is_safe_attribute
