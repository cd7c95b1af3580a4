"""Samples: what a row asks of a model and what it is to answer, before a tokenizer has seen it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_ft.recipe import Thinking


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


def text_of(content: str | list[dict[str, Any]]) -> str:
    """Of a turn's content, the texts alone."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
