"""Validation beside training in TensorBoard: scores as curves of their own, and answers as texts over steps."""

from __future__ import annotations

import tempfile
from typing import Any

from ray_ft import artifacts, paths


class Curves:
    """Beside the training's; on object stores uploaded each time."""

    def __init__(self, run: artifacts.RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._location = paths.join(run.tensorboard, "validation")
        self._remote = paths.is_uri(run.root)
        self._folder = tempfile.mkdtemp(prefix="ray_ft_tb_") if self._remote else self._location
        self._writer = SummaryWriter(self._folder)

    def add(self, step: int, scores: dict[str, float], answers: dict[str, list[dict[str, Any]]]) -> None:
        for name, value in scores.items():
            self._writer.add_scalar(name, value, step)
        for kind, rows in answers.items():
            for number, row in enumerate(rows):
                self._writer.add_text(f"{kind}/{number}", _as_text(row), step)
        self._writer.flush()
        if self._remote:
            paths.upload_dir(self._folder, self._location)

    def close(self) -> None:
        self._writer.close()


def _as_text(row: dict[str, Any]) -> str:
    """A prompt and its answer in the Markdown that TensorBoard shows, as indented code, which means nothing in it."""
    asked = row["prompt"]
    if not isinstance(asked, str):
        asked = "\n".join(f"{turn['role']}: {turn['content']}" for turn in asked)
    parts = {"prompt": asked, "thinking": row.get("thinking"), "answer": row["answer"] or row.get("error")}
    parts["reference"] = row.get("reference")
    blocks = [(name, str(text).splitlines() or [""]) for name, text in parts.items() if text is not None]
    return "\n\n".join("\n".join([f"{name}:", "", *(f"    {line}" for line in lines)]) for name, lines in blocks)
