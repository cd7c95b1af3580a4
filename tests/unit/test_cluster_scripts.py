"""What the cluster files run on a node: `setup.sh`, `start.sh`, `tls.sh`, each in a home of its own, without Ray."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from multihost.testbed import HEALTH

ROOT = Path(__file__).resolve().parents[2]
BASIC = "/usr/local/bin:/usr/bin:/bin"
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl not found")


def run(script: str, *arguments: str, root: Path = ROOT, **environment: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(root / "cluster" / script), *arguments],
        env={"PATH": BASIC, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


# ------------------------------------------------------------------------------------------------------------- start.sh


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A home with a token, and a `ray` that says how it was called."""
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray/auth_token"
    token.write_text("ab" * 32)
    token.chmod(0o644)
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv\nulimit -n\n')
    ray.chmod(0o755)
    return tmp_path


def start(node: Path, *arguments: str, **environment: Any) -> subprocess.CompletedProcess[str]:
    return run("start.sh", *arguments, HOME=str(node), PATH=f"{node}/bin:{BASIC}", **environment)


def test_a_head_listens_on_loopback_and_asks_for_the_token(node: Path) -> None:
    done = start(node, "head", "--num-cpus=0", OMP_NUM_THREADS="1", RAY_AUTH_TOKEN="another")
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert said[0] == "start"
    for option in ("--head", "--port=6379", "--dashboard-host=127.0.0.1", "--disable-usage-stats", "--num-cpus=0"):
        assert option in said
    assert "RAY_AUTH_MODE=token" in said
    assert f"RAY_AUTH_TOKEN_PATH={node}/.ray/auth_token" in said
    assert (node / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert not [line for line in said if line.startswith(("RAY_AUTH_TOKEN=", "OMP_NUM_THREADS=", "--autoscaling"))]
    (wait,) = [line for line in said if line.startswith("RAY_JOB_STOP_WAIT_TIME_S=")]
    assert int(wait.partition("=")[2]) > 60  # a checkpoint's time


def test_the_test_bed_finds_dead_nodes_as_a_cluster_does(node: Path) -> None:
    (option,) = [line for line in start(node, "head").stdout.splitlines() if line.startswith("--system-config=")]
    assert json.loads(option.partition("=")[2]) == HEALTH


def test_a_head_that_the_launcher_made_runs_the_autoscaler(node: Path) -> None:
    (node / "ray_bootstrap_config.yaml").write_text("{}")
    assert f"--autoscaling-config={node}/ray_bootstrap_config.yaml" in start(node, "head").stdout.splitlines()


def test_a_worker_joins_its_head(node: Path) -> None:
    said = start(node, "worker", "--num-gpus=8", RAY_HEAD_IP="10.0.0.1").stdout.splitlines()
    assert "--address=10.0.0.1:6379" in said
    assert "--num-gpus=8" in said
    assert "--head" not in said
    assert not [line for line in said if line.startswith("--system-config")]


@pytest.mark.parametrize(
    ("arguments", "token", "told"),
    [
        (("head",), None, "there is no token"),
        (("head",), "", "there is no token"),
        (("worker",), "abc", "RAY_HEAD_IP is not set"),
        (("header",), "abc", "'header' is no role"),
        ((), "abc", "'' is no role"),
    ],
)
def test_start_refuses(node: Path, arguments: tuple[str, ...], token: str | None, told: str) -> None:
    file = node / ".ray/auth_token"
    file.unlink()
    if token is not None:
        file.write_text(token)
    done = start(node, *arguments)
    assert done.returncode == 1
    assert told in done.stderr
    assert done.stdout == ""


def test_a_start_that_was_too_slow_is_tried_again(node: Path) -> None:
    ray = node / "bin/ray"
    ray.write_text(f'#!/bin/sh\necho "$1" >>{node}/calls\n[ "$1" = stop ] || [ $(wc -l <{node}/calls) -gt 2 ]\n')
    assert start(node, "head").returncode == 0
    assert (node / "calls").read_text().split() == ["start", "stop", "start"]
    ray.write_text(f'#!/bin/sh\necho "$1" >>{node}/more\n[ "$1" = stop ]\n')
    done = start(node, "head")
    assert (done.returncode, (node / "more").read_text().split().count("start")) == (1, 3)
    assert "Ray did not start" in done.stderr


def test_start_without_ray_names_setup(node: Path) -> None:
    (node / "bin/ray").unlink()
    assert "Run cluster/setup.sh on this node first" in start(node, "head").stderr


# ------------------------------------------------------------------------------------------------------------- setup.sh


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose lock for CPUs names one package, with an installer that says how it was called."""
    root = tmp_path / "checkout"
    (root / "requirements").mkdir(parents=True)
    shutil.copytree(ROOT / "cluster", root / "cluster", ignore=shutil.ignore_patterns("grafana", "kuberay"))
    version = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('pydantic'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    (root / "requirements/cpu.txt").write_text(f"# a lock\npydantic=={version}\n    # via -r cpu.in\n")
    installer = root / "requirements/install.sh"
    installer.write_text('#!/bin/sh\necho "installer: $1 VENV=$VENV PYTHON=$PYTHON"\n')
    installer.chmod(0o755)
    (tmp_path / "home").mkdir()
    return root


def setup(checkout: Path, *arguments: str, **environment: Any) -> subprocess.CompletedProcess[str]:
    return run("setup.sh", *arguments, root=checkout, HOME=str(checkout.parent / "home"), **environment)


def test_an_environment_that_has_all_is_used_as_it_is(checkout: Path) -> None:
    for _ in range(2):
        done = setup(checkout, "cpu", VENV=sys.prefix)
        assert done.returncode == 0, done.stderr
        assert "it has all 1 packages of requirements/cpu.txt" in done.stdout
        assert "installer" not in done.stdout
    home = checkout.parent / "home"
    assert (home / ".bashrc").read_text().count("env.sh") == 2  # one line, which names it twice
    shell = ["env", "-i", f"HOME={home}", f"PATH={BASIC}", "bash", "-c", ". ~/.bashrc; . ~/.bashrc; env"]
    found = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert f"PATH={sys.prefix}/bin:{BASIC}" in found
    assert "RAY_AUTH_MODE=token" in found
    assert not [line for line in found if "TLS" in line]
    (home / ".ray-ft/tls").mkdir()
    (home / ".ray-ft/tls/node.key").touch()
    found = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "RAY_USE_TLS=1" in found
    assert f"RAY_TLS_SERVER_KEY={home}/.ray-ft/tls/node.key" in found


def test_what_lacks_is_installed(checkout: Path) -> None:
    with (checkout / "requirements/cpu.txt").open("a") as lock:
        lock.write("no-such-package==1.0\n")
    done = setup(checkout, "cpu", PYTHON=sys.executable)
    assert f"installer: cpu VENV={checkout}/.venv PYTHON={sys.executable}" in done.stdout, done.stdout + done.stderr


def test_the_environment_of_another_checkout_is_not_touched(checkout: Path, tmp_path: Path) -> None:
    with (checkout / "requirements/cpu.txt").open("a") as lock:
        lock.write("no-such-package==1.0 ; python_version > '3'\n")
    shared = tmp_path / "shared"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(shared)], check=True)
    (shared / "ray-ft-lock.txt").write_text("/elsewhere abc\n")
    done = setup(checkout, "cpu", VENV=str(shared), PYTHON=sys.executable)
    assert done.returncode == 1
    assert "belongs to the checkout in /elsewhere and lacks: pydantic" in done.stderr
    assert "no-such-package 1.0 (found: none)" in done.stderr
    assert "installer" not in done.stdout


@pytest.mark.skipif(bool(shutil.which("nvidia-smi", path=BASIC)), reason="this machine has a driver")
def test_no_cuda_build_on_a_node_without_a_gpu(checkout: Path) -> None:
    refused = setup(checkout, "gpu")
    assert refused.returncode == 1
    assert "nvidia-smi lists no GPU" in refused.stderr
    assert "cpu node" in setup(checkout, VENV=sys.prefix).stdout  # what it finds by itself


def test_a_node_with_a_driver_gets_the_gpu_lock(checkout: Path, tmp_path: Path) -> None:
    (checkout / "requirements/gpu.txt").write_text("no-such-package==1.0\n")
    driver = tmp_path / "driver/nvidia-smi"
    driver.parent.mkdir()
    driver.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"\n')
    driver.chmod(0o755)
    done = setup(checkout, PATH=f"{driver.parent}:{BASIC}", PYTHON=sys.executable)
    assert f"installer: gpu VENV={checkout}/.venv" in done.stdout, done.stdout + done.stderr


def test_an_unknown_kind_is_refused(checkout: Path) -> None:
    assert "'tpu' is no kind of node" in setup(checkout, "tpu").stderr


# --------------------------------------------------------------------------------------------------------------- tls.sh


@needs_openssl
def test_certificates_are_of_the_ca_and_of_the_address(tmp_path: Path) -> None:
    done = run("tls.sh", str(tmp_path), "10.0.0.1", "fd00::1", "node2.example")
    assert done.returncode == 0, done.stderr
    for address, name in (
        ("10.0.0.1", "-verify_ip 10.0.0.1"),
        ("fd00::1", "-verify_ip fd00::1"),
        ("node2.example", "-verify_hostname node2.example"),
    ):
        folder = tmp_path / address
        for purpose in ("sslserver", "sslclient"):
            check = f"openssl verify -CAfile {folder}/ca.crt -purpose {purpose} {name} {folder}/node.crt"
            assert subprocess.run(shlex.split(check), capture_output=True).returncode == 0, check
        ssl.create_default_context().load_cert_chain(folder / "node.crt", folder / "node.key")
        assert (folder / "node.key").stat().st_mode & 0o77 == 0
        assert sorted(path.name for path in folder.iterdir()) == ["ca.crt", "node.crt", "node.key"]
    wrong = f"openssl verify -CAfile {tmp_path}/ca.crt -verify_ip 10.0.0.2 {tmp_path}/10.0.0.1/node.crt"
    assert subprocess.run(shlex.split(wrong), capture_output=True).returncode != 0
    authority = (tmp_path / "ca.crt").read_bytes()
    run("tls.sh", str(tmp_path), "10.0.0.3")  # a node that comes later is of the same CA
    assert (tmp_path / "10.0.0.3/ca.crt").read_bytes() == authority


@needs_openssl
def test_tls_refuses_what_is_no_address(tmp_path: Path) -> None:
    for arguments in ((str(tmp_path),), (str(tmp_path), "../escape")):
        done = run("tls.sh", *arguments)
        assert done.returncode == 1
        assert re.match(r"tls: error: ", done.stderr)
    assert not (tmp_path / "../escape").exists()


# --------------------------------------------------------------------------------------------------------- on_prem.yaml


def test_the_whole_project_is_sent_to_the_nodes() -> None:
    mounts = yaml.safe_load((ROOT / "cluster/on_prem.yaml").read_text())["file_mounts"]
    sent = {place for place in mounts.values() if not place.startswith("~")}
    assert [place for place in sent if not (ROOT / place).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = packages | {project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | {"pyproject.toml", "requirements", "cluster"} <= sent
