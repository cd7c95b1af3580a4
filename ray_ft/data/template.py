"""A conversation to text: the tokenizer's chat template, rendered as its `apply_chat_template` renders it.

Every row is rendered two times or more, and half of the time of `apply_chat_template` goes into what is the same for
every row: the special tokens are collected, and Jinja's sandbox looks at the same few attributes (`loop.first`) again
and again. Here both are done once. The template is compiled by transformers, with its filters and functions, and runs
in its sandbox. A tokenizer with an `apply_chat_template` of its own is asked by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

VERDICTS = 1024  # attributes whose safety is remembered: a template may make their names of what rows hold


class TemplateRefusal(Exception):
    """The chat template refuses a conversation, or renders it so that no answer can be told in it."""


class ChatTemplate:
    """One tokenizer's template, compiled at the first conversation: a tokenizer for plain text has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._compiled: Callable[[list[Any], bool], str] | None = None

    def render(self, turns: Sequence[dict[str, Any]], answer_next: bool = False) -> str:
        """The text of some turns, which are at least one.

        Args:
            answer_next: whether the text ends where the model is to answer.

        Raises:
            TemplateRefusal: the template refuses them, or there is none.
        """
        import jinja2

        try:
            self._compiled = self._compiled or compiled(self._tokenizer)
            return self._compiled(list(turns), answer_next)
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template is a program: any of them
            raise TemplateRefusal(str(error)) from error


def compiled(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any], bool], str]:
    """(turns, answer next) to text.

    Raises:
        ValueError: the tokenizer has no template, or several and none is the default.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:

        def as_it_does(turns: list[Any], answer_next: bool) -> str:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))

        return as_it_does

    source, tokens = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
    environment = _compile_jinja_template(source).environment.overlay()
    environment.is_safe_attribute = _remembered(environment)
    template = environment.from_string(source)
    template.globals = dict(template.globals)  # a chain of dicts, walked for each text
    render = template.render

    def at_once(turns: list[Any], answer_next: bool) -> str:
        if not turns:
            raise ValueError("there is no turn to render")
        return str(render(messages=turns, tools=None, documents=None, add_generation_prompt=answer_next, **tokens))

    return at_once


def _remembered(environment: jinja2.Environment) -> Callable[[Any, str, Any], bool]:
    """The sandbox's own verdict on an attribute, which depends on the object's type and the attribute's name alone."""
    ask = environment.is_safe_attribute  # type: ignore[attr-defined]  # of the sandbox
    verdicts: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(thing: Any, name: str, value: Any) -> bool:
        key = type(thing), name
        if (verdict := verdicts.get(key)) is None:
            verdict = bool(ask(thing, name, value))
            if len(verdicts) < VERDICTS:
                verdicts[key] = verdict
        return verdict

    return is_safe_attribute
