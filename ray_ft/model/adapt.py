"""What of the model is trained."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from ray_ft.errors import ModelError


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Stop training the parameters whose qualified names match a pattern (``*``, ``?``).

    Returns:
        Number of frozen elements.

    Raises:
        ModelError: a pattern matches nothing (a misspelt pattern would silently train all), or all is frozen.
    """
    names = dict(model.named_parameters())
    frozen = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ModelError(
                f"model.freeze pattern {pattern!r} matches no parameter",
                [f"names look like {', '.join(list(names)[:3])}", "patterns match the whole name: *embed_tokens*"],
            )
        frozen.update(matching)
    if len(frozen) == len(names):
        raise ModelError(f"model.freeze {list(patterns)} freezes every parameter", ["narrow the patterns"])
    for name in frozen:
        names[name].requires_grad_(False)
    return sum(names[name].numel() for name in frozen)
