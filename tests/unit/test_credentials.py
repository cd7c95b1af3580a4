from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ray_ft import cli, credentials, paths
from ray_ft.credentials import looks_secret, redacted
from ray_ft.errors import CredentialError, RecipeError
from ray_ft.recipe import Recipe
from ray_ft.view import View

VALUE = "canary-9f8e7d6c5b4a"
HF = "hf_" + "aB3" * 11
AKIA = "AKIA" + "Q7" * 8
KEY = "sk-" + "x1Y2" * 8
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home of one's own without secrets, and nothing known from before."""
    for name in (*(n for n in os.environ if looks_secret(n)), "RAY_FT_SECRETS", "RAY_AUTH_TOKEN_PATH", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(credentials, "FOLDERS", (str(tmp_path / "etc"), "~/.ray-ft/secrets"))
    monkeypatch.setattr(credentials, "_loaded", {})
    monkeypatch.setattr(credentials, "_from_files", set())
    (tmp_path / "home").mkdir()
    before = set(os.environ)
    yield tmp_path / "home"
    for name in set(os.environ) - before:
        del os.environ[name]


def secret(folder: Path, name: str, value: str, mode: int = 0o600) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(value)
    file.chmod(mode)
    return file


# --------------------------------------------------------------------------------------------------------- files


def test_files_become_variables(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret(own / ".ray-ft/secrets", "HF_TOKEN", VALUE + "\n")
    secret(own / ".ray-ft/secrets", "AWS_REGION", "eu-west-1")
    secret(own / ".ray-ft/secrets", "WANDB_API_KEY", "from the file")
    secret(tmp_path / "etc", "OTHER_KEY", "of the machine")
    secret(tmp_path / "etc", "AWS_REGION", "eu-north-1")
    monkeypatch.setenv("WANDB_API_KEY", "of the shell")
    assert credentials.load() == {"HF_TOKEN", "AWS_REGION", "OTHER_KEY"}
    assert os.environ["HF_TOKEN"] == VALUE
    assert os.environ["AWS_REGION"] == "eu-north-1"  # the first folder's
    assert os.environ["WANDB_API_KEY"] == "of the shell"
    secret(own / ".ray-ft/secrets", "LATE_TOKEN", VALUE)
    credentials.load()
    assert "LATE_TOKEN" not in os.environ  # once per process


def test_a_mounted_secret_of_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are links through ..data to a folder with a time in its name."""
    secret(tmp_path / "mount/..2026_11_21", "HF_TOKEN", VALUE, 0o400)
    (tmp_path / "mount/..data").symlink_to("..2026_11_21")
    (tmp_path / "mount/HF_TOKEN").symlink_to("..data/HF_TOKEN")
    monkeypatch.setenv("RAY_FT_SECRETS", str(tmp_path / "mount"))
    assert credentials.load() == {"HF_TOKEN"}
    assert os.environ["HF_TOKEN"] == VALUE


def test_the_folder_that_is_named_counts_alone(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret(own / ".ray-ft/secrets", "HF_TOKEN", VALUE)
    monkeypatch.setenv("RAY_FT_SECRETS", str(tmp_path / "none"))
    with pytest.raises(CredentialError, match=f"RAY_FT_SECRETS={tmp_path}/none is no folder"):
        credentials.load()
    assert "HF_TOKEN" not in os.environ
    (tmp_path / "none").mkdir()
    assert credentials.load() == frozenset()


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o622, 0o640])
def test_a_file_that_others_read_is_refused(own: Path, mode: int) -> None:
    file = secret(own / ".ray-ft/secrets", "HF_TOKEN", VALUE, mode)
    with pytest.raises(CredentialError, match=f"mode {mode:04o}: others can read it") as caught:
        credentials.load()
    assert f"chmod 600 {file}" in caught.value.ways_out
    assert VALUE not in str(caught.value)
    assert "HF_TOKEN" not in os.environ


def test_roots_group_may_read_what_kubernetes_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = secret(tmp_path, "HF_TOKEN", VALUE, 0o440)
    status = list(os.stat(file))
    status[4] = 0  # st_uid
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    credentials._refuse_open(file, os.stat_result(status))
    status[0] |= 0o004
    with pytest.raises(CredentialError):
        credentials._refuse_open(file, os.stat_result(status))


def test_what_is_no_secret_is_refused(own: Path) -> None:
    file = secret(own / ".ray-ft/secrets", "HF_TOKEN", "x" * (credentials.LARGEST + 1))
    with pytest.raises(CredentialError, match="no secret"):
        credentials.load()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CredentialError, match="no text"):
        credentials.load()


def test_storage_that_is_elsewhere_finds_them(own: Path) -> None:
    """Where a Ray worker needs them first: nothing of a job carries them there."""
    secret(own / ".ray-ft/secrets", "AWS_SECRET_ACCESS_KEY", VALUE)
    paths.filesystem("/tmp")
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
    paths.filesystem("memory://anything")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == VALUE


# --------------------------------------------------------------------------------------------------- recognising


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HF_TOKEN", "", True), ("AWS_SECRET_ACCESS_KEY", "", True), ("AWS_ACCESS_KEY_ID", "", True),
        ("RAY_FT_API_KEYS", "", True), ("OPENAI_API_KEY", "", True), ("DB_PASSWORD", "", True), ("GH_PAT", "", True),
        ("hf_token", "", True), ("AWS_SESSION_TOKEN", "", True), ("API_KEY_2", "", True), ("PGPASSWORD", "", True),
        ("TOKENIZERS_PARALLELISM", "false", False), ("RAY_AUTH_TOKEN_PATH", "/x", False), ("RAY_AUTH_MODE", "", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/key.json", False), ("AWS_REGION", "eu-west-1", False),
        ("KEYBOARD", "", False), ("MONKEY", "", False), ("RAY_ADDRESS", "10.0.0.1:6379", False),
        ("HF_HOME", "/x", False), ("PWD", "/work", False), ("OLDPWD", "/work", False), ("SSH_AUTH_SOCK", "/x", False),
        ("HARMLESS", HF, True), ("HARMLESS", AKIA, True), ("HARMLESS", KEY, True), ("HARMLESS", JWT, True),
        ("PROXY", "http://me:sesame1@proxy:3128", True), ("PROXY", "http://proxy:3128", False),
        ("HARMLESS", "-----BEGIN RSA PRIVATE KEY-----\nMIIE", True), ("NCCL_DEBUG", "INFO", False),
    ],
)  # fmt: skip
def test_what_looks_secret(name: str, value: str, expected: bool) -> None:
    assert looks_secret(name, value) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token {HF}, ok", "token ***, ok"),
        (f"id {AKIA}.", "id ***."),
        (f"Authorization: Bearer {KEY[3:]}", "Authorization: Bearer ***"),
        ("s3://me:sesame@bucket/x?region=y", "s3://***@bucket/x?region=y"),
        ("https://x/y?X-Amz-Signature=0123456789abcdef&z=1", "https://x/y?X-Amz-Signature=***&z=1"),
        ("s3://b/x?access_key=aaaabbbb&secret_key=ccccdddd", "s3://b/x?access_key=***&secret_key=***"),
        (f"before -----BEGIN PRIVATE KEY-----\n{'A' * 64}\n-----END PRIVATE KEY----- after", "before *** after"),
        (JWT, "***"),
        (f"bearer {'ab12' * 16}", "bearer ***"),
        ("Basic bWU6c2VzYW1lLW9wZW4=", "Basic ***"),
        (f"sk-or-v1-{'0a' * 32}", "***"),
        ("HF_TOKEN=abcdefghij, x?token=abcdefghij", "HF_TOKEN=*** x?token=***"),
    ],
)
def test_shapes_are_taken_out(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "step 100/200  loss 1.2345", "s3://bucket/runs/demo", "http://127.0.0.1:8000/v1", "google/gemma-3-1b-it",
        "data.train.0.prompt_field=question", "next: ray-ft export runs/demo", "tokens/s 1,234", "user@host:/path",
        '{"sha256": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}', "risk-free-and-basic things",
        "{translation:  {source_text: a}}", "https://images.example.org/a@2x.png:80", "12:30:00 someone@example.org",
        "a basic understanding of bearer authentication", "s3://bucket/sk-news-crawl-2019-2022-dedup",
        "loss_per_token=0.12345678", "max_new_token=10000000", "pad_token=<|end_of_text|>", "token=<|end_of_text|>",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "part", ["a", "a.b-", "-eyJabcdefgh", "sk-", "sk-A1-", "https://", "://", "s:", "://a:b", "token=", "Basic a ",
             "A_", "-----BEGIN A ", "-----BEGIN A PRIVATE KEY-----", "xoxb-", "Bearer ", "hf_"],
)  # fmt: skip
def test_long_text_takes_no_longer_than_its_length(part: str) -> None:
    """All that is printed goes through the patterns; one that tries every end for each beginning takes minutes here."""
    text = part * (300_000 // len(part))
    began = time.process_time()
    redacted(text)
    assert time.process_time() - began < 10


def test_known_values_are_taken_out(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also such as have no look: of the environment, of files, and the cluster's token."""
    monkeypatch.setenv("DB_PASSWORD", "correct horse battery")
    monkeypatch.setenv("RAY_FT_API_KEYS", "ann:0123456789abcdefg,production:gfedcba9876543210")
    monkeypatch.setenv("ACCOUNT_KEY", "the first line\nthe second line\n")
    monkeypatch.setenv("HF_HOME", "/a/longer/value")
    secret(own / ".ray-ft/secrets", "ODD_ONE", "value-of-a-file")
    secret(own / ".ray", "auth_token", "deadbeef" * 8)
    assert redacted("value-of-a-file") == "value-of-a-file"
    credentials.load()
    said = redacted(
        "correct horse battery, gfedcba9876543210, value-of-a-file, " + "deadbeef" * 8 + ", /a/longer/value, production"
    )
    assert said == "***, ***, ***, ***, /a/longer/value, production"
    assert redacted("  the second line") == "  ***"


def test_short_values_leave_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert redacted("a test of tests") == "a test of tests"


# --------------------------------------------------------------------------------------------------------- output


def test_the_view_says_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    view = View()
    view.line(f"one {VALUE}")
    view.console.print(f"two {VALUE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credentials, "redacted", str)  # the planted fault: the console's own line of defence is off
        view.console.print(f"three {VALUE}")
    assert capsys.readouterr().out == f"one ***\ntwo ***\nthree {VALUE}\n"


def test_a_live_panel_is_shown_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A panel replaces sys.stdout by a proxy to its console, which must not lead back to the proxy."""
    monkeypatch.setenv("HF_TOKEN", VALUE)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    view = View()
    assert view.console.is_terminal
    with view.training(4) as panel:
        panel.update({"step": 1, "loss": 2.5})
        print(f"beside it {VALUE}")
    out = capsys.readouterr().out
    assert "beside it ***" in out
    assert "2.5000" in out
    assert VALUE not in out


MAIN = """
import importlib, os, sys
module = importlib.import_module("ray_ft.cli.app")
os.environ["HF_TOKEN"] = {value!r}

@module.app.command()
def fail(kind: str) -> None:
    print("printed", {value!r})
    print("noted", {value!r}, file=sys.stderr)
    from ray_ft.errors import StorageError
    if kind == "deliberate":
        raise StorageError("no s3://me:{value}@bucket", ["try {value}"])
    raise RuntimeError("a bug: {value}")

sys.argv = ["ray-ft", "fail", {kind!r}]
module.main()
"""


@pytest.mark.parametrize(("kind", "status"), [("deliberate", 1), ("bug", 1)])
def test_no_way_out_of_the_command_line_shows_one(kind: str, status: int, own: Path) -> None:
    code = MAIN.format(value=VALUE, kind=kind)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert "printed ***" in done.stdout
    assert "noted ***" in done.stderr
    assert ("s3://***@bucket" if kind == "deliberate" else "a bug: ***") in done.stderr
    assert VALUE not in done.stdout + done.stderr.replace(repr(VALUE), "")


def test_what_was_made_for_the_reader_is_shown() -> None:
    with credentials.revealing(KEY):
        assert redacted(f"{KEY} and {HF} and {KEY}") == f"{KEY} and *** and {KEY}"
    assert redacted(KEY) == "***"


def test_a_new_key_is_shown() -> None:
    done = CliRunner().invoke(cli.app, ["key", "ann"])
    assert done.exit_code == 0
    assert done.stdout.startswith("rft-")


def test_a_stream_is_otherwise_itself(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as file:
        stream = credentials.Redacting(file)
        assert stream.fileno() == file.fileno()
        stream.writelines([HF, "\n"])
        console = Console(file=stream, width=300)  # type: ignore[arg-type]
        console.print(f"[bold]{HF}[/bold]")
    assert (tmp_path / "out").read_text() == "***\n***\n"


# ---------------------------------------------------------------------------------------------------------- token


def token_command(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["token", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_token_is_made_once_and_closed(own: Path) -> None:
    said = token_command()
    file = own / ".ray/auth_token"
    token = file.read_text()
    assert len(token) == 64
    assert int(token, 16) > 0
    assert file.stat().st_mode & 0o777 == 0o600
    assert f"made the cluster's token: {file}" in said
    assert token not in said
    assert "there is the cluster's token" in token_command()
    assert file.read_text() == token
    assert token_command("--show") == f"{token}\n"


def test_an_open_token_is_closed_with_a_line(own: Path) -> None:
    file = secret(own / ".ray", "auth_token", "ab" * 32, 0o644)
    assert f"{file} had mode 0644" in token_command()
    assert file.stat().st_mode & 0o777 == 0o600
    assert credentials.close_token() is None


def test_an_empty_token_is_no_token(own: Path) -> None:
    secret(own / ".ray", "auth_token", "")
    with pytest.raises(CredentialError, match="is empty"):
        credentials.make_token()


def test_a_token_that_is_being_written_is_waited_for(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first commands at once: the second may find the file before it has its content."""
    monkeypatch.setattr(credentials, "WRITTEN_SECONDS", 60)
    file = secret(own / ".ray", "auth_token", "")
    writer = threading.Timer(0.2, file.write_text, ["ab" * 32])
    writer.start()
    assert not credentials.make_token()
    writer.join()
    assert credentials.token() == "ab" * 32


def test_the_token_is_made_where_it_is_looked_for(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "deep/er/token"))
    assert credentials.make_token()
    assert credentials.token() == (tmp_path / "deep/er/token").read_text()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    assert credentials.token() == "of the environment"


# --------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run.storage=s3://me:sesame@bucket/runs", "run.storage"),
        ("model.path=s3://bucket/m?access_key=aaaabbbb&secret_key=ccccdddd", "model.path"),
        (f"data.train.0.path=https://{HF}@hub.example.org/a.jsonl", "data.train.0.path"),
        (f"data.train.0.prompt=ask {VALUE}", "data.train.0.prompt"),
    ],
)
def test_a_recipe_with_credentials_is_refused(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    with pytest.raises(RecipeError, match="holds credentials") as caught:
        make_recipe(override)
    assert caught.value.what.endswith(f"in {key}")
    assert "~/.ray-ft/secrets" in str(caught.value)
    assert not any(part in json.dumps([caught.value.what, *caught.value.ways_out]) for part in ("sesame", VALUE, HF))
