"""cluster/aws.yaml on an AWS that is moto: `ray up`, a worker that comes and goes, a launch that fails, `ray down`.

What is real: the file as it is shipped, Ray's launcher, its autoscaler on a head that it started, AWSNodeProvider,
rsync, cluster/setup.sh and cluster/start.sh, the account's CloudFormation template. What stands in: moto for AWS, with
a proxy before it that can let RunInstances fail; and for the machines, a folder each as HOME, reached by an `ssh` that
runs the command here. The network is on loopback, where each machine has its own address. Limit: moto starts nothing
and checks little of a request: that AWS takes it is not shown.

Some 100 s on two cores that have little else to do.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
REGION = "us-east-2"
#: Those of the account's network, on loopback here. AWS itself would not have them.
NETWORK = {"Network": "127.77.0.0/16", "Public": "127.77.0.0/24", "Private": "127.77.16.0/20"}
#: As often as Ray asks before it gives a launch up: all of one launch's requests, and none of the next's.
ATTEMPTS = 5
REFUSED = """<?xml version="1.0" encoding="UTF-8"?><Response><Errors><Error><Code>InsufficientInstanceCapacity</Code>
<Message>We have no m7i.8xlarge today.</Message></Error></Errors><RequestID>0</RequestID></Response>"""


class Aws:
    """moto, and a proxy before it on which `refuse` requests for instances fail, and which says which machines run."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        self._behind = f"http://{host}:{port}"
        reset = urllib.request.Request(f"{self._behind}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()
        self.refuse = 0
        #: Bodies of the requests for instances that were answered.
        self.launches: list[dict[str, str]] = []
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"
        self.env = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        self.env |= {"AWS_DEFAULT_REGION": REGION}

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    def client(self, name: str) -> Any:
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client(name, REGION, endpoint_url=self._behind, **keys)

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """The cluster's machines, or those in one of the states, the head first."""
        of_it = [{"Name": "tag:ray-cluster-name", "Values": ["ray-ft"]}]
        found = self.client("ec2").describe_instances(Filters=of_it)["Reservations"]
        every = [one for reservation in found for one in reservation["Instances"]]
        here = [one for one in every if not states or one["State"]["Name"] in states]
        return sorted(here, key=lambda one: kind(one) != "head")

    def _private(self, address: str) -> str:
        """The private address of the running machine that has this one, or nothing."""
        for one in self.instances("running"):
            if address in (one["PrivateIpAddress"], one.get("PublicIpAddress")):
                return one["PrivateIpAddress"]
        return ""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        aws = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.startswith("/machine/"):
                    return self.say(200, aws._private(self.path.split("/")[-1]).encode())
                asked = dict(urllib.parse.parse_qsl(body.decode(errors="replace")))
                if asked.get("Action") == "RunInstances":
                    if aws.refuse:
                        aws.refuse -= 1
                        return self.say(500, REFUSED.encode())
                    aws.launches.append(asked)
                headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
                request = urllib.request.Request(aws._behind + self.path, body or None, headers, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=60) as got:
                        return self.say(got.status, got.read())
                except urllib.error.HTTPError as error:
                    return self.say(error.code, error.read())

            do_GET = do_POST = do_PUT = answer

            def say(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *of: Any) -> None:
                pass

        return Handler


def kind(instance: dict[str, Any]) -> str:
    return next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == "ray-user-node-type")


#: In place of ssh: the last arguments are a command for the machine of that address, whose home is a folder here.
SSH = """#!{python}
import os, sys, urllib.request

arguments = iter(sys.argv[1:])
for argument in arguments:
    if argument in ("-i", "-o", "-L", "-p", "-l"):
        next(arguments)
    elif not argument.startswith("-"):
        break
address = argument.split("@")[-1]
with urllib.request.urlopen("{aws}/machine/" + address) as got:
    private = got.read().decode()
if not private:
    sys.exit(f"ssh: connect to host {{address}} port 22: Connection timed out") # no such machine runs
home = "{machines}/" + private
if not os.path.exists(home):
    os.makedirs(home)
    with open(home + "/.bashrc", "w") as file:
        file.write({bashrc!r})
os.chdir(home)
env = {{"HOME": home, "PATH": "{here}:/usr/local/bin:/usr/bin:/bin", "USER": "ubuntu", "LC_ALL": "C.UTF-8"}}
os.execve("/bin/bash", ["bash", "-c", " ".join(arguments)], env)
"""

#: In place of `ray` on a machine: its own address, ports that two machines on one loopback do not both want, no haste
#: to take a node for dead that a busy test machine makes slow; and `stop` ends what runs on this machine alone, where
#: Ray's own would end every Ray there is.
RAY = """#!{python}
import os, sys, psutil

home, (command, *options) = os.environ["HOME"], sys.argv[1:]
assert home.startswith("{machines}/"), home
if command == "stop":
    mine = {{process.pid for process in psutil.Process().parents()}} | {{os.getpid()}}
    for process in psutil.process_iter():
        try:
            if process.pid not in mine and process.environ().get("HOME") == home:
                process.kill()
        except psutil.Error:
            pass
    sys.exit()
if command == "start":
    options = [one.replace("6379", "{port}") for one in options if not one.startswith("--system-config")]
    options += ["--node-ip-address=" + os.path.basename(home), "--object-store-memory=104857600"]
    options += [f"--{{name}}-port=0" for name in ("node-manager", "object-manager", "runtime-env-agent",
                "dashboard-agent-grpc", "metrics-export", "min-worker", "max-worker", "dashboard-agent-listen")]
    if "--head" in options:
        options += ["--temp-dir={temp}", "--dashboard-port={dashboard}", "--ray-client-server-port={client}"]
os.execv("{venv}/bin/ray", ["ray", command, *options])
"""

#: Asks for a CPU, which the head has none of: where it ran.
WORK = """
import sys, ray
address = sys.argv[1]
ray.init(address=address, _node_ip_address=address.split(":")[0], log_to_driver=False)
place = ray.remote(num_cpus=1)(lambda: ray.util.get_node_ip_address())
print("ran on", ray.get(place.remote(), timeout=480))
"""


class Laptop:
    """Where `ray up` is typed: a home with a token, the stand-ins on PATH, and aws.yaml with this account's values."""

    def __init__(self, aws: Aws, folder: Path, shipped: dict[str, Any]) -> None:
        self.machines = folder / "machines"
        self._home, self._bin, venv = folder / "laptop", folder / "bin", folder / "venv" / "bin"
        for made in (self.machines, self._home / ".ray", self._bin, venv):
            made.mkdir(parents=True)
        token = self._home / ".ray" / "auth_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.port, dashboard, client = free_ports(3)
        self.temp = folder / "ray"
        real = Path(sys.executable).parent
        values = {
            "python": sys.executable, "aws": aws.url, "machines": self.machines, "here": self._bin, "port": self.port,
            "dashboard": dashboard, "client": client, "temp": self.temp, "venv": real.parent,
        }  # fmt: skip
        set_on_machines = {
            **aws.env, "VENV": venv.parent, "AUTOSCALER_UPDATE_INTERVAL_S": 1,
            "PATH": f"{self._bin}:$PATH", "RAY_raylet_start_wait_time_s": 180,
        }  # fmt: skip
        bashrc = "".join(f"export {name}={value}\n" for name, value in set_on_machines.items())
        executable(self._bin / "ssh", SSH.format(**values, bashrc=bashrc))
        executable(venv / "ray", RAY.format(**values))
        executable(venv / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        self._file = folder / "aws.yaml"
        self._file.write_text(yaml.safe_dump(shipped))
        self._env = {
            **aws.env, "HOME": str(self._home), "PATH": f"{self._bin}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
            "RAY_UP_enable_autoscaler_v2": "1", "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(folder),
        }  # fmt: skip

    def ray(self, verb: str, *options: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """`ray up cluster/aws.yaml` and the like, from the repository's root."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", verb, str(self._file), *options]
        return subprocess.run(
            ray, env={**os.environ, **self._env}, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def logs(self, pattern: str) -> str:
        return "".join(file.read_text(errors="replace") for file in self.temp.glob(f"session_2*/logs/{pattern}"))

    def end(self) -> None:
        """End what is left on the machines."""
        for process in psutil.process_iter():
            if home_of(process).startswith(f"{self.machines}/"):
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    process.kill()


def home_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("HOME", "")
    except psutil.Error:
        return ""


def executable(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def until(true: Callable[[], Any], seconds: float = 480) -> bool:
    end = time.monotonic() + seconds
    while not (is_so := bool(true())) and time.monotonic() < end:
        time.sleep(0.5)
    return is_so


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    one = Aws()
    yield one
    one.close()


@pytest.fixture(scope="module")
def shipped(aws: Aws) -> dict[str, Any]:
    """cluster/aws.yaml, with what the account's template made in place of each CHANGE."""
    parameters = {"Bucket": "runs", "SshFrom": "203.0.113.7/32", "Zone": f"{REGION}a", **NETWORK}
    stacks = aws.client("cloudformation")
    stacks.create_stack(
        StackName="ray-ft",
        TemplateBody=(ROOT / "cluster/account/aws.yaml").read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
    )
    (stack,) = stacks.describe_stacks(StackName="ray-ft")["Stacks"]
    made = {one["OutputKey"]: one["OutputValue"] for one in stack["Outputs"]}
    # moto's CloudFormation makes no placement groups, and leaves out that machines of a subnet get public addresses.
    made["placement"] = "ray-ft-Together-1"
    aws.client("ec2").modify_subnet_attribute(SubnetId=made["public"], MapPublicIpOnLaunch={"Value": True})
    text = (ROOT / "cluster/aws.yaml").read_text()
    for name, value in made.items():
        text, count = re.subn(rf"(?m)^(  {name}: &{name} )[\w-]+", rf"\g<1>{value}", text)
        assert count == 1, name
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def seen(aws: Aws, shipped: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was there before, during and after one cluster's life."""
    small = {name: dict(one) for name, one in shipped["available_node_types"].items() if name in ("head", "cpu")}
    small["cpu"] |= {"resources": {"CPU": 1}, "max_workers": 1}
    shipped = {**shipped, "available_node_types": small, "idle_timeout_minutes": 0.25}
    groups = {one["GroupId"] for one in aws.client("ec2").describe_security_groups()["SecurityGroups"]}
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path is short
    laptop = Laptop(aws, folder, shipped)
    seen: dict[str, Any] = {"groups before": groups}
    try:
        up = laptop.ray("up", "-y")
        seen["up"] = up.stdout + up.stderr
        assert up.returncode == 0, seen["up"]
        seen["after up"] = aws.instances()
        seen["files"] = {str(file.relative_to(laptop.machines)): file.stat().st_mode & 0o777
                         for file in laptop.machines.glob("*/.ray/auth_token")}  # fmt: skip

        aws.refuse = ATTEMPTS
        work = folder / "work.py"
        work.write_text(WORK)
        began = time.monotonic()
        head = seen["after up"][0]["PrivateIpAddress"]
        with ThreadPoolExecutor(1) as beside:  # meanwhile: an idle worker may be gone again when `ray exec` returns
            grown = beside.submit(
                lambda: until(lambda: len(aws.instances("running")) == 2) and aws.instances("running")
            )
            ran = laptop.ray("exec", f"python {work} {head}:{laptop.port}")
        seen["work"] = (ran.stdout + ran.stderr, time.monotonic() - began)
        seen["refused"] = ATTEMPTS - aws.refuse
        seen["grown"] = grown.result()
        seen["shrunk"] = until(lambda: len(aws.instances("running", "pending")) == 1)
        seen["after work"] = aws.instances("running", "pending")
        seen["said"] = laptop.logs("monitor*") + laptop.logs("autoscaler*")

        down = laptop.ray("down", "-y")
        seen["down"] = (down.returncode, down.stdout + down.stderr)
        seen["end"] = aws.instances()
        seen["groups after"] = {
            one["GroupId"] for one in aws.client("ec2").describe_security_groups()["SecurityGroups"]
        }
        seen["keys"] = [one["KeyName"] for one in aws.client("ec2").describe_key_pairs()["KeyPairs"]]
        seen["volumes"] = aws.client("ec2").describe_volumes()["Volumes"]
        yield seen
    finally:
        laptop.end()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_head_comes_up_alone(seen: dict[str, Any]) -> None:
    (head,) = seen["after up"]
    assert kind(head) == "head" and head["State"]["Name"] == "running"
    assert "Ray runtime started" in seen["up"]
    assert "will not" not in seen["up"]  # start workers, start Ray: what the launcher warns of


def test_the_token_is_its_owners_alone(seen: dict[str, Any]) -> None:
    assert list(seen["files"].values()) == [0o600]


def test_a_worker_comes_for_work_that_the_head_has_no_cpu_for(seen: dict[str, Any]) -> None:
    _, worker = seen["grown"]
    assert kind(worker) == "cpu"
    assert f"ran on {worker['PrivateIpAddress']}" in seen["work"][0], seen["work"]
    assert worker["PrivateIpAddress"].startswith("127.77.16.") and not worker.get("PublicIpAddress")


def test_a_launch_that_fails_is_survived_and_said(seen: dict[str, Any]) -> None:
    assert seen["refused"] == ATTEMPTS
    assert "InsufficientInstanceCapacity" in seen["said"] and "We have no m7i.8xlarge today" in seen["said"]


def test_an_idle_worker_is_ended(seen: dict[str, Any]) -> None:
    assert seen["shrunk"]
    assert [kind(one) for one in seen["after work"]] == ["head"]


def test_nothing_is_left_after_down(seen: dict[str, Any]) -> None:
    code, said = seen["down"]
    assert code == 0, said
    assert len(seen["end"]) == 2 and {one["State"]["Name"] for one in seen["end"]} == {"terminated"}
    assert seen["groups after"] == seen["groups before"]
    assert seen["volumes"] == []
    assert seen["keys"] == [f"ray-autoscaler_{REGION}"]  # which Ray keeps for the next time


def test_aws_is_asked_for_each_type_as_the_file_has_it(
    aws: Aws, shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray.autoscaler._private.aws import config, utils
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

    for name, value in {**aws.env, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for cache in (utils.resource_cache, utils.client_cache, config._get_subnets_or_die):
        cache.cache_clear()
    filled = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(shipped))
    resolved = AWSNodeProvider.bootstrap_config(filled)
    provider = AWSNodeProvider(resolved["provider"], "each-type")
    for name, one in resolved["available_node_types"].items():
        before = len(aws.launches)
        (made,) = provider.create_node(one["node_config"], {TAG_RAY_USER_NODE_TYPE: name}, 1)
        (asked,) = aws.launches[before:]
        assert (
            asked["InstanceType"] == one["node_config"]["InstanceType"]
            and asked["MetadataOptions.HttpTokens"] == "required"
        )
        fabric = [value for key, value in asked.items() if key.endswith(".InterfaceType")]
        cards = len(shipped["available_node_types"][name]["node_config"].get("NetworkInterfaces", []))
        assert len(fabric) == cards and fabric[:1] == ["efa"][:cards] and set(fabric[1:]) <= {"efa-only"}, name
        assert bool(cards) == ("GPU" in one["resources"]) == ("Placement.GroupName" in asked), name
        assert asked.get("InstanceMarketOptions.MarketType") == ("spot" if name.endswith("_spot") else None), name
        aws.client("ec2").terminate_instances(InstanceIds=[made])
    aws.client("ec2").delete_key_pair(KeyName=f"ray-autoscaler_{REGION}")  # its other half goes with tmp_path
