"""What is asked: a run, a model folder, or an OpenAI-compatible endpoint; and its answers' plain types.

Nothing here imports torch or ray, so that a command line can be checked before either is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from ray_ft import artifacts, paths
from ray_ft.errors import ModelError, RayFtError, ServeError, StorageError

EngineName = Literal["auto", "vllm", "transformers"]
KEY_VARIABLE = "RAY_FT_API_KEY"

#: What makes a folder one of a model, and what one of an adapter alone (PEFT's format).
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # organisation/model
WAYS = (
    "a run directory, as `ray-ft train` printed it: <run.storage>/<run.name>",
    "a model: a folder or URI that holds config.json, or a hub id such as google/gemma-3-1b-it",
    "an endpoint that speaks OpenAI's API: http://127.0.0.1:8000",
)


@dataclass(frozen=True)
class Target:
    """What is asked.

    Attributes:
        kind: a run of ours (a sweep's best trial's, where a sweep is named), a Hugging Face folder, or an
            OpenAI-compatible server.
        location: the run directory; the folder, URI or hub id; the base URL, which ends in /v1.
        model: of an endpoint, the name to ask for; None: the only one that it lists.
        api_key_env: of an endpoint, the environment variable that holds the key; the key itself is in no argument.
    """

    kind: Literal["run", "folder", "endpoint"]
    location: str
    model: str | None = None
    api_key_env: str = KEY_VARIABLE

    @classmethod
    def of(cls, text: str, model: str | None = None) -> Target:
        """Tell what a text names.

        Raises:
            CheckpointError: it names a sweep of which no trial has reported yet.
            ModelError: it names none of the three.
            ServeError: a URL that cannot be used.
        """
        if text.lower().startswith(("http://", "https://")):
            return cls("endpoint", _base_url(text), model)
        if model is not None:
            raise ModelError(
                f"a model name ({model!r}) is for endpoints, and {text!r} is none",
                ["leave it out", "name the endpoint by its URL: http://HOST:PORT"],
            )
        if not paths.is_uri(text) and not os.path.exists(paths.absolute(text)):
            if _HUB_ID.fullmatch(text):
                return cls("folder", text)
            raise _nothing(text, "there is no such folder")
        location = paths.absolute(text)
        try:
            names = set(paths.list_dir(location))
        except (OSError, ValueError, StorageError) as error:
            raise _nothing(text, f"it cannot be listed: {str(error).splitlines()[0]}") from error
        if "recipe.yaml" in names:
            return cls("run", artifacts.run_of(location))
        if names & {CONFIG, ADAPTER_CONFIG}:
            return cls("folder", location)
        raise _nothing(text, f"it holds neither recipe.yaml nor {CONFIG}" if names else "it is empty or not there")


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    if not parts.hostname or parts.query or parts.fragment:
        raise ServeError(f"{text!r} is no base URL", ["write http://HOST:PORT, with or without /v1"])
    if parts.username or parts.password:
        raise ServeError(
            "the endpoint's URL holds a user name or password, which logs and reports would show",
            [f"put the key into the environment variable {KEY_VARIABLE}, and leave it out of the URL"],
        )
    path = parts.path.rstrip("/")
    return f"{parts.scheme.lower()}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _nothing(text: str, why: str) -> RayFtError:
    return ModelError(f"{text!r} is nothing that can be asked: {why}", [f"name {way}" for way in WAYS])


@dataclass(frozen=True)
class Prompt:
    """One of the two.

    Attributes:
        messages: a conversation in OpenAI's form ({"role", "content"}), to be rendered with the model's own chat
            template. Content may be a list of parts ({"type": "text", "text"}, {"type": "image_url", "image_url":
            {"url": "data:…"}}) where the model sees.
        text: a prompt as it is; only the begin-of-text token is set before it, as in training.
    """

    messages: list[dict[str, Any]] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("a prompt has either messages or text")

    @property
    def has_images(self) -> bool:
        contents = [message.get("content") for message in self.messages or ()]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return any(part.get("type") == "image_url" for part in parts)


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: without special tokens; empty where there is an error.
        finish: "stop", "length" or "error"; an endpoint may have further reasons.
        prompt_tokens: tokens of the prompt; 0 where they were not counted.
        tokens: tokens generated, the one that ended the answer included.
        error: why there is no answer.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    error: str | None = None

    @classmethod
    def failed(cls, error: str, prompt_tokens: int = 0) -> Answer:
        return cls("", "error", prompt_tokens, 0, error)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; greedily by default.

    Attributes:
        max_new_tokens: longest answer; shorter where the model's context ends before.
        temperature: 0: always the likeliest token.
        top_p: share of the probability that is drawn from.
        seed: of the draws; None: another each time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ModelError(
                f"max_new_tokens = {self.max_new_tokens}, temperature = {self.temperature:g}, top_p = {self.top_p:g} "
                "cannot be sampled with",
                ["max_new_tokens from 1, temperature from 0, top_p above 0 and at most 1"],
            )


class Engine(Protocol):
    """What answers prompts.

    Attributes:
        name: "vllm", "transformers" or "endpoint".
        model: what answers, for people.
        identity: what tells this model from another one or an older state of it; JSON.
        special: finds the text of the model's special tokens; None where they are not known.
    """

    name: str
    model: str
    identity: dict[str, Any]

    @property
    def special(self) -> re.Pattern[str] | None: ...

    def answers(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """One answer per prompt, in order, while prompts are still being read.

        A prompt that cannot be answered (too long, refused by the template) is an `Answer` with an error.
        """
        ...
