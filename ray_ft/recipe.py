"""The recipe: every setting, typed and checked once, in one place.

Relative paths start at the folder the command runs in and are made absolute here, because workers run elsewhere.

A recipe is a YAML file; any key can be overridden as ``key.path=value``. Everything downstream receives these objects,
never dictionaries. Nothing here imports torch or ray.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ray_ft import paths
from ray_ft.errors import RecipeError


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot be changed after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------------------------- run


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run: its directory is <storage>/<name>, and training again under the same name resumes it."""
    storage: str = "runs"
    """Folder or URI (s3://…, gs://…) that holds run directories; every node must reach it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order of samples and of any random initialisation."""

    @field_validator("storage")
    @classmethod
    def _absolute(cls, storage: str) -> str:
        return paths.absolute(storage)

    @property
    def dir(self) -> paths.RunDir:
        return paths.RunDir(paths.join(self.storage, self.name))


class Model(Section):
    path: str
    """Hugging Face model: a local folder, a URI, or a hub id such as google/gemma-3-1b-it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; auto: bfloat16 on GPU, float32 on CPU. Trained weights are kept in float32."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation; auto: sdpa, which keeps packed documents apart on every device."""
    freeze: list[str] = []
    """Patterns (*, ?) of parameter names that are not trained, such as "*embed_tokens*"."""

    @field_validator("path")
    @classmethod
    def _absolute_folder(cls, path: str) -> str:
        local = paths.absolute(path)  # a hub id looks like a relative path; only a folder that is there is one
        return local if os.path.isdir(local) else path


# ------------------------------------------------------------------------------------------------------------ data


class Source(Section):
    path: str | list[str]
    """Files, folders, globs or URIs; JSONL (.jsonl .json .ndjson, also .gz .zst) or .parquet."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | list[str]) -> list[str]:
        return [paths.absolute(one) for one in ([path] if isinstance(path, str) else path)]


class MessagesSource(Source):
    """Conversations: a list of {role, content}; every assistant turn is trained."""

    format: Literal["messages"]
    field: str = "messages"
    """Column with the list of messages."""


class PromptCompletionSource(Source):
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


class TemplateSource(Source):
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


AnySource = Annotated[
    MessagesSource | PromptCompletionSource | TranslationSource | TextSource | TemplateSource,
    Field(discriminator="format"),
]


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


# ----------------------------------------------------------------------------------------------------------- train


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    name: Literal["adamw", "adafactor"] = "adamw"
    """AdamW (decoupled weight decay) or Adafactor (factored second moments)."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to biases, norms and embeddings."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's term added to the denominator."""


class Schedule(Section):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate that the decay ends at, as a share of the peak."""


class Checkpoint(Section):
    every: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Committed checkpoints that are kept."""


class Train(Section):
    strategy: Literal["fsdp", "none"] = "fsdp"
    """fsdp: parameters, gradients and optimizer sharded over the workers (FSDP2); none: replicated on each."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Ray Train workers, one device each; 0: in this process, without Ray and without sharding, for a debugger."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that each worker reserves; also its number of compute threads on CPU."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps to train, in place of epochs."""
    global_batch: Annotated[int, Field(ge=1)] = 16
    """Rows of seq_len tokens in one optimizer step, over all workers."""
    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Rows in one forward pass on one worker."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    loss_chunk: Annotated[int, Field(ge=1)] = 1024
    """Target tokens whose logits exist at once; the rest of the vocabulary × sequence never materialises."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations of the loss on data.eval; null: only after the last step."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint: Checkpoint = Checkpoint()

    @property
    def world_size(self) -> int:
        return max(self.workers, 1)

    @property
    def accumulation(self) -> int:
        """Forward passes of one worker per optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    @property
    def rows_per_worker(self) -> int:
        """Rows of one worker per optimizer step."""
        return self.global_batch // self.world_size

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        unit = self.micro_batch * self.world_size
        if self.global_batch % unit:
            below, above = self.global_batch // unit * unit, -(-self.global_batch // unit) * unit
            per_worker = self.global_batch // self.world_size if self.global_batch % self.world_size == 0 else 0
            micro = [m for m in range(1, per_worker + 1) if per_worker % m == 0]
            nearest = " or ".join(str(v) for v in (below, above) if v)
            ways = f"nearest valid global_batch: {nearest}"
            if micro:
                ways += f"; or keep it with micro_batch: {min(micro, key=lambda m: abs(m - self.micro_batch))}"
            raise ValueError(
                f"accumulation = global_batch ÷ (micro_batch × workers) = {self.global_batch} ÷ "
                f"({self.micro_batch} × {self.world_size}) is not a whole number; {ways}"
            )
        return self


class Evaluate(Section):
    max_rows: Annotated[int, Field(ge=1)] = 200
    """Held-out rows that are answered and scored; the loss is always over all of them."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows answered at once."""


class Serve(Section):
    model_name: str | None = None
    """Name under which clients ask for the model; null: the run's name."""
    host: str = "127.0.0.1"
    """Address to listen on; the default reaches only this machine."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """HTTP port."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer, in tokens; null: the model's limit, at most 8192."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Requests that one replica works on at once."""
    gpus_per_replica: Annotated[int, Field(ge=1)] = 1
    """GPUs over which one replica is split (tensor parallel); of no effect on CPU."""


class Recipe(Section):
    run: Run
    model: Model
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def sha256(self) -> str:
        """Identity of all settings, independent of how the file was written."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def save(self) -> None:
        """Write the resolved recipe into the run directory."""
        paths.write_text(self.run.dir.recipe, f"# resolved by ray-ft; sha256 {self.sha256}\n{self.to_yaml()}")


# --------------------------------------------------------------------------------------------------------- loading


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``key.path=value`` overrides.

    Args:
        path: a YAML file (a path or URI).
        overrides: each ``key.path=value``; the value is read as YAML. List items by index: ``data.train.0.path=…``.

    Raises:
        RecipeError: with every fault found, not only the first.
    """
    if not paths.exists(path):
        raise RecipeError(f"no recipe at {path!r}", _nearby_recipes(path))
    try:
        content = yaml.load(paths.read_text(path), _Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}", ["give the path of a YAML file in UTF-8"]) from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{path} is not valid YAML: {error}", ["indent with spaces; quote values that hold ': '"]
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds {type(content).__name__}, not sections", ["begin with run:, model:, data:"])
    for override in overrides:
        _apply(content, override)
    return parse(content, where=path)


def parse(content: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Check a dictionary; `where` names its origin in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        faults = [_fault(item) for item in error.errors()]
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise RecipeError(f"{count} in {where}", faults) from error


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for completion in editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


class _Loader(yaml.SafeLoader):
    """YAML as it should be: a key that stands twice is an error, and 1e-4 is a number (YAML 1.1 wants 1.0e-4)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _apply(content: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"override {override!r} is not of the form key.path=value", ["for example train.workers=4"])
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of override {override!r} is not valid YAML: {error}", ["quote it"]) from error
    *parents, last = key.split(".")
    node: Any = content
    for depth, part in enumerate(parents):
        try:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        except (ValueError, IndexError):
            node = None
        if not isinstance(node, dict | list):
            at = ".".join(parents[: depth + 1])
            raise RecipeError(f"override {override!r}: {at} is not a section of the recipe", ["check the key's path"])
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise RecipeError(
                f"override {override!r}: {'.'.join(parents)} is a list of {len(node)}",
                [f"use an index 0…{len(node) - 1}"],
            )
        node[int(last)] = value
    else:
        node[last] = value


def _fault(item: Any) -> str:
    """One line of an error: the key, what is wrong, the value, the ways out."""
    formats = [get_args(source.model_fields["format"].annotation)[0] for source in get_args(get_args(AnySource)[0])]
    # pydantic puts the chosen format into the location, right behind the source's index.
    parts = item["loc"]
    location = [str(p) for at, p in enumerate(parts) if not (at and isinstance(parts[at - 1], int) and p in formats)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = sorted(_keys(Recipe, item["loc"][:-1]))
        elsewhere = [path for path in _all_keys(Recipe) if path.split(".")[-1] == location[-1]]
        near = elsewhere or difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{key}: missing"
    if item["type"] == "union_tag_not_found":
        return f"{key}: no format; one of {', '.join(formats)}"
    if item["type"] == "union_tag_invalid":
        near = difflib.get_close_matches(str(item["ctx"]["tag"]), formats, n=1, cutoff=0.3)
        return f"{key}.format: {item['ctx']['tag']!r} is unknown; one of {', '.join(formats)}" + (
            f"; did you mean {near[0]!r}?" if near else ""
        )
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if item["type"] == "value_error" else f"{key} = {item['input']!r}: {message}"


def _sections(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (list, Union, UnionType, Annotated):
        for inner in get_args(annotation):
            yield from _sections(inner)


def _keys(section: type[Section], location: Sequence[int | str]) -> set[str]:
    """Known keys of the section at `location`."""
    candidates: list[type[Section]] = [section]
    for part in location:
        if isinstance(part, int):
            continue
        tagged = [
            c
            for c in candidates
            if "format" in c.model_fields and part in get_args(c.model_fields["format"].annotation)
        ]
        candidates = tagged or [
            inner for c in candidates if part in c.model_fields for inner in _sections(c.model_fields[part].annotation)
        ]
    return {name for candidate in candidates for name in candidate.model_fields}


def _all_keys(section: type[Section], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _nearby_recipes(path: str) -> list[str]:
    folder = os.path.dirname(path) or "."
    found = sorted(
        name for name in (os.listdir(folder) if os.path.isdir(folder) else []) if name.endswith((".yaml", ".yml"))
    )
    near = difflib.get_close_matches(os.path.basename(path), found, n=3, cutoff=0.4) or found[:3]
    return [f"there is {os.path.join(folder, name)}" for name in near] or ["give the path of a YAML file"]
