"""One prompt, one answer, on the terminal: text, or JSON for programs."""

from __future__ import annotations

import base64
import json
import mimetypes
import time
from typing import Any

from ray_ft import answers, paths
from ray_ft.answers import Answer, EngineName, Prompt, Sampling, Target
from ray_ft.errors import DataError, first_line

#: What image readers and OpenAI's API both take.
IMAGES = ("image/png", "image/jpeg", "image/webp", "image/gif")
MAX_IMAGE_BYTES = 20 << 20


def chat(
    target: Target,
    text: str,
    *,
    system: str | None = None,
    image: str | None = None,
    sampling: Sampling | None = None,
    engine: EngineName = "auto",
    device: str = "auto",
    raw: bool = False,
    as_json: bool = False,
) -> Answer:
    """Ask once, and print the answer.

    Args:
        system: instructions that stand before the prompt.
        image: file or URI of an image that the prompt is about, where the model sees; it is embedded in the request.
        raw: give the text to the model as it is, without its chat template.
        as_json: print one JSON object: model, answer, finish_reason, usage, seconds.

    Raises:
        DataError: the image cannot be read, the options exclude each other, or there is no answer to this prompt.
        RayFtError: the target does not answer.
    """
    prompt = _prompt(text, system, image, raw)
    if engine == "auto" and target.kind != "endpoint":
        engine = "transformers"  # vLLM takes a minute or more to start, which one answer does not earn back
    with answers.opened(target, engine, batch_size=1, device=device, gpus=0 if engine == "vllm" else 1) as asked:
        began = time.monotonic()
        answer = next(iter(asked.answers([prompt], sampling or Sampling())))
        seconds, model = time.monotonic() - began, asked.model
    if answer.error:
        raise DataError(
            f"no answer: {answer.error}",
            ["change what was refused: a shorter text, no image, or --raw where the chat template refuses"],
        )
    print(json.dumps(_described(model, answer, seconds), ensure_ascii=False, indent=2) if as_json else answer.text)
    return answer


def _prompt(text: str, system: str | None, image: str | None, raw: bool) -> Prompt:
    if not text.strip():
        raise DataError("the prompt is empty", ["give a text to be answered"])
    if raw:
        if system is not None or image is not None:
            raise DataError(
                "a raw prompt is the text alone: a system text or an image needs the chat template",
                ["leave out --raw", "leave out --system and --image"],
            )
        return Prompt(text=text)
    content: Any = text
    if image is not None:
        content = [{"type": "image_url", "image_url": {"url": _data_url(image)}}, {"type": "text", "text": text}]
    before = [] if system is None else [{"role": "system", "content": system}]
    return Prompt(messages=[*before, {"role": "user", "content": content}])


def _data_url(image: str) -> str:
    if image.lower().startswith(("http://", "https://")):
        raise DataError(f"the image {image!r} is an address, and nothing is fetched from there", ["save it as a file"])
    kind = mimetypes.guess_type(paths.base_name(image))[0]
    if kind not in IMAGES:
        raise DataError(f"the image {image!r} is of no known kind", ["name a .png, .jpg, .webp or .gif file"])
    try:
        content = paths.read_bytes(image)
    except OSError as error:
        raise DataError(f"the image {image!r} cannot be read: {first_line(error)}", ["check the path"]) from error
    if len(content) > MAX_IMAGE_BYTES:
        raise DataError(
            f"the image {image!r} has {len(content)} bytes, over {MAX_IMAGE_BYTES >> 20} MiB",
            ["scale it down: models look at some 900 × 900 pixels"],
        )
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _described(model: str, answer: Answer, seconds: float) -> dict[str, Any]:
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }
    return {
        "model": model,
        "answer": answer.text,
        "finish_reason": answer.finish,
        "usage": usage,
        "seconds": round(seconds, 3),
    }
