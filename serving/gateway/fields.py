"""Which fields a request may have, of which type and how large.

An allowlist, as vLLM has some 60 fields and several are dangerous in a stranger's hand: chat_template runs a template
of theirs, prompt_embeds loads a tensor of theirs, priority overtakes others, and every version adds some. `check`
returns what the engine is asked, made of checked values alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving.gateway.kinds import (
    Check,
    ids,
    logit_bias,
    number,
    response_format,
    same,
    stops,
    stream_options,
    text,
    truth,
    unknown,
    whole,
    wrong,
)
from serving.gateway.prompts import inputs, messages, prompt, tokens, tokens_of_messages, tokens_of_prompt
from serving.gateway.refusal import Refusal
from serving.gateway.routes import Route
from serving.gateway.settings import Settings

INT64 = 1 << 63


@dataclass(frozen=True)
class Asked:
    """A request that was checked.

    Attributes:
        body: for the engine; `model` is the engine's name.
        stream: the answer is to come in chunks.
        usage: the client asked for the chunk with the usage.
        choices: answers that are generated.
        prompt_estimate: tokens of the prompt; exact where it came as token ids.
        answer_most: tokens asked for, of all choices together.
    """

    body: dict[str, Any]
    stream: bool
    usage: bool
    choices: int
    prompt_estimate: int
    answer_most: int


def check(path: str, content: dict[str, Any], settings: Settings, route: Route) -> Asked:
    """What the engine is asked, from a parsed body.

    Args:
        path: ``/v1/chat/completions``, ``/v1/completions`` or ``/v1/classify``.

    Raises:
        Refusal: 400, naming the field.
    """
    table, needed = OFFERED[path], NEEDED[path]
    body: dict[str, Any] = {}
    for name, value in content.items():
        one = table.get(name)
        if one is None:
            raise unknown(name, table)
        if value is None:  # as if it was not there, for every field
            continue
        one(value, name, settings, route)
        body[name] = value
    if needed not in body:
        raise Refusal(400, f"the field {needed!r} is missing", "missing_field", needed)
    body["model"] = route.engine_name
    if path == "/v1/classify":
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        return Asked(body, False, False, 1, sum(map(tokens, texts)), 0)
    return _generate(body, needed, settings, route)


def _generate(body: dict[str, Any], needed: str, settings: Settings, route: Route) -> Asked:
    """The same for an answer that is generated: what depends on several fields."""
    chat = needed == "messages"
    prompts, estimate = (1, tokens_of_messages(body[needed])) if chat else tokens_of_prompt(body[needed])
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    if most is None and settings.max_tokens is not None and chat:
        most = body["max_tokens"] = min(settings.max_tokens, route.max_model_len)
    elif most is None and not chat:
        # vLLM's own default for completions.
        most = body["max_tokens"] = min(16, settings.max_tokens or 16, route.max_model_len)
    if body.get("min_tokens", 0) > (most or route.max_model_len):
        raise wrong("min_tokens", body["min_tokens"], f"at most max_tokens, {most or route.max_model_len}")
    stream = body.get("stream", False)
    options = body.pop("stream_options", None)
    if options is not None and not stream:
        raise Refusal(400, "stream_options is only for stream: true", "invalid_field", "stream_options")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise Refusal(400, "top_logprobs is only for logprobs: true", "invalid_field", "top_logprobs")
    if stream:
        if "prompt_logprobs" in body:
            raise Refusal(400, "prompt_logprobs is only for stream: false", "invalid_field", "prompt_logprobs")
        body["stream_options"] = {"include_usage": True}  # what was used is counted, whoever asks
    choices = prompts * body.get("n", 1)
    return Asked(
        body=body,
        stream=stream,
        usage=bool(options and options.get("include_usage")),
        choices=choices,
        prompt_estimate=estimate,
        answer_most=choices * (most or route.max_model_len),
    )


def _most_tokens(settings: Settings, route: Route) -> int:
    return min(settings.max_tokens or route.max_model_len, route.max_model_len)


_SAMPLING: dict[str, Check] = {
    "model": same,
    "max_tokens": whole(1, _most_tokens),
    "n": whole(1, lambda settings, route: settings.max_choices),
    "stream": truth,
    "stream_options": stream_options,
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": whole(-1, INT64 >> 32),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0, 2, above=True),
    "seed": whole(-INT64, INT64 - 1),
    "stop": stops,
    "stop_token_ids": ids(64),
    "min_tokens": whole(0, _most_tokens),
    "ignore_eos": truth,
    "skip_special_tokens": truth,
    "logit_bias": logit_bias,
    "prompt_logprobs": whole(0, 5),
    "response_format": response_format,
    "user": text(256),
}

OFFERED: dict[str, dict[str, Check]] = {
    "/v1/chat/completions": {
        **_SAMPLING,
        "messages": messages,
        "max_completion_tokens": whole(1, _most_tokens),
        "logprobs": truth,
        "top_logprobs": whole(0, 20),
    },
    "/v1/completions": {
        **_SAMPLING,
        "prompt": prompt,
        "echo": truth,
        "logprobs": whole(0, 20),
        "add_special_tokens": truth,
    },
    "/v1/classify": {"model": same, "input": inputs, "user": text(256)},
}
NEEDED = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/classify": "input"}
