"""What Gemma 3n has that other families do not: a tower that another package makes, and layers with borrowed keys.

Its vision tower is a model of timm's (MobileNetV5), which takes torchvision. Where either is not installed the model is
built with a tower that holds nothing, so that rows of text train, and whatever asks it to look at an image is refused.
The last layers attend to keys and values of earlier ones; published checkpoints hold weights for them all the same,
which nothing reads. Limits: no audio.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ray_ft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPE = "gemma3n"
TOWER = "model.vision_tower."
#: Of the tower's settings, what the model reads for its embeddings of images.
KEPT = ("hidden_size", "vocab_size", "vocab_offset", "rms_norm_eps", "initializer_range")
#: Of a layer that attends to another one's keys and values.
BORROWED = ("k_proj", "v_proj", "k_norm", "v_norm")
#: Layers of AltUp whose weight is read, and clamped in place, past their forward pass: an adapter beside them would be
#: left out while training, and clamping 4-bit codes would change them.
READ_PAST = ("prediction_coefs", "correction_coefs")


def missing() -> list[str]:
    """What the vision tower needs and is not installed."""
    return [name for name in ("timm", "torchvision") if importlib.util.find_spec(name) is None]


def misses_tower(config: PretrainedConfig) -> bool:
    """Whether the config's model can be built here only without its vision tower."""
    return config.model_type == MODEL_TYPE and bool(missing())


def without_tower(config: PretrainedConfig) -> None:
    """Have a config's model built without its vision tower, in place."""
    config.vision_config = _absent()[0](**{name: getattr(config.vision_config, name) for name in KEPT})


def lacks_tower(model: nn.Module) -> bool:
    """Whether a model was built without its vision tower."""
    return any(getattr(part, "stands_for_a_tower", False) for part in model.modules())


def no_tower() -> ModelError:
    """What is said where an image would have to be looked at."""
    return ModelError(
        f"Gemma 3n looks at images through a tower of timm's, and {' and '.join(missing())} cannot be imported here",
        [
            "run it where there are GPUs: their lock has both",
            "install timm, and a torchvision that was built for the torch that is installed",
            "data.images=null, to train on text",
        ],
    )


def passed_over(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Of the `names` of a checkpoint's tensors, those that the model rightly has no place for."""
    borrowing = tuple(
        f"{name}.{part}." for name, module in model.named_modules() if borrows(module) for part in BORROWED
    )
    prefixes = (*borrowing, TOWER) if lacks_tower(model) else borrowing
    return {name for name in names if name.startswith(prefixes)}


def borrows(module: nn.Module) -> bool:
    """Whether a module is attention over keys and values of an earlier layer's."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def kind(layer: nn.Module) -> tuple[Any, ...]:
    """What the activations of a decoder's layer depend on besides the shapes of its parameters: whether later layers
    borrow its keys and values, and whether only some of its feed-forward part is left active."""
    parts = list(layer.modules())
    lends = any(getattr(part, "store_full_length_kv", False) for part in parts)
    sparse = any(getattr(part, "activation_sparsity", 0.0) > 0 for part in parts)
    return (("lends", lends), ("sparse", sparse)) if lends or sparse else ()


def read_past(model: nn.Module) -> set[str]:
    """Names of linear layers that are not always asked by their forward pass (see `READ_PAST`)."""
    return {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if type(module).__name__ == "Gemma3nTextAltUp"
        for part in READ_PAST
    }


def _absent() -> tuple[Any, Any]:
    """(Config, model) of the tower that is not there, known to transformers."""
    global _made
    if _made is None:
        from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel

        class AbsentTowerConfig(Gemma3nVisionConfig):
            model_type = "gemma3n_vision_absent"

        class AbsentTower(PreTrainedModel):
            config_class = AbsentTowerConfig
            main_input_name = "pixel_values"
            _supports_sdpa = True
            stands_for_a_tower = True

            def __init__(self, config: AbsentTowerConfig) -> None:
                super().__init__(config)
                self.post_init()

            def forward(self, **_: Any) -> Any:
                raise no_tower()

        AutoModel.register(AbsentTowerConfig, AbsentTower)
        _made = AbsentTowerConfig, AbsentTower
    return _made


_made: tuple[Any, Any] | None = None
