"""Whether a document in a packed row sees another: one after the other is replaced, and all others' logits compared.

Bits are compared, not numbers, so that nothing is too small to be found. Limit: it tells what happens with these
implementations of attention on a CPU, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ray_ft.data import pack
from ray_ft.data.render import Tokens
from ray_ft.model.loss import documents
from ray_ft.train.objective import tensors

OURS, THEIRS = "ray-ft", "TRL"


def seeing(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, spans: Sequence[slice]) -> int:
    """How many documents see another: whose logits are not the same bits once all tokens of that other one changed.

    Args:
        logits: [tokens, vocabulary] of ids, int64 [tokens].
        spans: of the documents.

    Raises:
        ValueError: the logits of the same ids are not the same, so that nothing can be told.
    """
    before = logits(ids)
    if not torch.equal(before, logits(ids)):
        raise ValueError("two passes over the same tokens differ: what a document sees cannot be told from bits")
    found = set()
    for changed in spans:
        others = ids.clone()
        others[changed] = (others[changed] + 7) % before.shape[-1]
        after = logits(others)
        assert not torch.equal(before[changed], after[changed])
        found |= {at for at, one in enumerate(spans) if one != changed and not torch.equal(before[one], after[one])}
    return len(found)


def isolation(base: str, seq_len: int = 128, count: int = 24) -> dict[str, tuple[int, int]]:
    """(documents that see another, documents) in packed rows of each side, by implementation of attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from benchmarks.peers import trl_pack

    logging.disable_progress_bar()
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, count)
    samples = [Tokens(rng.integers(6, 500, n, dtype=np.int32), np.ones(n, bool)) for n in lengths]
    rows, _ = pack.pack(samples, seq_len, packing=True, pad_id=0)
    theirs = trl_pack.packed(trl_pack.dataset(np.concatenate([one.ids for one in samples]), lengths), seq_len)
    found = {}
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=attention).eval()
        with torch.no_grad():
            found[f"{OURS}, {attention}"] = seeing(ours(model, rows), *documents_of(rows)), count
            given = trl_pack.batch(theirs, 0)
            spans = _spans(given["position_ids"][0].numpy())
            ids = given["input_ids"][0]
            found[f"{THEIRS}, {attention}"] = seeing(theirs_of(model, given), ids, spans), count
            if attention == "sdpa":  # that the check finds what it looks for
                plain = lambda ids, model=model: model(ids[None], use_cache=False).logits[0]  # noqa: E731
                found["control: positions that run on"] = seeing(plain, ids, spans), count
    return found


def documents_of(rows: pack.Rows) -> tuple[torch.Tensor, list[slice]]:
    """All tokens of some rows, one row after the other, and where real documents lie among them."""
    flags = rows.flags.reshape(-1)
    spans = [one for one in _spans(pack.position_ids(rows.flags).reshape(-1)) if flags[one.start] & pack.REAL]
    return torch.from_numpy(rows.input_ids.reshape(-1).astype(np.int64)), spans


def _spans(positions: np.ndarray) -> list[slice]:
    edges = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def ours(model: Any, rows: pack.Rows) -> Callable[[torch.Tensor], torch.Tensor]:
    """As `ray_ft.model.loss.LossModel` calls the model."""
    _, positions, _ = tensors(rows, torch.device("cpu"))
    width = rows.flags.shape[1]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        given = ids.view(-1, width)[:, : positions.shape[1]]
        hidden = model.get_decoder()(input_ids=given, use_cache=False, **documents(model, positions)).last_hidden_state
        return model.get_output_embeddings()(hidden).flatten(0, 1)

    assert positions.shape[1] == width, "these rows are full enough that no column is left out"
    return logits


def theirs_of(model: Any, given: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    from benchmarks.peers import trl_pack

    return lambda ids: trl_pack.logits(model, given, ids[None])[0]
