"""Which Ray is behind an endpoint of this machine: noted while it is served, for `ray-ft serve --update`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ray_ft.errors import ServeError

AUTH_MODE = "RAY_AUTH_MODE"


@contextlib.contextmanager
def noted(port: int) -> Iterator[None]:
    """Note the address of this Ray for `update`, as long as the block runs."""
    import ray

    file = _file(port)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.touch(0o600)
    facts = {"address": ray.get_runtime_context().gcs_address, "pid": os.getpid(), "auth": os.environ.get(AUTH_MODE)}
    file.write_text(json.dumps(facts))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def look_up(port: int) -> str:
    """Address of the Ray behind this machine's endpoint at `port`.

    Raises:
        ServeError: none is noted, or what noted it is gone.
    """
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(_file(port).read_text())
        os.kill(facts["pid"], 0)
        if facts["auth"]:
            os.environ[AUTH_MODE] = facts["auth"]  # Ray sets it where it starts a cluster, not where it joins one
        return str(facts["address"])
    raise ServeError(
        f"no endpoint that `ray-ft serve` started listens on port {port} of this machine",
        ["name its port: --port", "for one on a cluster set RAY_ADDRESS", "start one: ray-ft serve RUN"],
    )


def _file(port: int) -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache") / "ray_ft" / "endpoints" / f"{port}.json"
