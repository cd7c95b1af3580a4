"""What holds a bed: its keeper, and the first process of each process namespace. Run by `testbed`, not by people.

Nothing but the standard library, and started without site-packages: each costs 10 MB and 50 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from . import process

REPOSITORY = Path(__file__).resolve().parents[2]
#: Starts this module; needs the repository as its folder.
PYTHON = (sys.executable, "-S", "-E", "-m", "tests.multihost.inside")
TMP, SHM = "1g", "256m"  # of each host


def keep(folder: str, owner: int) -> None:
    """The keeper: holds the bed's process namespace for as long as the owner lives (0: until SIGTERM)."""
    status = Path(folder, "keeper.json")
    status.write_text(json.dumps({"pid": os.getpid(), "began": process.began(os.getpid()), "owner": owner}))
    watched = [os.pidfd_open(owner)] if owner else []
    ended, ending = os.pipe()
    os.set_blocking(ending, False)
    signal.set_wakeup_fd(ending)
    signal.signal(signal.SIGTERM, lambda *_: None)
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [*PYTHON, "switch"]
    # With the keeper, however it ends, goes unshare; with that (--kill-child) the namespace's first process.
    switch = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=_die_with_parent)
    assert switch.stdout is not None
    if not switch.stdout.readline():
        raise SystemExit("unshare failed")
    (inner,) = process.children(switch.pid)
    print(inner, flush=True)
    os.close(1)
    select.select([*watched, ended, os.pidfd_open(switch.pid)], [], [])
    process.end(inner, process.began(inner), signal.SIGKILL)
    switch.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def host(folder: str, name: str) -> None:
    """A host's first process: its folders and name, then the collecting of ended processes."""
    state = json.loads(Path(folder, "bed.json").read_text())
    kept = [str(REPOSITORY), sys.prefix, sys.base_prefix, *state["share"]]
    if state["ssh"]:  # whoever comes in by ssh has a home of this host's own, and sshd a place for itself
        _own(folder, Path.home(), "0700", kept)
        _own(folder, Path("/run"), "0755", [str(Path(folder).parent)])
        Path("/run/sshd").mkdir(mode=0o755)
    _own(folder, Path("/tmp"), "1777", kept)
    _mount("-t", "tmpfs", "-o", f"size={SHM},mode=1777", "bed-shm", "/dev/shm")
    _mount("--bind", Path(folder, "etc-hosts"), "/etc/hosts")
    socket.sethostname(name)
    _reap()


def _own(folder: str, place: Path, mode: str, kept: list[str]) -> None:
    """A folder that is this host's alone, but for those below it that all hosts share."""
    stage = Path(folder, f"{place.name}-{os.getpid()}-{secrets.token_hex(3)}")
    stage.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={TMP},mode={mode}", f"bed-{place.name}", stage)
    for share in kept:
        if Path(share).is_relative_to(place) and Path(share) != place:
            inside = stage / Path(share).relative_to(place)
            inside.mkdir(parents=True, exist_ok=True)
            _mount("--rbind", share, inside)
    _mount("--move", stage, place)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", "--no-mtab", *map(str, arguments)], check=True)


def _reap() -> None:
    """The first process of a namespace inherits what lost its parent, and has to take note of its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    print("ready", flush=True)
    os.close(1)
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigtimedwait({signal.SIGCHLD}, 1)


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "keep":
        keep(arguments[0], int(arguments[1]))
    elif role == "host":
        host(*arguments)
    else:
        _reap()
