"""Whether Ray's token authentication is on, its token private, and the dashboard bound to the head alone.

Limits: firewalls and network policies are not seen; what Ray's token does not guard is in docs/security.md.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ray_ft import credentials
from ray_ft.doctor.finding import Finding, Severity, names
from ray_ft.hosts import is_loopback

KNOCK_SECONDS = 30
#: Asks the head for its nodes without a token. Prints "open" where it answers.
KNOCK = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
print("open")
"""
ON = (
    "on every node: ray-ft token, export RAY_AUTH_MODE=token, and start Ray again (cluster/start.sh does all of it)",
    "docs/security.md says what else to close",
)


def look() -> dict[str, Any]:
    """mode (token, disabled), token_file, token_bits (permissions; None: no file) and listening addresses, by port."""
    from ray._private.authentication.authentication_utils import get_authentication_mode_name
    from ray._raylet import get_authentication_mode

    file = credentials.token_file()
    bits = None
    if not os.environ.get("RAY_AUTH_TOKEN") and file.is_file():
        bits = stat.S_IMODE(file.stat().st_mode)
    return {
        "mode": get_authentication_mode_name(get_authentication_mode()),
        "token_file": str(file),
        "token_bits": bits,
        "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        "dashboard": _dashboard(),
    }


def _dashboard() -> list[str]:
    """Addresses at which this node listens on the dashboard's port, where it is on this node."""
    import psutil
    import ray
    import ray._private.worker

    url = ray._private.worker._global_node.webui_url if ray.is_initialized() else None
    port = (url or "").rpartition(":")[2]
    if not port.isdigit():
        return []
    mine = {one.address for its in psutil.net_if_addrs().values() for one in its} | {"0.0.0.0", "::"}
    listening = psutil.net_connections("tcp")
    return sorted(
        {c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN and c.laddr.port == int(port)} & mine
    )


def answers_anyone(address: str) -> bool:
    """Whether the head at this address answers a client that has no token. Takes seconds: a process of its own."""
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    without["RAY_AUTH_MODE"] = "disabled"
    try:
        done = subprocess.run(
            [sys.executable, "-c", KNOCK, address],
            env=without,
            capture_output=True,
            text=True,
            timeout=KNOCK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.stdout.strip() == "open"


def check(nodes: Mapping[str, Mapping[str, Any]], head: str, *, anyone: bool | None, private: bool) -> list[Finding]:
    """What follows from what `look` said on each node.

    Args:
        head: name of the head node.
        anyone: what `answers_anyone` said; None: not asked.
        private: Ray runs on this machine's loopback, for this command alone.
    """
    findings = []
    off = [node for node, facts in nodes.items() if facts["mode"] == "disabled"]
    if anyone or off:
        what = "the cluster answers without a token" if anyone else "Ray's token authentication is off"
        # No error, which `train` would refuse: the run works, and whose cluster it is cannot always turn the token on.
        severity = Severity.NOTE if private else Severity.WARNING
        said = f"{what}: whoever reaches its ports runs code on it"
        findings.append(Finding("auth.token", severity, names(off) if off else head, said, ON))
    for node, facts in nodes.items():
        bits = facts["token_bits"]
        # Kubernetes shows a mounted secret to the pod's group.
        if bits is not None and bits & (0o007 if facts["kubernetes"] else 0o077):
            what = f"{facts['token_file']} holds the cluster's token and may be read by other users: mode {bits:04o}"
            ways = (
                f"chmod 600 {facts['token_file']}",
                "if others are on this machine, make a new token: docs/security.md",
            )
            findings.append(Finding("auth.token_file", Severity.WARNING, node, what, ways))
    wide = [address for address in nodes.get(head, {}).get("dashboard", []) if not is_loopback(address)]
    if wide:
        # In Kubernetes its service has to reach it, and a network policy says who else does.
        kept = nodes[head]["kubernetes"]
        findings.append(
            Finding(
                "auth.dashboard",
                Severity.NOTE if kept else Severity.WARNING,
                head,
                f"the dashboard listens on {', '.join(wide)}: its page and the metrics need no token",
                (
                    "ray start --head --dashboard-host=127.0.0.1; reach it by ray dashboard or ssh -L",
                    "see docs/security.md",
                ),
            )
        )
    if not findings:
        findings.append(Finding("auth", Severity.OK, names(nodes), "token authentication is on, the token private"))
    return findings
