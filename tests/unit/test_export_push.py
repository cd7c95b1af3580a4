"""Pushing to a hub: against a local server that speaks as much of its protocol as the client asks for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_ft.errors import ExportError
from ray_ft.export import pushing

TOKEN = "hf_not_a_real_token"


class Hub(BaseHTTPRequestHandler):
    """Takes one repository's commits. `refuses`: status that everything is answered with."""

    refuses: int | None = None
    created: list[dict[str, Any]]
    files: dict[str, bytes]
    tokens: set[str | None]

    def do_GET(self) -> None:
        if self.refuses:
            return self._say(self.refuses, {"error": "no"})
        if "/tree/" in self.path:
            return self._say(200, [{"type": "file", "path": name, "size": 1, "oid": "a"} for name in self.files])
        return self._say(200, {"id": "org/model", "sha": "a" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.tokens.add(self.headers.get("Authorization"))
        if self.refuses:
            return self._say(self.refuses, {"error": "no"})
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self._say(200, {"url": f"http://{self.headers['Host']}/org/model", "id": "org/model"})
        if "/preupload/" in self.path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in asked]
            return self._say(200, {"files": modes})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    del self.files[entry["value"]["path"]]
            return self._say(
                200,
                {
                    "success": True,
                    "commitOid": "a" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/org/model/commit/a",
                },
            )
        return self._say(200, {"errors": [], "warnings": []})

    def _say(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"created": [], "files": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(tmp_path: Path) -> str:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "manifest.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags: [ray-ft]\n---\n")
    return str(folder)


def test_the_folder_is_uploaded_to_a_private_repository(hub: type[Hub], exported: str) -> None:
    hub.files |= {"model-00001-of-00002.safetensors": b"stale", "NOTES.txt": b"kept"}
    pushing.refuse("org/model")
    pushing.push(exported, "org/model", "model, step 4", exported)
    assert hub.files == {path.name: path.read_bytes() for path in Path(exported).iterdir()} | {"NOTES.txt": b"kept"}
    (created,) = hub.created
    assert created["name"] == "model" and created["organization"] == "org"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(("status", "way"), [(401, "HF_TOKEN"), (403, "may not write to org/model")])
def test_a_refusal_says_why_and_that_the_export_stays(
    hub: type[Hub], exported: str, status: int, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = status
    with pytest.raises(ExportError, match=rf"the hub refused org/model with status {status}") as failure:
        pushing.push(exported, "org/model", "model, step 4", exported)
    said = str(failure.value)
    assert way in said and f"stays: {exported}" in said and "ray-ft export RUN --push REPO" in said
    assert TOKEN not in said + "".join(capfd.readouterr())
    assert len(list(Path(exported).iterdir())) == 3


def test_a_hub_that_is_not_there(exported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"the push to org/model failed: ") as failure:
        pushing.push(exported, "org/model", "model, step 4", exported)
    assert "check the network and HF_ENDPOINT" in str(failure.value)


def test_what_cannot_work_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("model", "../model/x", "org/model/more", "https://hub/org/model"):
        with pytest.raises(ExportError, match=r"is no name of a hub repository"):
            pushing.refuse(name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ExportError, match=r"there is no token to push to org/model with") as failure:
        pushing.refuse("org/model")
    assert "HF_TOKEN" in str(failure.value)
