"""What a model's processor makes of images: the tokens that stand for one, and the values that its tower is given.

The processor's settings are those in the model's folder; images are scaled by PIL, which every machine has and which
gives the same values on all of them. Limits: Gemma 3 and 3n, each of whose images is a fixed number of tokens; no pan
and scan; no audio.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ft import paths
from ray_ft.data.images import picture
from ray_ft.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: model_type → what config.json calls the number of tokens that an image takes.
LENGTHS = {"gemma3": "mm_tokens_per_image", "gemma3n": "vision_soft_tokens_per_image"}
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Vision:
    """
    Attributes:
        mark: what the chat template writes for an image.
        tokens: what stands in its place, as text: begin, soft tokens and end.
        token_id: of a soft token, in whose place the image's embeddings are put.
        processor: transformers' image processor.
    """

    mark: str
    tokens: str
    token_id: int
    processor: Any

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the tower is given."""
        size = self.processor.size
        return 3, size["height"], size["width"]

    def pixels(self, files: Sequence[bytes]) -> np.ndarray:
        """float32 [images, channels, height, width] of checked image files."""
        if not files:
            return np.zeros((0, *self.shape), np.float32)
        made = self.processor([picture(file) for file in files], return_tensors="np")
        return np.asarray(made["pixel_values"], np.float32)

    def identity(self) -> dict[str, Any]:
        """What prepared rows, and what is made of them, depend on."""
        return {"tokens": self.tokens, "processor": {key: _plain(v) for key, v in self.processor.to_dict().items()}}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | type(None)) else repr(value)


@lru_cache(maxsize=4)
def load_vision(folder: str, tokenizer: PreTrainedTokenizerBase) -> Vision:
    """Of a local model folder and its tokenizer, kept per process.

    Raises:
        ModelError: the model sees nothing, is of another family, or its processor's settings are not there.
    """
    config = _settings(folder, "config.json")
    if (kind := config.get("model_type")) not in LENGTHS:
        raise ModelError(
            f"images are trained on with Gemma 3's and 3n's vision-language models, and {folder!r} is a {kind!r}",
            ["name one, such as google/gemma-3-4b-it", "data.images=null, to train on text"],
        )
    kept = _settings(folder, PROCESSOR)
    own = kept.get("image_processor") or _settings(folder, PREPROCESSOR)
    wanted = ["boi_token", "eoi_token", "image_token"]
    wanted += ["boa_token", "eoa_token", "audio_token"] if kind == "gemma3n" else []
    if not own or any(getattr(tokenizer, name, None) is None for name in wanted):
        raise ModelError(
            f"{folder!r} cannot prepare images: it lacks "
            + (f"{PROCESSOR} or {PREPROCESSOR}" if not own else f"the tokenizer's {', '.join(wanted)}"),
            [f"copy {PROCESSOR}, {PREPROCESSOR} and tokenizer_config.json of the published model into the folder"],
        )
    if own.get("do_pan_and_scan"):
        raise ModelError(
            f"{folder!r} cuts images into several (do_pan_and_scan), which is not done in training here",
            [f"set do_pan_and_scan to false in its {PREPROCESSOR}"],
        )
    try:
        length = int(kept.get("image_seq_length") or config.get(LENGTHS[kind]) or 256)
        both = (_gemma3n if kind == "gemma3n" else _gemma3)(own, tokenizer, length)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ModelError(
            f"{folder!r} cannot prepare images: {first_line(error)}", ["fetch the folder again"]
        ) from error
    if length != (config.get(LENGTHS[kind]) or 256):
        raise ModelError(
            f"{folder!r} contradicts itself: its processor gives an image {length} tokens, its config.json "
            f"{config.get(LENGTHS[kind])}",
            ["fetch the folder again"],
        )
    # Gemma 3's template writes the beginning of an image, 3n's one of its soft tokens.
    mark = both.image_token if kind == "gemma3n" else both.boi_token
    return Vision(mark, both.full_image_sequence, int(tokenizer.image_token_id), both.image_processor)


def _gemma3(own: dict[str, Any], tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor

    return Gemma3Processor(Gemma3ImageProcessorPil.from_dict(own), tokenizer, image_seq_length=length)


def _gemma3n(own: dict[str, Any], tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nProcessor, SiglipImageProcessorPil

    images = SiglipImageProcessorPil.from_dict(own)
    return Gemma3nProcessor(Gemma3nAudioFeatureExtractor(), images, tokenizer, image_seq_length=length)


def _settings(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    return dict(paths.read_json(path)) if os.path.exists(path) else {}
