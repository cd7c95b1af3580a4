"""Jobs from here: what goes along, what is refused before anything is sent, and a cluster that goes away and comes
back, here a small server in its place."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ray_ft import submit
from ray_ft.cli import app
from ray_ft.errors import CredentialError, RayFtError, RecipeError, ResourceError
from ray_ft.submit import api as jobs_api
from ray_ft.submit import check, follow, package, show
from ray_ft.submit.api import Api, Job, NoAnswer, find_address, find_token
from ray_ft.view import View

TOKEN = "0123456789abcdef" * 2

# --------------------------------------------------------------------------------------------------------- the package


def make(folder: Path, *names: str, size: int = 3) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    return folder


def test_what_goes_along_and_what_stays(tmp_path: Path) -> None:
    make(
        tmp_path, "configs/a.yaml", "ray_ft/cli.py", "notes.md", ".git/HEAD", "env/bin/python", "env/pyvenv.cfg",
        "ray_ft/__pycache__/x.pyc", "base/model.safetensors", "base/config.json", "data/rows.jsonl", ".env",
        "runs/words/recipe.yaml", "runs/words/checkpoints/step/state.json", "runs/_prepared/k/stats.json", "id_rsa",
        "build/keep.py", "build/drop.py", "deep/secret.txt", "deep/er/secret.txt", "deep/er/open.txt",
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text("build/*\n!build/keep.py\n")
    (tmp_path / "deep" / ".gitignore").write_text("secret.txt\n")
    (tmp_path / "linked").symlink_to(tmp_path.parent)
    found = package.collect(tmp_path)
    assert set(found.files) == {
        ".gitignore", "configs/a.yaml", "ray_ft/cli.py", "notes.md", "base/config.json", "build/keep.py",
        "deep/.gitignore", "deep/er/open.txt",
    }  # fmt: skip
    assert found.left_out == {
        "tools' own": 3, "weights": 1, "data": 1, "credentials": 2, "runs": 2, "ignored": 3, "links": 1
    }  # fmt: skip
    assert found.holds(tmp_path / "base") and not found.holds(tmp_path / "data")


def test_include_brings_back_all_but_credentials_and_exclude_wins(tmp_path: Path) -> None:
    make(tmp_path, "a.yaml", "data/rows.jsonl", "data/more.jsonl", "ignored/x.txt", ".env", "runs/w/recipe.yaml")
    make(tmp_path, "runs/w/checkpoints/w.bin")
    (tmp_path / ".gitignore").write_text("ignored/\n")
    found = package.collect(tmp_path, ["data/*.jsonl", "ignored/**", ".env", "runs/w/recipe.yaml"], ["more.jsonl"])
    assert set(found.files) == {".gitignore", "a.yaml", "data/rows.jsonl", "ignored/x.txt", "runs/w/recipe.yaml"}


def test_equal_content_is_an_equal_archive(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", "a/b.py", "c.sh"), make(tmp_path / "other", "a/b.py", "c.sh")
    (one / "c.sh").chmod(0o755)
    (other / "c.sh").chmod(0o755)
    name, content = package.collect(one).build()
    assert package.collect(other).build() == (name, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["a/b.py", "c.sh"] and archive.read("a/b.py") == b"xxx"
        assert archive.getinfo("c.sh").external_attr >> 16 & 0o100
    (other / "a/b.py").write_bytes(b"xxy")
    assert package.collect(other).build()[0] != name


def test_a_package_too_large_names_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    make(tmp_path, "a.py")
    (tmp_path / "large.dat").write_bytes(os.urandom(40_000))
    monkeypatch.setattr(package, "MOST", 30_000)
    with pytest.raises(RecipeError, match=r"largest: large\.dat"):
        package.collect(tmp_path).build()
    monkeypatch.setattr(package, "HOPELESS", 30_000)
    with pytest.raises(RecipeError, match=r"largest: large\.dat"):
        package.collect(tmp_path).build()
    assert package.collect(tmp_path, exclude=["*.dat"]).build()[1]


def test_a_recipe_beside_its_rows_is_no_run(tmp_path: Path) -> None:
    make(tmp_path, "task/recipe.yaml", "task/data/prompt.txt", "run/recipe.yaml", "run/data/stats.json")
    assert set(package.collect(tmp_path).files) == {"task/recipe.yaml", "task/data/prompt.txt"}


def test_limit_is_rays_own() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert package.MOST == DASHBOARD_CLIENT_MAX_SIZE


@pytest.mark.parametrize("folder", ["/", "~", "/nowhere/at/all"])
def test_a_whole_machine_is_not_sent(folder: str) -> None:
    with pytest.raises(RecipeError):
        package.collect(folder)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a recipe over s3:// that can be submitted as it is."""
    folder = tmp_path / "project"
    content = {
        "run": {"name": "words", "storage": "s3://bucket/runs"},
        "model": {"path": "google/gemma-3-1b-it"},
        "data": {"train": [{"path": "s3://bucket/rows.jsonl", "format": "text"}]},
    }
    make(folder, "configs/a.yaml", "data/rows.jsonl", "base/config.json", "base/model.safetensors")
    (folder / "configs/a.yaml").write_text(yaml.safe_dump(content))
    return folder


def checked(project: Path, *overrides: str, include: tuple[str, ...] = (), path: str = "configs/a.yaml") -> Any:
    return check.check_recipe(path, overrides, [], package.collect(project, include))


def test_a_recipe_over_shared_storage_passes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(project, "train.workers=2")
    assert found.arguments == ["configs/a.yaml", "train.workers=2"]
    assert (found.run, found.storage, found.alone, found.notes, found.own) == (
        "words",
        "s3://bucket/runs",
        True,
        [],
        [],
    )
    monkeypatch.chdir(project / "configs")
    assert checked(project, path="a.yaml").arguments == ["configs/a.yaml"]  # as the job, in the folder above, names it


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.storage=runs", "run.storage is relative"),
        ("run.storage={project}/runs", "run.storage {project}/runs: it would lie in the job's copy"),
        ("model.path=base", "model.path=base lies in the working directory, and 1 of its files do not go along"),
        ("data.train.0.path=data/rows.jsonl", "--include 'data/rows.jsonl'"),
        ("data.train.0.path=data/none.jsonl", "matches no file"),
        ("data.train.0.path={project}/data/rows.jsonl", "absolute path of this machine: write data/rows.jsonl"),
        ("train.workers=0", "train.workers=1 or more"),
    ],
)
def test_what_the_job_would_not_find_is_refused(project: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        checked(project, override.format(project=project))
    assert said.format(project=project) in str(error.value)


def test_all_faults_at_once(project: Path) -> None:
    with pytest.raises(RecipeError) as error:
        checked(project, "run.storage=runs", "data.train.0.path=data/rows.jsonl", "model.path=base")
    assert len(error.value.ways_out) == 3


def test_what_is_included_goes_along(project: Path) -> None:
    found = checked(project, "data.train.0.path=data/*.jsonl", "model.path=base", include=("data/**", "base/**"))
    assert len(found.notes) == 1 and "belongs to this submission" in found.notes[0]


def test_absolute_paths_are_said_and_a_nodes_own_are_known(project: Path) -> None:
    found = checked(project, "run.storage=/mnt/runs", "data.train.0.path=/mnt/rows.jsonl", "model.path=/mnt")
    assert [note.partition("=")[0] for note in found.notes] == ["run.storage", "model.path", "data.train.0.path"]
    assert not found.own
    assert checked(project, "run.storage=/tmp/runs").own == ["run.storage=/tmp/runs"]


@pytest.mark.parametrize("path", ["nothing.yaml", "../outside.yaml", "configs/ignored.yaml"])
def test_a_recipe_that_does_not_go_along(project: Path, path: str) -> None:
    make(project, "../outside.yaml", "configs/ignored.yaml")
    (project / ".gitignore").write_text("ignored.yaml\n")
    with pytest.raises(RecipeError):
        checked(project, path=str(project / path))


@pytest.mark.parametrize(
    ("verb", "given", "said"),
    [
        ("evaluate", {"target": "runs/words"}, "2 of its files do not go along"),
        ("evaluate", {"target": "s3://b/words", "path": "configs/none.yaml"}, "there is no such file"),
        ("evaluate", {"target": "s3://b/words", "to": "report"}, "--to report lies in the job's copy"),
        ("export", {"run": "base"}, "1 of its files do not go along"),
        (
            "generate",
            {"target": "s3://b/words", "source": ["data/rows.jsonl"], "to": "s3://b/x"},
            "data/rows.jsonl: in",
        ),
        ("generate", {"target": "s3://b/words", "source": ["s3://b/r"], "to": "out.jsonl"}, "--to out.jsonl lies in"),
    ],
)
def test_arguments_of_other_verbs(project: Path, verb: str, given: dict[str, Any], said: str) -> None:
    make(project, "runs/words/recipe.yaml", "runs/words/checkpoints/x")
    with pytest.raises(RecipeError) as error:
        check.check_arguments(verb, given, [], package.collect(project))
    assert said in str(error.value)


def test_arguments_that_can_work(project: Path) -> None:
    given = {"target": "s3://b/words", "source": ["s3://b/rows.jsonl"], "to": "s3://b/out.jsonl"}
    found = check.check_arguments("generate", given, ["s3://b/words"], package.collect(project))
    assert (found.run, found.storage, found.alone, found.notes) == ("words", "s3://b", False, [])
    found = check.check_arguments("evaluate", {"target": "google/gemma-3-1b-it"}, [], package.collect(project))
    assert found.run == "gemma-3-1b-it"


def test_only_named_variables_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("INNOCENT", "hf_" + "a" * 30)
    assert check.check_environment(["NCCL_DEBUG"]) == {"NCCL_DEBUG": "INFO"}
    for name in ("HF_TOKEN", "INNOCENT", "HF_TOKEN=abc"):
        with pytest.raises(CredentialError) as error:
            check.check_environment([name])
        assert "a" * 30 not in str(error.value) and "abc" not in str(error.value)
    for name in ("NOT_SET_ANYWHERE", "NCCL_DEBUG=WARN"):
        with pytest.raises(RecipeError):
            check.check_environment([name])


@pytest.mark.parametrize("argument", ["data.train.0.path=https://me:pass1234@host/x", "x.hf_token=abc"])
def test_no_secret_in_the_command_line(argument: str) -> None:
    check.check_line(["recipe.yaml", "train.workers=2"])
    with pytest.raises(CredentialError) as error:
        check.check_line([argument])
    assert "pass1234" not in str(error.value) and "abc" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ address, token


@pytest.mark.parametrize(
    ("given", "variables", "found"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("https://ray.example.org/", {"RAY_ADDRESS": "http://other:1"}, "https://ray.example.org"),
        (None, {"RAY_ADDRESS": "10.0.0.4:8265"}, "http://10.0.0.4:8265"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://b:2"),
        ("[::1]:8265", {}, "http://[::1]:8265"),
    ],
)
def test_address(given: str | None, variables: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_address(given) == found


@pytest.mark.parametrize("given", ["ray://head:10001", "auto", "local", "http://user:password@head:8265"])
def test_no_address(given: str) -> None:
    with pytest.raises(RayFtError) as error:
        find_address(given)
    assert "password@" not in str(error.value)


def test_token_in_rays_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert find_token() == ("", "")
    make(tmp_path, ".ray/auth_token")
    assert find_token() == ("xxx", str(tmp_path / ".ray/auth_token"))
    (tmp_path / "other").write_text("yyy\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert find_token()[0] == "yyy"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "zzz")
    assert find_token() == ("zzz", "RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(CredentialError):
        find_token()


def test_oldest_ray_is_what_the_project_asks_for() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [ray] = [one for one in project["dependencies"] if one.startswith("ray[")]
    assert ray.partition(">=")[2] == ".".join(map(str, jobs_api.OLDEST_RAY))


# --------------------------------------------------------------------------------------------------- a cluster in small


class Cluster:
    """Answers as the jobs API does, with a token; `broken` is what it does instead to so many requests."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.packages: dict[str, bytes] = {}
        self.ray, self.alive, self.cpus, self.broken, self.asked = "2.60.0", 1, 3.0, list[str](), list[str]()
        self.on_logs: Callable[[], None] = lambda: None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                outer.asked.append(f"{self.command} {self.path}")
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                how = outer.broken.pop(0) if outer.broken else ""
                if how == "cut":
                    self.connection.close()
                    self.close_connection = True
                    return
                status, answer = outer.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
                if how == "lost":  # done, and the answer does not arrive
                    self.connection.close()
                    self.close_connection = True
                    return
                if how == "500":
                    status, answer = 500, "Traceback\nit is starting"
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: bytes, auth: str) -> tuple[int, Any]:
        if auth != f"Bearer {TOKEN}":
            return (403, "Forbidden") if auth else (401, "Unauthorized")
        if path == "/api/version":
            return 200, {"ray_version": self.ray}
        if path == "/api/v0/nodes":
            resources = {"CPU": self.cpus} if self.cpus else {}
            nodes = [{"state": "ALIVE", "resources_total": resources}] * self.alive + [{"state": "DEAD"}]
            return 200, {"data": {"result": {"result": nodes}}}
        if path.startswith("/api/packages/gcs/"):
            name = path.rpartition("/")[2]
            if method == "PUT":
                self.packages[name] = body
                return 200, ""
            return (200 if name in self.packages else 404), ""
        if path == "/api/jobs/" and method == "GET":
            return 200, [*self.jobs.values(), {"type": "DRIVER", "submission_id": None, "status": "RUNNING"}]
        if path == "/api/jobs/":
            wanted = json.loads(body)
            name = wanted["submission_id"]
            if name in self.jobs:
                return 400, f"ValueError: Job with submission_id {name} already exists."
            self.add(name, **{key: wanted[key] for key in ("metadata", "entrypoint", "runtime_env")})
            return 200, {"submission_id": name}
        name, _, what = path.removeprefix("/api/jobs/").partition("/")
        if name not in self.jobs:
            return 404, "no such job"
        if what == "logs":
            self.on_logs()
            return 200, {"logs": self.logs.get(name, "")}
        if what == "stop":
            self.logs[name] += "stopped after step 7 of 30; the same command continues\n"
            self.end(name, "STOPPED")
            return 200, {"stopped": True}
        return 200, self.jobs[name]

    def add(self, name: str, status: str = "RUNNING", **more: Any) -> None:
        at = 1_700_000_000_000 + 1000 * len(self.jobs)
        self.jobs[name] = {"submission_id": name, "status": status, "start_time": at, **more}
        self.logs.setdefault(name, "")

    def end(self, name: str, status: str, code: int | None = None) -> None:
        self.jobs[name] |= {
            "status": status,
            "driver_exit_code": code,
            "end_time": self.jobs[name]["start_time"] + 5000,
        }


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(follow, "FIRST_WAIT", 0.01)
    one = Cluster()
    yield one
    one.server.shutdown()
    one.server.server_close()


class Seen:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def say(self, text: str) -> None:
        self.said.append(text)


def test_no_line_is_lost_or_shown_twice(cluster: Cluster) -> None:
    wanted = [f"line {number} é" for number in range(40)]
    whole = "2026-01-01 00:00:00,000\tINFO job_manager.py:1 -- Runtime env is setting up.\n"
    whole += "Running entrypoint for job a: exec python\n" + "\n".join(wanted)  # the last one without an end
    cluster.add("a")
    at = [0]

    def more() -> None:
        at[0] += 23  # in the middle of lines
        cluster.logs["a"] = whole[: at[0]]
        if at[0] >= len(whole):
            cluster.end("a", "SUCCEEDED", 0)
        if at[0] % 5 == 0:
            cluster.broken += ["cut", "500", "cut"]

    cluster.on_logs = more
    seen = Seen()
    job = follow.follow(Api(cluster.address), "a", seen)
    assert job.status == "SUCCEEDED" and seen.lines == wanted
    away, back = (sum(word in said for said in seen.said) for word in ("the job goes on", "connected again"))
    assert away == back > 2  # one line for each time, not for each attempt


def test_a_server_that_is_gone_is_waited_for_and_then_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add("a")
    cluster.server.shutdown()
    cluster.server.server_close()
    monkeypatch.setattr(follow, "AWAY_SECONDS", 0.1)
    with pytest.raises(NoAnswer):
        follow.follow(Api(cluster.address), "a", Seen())


def test_a_text_that_cannot_be_read_does_not_hold_the_end_back(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.end("a", "FAILED", 3)
    cluster.broken = ["", "500"] * 10
    seen = Seen()
    assert follow.exit_code(follow.follow(Api(cluster.address), "a", seen)) == 3
    assert "cannot be read" in seen.said[-1]


@pytest.mark.parametrize(
    ("status", "code", "exits"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 143)],
)
def test_exit_code(status: str, code: int | None, exits: int) -> None:
    assert follow.exit_code(Job("a", status, {}, "", "", None, None, code)) == exits


@pytest.mark.parametrize(("token", "said"), [("", "this machine has none"), ("bad", "is not the one of")])
def test_token_refused(
    cluster: Cluster, token: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(CredentialError, match=said):
        Api(cluster.address).jobs()


def test_what_is_no_dashboard(cluster: Cluster) -> None:
    cluster.answer = lambda *_: (200, "<html>")  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="no Ray dashboard"):
        Api(cluster.address).ray_version()
    cluster.answer = lambda *_: (404, "?")  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="404"):
        Api(cluster.address).ray_version()


def test_an_old_cluster_is_refused(cluster: Cluster) -> None:
    cluster.ray = "2.9.3"
    with pytest.raises(ResourceError, match=r"runs Ray 2\.9\.3; ray-ft needs 2\.60"):
        Api(cluster.address).ray_version()


def test_an_open_way_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert "without encryption" in (Api("http://10.1.2.3:8265").warning or "")
    assert Api("https://10.1.2.3:8265").warning is None
    assert Api("http://127.0.0.1:8265").warning is None


# ---------------------------------------------------------------------------------------------------------- submissions


def sent(cluster: Cluster, project: Path, *overrides: str) -> tuple[str, list[str]]:
    said: list[str] = []
    wrapped = package.collect(project)
    found = submit.prepare("train", ["configs/a.yaml"], {"path": "configs/a.yaml", "overrides": overrides}, wrapped)
    return submit.send(Api(cluster.address), "train", found, wrapped, {"NCCL_DEBUG": "INFO"}, said.append), said


def test_what_is_sent(cluster: Cluster, project: Path) -> None:
    name, said = sent(cluster, project, "train.workers=2", "run.name=a/b", "model.path=/mnt/a model")
    assert name == "train-a-b-1" and any("files, 0.0 MiB; left out: 1 data, 1 weights" in line for line in said)
    job = cluster.jobs[name]
    assert job["entrypoint"] == (
        "exec python -m jobs.train configs/a.yaml train.workers=2 run.name=a/b 'model.path=/mnt/a model'"
    )
    assert job["metadata"]["ray_ft_run"] == "a/b" and job["metadata"]["ray_ft_storage"] == "s3://bucket/runs"
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "NCCL_DEBUG": "INFO"}
    [(archive, content)] = cluster.packages.items()
    assert job["runtime_env"]["working_dir"] == f"gcs://{archive}"
    assert "configs/a.yaml" in zipfile.ZipFile(io.BytesIO(content)).namelist()
    cluster.end(name, "SUCCEEDED", 0)
    assert sent(cluster, project, "run.name=a/b")[0] == "train-a-b-2"
    assert sum(one.startswith("PUT") for one in cluster.asked) == 1  # the cluster had it


def test_one_job_writes_a_run(cluster: Cluster, project: Path) -> None:
    name, _ = sent(cluster, project)
    with pytest.raises(ResourceError, match="train-words-1 is at work on the run words already") as error:
        sent(cluster, project)
    assert "ray-ft attach train-words-1" in error.value.ways_out
    sent(cluster, project, "run.storage=s3://elsewhere")  # another run of the same name
    cluster.end(name, "STOPPED")
    assert sent(cluster, project)[0] == "train-words-3"


def test_a_lost_answer_does_not_send_twice(cluster: Cluster, project: Path) -> None:
    cluster.broken = ["", "", "", "", "lost"]  # version, jobs, package, upload, submit
    assert sent(cluster, project)[0] == "train-words-1"
    assert list(cluster.jobs) == ["train-words-1"]


def test_a_nodes_own_storage_needs_a_single_node(cluster: Cluster, project: Path) -> None:
    assert sent(cluster, project, "run.storage=/tmp/runs")
    cluster.alive = 2
    with pytest.raises(ResourceError, match="each node has its own run"):
        sent(cluster, project, "run.storage=/tmp/runs", "run.name=other")
    cluster.alive, cluster.cpus = 1, 0  # a head alone that only drives: its workers are yet to be started
    with pytest.raises(ResourceError, match="each node has its own run"):
        sent(cluster, project, "run.storage=/tmp/runs", "run.name=other")


def test_stop_says_the_step(cluster: Cluster) -> None:
    cluster.add("train-a-1", metadata={"ray_ft_run": "a"})
    out = CliRunner().invoke(app, ["stop", "a", "--address", cluster.address])
    assert out.exit_code == 0, out.output
    assert "train-a-1 stopped after step 7 of 30, with a checkpoint" in out.output
    assert "is over already: stopped" in CliRunner().invoke(app, ["stop", "a", "--address", cluster.address]).output


def test_find_takes_an_id_or_the_newest_of_a_run(cluster: Cluster) -> None:
    for number, status in ((1, "FAILED"), (2, "RUNNING"), (3, "FAILED")):
        cluster.add(f"train-a-{number}", status, metadata={"ray_ft_run": "a"})
    asked = Api(cluster.address)
    assert submit.find(asked, "train-a-1").status == "FAILED"
    assert submit.find(asked, "a").id == "train-a-2"  # the one alive
    cluster.end("train-a-2", "FAILED")
    assert submit.find(asked, "a").id == "train-a-3"
    with pytest.raises(ResourceError, match="neither a job nor a run 'b'"):
        submit.find(asked, "b")


def test_the_command_line_end_to_end(cluster: Cluster, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")

    def over() -> None:
        cluster.logs["train-words-1"] = "step 1/2  loss 3\ntrained\n"
        cluster.end("train-words-1", "FAILED", 5)

    cluster.on_logs = over
    address = ["--address", cluster.address]
    out = CliRunner().invoke(
        app, ["submit", "train", "configs/a.yaml", "train.workers=2", "--env", "NCCL_DEBUG", *address]
    )
    assert out.exit_code == 5, out.output
    lines = out.output.splitlines()
    assert lines[-3:] == ["step 1/2  loss 3", "trained", "train-words-1 failed, exit status 5"]
    out = CliRunner().invoke(app, ["jobs", *address])
    assert "train-words-1" in out.output and "failed (5)" in out.output and "0:00:05" in out.output
    assert "no running jobs" in CliRunner().invoke(app, ["jobs", "--running", *address]).output


def test_wrong_arguments_are_refused_before_anything_is_sent(
    cluster: Cluster, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    address = ["--address", cluster.address]
    assert (
        CliRunner().invoke(app, ["submit", "generate", "s3://b/w", "s3://b/r.jsonl", *address]).exit_code == 2
    )  # --to
    assert CliRunner().invoke(app, ["submit", "train", "configs/a.yaml", "--nonsense", *address]).exit_code == 2
    assert isinstance(CliRunner().invoke(app, ["submit", "serve", "x", *address]).exception, RecipeError)
    out = CliRunner().invoke(
        app, ["submit", "generate", "s3://b/w", "s3://b/r.jsonl", "--to", "s3://b/o.jsonl", "--detach", *address]
    )
    assert out.exit_code == 0, out.output
    assert cluster.jobs["generate-w-1"]["entrypoint"].endswith(
        "jobs.generate s3://b/w s3://b/r.jsonl --to s3://b/o.jsonl"
    )


def test_ctrl_c_leaves_the_job_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.add("train-a-1")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "attach", interrupt)
    out = CliRunner().invoke(app, ["attach", "train-a-1", "--address", cluster.address])
    assert out.exit_code == 130
    assert "train-a-1 goes on; ray-ft attach train-a-1 --address" in out.output
    assert not any("stop" in one for one in cluster.asked)


# -------------------------------------------------------------------------------------------------------------- screen


def test_panel_on_a_terminal_keeps_only_the_newest_step() -> None:
    out = io.StringIO()
    view = View(Console(file=out, force_terminal=True, width=100, highlight=False))
    with show.shown(view) as screen:
        screen.line("eval data: 3 rows [x]")
        for step in (1, 2, 3):
            screen.line(f"step {step}/3  loss {step}.5")
    text = out.getvalue()
    assert "eval data: 3 rows [x]" in text and "3/3" in text and "loss 3.5" in text


def test_plain_lines_elsewhere() -> None:
    out = io.StringIO()
    with show.shown(View(Console(file=out, width=100, highlight=False, soft_wrap=True))) as screen:
        screen.line("step 1/3  loss 1.5")
        screen.line("Authorization: Bearer " + "a" * 40)
    assert out.getvalue() == "step 1/3  loss 1.5\nAuthorization: Bearer ***\n"
