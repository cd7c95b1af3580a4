"""The gateway's settings: the recipe's ``serve.gateway`` section as the manifest carries it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_ft.errors import ServeError


@dataclass(frozen=True)
class Settings:
    """As the section ``serve.gateway`` of the recipe, where each setting is described; times in seconds."""

    api_keys_file: str | None = None
    api_keys_env: str = "RAY_FT_API_KEYS"
    open: bool = False
    admins: tuple[str, ...] = ("admin",)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_body_bytes: int = 4 << 20
    max_tokens: int | None = None
    max_choices: int = 4
    max_waiting: int = 256
    timeout_seconds: float = 600
    stall_seconds: float = 30
    cors_origins: tuple[str, ...] = ()
    media_domains: tuple[str, ...] = ()
    playground: bool = True
    body_seconds: float = 30
    """A body has to arrive within this time; not in the recipe, as only tests have a reason to change it."""

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Settings:
        """Settings from a manifest; what it leaves out has the defaults.

        Raises:
            ServeError: a key that no setting has: the manifest is from a newer version.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"body_seconds"}
        unknown = sorted(set(section) - known)
        if unknown:
            raise ServeError(
                f"the manifest's serve.gateway has settings that this version does not know: {', '.join(unknown)}",
                ["serve it with the version of ray-ft that exported it, or a newer one", "export the run again"],
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
        return cls(**values)
