"""Answers from transformers: in this process, or in Ray actors on the cluster, one copy of the model on each GPU.

The same code loads a checkpoint, an export, a base model and an adapter, with every tensor accounted for. Limits: a
model has to fit one device; a batch waits for its longest answer, so vLLM is several times faster where it can be had.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ray_ft import placement
from ray_ft.answers import found
from ray_ft.answers.found import Found
from ray_ft.answers.memory import explained
from ray_ft.answers.prompt import Rendered
from ray_ft.answers.target import Answer, Prompt, Sampling
from ray_ft.data.images import BadImage, ImageReader, picture
from ray_ft.errors import ModelError, first_line
from ray_ft.model import attention, load
from ray_ft.recipe import Images

T = TypeVar("T")


class Transformers:
    """The engine; use `opened`.

    Args:
        actors: copies of the model on the connected cluster, each on a GPU or on CPUs; 0: one in this process.
    """

    name = "transformers"

    def __init__(self, what: Found, batch_size: int, device: str, actors: int) -> None:
        self.model, self.identity = what.name, what.identity
        self._what, self._batch_size = what, batch_size
        self._here = None if actors else _Answering(what, device)
        self._actors = _start(what, device, actors) if actors else []

    @property
    def special(self) -> re.Pattern[str] | None:
        return self._what.encoder.special

    def answers(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Answer]:
        smaller = f"answer fewer at once: a batch size below {self._batch_size}"
        with explained(self.model, smaller, "shorter answers"):
            yield from self._answers(prompts, sampling)

    def _answers(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Answer]:
        batches = ((batch, sampling) for batch in _batches(prompts, self._batch_size))
        if self._here is not None:
            for batch, how in batches:
                yield from self._here.answer(batch, how)
            return
        from ray.util import ActorPool

        pool = ActorPool(self._actors)
        ahead = 2 * len(self._actors)  # one batch under way and one waiting for each; ActorPool.map would read them all
        for item in batches:
            pool.submit(lambda actor, given: actor.answer.remote(*given), item)
            ahead -= 1
            if ahead < 0 and pool.has_next():
                yield from pool.get_next()
        while pool.has_next():
            yield from pool.get_next()

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._here = [], None


def _start(what: Found, device: str, actors: int) -> list[Any]:
    import ray

    cpus, gpus = (1, 1) if device == "cuda" else (placement.answering_cpus(), 0)
    made = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Answering)
    # A copy without what was looked up here: another node has its own local folders.
    return [made.remote(replace(what), device) for _ in range(actors)]


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(items)
    while batch := list(itertools.islice(stream, size)):
        yield batch


class _Answering:
    """One copy of the model on one device."""

    def __init__(self, what: Found, device: str) -> None:
        self._what, self._device = what, torch.device(device)
        self._model: Any = None
        self._processor: Any = None

    def _load(self) -> None:
        # Not when an actor is made: Ray reports an error there without its class.
        self._model = _loaded(self._what, self._device)
        self._encoder = self._what.encoder
        tokenizer = self._encoder.tokenizer
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else min(self._encoder.stops, default=0)  # hidden by the attention mask

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        if self._model is None:
            self._load()
        answers: dict[int, Answer] = {}
        asked: dict[int, Rendered] = {}
        seen = {at: prompt for at, prompt in enumerate(prompts) if prompt.has_images}
        for group in self._alike(seen):
            answers |= self._see({at: seen[at] for at in group}, sampling)
        for at, prompt in enumerate(prompts):
            if prompt.has_images:
                continue
            encoded = self._encoder.encode(prompt, sampling)
            if isinstance(encoded, Answer):
                answers[at] = encoded
            else:
                asked[at] = encoded
        if asked:
            longest = max(len(rendered.ids) for rendered in asked.values())
            ids = torch.full((len(asked), longest), self._pad)
            mask = torch.zeros_like(ids)
            for row, rendered in enumerate(asked.values()):  # on the left, so that every answer begins at one column
                ids[row, longest - len(rendered.ids) :] = torch.tensor(rendered.ids)
                mask[row, longest - len(rendered.ids) :] = 1
            most = max(rendered.room for rendered in asked.values())
            new = self._generated({"input_ids": ids, "attention_mask": mask}, most, sampling)
            for (at, rendered), row in zip(asked.items(), new, strict=True):
                answers[at] = self._encoder.answer(rendered, row)
        return [answers[at] for at in range(len(prompts))]

    @torch.inference_mode()
    def _generated(self, inputs: dict[str, Any], room: int, sampling: Sampling) -> list[list[int]]:
        from transformers import GenerationConfig

        draws: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        # Whole, not the folder's with changes: what that adds (a penalty, a top_k of 64) vLLM would not know of.
        config = GenerationConfig(
            max_new_tokens=room, eos_token_id=sorted(self._encoder.stops) or None, pad_token_id=self._pad, **draws
        )
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        output = self._model.generate(**inputs, generation_config=config)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def _alike(self, seen: dict[int, Prompt]) -> Iterable[list[int]]:
        """Prompts with images in groups that make a batch: all of Gemma 3's and 3n's, scaled to one size."""
        if self._what.config.model_type in ("gemma3", "gemma3n"):
            return [list(seen)] if seen else []
        return [[at] for at in seen]

    def _see(self, prompts: dict[int, Prompt], sampling: Sampling) -> dict[int, Answer]:
        """Answers to prompts with images, by the number of the prompt."""
        if self._processor is None:
            self._processor = _processor(self._what)
        messages = {}
        answers: dict[int, Answer] = {}
        for at, prompt in prompts.items():
            assert prompt.messages is not None
            try:
                messages[at] = [{**message, "content": _parts(message["content"])} for message in prompt.messages]
            except BadImage as bad:
                answers[at] = Answer.failed(f"{bad.reason}: {bad.detail}" if bad.detail else bad.reason)
        if not messages:
            return answers
        inputs = self._processor.apply_chat_template(
            list(messages.values()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )  # fmt: skip
        # On the left, so that every answer begins at one column.
        real = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        asked = {at: self._encoder.fit(ids, sampling) for at, ids in zip(messages, real, strict=True)}
        if short := {at: one for at, one in asked.items() if isinstance(one, Answer)}:  # too long: the others anew
            return answers | short | self._see({at: prompts[at] for at in asked.keys() - short.keys()}, sampling)
        rendered = {at: one for at, one in asked.items() if isinstance(one, Rendered)}
        inputs = {
            name: value.to(self._model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        new = self._generated(inputs, max(one.room for one in rendered.values()), sampling)
        for (at, one), row in zip(rendered.items(), new, strict=True):
            answers[at] = self._encoder.answer(one, row)
        return answers


def _loaded(what: Found, device: torch.device) -> Any:
    """The model on its device, in the precision that it is stored in; float16 is widened, as Gemma overflows in it."""
    cuda = device.type == "cuda"
    if (trained := what.trained) is not None:
        lowered = trained.recipe.model.dtype == "bfloat16" or (cuda and trained.recipe.model.dtype == "auto")
        return trained.model(device, torch.bfloat16 if lowered else torch.float32)
    dtype = load.stored_dtype(what.config)
    if dtype not in (torch.float32, torch.bfloat16):
        dtype = torch.bfloat16 if cuda else torch.float32
    chosen = attention.choose("auto", device.type, what.config, dtype)
    model = load.build(what.config, chosen.implementation, dtype)
    load.allocate(model, device)
    load.fill(model, what.folder, load.whole_spans(model))
    if what.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, found.local_folder(what.adapter))
    return model.eval()


def _processor(what: Found) -> Any:
    """What turns images and text into the model's inputs.

    Raises:
        ModelError: the model sees nothing, or its folder lacks the processor's settings.
    """
    if getattr(what.config, "vision_config", None) is None:
        raise ModelError(
            f"{what.name} does not see: its model_type {what.config.model_type!r} has no vision tower",
            ["ask without an image", "name a model that sees, such as google/gemma-3-4b-it"],
        )
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(what.folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _no_processor(what, first_line(error)) from error
    if getattr(processor, "image_processor", None) is None:
        raise _no_processor(what, "its processor is for text alone")
    return processor


def _no_processor(what: Found, why: str) -> ModelError:
    needed = "preprocessor_config.json and processor_config.json"
    return ModelError(
        f"{what.folder} cannot prepare images: {why}", [f"copy {needed} of the published model into the folder"]
    )


def _parts(content: Any) -> list[dict[str, Any]]:
    """OpenAI's parts as transformers' processors want them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "image", "image": _image(part["image_url"]["url"])} if part["type"] == "image_url" else part
        for part in content
    ]


def _image(url: str) -> Any:
    """The image in a data: URL, as training shows it; nothing is fetched.

    Raises:
        BadImage: it is none.
    """
    if not url.startswith("data:"):
        raise BadImage("image is not in a data: URL", f"{url[:80]!r}; nothing is fetched from addresses")
    return picture(ImageReader("", Images()).read(url))
