"""What became of rows: how many were read, used, rejected and why, and how many tokens they gave."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

TOO_LONG = "longer than seq_len"


@dataclass
class Counts:
    """What happened to the rows of a chunk, or of all of them together."""

    rows: int = 0
    used: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    packed: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    duplicates: int = 0
    """Rows used that equal an earlier one; counted over a whole split, not per chunk."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Samples by token length, rounded up to a power of two."""

    def add(self, other: Counts) -> None:
        for name in ("rows", "used", "truncated", "packed", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rejected.update(other.rejected)
        self.lengths.update(other.lengths)

    @property
    def bad_share(self) -> float:
        """Share of rows that are faulty; one that is merely too long is not."""
        return (self.rejected.total() - self.rejected[TOO_LONG]) / max(self.rows, 1)

    def common_reasons(self, count: int = 3) -> list[str]:
        return [f"{number} × {reason}" for reason, number in self.rejected.most_common(count)]

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counts:
        counters = {
            "rejected": Counter(content["rejected"]),
            "lengths": Counter({int(k): v for k, v in content["lengths"].items()}),
        }
        return cls(**{**content, **counters})
