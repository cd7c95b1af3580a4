"""After training: scoring and serving."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ray_ft.recipe.section import Section


class Evaluate(Section):
    max_rows: Annotated[int, Field(ge=1)] = 200
    """Held-out rows that are answered and scored; the loss is always over all of them."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows answered at once."""


class Serve(Section):
    model_name: str | None = None
    """Name under which clients ask for the model; null: the run's name."""
    host: str = "127.0.0.1"
    """Address to listen on; the default reaches only this machine."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """HTTP port."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the model."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer, in tokens; null: the model's limit, at most 8192."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Requests that one replica works on at once."""
    gpus_per_replica: Annotated[int, Field(ge=1)] = 1
    """GPUs over which one replica is split (tensor parallel); of no effect on CPU."""
