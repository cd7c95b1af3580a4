"""Prompts to token ids, exactly as training renders what stands before an answer; and token ids back to text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_ft.answers.target import Answer, Prompt, Sampling
from ray_ft.data.render import Renderer
from ray_ft.data.samples import Conversation
from ray_ft.data.template import TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """Token ids of one prompt and how many tokens its answer may have."""

    ids: list[int]
    room: int


@dataclass
class Encoder:
    """One model's prompts.

    Args:
        tokenizer: the model's fast one.
        context: longest prompt plus answer, in tokens.
        listed_stops: tokens that the model's generation_config.json lists as ends of an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    listed_stops: Sequence[int] = ()
    stops: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self._renderer = Renderer(self.tokenizer)
        self.stops = frozenset(self.listed_stops) | frozenset(self._renderer.stop_ids())

    @property
    def special(self) -> re.Pattern[str] | None:
        return self._renderer.special

    def text(self, prompt: Prompt) -> str:
        """The prompt as text, special tokens included; a prompt that is text already may lack its <bos>."""
        if prompt.text is not None:
            return prompt.text
        assert prompt.messages is not None
        turns = [{**message, "content": joined(message.get("content"))} for message in prompt.messages]
        # The turn that would be trained stands last in a conversation; it is not rendered.
        return self._renderer.prompt_text(Conversation((*turns, {"role": "assistant", "content": ""})))

    def encode(self, prompt: Prompt, sampling: Sampling) -> Rendered | Answer:
        """Token ids, or the answer that says why there can be none."""
        try:
            text = self.text(prompt)
        except TemplateRefusal as refusal:
            return Answer.failed(f"refused by the chat template: {refusal}")
        # Rendered text holds its special tokens; plain text begins with <bos>, once, as in training.
        ids = list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        bos = self.tokenizer.bos_token_id
        if prompt.text is not None and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return self.fit(ids, sampling)

    def fit(self, ids: list[int], sampling: Sampling) -> Rendered | Answer:
        if not ids:
            return Answer.failed("the prompt is empty")
        if len(ids) >= self.context:
            return Answer.failed(
                f"the prompt has {len(ids)} tokens, which leaves no room in a context of {self.context}", len(ids)
            )
        return Rendered(ids, min(sampling.max_new_tokens, self.context - len(ids)))

    def answer(self, rendered: Rendered, new: Sequence[int]) -> Answer:
        """The answer in generated tokens, of which those behind its end or beyond its room are no part."""
        ids = list(new[: rendered.room])
        end = next((at for at, token in enumerate(ids) if token in self.stops), None)
        if end is not None:
            ids = ids[: end + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(text, "length" if end is None else "stop", len(rendered.ids), len(ids))


def joined(content: Any) -> str:
    """The text of a message's content; of parts, their texts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content
