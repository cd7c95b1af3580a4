"""The peer of `packing.py`: TRL's own packing and collator, called as SFTTrainer calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

datasets.disable_progress_bars()
COLUMNS = ("input_ids", "labels")  # what SFTTrainer packs


def dataset(ids: np.ndarray, lengths: np.ndarray) -> datasets.Dataset:
    """Tokenized samples in memory, as they lie before packing: lists of int64.

    Args:
        ids: [tokens] of all samples, one after the other.
        lengths: [samples].
    """
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(ids, pa.int64()))
    return datasets.Dataset(pa.table(dict.fromkeys(COLUMNS, column)))


def packed(samples: datasets.Dataset, seq_len: int, *, whole: bool = False) -> datasets.Dataset:
    """Best-fit decreasing, SFTTrainer's default.

    Args:
        whole: all samples at once; else a thousand at a time, as SFTTrainer has it, which leaves that to `map`.
    """
    return pack_dataset(samples, seq_len, "bfd", {"batch_size": len(samples)} if whole else None)


def batch(rows: datasets.Dataset, pad_id: int) -> dict[str, Any]:
    """What a step's forward pass is given of some packed rows, less the labels."""
    collator = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)
    given = collator([rows[at] for at in range(len(rows))])
    return {name: value for name, value in given.items() if name != "labels"}


def logits(model: Any, given: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens, vocabulary]: the backbone is called as SFTTrainer's loss does it, with other ids in the batch."""
    hidden = model.base_model(**{**given, "input_ids": ids}, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden)
