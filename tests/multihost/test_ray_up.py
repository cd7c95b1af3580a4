"""`cluster/on_prem.yaml` as shipped, from a laptop over ssh: up, a job across two hosts, down; then once more with TLS.

The laptop is a host of its own that is no node. In the file, what it marks CHANGE is filled in; the environment is the
one that there is, and Ray counts more CPUs than this machine may have. The tests follow one another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_ft.demo import DemoPaths, write_demo
from ray_ft.train import checkpoint

from . import inside, process
from .testbed import PORT, Background, Bed
from .training import WORKER

pytestmark = [pytest.mark.multihost, pytest.mark.slow, pytest.mark.timeout(1500)]
HEAD, WORK, LAPTOP = range(3)
NODES = (HEAD, WORK)
STEPS = 12
DASHBOARD = 8265
RECIPE = "configs/quickstart.yaml"
RAY = r"gcs_server|raylet|ray::|ray/dashboard|ray/autoscaler|log_monitor|runtime_env"
#: Seconds in which a node whose head is gone ends by itself: start.sh's 20 and what a busy machine adds.
ORPHANED = 20 + 130
START = "~/ray-ft/cluster/start.sh"
#: Asks the head without becoming a part of the cluster, and gives up after 10 s in place of 60.
ASK = """
import os
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"
from ray._raylet import GcsClient
found = GcsClient(address=os.environ["RAY_ADDRESS"]).get_all_node_info(timeout=10).values()
print("nodes", sum(one.state == 0 for one in found))
"""
JOIN = """
import ray
ray.init()
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Pinned
@ray.remote(num_cpus=0)
def where():
    return ray.util.get_node_ip_address()
ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
print("ran on", sorted(ray.get([where.options(scheduling_strategy=Pinned(one, soft=False)).remote() for one in ids])))
"""


class Site:
    """The hosts, the laptop's copy of the cluster file, and commands as given on the laptop."""

    def __init__(self, bed: Bed, shared: Path) -> None:
        self.bed, self.shared, self.file = bed, shared, shared / "on_prem.yaml"
        (shared / "runs").mkdir()
        options = "--num-cpus=3 --object-store-memory=100000000"
        fill = {
            "head_ip: 192.0.2.10": f"head_ip: {bed.address(HEAD)}",
            "[192.0.2.11, 192.0.2.12]": f"[{bed.address(WORK)}]",
            "ssh_user: ray": "ssh_user: root",
            "~/.ssh/ray_ft": str(bed.key),
            "test -w /mnt/runs": f"test -w {shared}/runs",
            "- ~/ray-ft/cluster/setup.sh\n": f"- VENV={sys.prefix} ~/ray-ft/cluster/setup.sh cpu\n",
            f"{START} head\n": f"{START} head {options}\n",
            f"{START} worker\n": f"{START} worker {options}\n",
        }
        text = Path(inside.REPOSITORY, "cluster/on_prem.yaml").read_text()
        for shipped, filled in fill.items():
            assert text.count(shipped) == 1, shipped
            text = text.replace(shipped, filled)
        self.file.write_text(text)

    def laptop(self, command: str, **options: Any) -> Any:
        setting = "unset RAY_ADDRESS RAY_AUTH_TOKEN_PATH; export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0;"
        return self.bed.shell(LAPTOP, f"{setting} {command}", **options)

    @staticmethod
    def job(entrypoint: str) -> str:
        return f"ray job submit --address http://127.0.0.1:{DASHBOARD} --working-dir . -- {entrypoint}"

    def node(self, host: int, command: str) -> subprocess.CompletedProcess[str]:
        """On a node, as somebody who comes in by ssh."""
        ssh = f"ssh -i {self.bed.key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        words = [*ssh.split(), f"root@{self.bed.address(host)}", f". ~/.bashrc; {command}"]
        done: subprocess.CompletedProcess[str] = self.bed.shell(LAPTOP, words, timeout=180)
        return done

    def up(self) -> str:
        done = self.laptop(f"ray up -y --no-config-cache {self.file} </dev/null 2>&1", timeout=480)
        assert done.returncode == 0, done.stdout
        return str(done.stdout)

    def wait_nodes(self) -> None:
        """Until Ray on the head says that both are alive."""
        # Asking costs a busy machine more than Ray itself: not before there is something to be asked about.
        until(lambda: self.bed.processes(WORK, "DashboardAgent"), 300, self.monitor)
        ask = "ray list nodes --format json --filter state=ALIVE 2>/dev/null || true"
        until(lambda: self.node(HEAD, ask).stdout.count('"node_id"') == len(NODES), 300, self.monitor)

    def monitor(self) -> str:
        """What the autoscaler on the head says."""
        return self.node(HEAD, "tail -n 60 /tmp/ray/session_latest/logs/monitor*").stdout

    def down(self) -> str:
        done = self.laptop(f"ray down -y {self.file} </dev/null 2>&1", timeout=240)
        assert done.returncode == 0, done.stdout
        return str(done.stdout)

    def of_ray(self) -> dict[int, list[str]]:
        """Ray's processes on the nodes."""
        said = {host: map(process.command_line, self.bed.processes(host, RAY)) for host in NODES}
        return {host: list(filter(None, lines)) for host, lines in said.items()}


def until(condition: Callable[[], Any], seconds: float, state: Callable[[], Any] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not after {seconds:.0f} s: {state()}"
        time.sleep(0.5)


def connect(address: str) -> str:
    """A command that succeeds where somebody listens at the dashboard's port."""
    return f"timeout 10 bash -c '</dev/tcp/{address}/{DASHBOARD}'"


def overrides(site: Site, demo: DemoPaths) -> str:
    """Of the quickstart's recipe: a smaller demo on the shared storage, and a worker on each host."""
    settings = {
        "run.storage": f"{site.shared}/runs",
        "model.path": demo.base,
        "data.train.0.path": f"{demo.folder}/train",
        "data.eval.0.path": demo.heldout,
        "data.seq_len": 128,
        "train.global_batch": 4,
        "train.micro_batch": 2,
        "train.cpus_per_worker": 2,  # of the three of a host: one worker on each, and a CPU for data
        "train.max_steps": STEPS,
        "train.checkpoint.every": STEPS // 2,
    }
    return " ".join(f"{name}={value}" for name, value in settings.items())


@pytest.fixture(scope="module")
def site(multihost_ssh: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    shared = tmp_path_factory.mktemp("site")
    with Bed(hosts=3, ray=False, ssh=True, token=False, share=[shared]) as bed:
        yield Site(bed, shared)


@pytest.fixture(scope="module")
def demo(site: Site) -> DemoPaths:
    return write_demo(str(site.shared / "demo"), rows=1200, hidden_size=32, layers=2)


@pytest.fixture(scope="module")
def dashboard(site: Site) -> Iterator[Background]:
    """The head's dashboard at the laptop's port, as `ray dashboard` brings it there."""
    forward = site.laptop(f"ray dashboard {site.file}", background=True)
    until(lambda: site.laptop(connect("127.0.0.1")).returncode == 0, 240, forward.output)
    yield forward
    forward.signal(15)


def test_up(site: Site) -> None:
    made = site.laptop("ray-ft token && chmod 644 ~/.ray/auth_token")
    assert made.returncode == 0, made.stderr
    said = site.up()
    assert "will not launch any workers" not in said
    assert "will not be started" not in said
    site.wait_nodes()
    for host in NODES:
        assert site.node(host, "stat -c %a ~/.ray/auth_token").stdout.split()[-1] == "600"


def test_nobody_gets_in_but_by_ssh_and_with_the_token(site: Site) -> None:
    refused = site.laptop(connect(site.bed.address(HEAD)))
    assert "Connection refused" in refused.stderr  # it listens on the head's loopback
    address = f"{site.bed.address(HEAD)}:{PORT}"
    for settings in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        ask = {"RAY_ADDRESS": address, **settings}
        done = site.bed.shell(WORK, [sys.executable, "-c", ASK], env=ask, timeout=180)
        assert done.returncode != 0
        assert "nodes" not in done.stdout
        assert "Unauthenticated" in done.stderr, done.stderr


def test_the_doctor_finds_no_error(site: Site, demo: DemoPaths, dashboard: Background) -> None:
    done = site.laptop(site.job(f"ray-ft doctor {RECIPE} {overrides(site, demo)} --json"), timeout=400)
    start = done.stdout.index("\n{\n")
    found, _ = json.JSONDecoder().raw_decode(done.stdout[start:].lstrip())
    errors = [finding for finding in found["findings"] if finding["severity"] == "error"]
    assert errors == []
    assert len(found["findings"]) > 10
    assert found["worst"] in ("ok", "note", "warning")


def test_a_job_across_two_hosts(site: Site, demo: DemoPaths, dashboard: Background) -> None:
    running = site.laptop(site.job(f"python jobs/train.py {RECIPE} {overrides(site, demo)}"), background=True)
    seen: set[int] = set()

    def ended() -> bool:
        seen.update(host for host in NODES if site.bed.processes(host, WORKER))
        return running.poll() is not None

    until(ended, 700, running.output)
    assert running.poll() == 0, running.output()
    assert seen == {HEAD, WORK}
    run = site.shared / "runs" / "quickstart"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == STEPS
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert checkpoint.newest(str(run / "checkpoints")) is not None  # complete, by its digests
    assert checkpoint.steps(str(run / "checkpoints"))[-1] == STEPS


def test_down_leaves_no_process(site: Site) -> None:
    site.down()
    until(lambda: not any(site.of_ray().values()), ORPHANED, site.of_ray)


def test_tls(site: Site) -> None:
    addresses = {host: site.bed.address(host) for host in (HEAD, WORK, LAPTOP)}
    certificates = site.shared / "tls"
    made = site.laptop(f"cluster/tls.sh {certificates} {' '.join(addresses.values())} 2>&1")
    assert made.returncode == 0, made.stdout
    for host in NODES:
        place = f"mkdir -p ~/.ray-ft && cp -r {certificates}/{addresses[host]} ~/.ray-ft/tls"
        assert site.node(host, place).returncode == 0
    site.up()
    site.wait_nodes()
    joining = {"RAY_ADDRESS": f"{addresses[HEAD]}:{PORT}", "RAY_AUTH_MODE": "token"}
    ours = joining | _tls(certificates / addresses[WORK])
    site.laptop(f"cluster/tls.sh {certificates}-other {addresses[WORK]}")
    other = joining | _tls(Path(f"{certificates}-other") / addresses[WORK])
    # The token is right each time. No certificate, or one of another CA: the head does not answer.
    for unknown in (joining, other):
        refused = site.bed.shell(WORK, [sys.executable, "-c", ASK], env=unknown, timeout=180)
        assert refused.returncode != 0
        assert "nodes" not in refused.stdout
        assert "Failed to connect to GCS" in refused.stderr
    assert site.bed.shell(WORK, [sys.executable, "-c", ASK], env=ours, timeout=180).stdout.endswith("nodes 2\n")
    done = site.bed.shell(WORK, [sys.executable, "-c", JOIN], env=ours, timeout=240)
    assert f"ran on {[addresses[HEAD], addresses[WORK]]}" in done.stdout, done.stdout + done.stderr
    site.down()
    until(lambda: not any(site.of_ray().values()), ORPHANED, site.of_ray)


def _tls(folder: Path) -> dict[str, str]:
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": f"{folder}/ca.crt",
        "RAY_TLS_SERVER_CERT": f"{folder}/node.crt",
        "RAY_TLS_SERVER_KEY": f"{folder}/node.key",
    }
