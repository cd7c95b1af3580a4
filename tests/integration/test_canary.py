"""Secrets of known values go through submit, train, export and serve on one head, and are found nowhere after it: in no
log, answer of an API, command line, checkpoint, manifest, card or line that was printed. The same search finds the one
that is put where it should not be.

Storage is an S3 that is reached with them, by the driver, Ray's workers and Serve's replicas, so that they are used.
About three minutes on two busy cores.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from head import Head

from ray_ft.demo import PROMPT, DemoPaths
from tests.integration.servers import command_line, free_port

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
READY = 420  # seconds until the model answers, on a busy machine
API = (
    "/api/jobs/", "/api/v0/jobs?detail=1", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/events",
    "/api/v0/workers?detail=1", "/api/v0/runtime_envs?detail=1", "/api/v0/nodes?detail=1", "/nodes?view=summary",
    "/api/serve/applications/", "/logical/actors", "/api/cluster_status", "/api/v0/placement_groups?detail=1",
)  # fmt: skip


@dataclass
class Place:
    """A head whose nodes have the secrets as files, and an S3."""

    head: Head
    bucket: Any
    canaries: dict[str, str]
    folder: Path
    env: dict[str, str]
    printed: list[str] = field(default_factory=list)

    def command(self, *arguments: str) -> str:
        """A verb of ray-ft; what it prints is searched, too."""
        done = subprocess.run(
            [sys.executable, "-m", "ray_ft", *arguments],
            env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        self.printed.append(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def hits(self, values: Sequence[str]) -> list[str]:
        """Every place where one of the values can be read."""
        found = [f"printed {at}" for at, text in enumerate(self.printed) if any(each in text for each in values)]
        wanted = [each.encode() for each in values]
        # The session's logs, packages and what else Ray keeps.
        texts = [(str(file.relative_to(self.head.folder)), content) for file, content in self.head.files()]
        texts += [(f"s3 {item.key}", item.get()["Body"].read()) for item in self.bucket.objects.all()]
        found += [name for name, text in texts if any(each in text for each in wanted)]
        for path in [*API, *(f"/api/jobs/{job}{part}" for job in self.jobs() for part in ("", "/logs"))]:
            answer = self.ask(self.head.dashboard + path)
            assert answer.status_code == 200, (path, answer.text)
            if any(each in answer.content for each in wanted):
                found.append(f"GET {path}")
        if any(each in self.ask(f"http://127.0.0.1:{self.head.metrics_port}/metrics").content for each in wanted):
            found.append("metrics")
        for process in self.head.processes():
            if any(each in (line := command_line(process)) for each in values):
                found.append(f"command line of {line.split()[0]}")
        return found

    def jobs(self) -> list[str]:
        listed = self.ask(f"{self.head.dashboard}/api/jobs/").json()
        return [job["submission_id"] for job in listed if job["submission_id"]]

    def ask(self, url: str) -> httpx.Response:
        return httpx.get(url, headers={"Authorization": f"Bearer {self.head.token}"}, trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def place(demo: DemoPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    import boto3
    from moto.server import ThreadedMotoServer

    canaries = {
        "AWS_ACCESS_KEY_ID": "AKIA" + secrets.token_hex(8).upper(),
        "AWS_SECRET_ACCESS_KEY": "canary" + secrets.token_hex(17),
        "HF_TOKEN": "hf_" + secrets.token_hex(17),
        "RAY_FT_API_KEYS": "ann:rft-" + secrets.token_hex(16),
        "WANDB_API_KEY": secrets.token_hex(20),  # used by nothing here, and there all the same
    }
    folder = tmp_path_factory.mktemp("canary")
    kept = folder / "secrets"
    kept.mkdir(mode=0o700)
    for name, value in canaries.items():
        (kept / name).touch(mode=0o600)
        (kept / name).write_text(value + "\n")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset, timeout=10).close()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        "RAY_FT_SECRETS": str(kept), "RAY_FT_CACHE": str(folder / "cache"), "XDG_RUNTIME_DIR": str(folder),
        "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    s3 = boto3.resource(
        "s3", endpoint_url=settings["AWS_ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id="a",
        aws_secret_access_key="b",
    )  # fmt: skip
    bucket = s3.create_bucket(Bucket="runs")
    for file in Path(demo.base).iterdir():
        bucket.upload_file(str(file), f"base/{file.name}")
    for file in map(Path, [*demo.train, demo.heldout]):
        bucket.upload_file(str(file), f"data/{file.name}")
    rows = {"format": "translation", "prompt": PROMPT}
    recipe = {
        "run": {"name": "canary", "storage": "s3://runs/runs"},
        "model": {"path": "s3://runs/base"},
        "data": {
            "train": [{"path": [f"s3://runs/data/{Path(file).name}" for file in demo.train], **rows}],
            "eval": [{"path": f"s3://runs/data/{Path(demo.heldout).name}", **rows}],
            "seq_len": 128,
        },
        "train": {
            "workers": 1, "cpus_per_worker": 1, "global_batch": 8, "micro_batch": 4, "max_steps": 3,
            "checkpoint": {"every": 2},
        },
        "serve": {"max_model_len": 128},
    }  # fmt: skip
    work = folder / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # Without what this process has in its own environment: the files are to be the only source.
    with Head(environment=settings) as head:
        env = {name: value for name, value in head.env(**settings).items() if name not in canaries}
        try:
            yield Place(head, bucket, canaries, work, env)
        finally:
            server.stop()


def test_no_secret_is_to_be_found_after_submit_train_export_and_serve(place: Place) -> None:
    address = ("--address", place.head.dashboard)
    place.command("submit", "train", "recipe.yaml", *address)
    place.command("submit", "export", "s3://runs/runs/canary", "--no-vllm", *address)
    written = {item.key for item in place.bucket.objects.all()}
    assert {"runs/canary/recipe.yaml", "runs/canary/export/manifest.json", "runs/canary/export/README.md"} <= written
    committed = [key for key in written if key.startswith("runs/canary/checkpoints/") and key.endswith("/COMMITTED")]
    assert committed
    answered = serve_and_ask(place)
    assert answered["choices"]
    values = [part for value in place.canaries.values() for part in value.split(":")[-1:]]
    assert place.hits(values) == []
    assert len(place.jobs()) == 2

    # The planted fault: what a person may do with Ray's own tools, and ray-ft submit refuses.
    stray = "hf_" + secrets.token_hex(17)
    body = {"entrypoint": "true", "runtime_env": {"env_vars": {"HF_TOKEN": stray}}}
    httpx.post(
        f"{place.head.dashboard}/api/jobs/", json=body, headers={"Authorization": f"Bearer {place.head.token}"},
        trust_env=False, timeout=60,
    ).raise_for_status()  # fmt: skip
    until = time.monotonic() + 120
    while not (found := place.hits([stray])) or not any("runtime_env" in each for each in found):
        assert time.monotonic() < until, found
        time.sleep(1)
    assert "GET /api/jobs/" in found
    refused = subprocess.run(
        [sys.executable, "-m", "ray_ft", "submit", "train", "recipe.yaml", *address, "--env", "HF_TOKEN"],
        env={**place.env, "HF_TOKEN": stray}, cwd=place.folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "HF_TOKEN" in refused.stderr
    assert stray not in refused.stdout + refused.stderr
    assert len(place.jobs()) == 3


def serve_and_ask(place: Place) -> dict[str, Any]:
    """One answer of the exported model by `ray-ft serve` on the same head; what it prints is searched, too."""
    port, log = free_port(), place.folder / "serve.txt"
    with log.open("wb") as out:
        serving = subprocess.Popen(
            [sys.executable, "-m", "ray_ft", "serve", "s3://runs/runs/canary", "--port", str(port)],
            stdout=out, stderr=out, env={**place.env, "RAY_ADDRESS": place.head.address}, cwd=place.folder,
        )  # fmt: skip
    try:
        until = time.monotonic() + READY
        while "stop it:" not in log.read_text():
            assert serving.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(1)
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {"model": "canary", "prompt": "twelve", "max_tokens": 4}
        key = place.canaries["RAY_FT_API_KEYS"].partition(":")[2]
        for shown, expected in (("rft-" + "0" * 32, 403), (key, 200)):
            answer = httpx.post(
                url, json=body, headers={"Authorization": f"Bearer {shown}"}, trust_env=False, timeout=120
            )
            assert answer.status_code == expected, answer.text
        return json.loads(answer.text)
    finally:
        serving.send_signal(signal.SIGINT)
        try:
            serving.wait(120)
        except subprocess.TimeoutExpired:
            os.kill(serving.pid, signal.SIGKILL)
            serving.wait()
        place.printed.append(log.read_text())
