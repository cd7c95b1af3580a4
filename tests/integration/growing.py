"""A private Ray cluster whose autoscaler makes processes in place of machines: it grows, shrinks and loses nodes.

    with Growing({"small": {"resources": {"CPU": 2}, "max_workers": 2}}, max_workers=2) as cluster:
        subprocess.run([...], env=cluster.env())

Ray's own autoscaler (v2) runs with Ray's provider for tests; nodes are raylets on loopback. The head offers nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import patience
import psutil
import pytest
from ports import free_ports
from servers import command_line, with_children

HEAD = "f" * 51 + "00000"  # the name by which the provider knows its head
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
MARK = "RAY_FT_TEST_GROWING"
STORE = 100 << 20
IDLE_SECONDS = 3


class Growing:
    """
    Args:
        types: name → resources (CPU, GPU) and max_workers of a node type.
        max_workers: nodes of all types.

    Attributes:
        address: what RAY_ADDRESS takes.
    """

    def __init__(self, types: dict[str, dict[str, Any]], max_workers: int) -> None:
        self._types, self._max_workers = types, max_workers
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def __enter__(self) -> Growing:
        patience.start(self._start, self.__exit__)
        return self

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")  # a socket's path is short
        folder = Path(self._folder.name)
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        config = folder / "cluster.yaml"
        config.write_text(json.dumps(self._config()))
        fake = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        options = [f"--port={self.address.split(':')[1]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
        options += ["--num-cpus=0", "--num-gpus=0", f"--object-store-memory={STORE}", f"--autoscaling-config={config}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        self._out = folder / "out"
        with open(self._out, "w") as out:
            self._head = subprocess.Popen(
                [*ray, "--include-dashboard=false", *options],
                env={**self._own(), **fake, MARK: str(folder)},
                stdout=out,
                stderr=out,
            )
        self._until_it_runs()

    def __exit__(self, *_: object) -> None:
        """End the head and all that came from it: the autoscaler, and the nodes that it started."""
        family = with_children(self._processes())
        self._head.terminate()
        _, left = psutil.wait_procs(family, timeout=10)
        while left := [*left, *with_children(self._processes())]:  # a dying process may start another
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
            left = []
        self._head.wait()
        self._folder.cleanup()

    def env(self) -> dict[str, str]:
        """The environment of a driver."""
        return {**self._own(), "RAY_ADDRESS": self.address}

    def output(self) -> str:
        return self._out.read_text()

    def autoscaler_log(self) -> str:
        """What the autoscaler did, without what it repeats."""
        log = Path(self._folder.name, "session_latest", "logs", "monitor.log").read_text()
        return "\n".join(line for line in log.splitlines() if "legacy field" not in line)

    def raylet(self, node: str) -> psutil.Process:
        """The process that is the node of this id."""
        for process in self._processes():
            if f"--node_id={node}" in command_line(process).split() and process.name() == "raylet":
                return process
        raise ProcessLookupError(f"no raylet of node {node}")

    def _processes(self) -> list[psutil.Process]:
        """All that came from the head: Ray's processes inherit its mark, also where they outlive their parents."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get(MARK) == self._folder.name
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _own(self) -> dict[str, str]:
        # The second: on loopback. A RAY_ADDRESS around the test is none of ours.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **self._token}

    def _config(self) -> dict[str, Any]:
        types = {"ray.head.default": {"resources": {}, "max_workers": 0}, **self._types}
        made = {
            name: {
                "node_config": {},
                "min_workers": 0,
                **one,
                "resources": {**one["resources"], **({"object_store_memory": STORE} if one["resources"] else {})},
            }
            for name, one in types.items()
        }
        return {
            "cluster_name": "fake",
            "max_workers": self._max_workers,
            "idle_timeout_minutes": IDLE_SECONDS / 60,
            "upscaling_speed": 100,  # with 1 only as many nodes are started at once as there are, or one
            "provider": {
                "type": "external", "module": PROVIDER, "gcs_address": self.address, "launch_multiple": True,
                "head_node_id": HEAD,
                "disable_node_updaters": True,  # there is nothing to install, and a node on which that fails is ended
            },
            "head_node_type": "ray.head.default",
            "available_node_types": made,
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            **{f"{who}_commands": [] for who in ("initialization", "setup", "head_setup", "worker_setup")},
            **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        }  # fmt: skip

    def _until_it_runs(self) -> None:
        for _ in range(600):
            if "Ray runtime started" in self.output():
                return
            assert self._head.poll() is None, self.output()
            time.sleep(0.2)
        pytest.fail(self.output())
