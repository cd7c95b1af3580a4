"""A cluster's jobs API over HTTP: whom to ask, with which token, and what its answers mean.

Ray need not be installed or running here, and its version may differ: the API is plain JSON (Ray's own description is
`dashboard/modules/job/openapi.yml`). Limits: certificates are checked against those that this machine trusts; over
plain http the token can be read by whoever sees the traffic, which `warning` says.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ray_ft import credentials
from ray_ft.errors import CredentialError, ResourceError, first_line
from ray_ft.hosts import is_loopback

if TYPE_CHECKING:
    import httpx

DEFAULT = "http://127.0.0.1:8265"  # where `ray dashboard` and Ray's examples of ssh forward it to
OLDEST_RAY = (2, 60)  # what pyproject.toml asks for
CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
UPLOAD_SECONDS = 600.0
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
#: What a job of ours carries in its metadata.
VERB, RUN, STORAGE, VERSION = "ray_ft_verb", "ray_ft_run", "ray_ft_storage", "ray_ft_version"


class NoAnswer(ResourceError):
    """The cluster did not answer, or said that it cannot for now: the same request may succeed a little later."""


@dataclass(frozen=True)
class Job:
    """What the API says of one job. Times are seconds since the epoch, `exit_code` is the entry point's own."""

    id: str
    status: str
    metadata: dict[str, str]
    entrypoint: str
    message: str
    started: float | None
    ended: float | None
    exit_code: int | None

    @classmethod
    def of(cls, content: dict[str, Any]) -> Job:
        def seconds(name: str) -> float | None:
            return content[name] / 1000 if content.get(name) else None

        return cls(
            content["submission_id"],
            content["status"],
            content.get("metadata") or {},
            content.get("entrypoint") or "",
            content.get("message") or "",
            seconds("start_time"),
            seconds("end_time"),
            content.get("driver_exit_code"),
        )

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def run(self) -> str:
        return self.metadata.get(RUN, "")

    @property
    def verb(self) -> str:
        return self.metadata.get(VERB, "")


def find_address(given: str | None) -> str:
    """Base URL of the dashboard: as given, else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else loopback.

    Raises:
        ResourceError: it is of a form that has no jobs API.
    """
    from_where, text = "--address", given or ""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if not text:
            from_where, text = name, os.environ.get(name, "")
    text = text.strip().rstrip("/")
    if not text:
        return DEFAULT
    ways = [
        "name the dashboard, such as http://127.0.0.1:8265; `ray dashboard cluster/….yaml` forwards it there",
        "without a cluster the verbs run here: ray-ft train RECIPE",
    ]
    if "://" not in text and re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:/\s]+):\d+", text):
        text = f"http://{text}"
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ResourceError(f"{from_where}={text} is no address of a jobs API", ways)
    if parts.username or parts.password:
        raise CredentialError(f"{from_where} holds a user name or password; tokens go by file", _token_ways())
    return text


def find_token() -> tuple[str, str]:
    """The cluster's token and where it is from, in Ray's own order; ("", "") where there is none.

    Raises:
        CredentialError: the file that should hold it cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    file = credentials.token_file()
    try:
        return file.read_text(encoding="utf-8").strip(), str(file)
    except FileNotFoundError as error:
        if os.environ.get("RAY_AUTH_TOKEN_PATH"):
            raise CredentialError(f"RAY_AUTH_TOKEN_PATH={file}: there is no such file", _token_ways()) from error
        return "", ""
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialError(f"the token in {file} cannot be read: {first_line(error)}", _token_ways()) from error


class Api:
    """One cluster's jobs API. Every method may raise NoAnswer; ResourceError where trying again is of no use;
    CredentialError where the token is missing or another one."""

    def __init__(self, address: str) -> None:
        import httpx

        self.address = address
        token, self._token_from = find_token()
        self._token = token
        host = urlsplit(address).hostname or ""
        self._open = bool(token) and address.startswith("http://") and not is_loopback(host)
        self._client: httpx.Client = httpx.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            trust_env=not is_loopback(host),  # a proxy does not lead to this machine
        )

    def close(self) -> None:
        self._client.close()

    @property
    def warning(self) -> str | None:
        """What is not safe about this connection."""
        if not self._open:
            return None
        return (
            f"the token goes to {self.address} without encryption: come through `ray dashboard` or ssh -L, or use https"
        )

    def ray_version(self) -> str:
        """Of the cluster.

        Raises:
            ResourceError: what answers is no Ray, or one that is too old.
        """
        version = self._json("GET", "/api/version").get("ray_version", "")
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if len(numbers) < 2:
            raise ResourceError(f"what answers at {self.address} is no Ray dashboard", _address_ways())
        if numbers < OLDEST_RAY:
            raise ResourceError(
                f"the cluster at {self.address} runs Ray {version}; ray-ft needs "
                f"{'.'.join(map(str, OLDEST_RAY))} or newer",
                [f"install the versions of requirements/ on its nodes; here is Ray {metadata.version('ray')}"],
            )
        return version

    def one_node(self) -> bool:
        """Whether all work is done on one node; not on a head that offers no CPU, whose workers are yet to come."""
        result = self._json("GET", "/api/v0/nodes")["data"]["result"]["result"]
        alive = [node for node in result if node["state"] == "ALIVE"]
        return len(alive) == 1 and bool((alive[0].get("resources_total") or {}).get("CPU"))

    def jobs(self) -> list[Job]:
        """All that were submitted, oldest first."""
        found = [Job.of(one) for one in self._json("GET", "/api/jobs/") if one.get("submission_id")]
        return sorted(found, key=lambda job: job.started or 0)

    def job(self, name: str) -> Job | None:
        """The job of this submission id; None where the cluster knows none."""
        answer = self._ask("GET", f"/api/jobs/{name}", fine=(200, 404))
        if answer.status_code == 404:
            return None
        content = self._read(answer)
        return Job.of(content) if content.get("submission_id") else None

    def logs(self, name: str) -> str:
        """All that the job's entry point has printed so far."""
        return self._json("GET", f"/api/jobs/{name}/logs")["logs"]

    def submit(
        self, name: str, entrypoint: str, runtime_env: dict[str, Any], described: dict[str, str]
    ) -> httpx.Response:
        """Ask for a job. Of no CPUs and GPUs: Ray runs the entry point on the head node then.

        Returns:
            The answer: 200; 400 where the id is taken, with "already exists" in its text.
        """
        body = {
            "submission_id": name,
            "entrypoint": entrypoint,
            "runtime_env": runtime_env,
            "metadata": described,
            "entrypoint_num_cpus": 0,
            "entrypoint_num_gpus": 0,
        }
        return self._ask("POST", "/api/jobs/", fine=(200, 400), json=body)

    def stop(self, name: str) -> bool:
        """Ask a job to end. Returns whether it was running."""
        return bool(self._json("POST", f"/api/jobs/{name}/stop")["stopped"])

    def has_package(self, name: str) -> bool:
        return self._ask("GET", f"/api/packages/gcs/{name}", fine=(200, 404)).status_code == 200

    def upload(self, name: str, content: bytes) -> None:
        self._ask("PUT", f"/api/packages/gcs/{name}", content=content, timeout=UPLOAD_SECONDS)

    def _json(self, method: str, path: str) -> Any:
        return self._read(self._ask(method, path))

    def _read(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise ResourceError(
                f"what answers at {self.address} is no Ray dashboard: {answer.request.url.path} gave no JSON",
                _address_ways(),
            ) from error

    def _ask(self, method: str, path: str, fine: tuple[int, ...] = (200,), **more: Any) -> httpx.Response:
        import httpx

        try:
            answer = self._client.request(method, path, **more)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise NoAnswer(f"no answer from {self.address}: {first_line(error)}", _address_ways()) from error
        if answer.status_code in fine:
            return answer
        if answer.status_code == 401:
            what = "this machine has none" if not self._token else f"did not take that of {self._token_from}"
            raise CredentialError(f"the cluster at {self.address} asks for its token, and {what}", _token_ways())
        if answer.status_code == 403:
            whose = f"the token of {self._token_from} is not the one of" if self._token else "no entry without a token:"
            raise CredentialError(f"{whose} the cluster at {self.address}", _token_ways())
        said = answer.text.strip().splitlines() or [""]
        kind = NoAnswer if answer.status_code >= 500 else ResourceError
        raise kind(
            f"{method} {path} at {self.address} failed with {answer.status_code}: {said[-1][:300]}", _address_ways()
        )


def _address_ways() -> list[str]:
    return [
        "check --address (RAY_API_SERVER_ADDRESS, RAY_ADDRESS): the dashboard's port, 8265 by default, not the GCS's",
        "`ray dashboard cluster/….yaml`, or ssh -L 8265:127.0.0.1:8265 HEAD, brings it to this machine",
    ]


def _token_ways() -> list[str]:
    return [
        "bring the head's ~/.ray/auth_token to the same place here (docs/security.md)",
        "or name the file that holds it: RAY_AUTH_TOKEN_PATH",
    ]
