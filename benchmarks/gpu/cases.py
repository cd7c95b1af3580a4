"""What is trained: a size of Gemma 3, how, and on how many rows, as a recipe of the product.

The models are the published ones with their vision towers, which stay frozen and see nothing: text alone is trained on.
`tiny` stands for all sizes on a machine without a GPU; the same code runs, and its figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SIZES = ("4b", "12b", "27b")
TINY_SEQ, TINY_WORDS = 64, 512
IN_BACKWARD = ("train.optimizer.in_backward=true", "train.clip_norm=null")
ADAFACTOR = ("train.optimizer.name=adafactor", "train.optimizer.weights=bfloat16")
ADAMW_8BIT = ("train.optimizer.name=adamw_8bit", "train.optimizer.weights=bfloat16")
RECOMPUTE = "train.gradient_checkpointing=true"


@dataclass(frozen=True)
class Case:
    """One thing to train.

    Attributes:
        lora: adapters of rank 16 on every linear layer of the language model; else all of its weights, the embeddings
            included.
        rows: of `seq_len` tokens in a step; `micro`: in a forward pass.
        settings: overrides of the recipe.
        patches: what no setting of a recipe does, by its name in `patches`.
        documents: packed into each row.
        instead: what is trained where this does not fit in memory.
        sought: how long a row can be is what is asked, not how fast it is.
        against: the case of the ablation that this one is compared with.
    """

    name: str
    size: str
    lora: bool
    rows: int
    micro: int
    settings: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    seq_len: int = 4096
    documents: int = 1
    instead: Case | None = None
    sought: bool = False
    against: str = "4B"

    @property
    def keys(self) -> bool:
        """Whether the product can be told so, in a recipe; an aim is for such cases alone."""
        return not self.patches

    def variant(self, name: str, *settings: str, patches: Sequence[str] = (), **changes: Any) -> Case:
        """The same with further settings, which win."""
        changes = {"instead": None, **changes}
        return replace(self, name=name, settings=(*self.settings, *settings), patches=tuple(patches), **changes)

    @property
    def said(self) -> str:
        """Settings for a table: without the sections that all have."""
        return " ".join([one.removeprefix("train.") for one in self.settings] + [f"+{one}" for one in self.patches])


def _recomputing(name: str, *settings: str, patches: Sequence[str] = ()) -> Case:
    """LoRA of 27B with as few layers recomputed as `ray-ft plan` says fit (each costs half as much again), and more
    where they do not."""
    case: Case | None = None
    for share in (1.0, 0.5, 0.25):
        named = name if share == 0.25 else f"{name}, {share:g} of the layers recomputed"
        every = (f"train.gradient_checkpointing={share:g}" if share < 1 else RECOMPUTE, *settings)
        case = Case(named, "27b", True, 1, 1, every, tuple(patches), instead=case)
    assert case is not None
    return case


def _with_instead(*cases: Case) -> tuple[Case, ...]:
    """Cases, each followed by what is trained in its place."""
    found: list[Case] = []
    for case in cases:
        at: Case | None = case
        while at is not None:
            found.append(at)
            at = at.instead
    return tuple(found)


#: With SDPA a mask of rows × rows would be what is at its limit, and layers with a window take the time of all places.
FLEX = "model.attention=flex_attention"
LORA_27B = _recomputing("LoRA 27B")
LORA_WAYS = (
    _recomputing("LoRA 27B, flex attention", FLEX),
    _recomputing("LoRA 27B, torch.compile", patches=("compile",)),
)
FULL_27B = Case("full 27B, Adafactor in backward", "27b", False, 4, 4, (*ADAFACTOR, *IN_BACKWARD, RECOMPUTE))
FULL_27B_8BIT = Case("full 27B, 8-bit AdamW in backward", "27b", False, 3, 3, (*ADAMW_8BIT, *IN_BACKWARD, RECOMPUTE))
#: Gradients of a whole step fit beside these: the update's time is shared by several passes.
FULL_12B = Case("full 12B, Adafactor", "12b", False, 8, 1, ADAFACTOR)
FULL_4B = Case("full 4B, Adafactor", "4b", False, 8, 2, ADAFACTOR)
LONG_LORA = LORA_27B.variant("longest row, LoRA 27B", RECOMPUTE, FLEX, sought=True)
LONG_FULL = FULL_27B.variant("longest row, full 27B, Adafactor in backward", FLEX, rows=1, micro=1, sought=True)

BASE = Case("4B", "4b", True, 4, 2)
RECOMPUTED = BASE.variant("all layers recomputed", RECOMPUTE)
#: Those of most worth first. Liger replaces classes for the rest of its process, so it comes last.
ABLATION = (
    BASE,
    RECOMPUTED,
    BASE.variant("attention: flex_attention", FLEX),
    BASE.variant("torch.compile, layer by layer", patches=("compile",)),
    BASE.variant("logits of all targets at once", "train.loss_chunk=8192"),
    BASE.variant("attention: flash_attention_2", "model.attention=flash_attention_2"),
    # All scores are kept, which fits where all else is recomputed.
    RECOMPUTED.variant("attention: eager", "model.attention=eager", against=RECOMPUTED.name),
    BASE.variant("sdpa: cuDNN's kernel where it can", patches=("sdpa cudnn",)),
    BASE.variant("sdpa: the memory-efficient kernel where it can", patches=("sdpa efficient",)),
    BASE.variant("4 documents a row", documents=4),
    BASE.variant("Liger's RMSNorm, GeGLU, RoPE", patches=("liger",)),
)
TRAINED = _with_instead(LORA_27B, *LORA_WAYS, FULL_27B, FULL_27B_8BIT, FULL_12B, FULL_4B)
#: What a recipe can say, and so `ray-ft plan` can foresee; that which comes first in a short call first.
PLANNED = tuple(
    case for case in (LORA_27B, FULL_27B, FULL_27B_8BIT, FULL_12B, FULL_4B, *ABLATION, *TRAINED) if case.keys
)


def tiny(case: Case) -> Case:
    """The case with rows that a CPU gets through in no time."""
    return replace(case, seq_len=TINY_SEQ)


def config_of(size: str, small: bool = False) -> Any:
    """The published config of a size; `small`: one of its kind with hardly any weights."""
    from ray_ft.plan import shapes

    if not small:
        return shapes.find_config(f"google/gemma-3-{size}-it")
    from transformers import Gemma3Config, Gemma3TextConfig

    text = Gemma3TextConfig(
        vocab_size=TINY_WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=16, query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=TINY_WORDS - 1, boi_token_index=TINY_WORDS - 2, eoi_token_index=TINY_WORDS - 3,
    )  # fmt: skip


def recipe_of(case: Case, model: str | Path, steps: int = 1) -> Any:
    """The case as a recipe that `train.workers: 0` runs in this process.

    Args:
        model: a folder or a hub id; of it only the config is read.
    """
    from ray_ft import recipe as recipes

    content: dict[str, Any] = {
        "run": {"name": "gpu", "storage": "runs"},
        "model": {"path": str(model)},
        "data": {"train": [{"path": "mock.jsonl", "format": "text"}], "seq_len": case.seq_len},
        "train": {
            "workers": 0,
            "strategy": "none",
            "global_batch": case.rows,
            "micro_batch": case.micro,
            "max_steps": steps,
            "log_every": 1,
            "schedule": {"name": "constant"},
            "optimizer": {"lr": 1e-6},  # random weights learn nothing; they are to stay finite
        },
    }
    if case.lora:
        content["model"]["adapter"] = {"name": "lora", "rank": 16, "alpha": 32}
    else:
        content["model"]["freeze"] = ["vision_tower"]
    for override in case.settings:
        recipes.apply_override(content, override)
    return recipes.parse(content, where=case.name)
