"""Rows and how they become batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ray_ft import paths
from ray_ft.recipe.section import Section


class Source(Section):
    path: str | list[str]
    """Files, folders, globs or URIs; JSONL (.jsonl .json .ndjson, also .gz .zst) or .parquet."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Passes over this source in one epoch: 2 uses each row twice, 0.5 half of the rows, the next epoch the others."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | list[str]) -> list[str]:
        return [paths.absolute(one) for one in ([path] if isinstance(path, str) else path)]


class Thinking(Section):
    """Answers that think first: how the thinking is marked, and whether it is trained."""

    open: str = "<think>"
    """What the thinking begins with."""
    close: str = "</think>"
    """What the thinking ends with; what follows is what the answer says."""
    train: bool = True
    """Train the thinking like the rest; false: it is read, and neither it nor its tags are targets of the loss."""

    @model_validator(mode="after")
    def _tell_apart(self) -> Thinking:
        for name in ("open", "close"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is {getattr(self, name)!r}, which is in any text; name a tag such as <think>")
        if self.open in self.close or self.close in self.open:
            raise ValueError(
                f"open {self.open!r} and close {self.close!r} cannot be told apart, as one holds the other; name others"
            )
        return self


class AnswerSource(Source):
    """Whose answers are texts of the rows' own."""

    thinking: Thinking | None = None
    """Answers may think first, between tags: rows are checked for it, and scores are of what follows; {} has the usual
    tags. null: tags are text like any other."""


class MessagesSource(AnswerSource):
    """Conversations: a list of {role, content}; every assistant turn is trained."""

    format: Literal["messages"]
    field: str = "messages"
    """Column with the list of messages."""


class PromptCompletionSource(AnswerSource):
    """Two columns: what is asked and what is answered."""

    format: Literal["prompt_completion"]
    prompt_field: str = "prompt"
    """Column with the prompt."""
    completion_field: str = "completion"
    """Column with the answer."""
    chat: bool = True
    """Wrap both in the model's chat template; false: prompt and answer are simply joined."""


class TranslationSource(Source):
    """Parallel text with language codes."""

    format: Literal["translation"]
    prompt: str = (
        "You are a professional {source_lang} ({src_lang_code}) to {target_lang} ({tgt_lang_code}) translator. "
        "Translate the following text and answer with the translation only.\n\n{text}"
    )
    """Prompt template; may use {source_lang} {src_lang_code} {target_lang} {tgt_lang_code} {text}."""
    source_field: str = "source_text"
    """Column with the text to translate."""
    target_field: str = "target_text"
    """Column with the translation."""
    source_lang_code: str | None = None
    """Source language of all rows (en, pt-BR, zh_Hans …); null: read from source_lang_code_field."""
    target_lang_code: str | None = None
    """Target language of all rows; null: read from target_lang_code_field."""
    source_lang_code_field: str = "source_lang_code"
    """Column with each row's source language code."""
    target_lang_code_field: str = "target_lang_code"
    """Column with each row's target language code."""
    source_lang_name: str = "auto"
    """Name of the source language in the prompt; auto: from its code."""
    target_lang_name: str = "auto"
    """Name of the target language in the prompt; auto: from its code."""

    @field_validator("prompt")
    @classmethod
    def _known_fields(cls, prompt: str) -> str:
        known = {"source_lang", "src_lang_code", "target_lang", "tgt_lang_code", "text"}
        used = template_fields(prompt)
        if unknown := used - known:
            raise ValueError(
                f"unknown field {sorted(unknown)} in the prompt; a translation prompt may use {sorted(known)}"
            )
        if "text" not in used:
            raise ValueError("the prompt never uses {text}, so the model would not see what to translate")
        return prompt


class TextSource(Source):
    """Plain text: every token is trained."""

    format: Literal["text"]
    field: str = "text"
    """Column with the text."""


class TemplateSource(AnswerSource):
    """Prompt and answer built from any named columns."""

    format: Literal["template"]
    prompt: str
    """Prompt template over the row's columns: "Question: {question}"."""
    completion: str
    """Answer template over the row's columns: "<think>{reasoning}</think>{answer}"."""
    chat: bool = True
    """Wrap both in the model's chat template; false: prompt and answer are simply joined."""

    @field_validator("prompt", "completion")
    @classmethod
    def _parses(cls, template: str) -> str:
        template_fields(template)
        return template


class LabelsSource(Source):
    """Texts to be classified: each row's text and which of model.labels it has."""

    format: Literal["labels"]
    field: str = "text"
    """Column with the text; the model reads it as it is, without a chat template."""
    label_field: str = "label"
    """Column with the label: its name, or its number from 0 in the order of model.labels."""


class PreferenceSource(Source):
    """Two answers to one prompt, the first preferred: what preference tuning (train.preference) learns from.

    Prompt and answers are strings or lists of messages. Answers that are whole conversations, with the prompt at their
    beginning, are taken apart where they begin to differ.
    """

    format: Literal["preference"]
    prompt_field: str | None = "prompt"
    """Column with the prompt; null: none, both answers are whole conversations that begin alike."""
    chosen_field: str = "chosen"
    """Column with the preferred answer."""
    rejected_field: str = "rejected"
    """Column with the other answer."""
    chat: bool = True
    """Wrap strings in the model's chat template; false: prompt and answer are strings, and simply joined."""

    @model_validator(mode="after")
    def _prompt_or_conversations(self) -> PreferenceSource:
        if self.prompt_field is None and not self.chat:
            raise ValueError(
                "chat: false joins the strings of prompt and answer, and prompt_field: null names no prompt; name its "
                "column, or set chat: true for answers that are lists of messages"
            )
        return self


class ImageQuestionSource(AnswerSource):
    """A picture, a question about it, and the answer."""

    format: Literal["image_question"]
    image_field: str = "image"
    """Column with the image: a path, a data: URL, an address on an allowed host, or its bytes."""
    question_field: str = "question"
    """Column with the question."""
    answer_field: str = "answer"
    """Column with the answer."""


AnySource = Annotated[
    MessagesSource
    | PromptCompletionSource
    | TranslationSource
    | TextSource
    | TemplateSource
    | LabelsSource
    | PreferenceSource
    | ImageQuestionSource,
    Field(discriminator="format"),
]


#: What a model is trained for; a recipe's follows from the formats of its sources.
Task = Literal["language", "labels", "preference"]

TASKS: dict[type[Source], Task] = {LabelsSource: "labels", PreferenceSource: "preference"}
"""Of the formats that are for another task than language."""


def template_fields(template: str) -> set[str]:
    """Names of the fields in a ``{name}`` template; literal braces are written twice.

    Raises:
        ValueError: the template does not parse, or has positional, indexed or formatted fields.
    """
    import string

    fields = set()
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"field {{{name}}} is not a plain name; write literal braces as {{{{ and }}}}")
        fields.add(name)
    return fields


class Images(Section):
    """Which images rows may bring."""

    hosts: list[Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]] = []
    """Hosts that images are fetched from by https when the data is prepared, such as images.example.org; of none by
    default: what a row names is fetched by your machines, in your network."""
    max_bytes: Annotated[int, Field(ge=1)] = 20 << 20
    """Largest image, as it is stored."""
    max_pixels: Annotated[int, Field(ge=1)] = 40_000_000
    """Width × height of the largest: a few KB may unpack to gigabytes."""


class Data(Section):
    train: Annotated[list[AnySource], Field(min_length=1)]
    """Sources to train on."""
    eval: list[AnySource] = []
    """Held-out sources: evaluation loss during training, and `ray-ft evaluate`."""
    seq_len: Annotated[int, Field(ge=8)] = 1024
    """Tokens in one row of a batch."""
    packing: bool = True
    """Put several samples into one row, none seeing another; false: one sample a row."""
    long_rows: Literal["drop", "truncate"] = "drop"
    """What becomes of a sample longer than seq_len; counted either way."""
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of faulty rows above which the run is refused; rows that are merely too long do not count."""
    shuffle: bool = True
    """Shuffle rows anew in each epoch; false: rows in the order in which they were prepared."""
    shuffle_window: Annotated[int, Field(ge=1)] = 8_000_000
    """Tokens that are shuffled among each other (and held in memory, 5 bytes each, by one reading task)."""
    cache: Literal["auto", "off"] = "auto"
    """Keep the tokens of training rows in run.storage; off: keep an index, and tokenize each time rows are read."""
    images: Images | None = None
    """Train on the images in the rows too, where the model sees; {} takes the defaults; null: rows with any are
    rejected."""
    ledger: bool = False
    """Record which samples each step used, as file:line, in the run directory."""

    @property
    def chat(self) -> bool:
        """Whether any source is trained in the model's chat template."""
        return any(getattr(source, "chat", source.format != "text") for source in self.train)

    @property
    def task(self) -> Task:
        """What the sources are for; all of them for the same."""
        return TASKS.get(type(self.train[0]), "language")

    @model_validator(mode="after")
    def _one_task(self) -> Data:
        for split in ("train", "eval"):
            for at, source in enumerate(getattr(self, split)):
                if (task := TASKS.get(type(source), "language")) != self.task:
                    raise ValueError(
                        f"{split}.{at} has format {source.format}, which trains for {task}, and train.0 has format "
                        f"{self.train[0].format}, which trains for {self.task}; one run trains for one of them: put "
                        "the source into a recipe of its own"
                    )
        return self

    @model_validator(mode="after")
    def _pairs_are_whole(self) -> Data:
        if self.task == "preference" and self.long_rows == "truncate":
            raise ValueError(
                "long_rows: truncate would compare answers of which one is cut, and format preference compares whole "
                "ones; set long_rows: drop, and raise seq_len for longer pairs"
            )
        return self

    @model_validator(mode="after")
    def _images_are_kept(self) -> Data:
        if self.images is None:
            for split in ("train", "eval"):
                for at, source in enumerate(getattr(self, split)):
                    if isinstance(source, ImageQuestionSource):
                        raise ValueError(
                            f"{split}.{at} has format {source.format}, and images: null rejects every row with an "
                            "image; set data.images={}, or choose another format"
                        )
        elif self.task != "language":
            raise ValueError(
                f"images is for rows that are answered, and train.0 has format {self.train[0].format}, whose rows are "
                "text alone; remove images, or set format: messages or image_question"
            )
        elif self.cache == "off":
            raise ValueError(
                "cache: off would fetch and check every image again each time its row is read, and another image may "
                "lie under its name by then; remove cache, or set images: null"
            )
        return self

    @field_validator("cache", mode="before")
    @classmethod
    def _unquoted(cls, value: object) -> object:
        return "off" if value is False else value  # YAML takes a bare off for false

    @field_validator("eval")
    @classmethod
    def _used_once(cls, sources: list[AnySource]) -> list[AnySource]:
        if weighted := [at for at, source in enumerate(sources) if source.weight != 1]:
            raise ValueError(f"source {weighted[0]} has a weight, but a held-out row is used once; remove its weight")
        return sources
