"""The chat template's text is that of the tokenizer's own `apply_chat_template`, and its sandbox holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from ray_ft.data import template
from ray_ft.data.render import load_tokenizer
from ray_ft.data.template import ChatTemplate, TemplateRefusal
from ray_ft.demo import DemoPaths

TALK = [
    {"role": "user", "content": " Wie geht's? {{ 1 }} "},
    {"role": "assistant", "content": "so so\n"},
    {"role": "user", "content": "é\u2028"},
]
SYSTEM = [{"role": "system", "content": "short"}, *TALK]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image"}]}]
#: What published templates use: loops, namespaces, filters and functions of transformers, generation blocks.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "namespace": "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "{{ ns.n }}:{{ loop.first }}{{ loop.last }}{{ loop.index }}{{ m.content | tojson }}{%- endfor -%}",
    "generation": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% continue %}{% endif %}{{ m['content'] }}{% endfor %}",
    "macro": "{% macro turn(m) %}[{{ m.role }}] {{ m.content | trim }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}\n{% endfor %}{{ tools is none }}{{ documents is none }}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ k.upper() }}={{ v }};{% endfor %}{% endfor %}",
    "refuses": "{{ raise_exception('never') }}",
    "undefined": "{{ messages[7]['role'] }}",
    "broken": "{% if %}",
}


@pytest.fixture
def tokenizer(demo: DemoPaths) -> PreTrainedTokenizerBase:
    return copy.deepcopy(load_tokenizer(demo.base))


def said(render: Callable[[], Any]) -> tuple[str, str]:
    """The text, or that there is none and why."""
    try:
        return "text", str(render())
    except Exception as error:
        return "refused", str(error)


def theirs(tokenizer: PreTrainedTokenizerBase, turns: list[Any], answer_next: bool) -> tuple[str, str]:
    return said(lambda: tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))


def ours(tokenizer: PreTrainedTokenizerBase, turns: list[Any], answer_next: bool) -> tuple[str, str]:
    return said(lambda: ChatTemplate(tokenizer).render(turns, answer_next))


@pytest.mark.parametrize("answer_next", [False, True])
@pytest.mark.parametrize("turns", [TALK, SYSTEM, PARTS, TALK[:1], []], ids=["talk", "system", "parts", "one", "none"])
@pytest.mark.parametrize("name", ["own", *TEMPLATES])
def test_the_text_is_the_tokenizers_own(
    tokenizer: PreTrainedTokenizerBase, name: str, turns: list[Any], answer_next: bool
) -> None:
    tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    assert ours(tokenizer, turns, answer_next) == theirs(tokenizer, turns, answer_next)


def test_some_of_these_are_texts_and_some_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    found = {}
    for name, source in TEMPLATES.items():
        tokenizer.chat_template = source
        found[name] = ours(tokenizer, TALK, True)[0]
    assert {name for name, kind in found.items() if kind == "refused"} == {"refuses", "undefined", "broken"}


def test_of_several_templates_the_default_is_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert ChatTemplate(tokenizer).render(TALK) == "a"


def test_a_tokenizer_without_one_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TemplateRefusal, match="chat_template is not set"):
        ChatTemplate(tokenizer).render(TALK)


def test_a_tokenizer_with_a_way_of_its_own_is_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, conversation: Any, **options: Any) -> str:
            return f"{len(conversation)} {sorted(options.items())}"

    tokenizer.__class__ = Own
    expected = "3 [('add_generation_prompt', True), ('tokenize', False)]"
    assert ChatTemplate(tokenizer).render(TALK, answer_next=True) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages | attr('clear') }}{{ messages.clear() }}",
        "{% for m in messages %}{{ loop.first }}{{ loop.__class__.__mro__ }}{% endfor %}",
        "{{ messages.count(1) }}{{ messages.append(1) }}",
    ],
)
def test_the_sandbox_holds_each_time(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    tokenizer.chat_template = source
    rendered, turns = ChatTemplate(tokenizer), copy.deepcopy(TALK)
    for _ in range(2):  # the second time the verdicts are remembered
        with pytest.raises(TemplateRefusal, match=r"unsafe|access"):
            rendered.render(turns)
    assert turns == TALK


def test_verdicts_are_the_sandboxs_and_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "VERDICTS", 3)
    sandbox = ImmutableSandboxedEnvironment()
    asked: list[tuple[type, str]] = []

    def ask(thing: Any, name: str, value: Any) -> bool:
        asked.append((type(thing), name))
        return sandbox.is_safe_attribute(thing, name, value)

    verdict = template.remembered(ask)
    keys: list[tuple[Any, str]] = [("a", "upper"), ("b", "__class__"), ([], "append"), ([], "count"), ({}, "keys")]
    for _ in range(2):
        for thing, name in keys:
            assert verdict(thing, name, None) is sandbox.is_safe_attribute(thing, name, None)
    once, again = [(type(thing), name) for thing, name in keys[:3]], [(type(thing), name) for thing, name in keys[3:]]
    assert asked == [*once, *again, *again]


def test_a_template_is_compiled_once(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = "compiled once: {{ messages | length }}{{ bos_token }}"
    other = copy.deepcopy(tokenizer)
    other.bos_token = tokenizer.eos_token
    before = template._compiled.cache_info().misses
    texts = [ChatTemplate(one).render(TALK) for one in (tokenizer, other, tokenizer)]
    assert template._compiled.cache_info().misses == before + 1
    assert texts[0] == texts[2] != texts[1]  # each with the special tokens of its own


def test_the_tokenizers_own_sandbox_is_left_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    ChatTemplate(tokenizer).render(TALK)
    environment = _compile_jinja_template(tokenizer.get_chat_template()).environment
    assert "is_safe_attribute" not in vars(environment)
