"""What became of rows: how many were read, used, rejected and why, and how many tokens they gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOO_LONG = "longer than seq_len"
SHOWN = 12  # labels that a line names


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
    labels: Counter[str] = field(default_factory=Counter)
    """Samples used by ``source/label``, both as numbers; of rows with labels only."""

    def add(self, other: Counts) -> None:
        for name in ("rows", "used", "truncated", "packed", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rejected.update(other.rejected)
        self.lengths.update(other.lengths)
        self.labels.update(other.labels)

    @property
    def bad_share(self) -> float:
        """Share of rows that are faulty; one that is merely too long is not."""
        return (self.rejected.total() - self.rejected[TOO_LONG]) / max(self.rows, 1)

    def of_labels(self, count: int, weights: Mapping[int, float] | None = None) -> list[float]:
        """How many samples have each of `count` labels; those of a source times its weight, where there are any."""
        found = [0.0] * count
        for key, samples in self.labels.items():
            source, label = map(int, key.split("/"))
            found[label] += samples * (weights or {}).get(source, 1.0)
        return found

    def say_labels(self, names: Sequence[str]) -> str:
        """How many samples have each label, the commonest first; empty where there are no labels."""
        rows = sorted(zip(map(int, self.of_labels(len(names))), names, strict=True), key=lambda pair: -pair[0])
        said = [f"{name} {count:,}" for count, name in rows[:SHOWN]]
        none = [name for count, name in rows if not count]
        said += [f"… {len(rows) - SHOWN} more"] * (len(rows) > SHOWN) + [f"none of {', '.join(none[:SHOWN])}"] * bool(
            none
        )
        return ", ".join(said)

    def common_reasons(self, count: int = 3) -> list[str]:
        return [f"{number} × {reason}" for reason, number in self.rejected.most_common(count)]

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counts:
        counters = {
            "rejected": Counter(content["rejected"]),
            "labels": Counter(content.get("labels", {})),
            "lengths": Counter({int(k): v for k, v in content["lengths"].items()}),
        }
        return cls(**{**content, **counters})
