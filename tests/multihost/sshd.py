"""sshd on a bed's hosts: root comes in with the bed's key, and with nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .testbed import Background, Bed

TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])  # sshd, where PATH is not root's


def why_not() -> str | None:
    """Why hosts cannot have sshd; None where they can."""
    if lacking := [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]:
        return f"{', '.join(lacking)} not found: install openssh-server, openssh-client and rsync"
    return None


def prepare(folder: Path) -> None:
    """Write keys and configuration of all hosts: `key` lets in; `host-key` is one for all, nobody here would notice."""
    for name in ("key", "host-key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bed", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    # Nothing of the machine's own /etc/ssh: no other keys, no passwords, nothing from a client's environment.
    lines = [f"HostKey {folder}/host-key", f"AuthorizedKeysFile {folder}/key.pub", "StrictModes no", "PidFile none"]
    lines += ["AuthenticationMethods publickey", "PermitRootLogin prohibit-password", "UsePAM no", "UseDNS no"]
    lines += ["MaxStartups 100"]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")


def start(bed: Bed, host: int) -> str | None:
    """Start it on a host. Returns what it says if it does not listen; None where it does."""
    log = bed.folder / f"sshd{host}.log"
    command = [str(shutil.which("sshd", path=PATH)), "-D", "-e", "-f", str(bed.folder / "sshd_config")]
    running: Background = bed.shell(host, [*command, f"-oListenAddress={bed.address(host)}"], background=True, log=log)
    for _ in range(600):
        with contextlib.suppress(FileNotFoundError):
            if "Server listening" in log.read_text():
                return None
        if running.poll() is not None:
            break
        time.sleep(0.05)
    return log.read_text()[-2000:]
