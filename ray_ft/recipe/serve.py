"""After training: scoring, and serving behind a gateway."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_ft.hosts import is_loopback
from ray_ft.recipe.section import Section


class During(Section):
    """Answers to held-out rows while training goes on, beside it: the workers wait for nothing."""

    every: Annotated[int, Field(ge=1)]
    """Steps between evaluations; each takes the newest checkpoint, so train.checkpoint.every bounds it."""
    max_rows: Annotated[int, Field(ge=1)] = 50
    """Held-out rows that are answered each time."""
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    """Prompts of your own that are answered each time too, to be read: what a user says, or with data.train that has no
    chat template the text to go on with."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs that it asks for beside the workers', where the run is on GPUs; 0: it answers on CPU."""


class Evaluate(Section):
    max_rows: Annotated[int, Field(ge=1)] = 200
    """Held-out rows that are answered and scored; the loss is always over all of them."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows answered at once."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What answers: auto is vLLM for an exported model on GPUs, else transformers."""
    labels: list[str] = []
    """Answers that are labels: accuracy, F1 and the confusion of these are reported."""
    base: bool = True
    """Ask the base model the same, and report by how much it was improved, with an interval."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the paired bootstrap from which the intervals come."""
    during: During | None = None
    """Evaluate beside the training; null: only afterwards."""


class Gateway(Section):
    """Who may ask, what, and how much: the gateway in front of all models of one endpoint."""

    api_keys_file: str | None = None
    """File of keys, a line each: NAME KEY, or NAME sha256:HEX; read again whenever it changes."""
    api_keys_env: str = "RAY_FT_API_KEYS"
    """Environment variable with keys as NAME:KEY,NAME:KEY; read when serving starts."""
    open: bool = False
    """Ask for no key; only where serve.host is a loopback address."""
    admins: list[str] = ["admin"]
    """Names of keys that may also read /metrics."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Requests that one key may make; null: no limit."""
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Tokens, of prompts and answers, that one key may use; null: no limit."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 << 20
    """Largest body of a request."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer that a request may ask for; null: what the model's context has room for."""
    max_choices: Annotated[int, Field(ge=1)] = 4
    """Largest n: answers to one prompt."""
    max_waiting: Annotated[int, Field(ge=1)] = 256
    """Requests of one model that may wait for a place; more are answered with 503 at once."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600
    """Longest time for one request."""
    stall_seconds: Annotated[float, Field(gt=0)] = 30
    """A model that gives no token for so long, though asked, makes /health fail."""
    cors_origins: list[str] = []
    """Origins whose pages may ask from a browser, such as https://app.example.org; none by default."""
    media_domains: list[str] = []
    """Hosts that images may be fetched from; others, and all other addresses than data:, are refused."""
    playground: bool = True
    """Serve the page at /playground."""


class Serve(Section):
    model_name: str | None = None
    """Name under which clients ask for the model; null: the run's name."""
    host: str = "127.0.0.1"
    """Address to listen on; the default reaches only this machine."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """HTTP port."""
    replicas: Annotated[int, Field(ge=1)] | tuple[int, int] = 1
    """Copies of the model; [min, max]: as many as the load asks for, and 0 as min gives all back when idle."""
    target_requests: Annotated[int, Field(ge=1)] | None = None
    """Requests at once for which one replica more is worth it; null: half of max_num_seqs."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus answer, in tokens; null: the model's limit, at most 8192."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Requests that one replica works on at once."""
    gpus_per_replica: Annotated[int, Field(ge=1)] | None = None
    """GPUs over which one replica is split (tensor parallel); null: as few as hold the model; of no effect on CPU."""
    gateway: Gateway = Gateway()

    @model_validator(mode="after")
    def _consistent(self) -> Serve:
        if isinstance(self.replicas, tuple):
            low, high = self.replicas
            if not 0 <= low <= high or high < 1:
                raise ValueError(
                    f"replicas: [{low}, {high}] is [min, max], with 0 <= min <= max and max at least 1; "
                    f"write replicas: {max(low, high, 1)} for a fixed number"
                )
        elif self.target_requests is not None:
            raise ValueError(
                f"target_requests: {self.target_requests} is read where replicas may change, and replicas is "
                f"{self.replicas}; write replicas: [{self.replicas}, {2 * self.replicas}], or leave it out"
            )
        if self.gateway.open and not is_loopback(self.host):
            raise ValueError(
                f"gateway.open: true lets anyone ask who reaches host: {self.host}; set host: 127.0.0.1, or give keys "
                "(gateway.api_keys_file) and leave gateway.open out"
            )
        return self
