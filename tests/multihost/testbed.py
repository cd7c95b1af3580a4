"""Several Ray hosts on one machine, to be killed and cut off: a test bed.

    with Bed(hosts=3) as bed:                              # host 0 is the head, the others are workers
        bed.shell(0, "ray list nodes")
        bed.kill(2)

    python -m tests.multihost.testbed start play --hosts 3   # the same by hand; then: shell, kill, cut, heal, revive,
    python -m tests.multihost.testbed shell play 0           # nodes, ps, list, stop

Each host has a network namespace (eth0, 10.77.0.<host + 1>), its own processes, host name, /proc, and /tmp and /dev/shm
of bounded size; the repository, the environment and the folders in `share` are the machine's. The bridge between them
lies in a namespace too, so nothing appears in the machine's own network and beds do not meet one another.

All of a bed is inside one process namespace, whose first process a keeper holds. The keeper watches the process that
made the bed: when that ends, however it ends, or when the keeper does, the kernel ends every process of the bed, and
with the processes go their namespaces, links and mounts. What can be left is a folder below `ROOT`; the next start
removes those whose owner is gone. Nothing is ever found by a process's name.

Limits: Linux, root, iproute2 and util-linux (`why_not` says what lacks); hosts reach one another and nothing else; all
share the machine's memory, cores and clock.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import inside, process, sshd

ROOT = Path("/run/ray-ft-bed")
NETWORK = "10.77.0"
PORT = 6379
OWN = ("net", "mount", "uts", "ipc", "pid")  # namespaces of a host
#: How soon the head takes a node that does not answer for dead: after about 3 × (1 + 4) s, in place of Ray's
#: 5 × (3 + 10) s. A cluster's YAML sets the same on its head: ray start --head --system-config='{…}'.
HEALTH = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 4000,
    "health_check_failure_threshold": 3,
}
OBJECT_STORE = 100 << 20  # bytes; Ray refuses less than 75 MB
START_SECONDS = 60  # for a command in the background to be there, on a busy machine
#: For nodes to be alive. Ray ends one that is not up after 30 s; on a busy machine it takes the service several tries.
NODES_SECONDS = 180
RAYLET = "raylet/raylet "


class BedError(RuntimeError):
    """The bed cannot be made, or something in it does not answer."""


@functools.cache
def why_not() -> str | None:
    """Why no bed can be made here; None where one can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if lacking := [tool for tool in ("ip", "unshare", "nsenter", "mount") if not shutil.which(tool)]:
        return f"{', '.join(lacking)} not found: install iproute2 and util-linux"
    flags = [f"--{kind}" for kind in OWN]
    tried = _run(["unshare", *flags, "--fork", "--mount-proc", "ip", "link", "add", "v0", "type", "veth"])
    if tried.returncode:
        return f"the kernel or container refuses namespaces: {tried.stderr.strip()}"
    return None


class Background:
    """A command that runs on a host; what it prints goes to `log`."""

    def __init__(self, outer: subprocess.Popen[bytes], pid: int, log: Path) -> None:
        self._outer, self.pid, self.log = outer, pid, log

    def poll(self) -> int | None:
        """Its exit status, as a shell gives it (143 after SIGTERM); None while it runs."""
        return _status(self._outer.poll())

    def wait(self, timeout: float | None = None) -> int:
        status = _status(self._outer.wait(timeout))
        assert status is not None
        return status

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Bed:
    """Hosts 0 … n − 1; host 0 is the head.

    Args:
        hosts: how many.
        cpus: that Ray counts on each host, or on all alike.
        name: of the bed; one that outlives the process that starts it needs one (see `detached`).
        token: Ray's token authentication.
        resolve: whether host names resolve; on real clusters they sometimes do not.
        dashboard: whether the head has one (port 8265).
        ray: whether Ray runs on the hosts; without it they are hosts in a network.
        share: folders below /tmp that every host sees.
        ssh: whether each host has an sshd, which lets root in with the key in `key`, and a home folder of its own.
        detached: the bed lives until `stop`, not as long as this process.

    Raises:
        BedError: see `why_not`; or a bed of this name is there; or a host or its Ray does not start.
    """

    def __init__(
        self,
        hosts: int = 3,
        cpus: float | Sequence[float] = 1,
        *,
        name: str | None = None,
        token: bool = True,
        resolve: bool = True,
        dashboard: bool = False,
        ray: bool = True,
        share: Sequence[str | Path] = (),
        ssh: bool = False,
        detached: bool = False,
    ) -> None:
        if reason := why_not() or (sshd.why_not() if ssh else None):
            raise BedError(reason)
        each = [float(cpus)] * hosts if isinstance(cpus, int | float) else [float(count) for count in cpus]
        if len(each) != hosts:
            raise BedError(f"cpus of {len(each)} hosts are given, the bed has {hosts}")
        self.name = name or f"{os.getpid()}-{secrets.token_hex(3)}"
        self.folder = ROOT / self.name
        self._state: dict[str, Any] = {
            "cpus": each,
            "token": token,
            "resolve": resolve,
            "dashboard": dashboard,
            "ray": ray,
            "share": [str(Path(folder).resolve()) for folder in share],
            "ssh": ssh,
            "detached": detached,
            "switch": 0,
            "hosts": [None] * hosts,  # process id of each host's init
            "started": 0,  # hosts ever started
        }
        self._keeper: subprocess.Popen[bytes] | None = None

    @classmethod
    def load(cls, name: str) -> Bed:
        """The running bed of this name."""
        bed = cls.__new__(cls)
        bed.name, bed.folder, bed._keeper = name, ROOT / name, None
        if not (bed.folder / "bed.json").exists():
            raise BedError(f"there is no bed {name!r}; there are: {', '.join(names()) or 'none'}")
        bed._state = json.loads((bed.folder / "bed.json").read_text())
        return bed

    def __enter__(self) -> Bed:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------------- the whole

    def start(self) -> None:
        """Make the bed; returns when Ray on the head answers and all nodes are alive."""
        sweep()
        ROOT.mkdir(parents=True, exist_ok=True)
        try:
            self.folder.mkdir()
        except FileExistsError:
            raise BedError(f"there is a bed {self.name!r} already; stop it first, or take another name") from None
        try:
            token = self.folder / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            self._write_names()
            if self._state["ssh"]:
                sshd.prepare(self.folder)
            self._start_keeper()
            self._save()
            for host in range(len(self.hosts)):
                self.start_host(host)
            if self._state["ray"]:
                self.wait_nodes(len(self.hosts))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the bed: all of it is gone when this returns."""
        with contextlib.suppress(FileNotFoundError):
            keeper = json.loads((self.folder / "keeper.json").read_text())
            process.end(keeper["pid"], keeper["began"], signal.SIGTERM)
        if self._keeper:
            self._keeper.wait(process.END_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_keeper(self) -> None:
        owner = 0 if self._state["detached"] else os.getpid()
        command = [*inside.PYTHON, "keep", str(self.folder), str(owner)]
        log = (self.folder / "keeper.log").open("wb")
        self._keeper = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd=inside.REPOSITORY,
        )
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        if not line:
            raise BedError(f"the bed's keeper did not start: {(self.folder / 'keeper.log').read_text()}")
        self._state["switch"] = int(line)
        self._ip(["link add bridge type bridge", "link set bridge up"])

    @property
    def hosts(self) -> list[int | None]:
        """Process ids of the hosts' first processes; None for one that is down."""
        hosts: list[int | None] = self._state["hosts"]
        return hosts

    def _save(self) -> None:
        partial = self.folder / "bed.json.partial"
        partial.write_text(json.dumps(self._state))
        partial.replace(self.folder / "bed.json")

    def _write_names(self) -> None:
        lines = ["127.0.0.1 localhost"]
        if self._state["resolve"]:
            lines += [f"{self.address(host)} {self.host_name(host)}" for host in range(len(self.hosts))]
        (self.folder / "etc-hosts").write_text("\n".join(lines) + "\n")

    @property
    def key(self) -> Path:
        """The private key that every host's sshd lets in."""
        return self.folder / "key"

    # ------------------------------------------------------------------------------------------------------ hosts

    @staticmethod
    def address(host: int) -> str:
        return f"{NETWORK}.{host + 1}"

    @staticmethod
    def host_name(host: int) -> str:
        return f"bed-host{host}"

    def init(self, host: int) -> int:
        """The host's first process, as a process id of the machine."""
        pid = self.hosts[host]
        if pid is None:
            raise BedError(f"host {host} is down; start_host starts it")
        return pid

    def start_host(self, host: int) -> None:
        """Start a host that is down, and Ray on it, as a service that is started again whenever it ends."""
        if self.hosts[host] is not None:
            raise BedError(f"host {host} is up")
        self._state["started"] += 1
        link = f"h{host}n{self._state['started']}"  # another name each time: the kernel removes old links later
        log = self.folder / f"host{host}.log"
        command = ["nsenter", "--target", str(self._state["switch"]), "--pid", "unshare"]
        command += [f"--{kind}" for kind in OWN] + ["--fork", "--kill-child", "--mount-proc"]
        command += [*inside.PYTHON, "host", str(self.folder), self.host_name(host)]
        with log.open("ab") as errors:
            outer = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                cwd=inside.REPOSITORY,
            )
        assert outer.stdout is not None
        if not outer.stdout.readline():
            raise BedError(f"host {host} did not start: {log.read_text()[-2000:]}")
        pid = outer.pid
        for _ in range(2):  # nsenter → unshare → the host's first process
            (pid,) = process.children(pid)
        # The same network card each time: others would send to the old one's address until they forget it.
        card = f"name eth0 address 02:00:00:00:00:{host + 1:02x} netns {pid}"
        self._ip([f"link add {link} type veth peer {card}", f"link set {link} master bridge up"])
        self._ip([f"addr add {self.address(host)}/24 dev eth0", "link set eth0 up", "link set lo up"], inside=pid)
        self.hosts[host] = pid
        self._state[f"link{host}"] = link
        self._save()
        if self._state["ssh"] and (said := sshd.start(self, host)):
            raise BedError(f"sshd on host {host} does not start: {said}")
        if self._state["ray"]:
            service = f"while true; do {self._ray_command(host)}; sleep 1; done"
            self.shell(host, service, background=True, log=log)

    def _ray_command(self, host: int) -> str:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ray += ["--include-log-monitor=false"]
        ray += [f"--node-ip-address={self.address(host)}", f"--num-cpus={self._state['cpus'][host]:g}"]
        ray += [f"--object-store-memory={OBJECT_STORE}"]
        if host == 0:
            ray += ["--head", f"--port={PORT}", f"--system-config={json.dumps(HEALTH)}"]
            ray += [f"--include-dashboard={str(self._state['dashboard']).lower()}"]
        else:
            ray += [f"--address={self.address(0)}:{PORT}"]
        return shlex.join(ray)

    def kill(self, host: int) -> None:
        """The host loses its power: its packets stop, then all its processes and its memory are gone."""
        pid = self.init(host)
        self.cut(host)  # first, so that no closing socket says goodbye
        self.hosts[host] = None
        self._save()
        process.end(pid, process.began(pid), signal.SIGKILL)

    def cut(self, host: int) -> None:
        """Unplug the host's network: packets vanish, nothing is refused or reset."""
        self.init(host)
        self._ip([f"link set {self._state[f'link{host}']} down"])

    def heal(self, host: int) -> None:
        """Plug it in again."""
        self.init(host)
        self._ip([f"link set {self._state[f'link{host}']} up"])

    def _ip(self, commands: Sequence[str], inside: int | None = None) -> None:
        space = f"--net=/proc/{inside or self._state['switch']}/ns/net"
        done = _run(["nsenter", space, "ip", "-batch", "-"], input="\n".join(commands) + "\n")
        if done.returncode:
            raise BedError(f"ip: {'; '.join(commands)}: {done.stderr.strip()}")

    # -------------------------------------------------------------------------------------------------- what runs

    def environment(self) -> dict[str, str]:
        """Of every command on a host: this process's own, less what would lead to another Ray, plus the bed's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TMPDIR"))}
        ours = {
            "RAY_ADDRESS": f"{self.address(0)}:{PORT}",
            "PYTHONPATH": str(inside.REPOSITORY),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "HF_HUB_OFFLINE": "1",
        }
        if self._state["token"]:
            ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        return kept | ours

    def shell(
        self,
        host: int,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        background: bool = False,
        timeout: float | None = None,
        log: Path | None = None,
    ) -> Any:
        """Run a command (for bash, or as arguments) on a host, in the repository's folder.

        Returns:
            subprocess.CompletedProcess with text; or, in the background, a `Background`.
        """
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        line = [*self.enter(host), *words]
        environment = self.environment() | dict(env or {})
        if not background:
            return _run(line, env=environment, timeout=timeout)
        log = log or self.folder / f"command-{secrets.token_hex(4)}.log"
        with log.open("ab") as out:
            outer = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
                cwd=inside.REPOSITORY,
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if (children := process.children(outer.pid)) or outer.poll() is not None:
                return Background(outer, children[0] if children else outer.pid, log)
            time.sleep(0.01)
        raise BedError(f"nsenter started nothing: {command}")

    def enter(self, host: int) -> list[str]:
        """The beginning of a command line that runs on a host."""
        flags = [f"--{kind}" for kind in OWN]
        return ["nsenter", "--target", str(self.init(host)), *flags, f"--wd={inside.REPOSITORY}", "--"]

    def processes(self, host: int, pattern: str = "") -> list[int]:
        """Process ids, of the machine, of the host's processes whose command line matches a regular expression."""
        space = os.readlink(f"/proc/{self.init(host)}/ns/pid")
        found = []
        for pid in process.pids():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.readlink(f"/proc/{pid}/ns/pid") == space and re.search(pattern, process.command_line(pid)):
                    found.append(pid)
        return sorted(found)

    def raylet(self, host: int) -> int:
        """Process id, of the machine, of the host's raylet, without what it is about to start, which has its name."""
        found = self.processes(host, RAYLET)
        (raylet,) = [pid for pid in found if process.parent(pid) not in found]
        return raylet

    def nodes(self) -> list[dict[str, Any]]:
        """What Ray says on the head: {address, alive, id} of each node that it ever knew."""
        return self._ask_nodes("answer = table()", NODES_SECONDS)

    def wait_nodes(self, count: int, timeout: float = NODES_SECONDS) -> list[dict[str, Any]]:
        """Wait until `count` nodes are alive, as Ray says. Returns what `nodes` does.

        Raises:
            BedError: they are not in time.
        """
        wait = f"""
end = time.monotonic() + {timeout}
while True:
    answer = table()
    if sum(node["alive"] for node in answer) == {count} or time.monotonic() > end:
        break
    time.sleep(0.2)
"""
        found = self._ask_nodes(wait, timeout)
        alive = sorted(node["address"] for node in found if node["alive"])
        if len(alive) != count:
            raise BedError(f"{count} nodes should be alive after {timeout:.0f} s, there are {alive}\n{self.logs()}")
        return found

    def _ask_nodes(self, question: str, timeout: float) -> list[dict[str, Any]]:
        end, last = time.monotonic() + timeout, "it did not answer"
        while time.monotonic() < end:  # a head that has just started refuses connections
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = self.shell(0, [sys.executable, "-c", NODES + question + _PRINT], timeout=timeout + 30)
                if done.returncode == 0:
                    answer: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
                    return answer
                last = done.stderr[-1500:]
            time.sleep(0.3)
        raise BedError(f"Ray on the head does not answer: {last}\n{self.logs()}")

    def logs(self) -> str:
        """The ends of what `ray start` printed on each host."""
        files = sorted(self.folder.glob("host*.log"))
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-800:]}" for file in files)


NODES = """
import json, os, time
from ray._raylet import GcsClient  # what `ray health-check` asks; no driver that would join the cluster
def table():
    client = GcsClient(address=os.environ["RAY_ADDRESS"])
    nodes = client.get_all_node_info(timeout=5).values()
    return [{"address": n.node_manager_address, "alive": n.state == 0, "id": n.node_id.hex()} for n in nodes]
"""
_PRINT = "\nprint(json.dumps(answer))\n"


def names() -> list[str]:
    """The beds that there are."""
    return sorted(folder.name for folder in ROOT.glob("*") if folder.is_dir())


def sweep() -> list[str]:
    """Remove what is left of beds whose keeper is gone: a folder, since everything else ended with it."""
    swept = []
    for name in names():
        folder = ROOT / name
        try:
            keeper = json.loads((folder / "keeper.json").read_text())
        except (FileNotFoundError, ValueError):
            try:
                made = folder.stat().st_mtime
            except FileNotFoundError:  # its keeper removes it just now
                continue
            if time.time() - made < 60:  # it is being made just now
                continue
            keeper = {"pid": 0, "began": 0}
        if process.began(keeper["pid"]) != keeper["began"]:
            shutil.rmtree(folder, ignore_errors=True)
            swept.append(name)
    return swept


def _run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **options)


def _status(code: int | None) -> int | None:
    return 128 - code if code is not None and code < 0 else code


if __name__ == "__main__":
    from .command import main

    main()
