"""The loss of a model behind an OpenAI-compatible endpoint, where it tells the probabilities of a prompt's tokens.

vLLM's /v1/completions takes token ids and, with `prompt_logprobs`, gives the log-probability of each of them. Other
servers, and gateways that let no such field pass, do not; then there is no loss, and the report says why. Limits: the
tokens are those of the recipe's model; that the endpoint's model has the same tokenizer cannot be seen from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from ray_ft.answers.endpoint import Endpoint
from ray_ft.answers.target import Target
from ray_ft.data import pack
from ray_ft.data.order import Order
from ray_ft.data.prepared import Prepared
from ray_ft.errors import ServeError, first_line
from ray_ft.evaluate.losses import Loss


class _Refused(Exception):
    """Why the endpoint gives no loss."""


def endpoint_loss(
    target: Target, prepared: Prepared, at_once: int, on_progress: Callable[[int, int], None]
) -> Loss | str:
    """The endpoint's loss over all documents of the packed rows, or why there is none.

    Args:
        at_once: requests under way at one time.

    Raises:
        ServeError: nobody answers there, or the key is refused.
    """
    if prepared.images:
        return "rows with images have no tokens that /v1/completions takes"
    engine = Endpoint(target, at_once)
    total, tokens, done = 0.0, 0, 0
    try:
        documents = documents_of(prepared)
        with ThreadPoolExecutor(at_once) as pool:
            while batch := list(islice(documents, 4 * at_once)):
                for loss, count, rows in pool.map(lambda one: (*_judge(engine, *one[:2]), one[2]), batch):
                    total, tokens, done = total + loss, tokens + count, done + rows
                on_progress(done, prepared.rows)
    except _Refused as refused:
        return str(refused)
    finally:
        engine.close()
    return Loss(total / tokens, tokens, prepared.rows) if tokens else "the held-out rows hold no token to judge"


def documents_of(prepared: Prepared) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(token ids [n], which of them are targets [n], 1 for the first document of a packed row else 0), in order."""
    order = Order.once(prepared)
    for part in order.slices(0, order.rows):
        rows = part.read(prepared)
        for ids, flags in zip(rows.input_ids, rows.flags, strict=True):
            real = int(np.count_nonzero(flags & pack.REAL))
            starts = np.flatnonzero(flags[:real] & pack.START).tolist()
            for start, stop in zip(starts, [*starts[1:], real], strict=True):
                yield ids[start:stop], (flags[start:stop] & pack.TRAINED) > 0, int(start == 0)


def _judge(engine: Endpoint, ids: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """(sum of the losses of one document's target tokens, their number)."""
    import openai

    try:
        response = engine.completed(
            prompt=ids.tolist(),
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 0},  # of the prompt's own tokens, and of no others
        )
    except openai.APIStatusError as error:
        raise _Refused(f"the endpoint refuses prompt_logprobs ({error.status_code}): {first_line(error)}") from error
    except ServeError as error:
        if not isinstance(error.__cause__, openai.NotFoundError):
            raise
        raise _Refused("the endpoint has no /v1/completions") from error
    given = (response.choices[0].model_extra or {}).get("prompt_logprobs")
    if given is None:
        raise _Refused("the endpoint does not give prompt_logprobs")
    return summed(given, ids, targets)


def summed(given: list[dict[str, Any] | None], ids: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """Sum and number of the losses of target tokens, from vLLM's `prompt_logprobs`.

    Raises:
        _Refused: they are not those of the tokens.
    """
    if len(given) != len(ids):
        raise _Refused(f"the endpoint gave probabilities of {len(given)} tokens for a prompt of {len(ids)}")
    total, wanted = 0.0, [at for at in np.flatnonzero(targets).tolist() if at]  # nothing stands before the first
    for at in wanted:
        found = (given[at] or {}).get(str(int(ids[at])))
        if found is None or not math.isfinite(found["logprob"]):
            raise _Refused("the endpoint gave no probability of a prompt's token")
        total -= float(found["logprob"])
    return total, len(wanted)
