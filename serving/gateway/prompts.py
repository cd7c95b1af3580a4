"""What a model is given to read: messages, prompts and texts; their form, and how many tokens they are likely to be."""

from __future__ import annotations

from typing import Any

from serving.gateway import images
from serving.gateway.kinds import Check, all_ids, same, text, unknown, wrong
from serving.gateway.refusal import Refusal
from serving.gateway.routes import Route
from serving.gateway.settings import Settings

#: Bytes of a text for each token that it is estimated to have; English has about 4.
BYTES_PER_TOKEN = 4
MOST_MESSAGES = 1024
#: Prompts of one completions request, and texts of one classify request.
MOST_PROMPTS = 64
ROLES = ("system", "developer", "user", "assistant")
_MESSAGE: dict[str, Check] = {"role": same, "content": same, "name": same}


def messages(value: Any, name: str, settings: Settings, route: Route) -> None:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise wrong(name, value, f"a list of 1 to {MOST_MESSAGES} messages")
    seen = 0
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise wrong(where, message, "an object")
        for key in message:
            if key not in _MESSAGE:
                raise unknown(key, _MESSAGE, f"{where}.")
        if message.get("role") not in ROLES:
            raise wrong(f"{where}.role", message.get("role"), f"one of {', '.join(ROLES)}")
        if "name" in message:
            text(64)(message["name"], f"{where}.name", settings, route)
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not 1 <= len(content) <= 256:
            raise wrong(f"{where}.content", content, "a text, or a list of 1 to 256 parts")
        for j, part in enumerate(content):
            seen += _part(part, f"{where}.content[{j}]", settings, route)
    if seen > images.MOST_IMAGES:
        raise Refusal(400, f"{seen} images are more than {images.MOST_IMAGES}", "invalid_field", name)


def _part(part: Any, where: str, settings: Settings, route: Route) -> int:
    """Check one part of a message. Returns the images in it."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise wrong(where, part, "{type: text, text: …} and nothing else")
        return 0
    if kind != "image_url":
        raise wrong(f"{where}.type", kind, "text or image_url")
    if not route.vision:
        raise Refusal(400, f"the model {route.name!r} does not see images", "invalid_field", where)
    image = part.get("image_url")
    if (
        set(part) != {"type", "image_url"}
        or not isinstance(image, dict)
        or not {"url"} <= set(image) <= {"url", "detail"}
    ):
        raise wrong(where, part, "{type: image_url, image_url: {url: …}} and nothing else")
    if image.get("detail", "auto") not in ("auto", "low", "high"):
        raise wrong(f"{where}.image_url.detail", image["detail"], "auto, low or high")
    images.check(image["url"], f"{where}.image_url.url", settings.media_domains)
    return 1


def prompt(value: Any, name: str, settings: Settings, route: Route) -> None:
    """A text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return
    rule = f"a text, a list of token ids, or a list of at most {MOST_PROMPTS} of these"
    if not isinstance(value, list) or not value:
        raise wrong(name, value, rule)
    if type(value[0]) is int:
        if not all_ids(value):
            raise wrong(name, value, rule)
    elif len(value) > MOST_PROMPTS:
        raise wrong(name, value, rule)
    elif isinstance(value[0], str):
        if not all(isinstance(text, str) for text in value):
            raise wrong(name, value, rule)
    elif not all(isinstance(ids, list) and ids and all_ids(ids) for ids in value):
        raise wrong(name, value, rule)


def inputs(value: Any, name: str, settings: Settings, route: Route) -> None:
    texts = value if isinstance(value, list) else [value]
    if not 1 <= len(texts) <= MOST_PROMPTS or not all(isinstance(text, str) and text for text in texts):
        raise wrong(name, value, f"a text, or a list of 1 to {MOST_PROMPTS} texts")


def tokens(text: str) -> int:
    return len(text) // BYTES_PER_TOKEN + 1


def tokens_of_prompt(prompt: Any) -> tuple[int, int]:
    """Number of prompts, and their tokens, estimated for texts."""
    if isinstance(prompt, str):
        return 1, tokens(prompt)
    if isinstance(prompt[0], int):
        return 1, len(prompt)
    return len(prompt), sum(tokens(one) if isinstance(one, str) else len(one) for one in prompt)


def tokens_of_messages(messages: list[dict[str, Any]]) -> int:
    """Tokens, estimated; 4 more for each message's role, and 256 for an image, as Gemma 3 has."""
    count = 0
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        count += 4 + sum(tokens(part["text"]) if "text" in part else 256 for part in parts)
    return count
