"""Room on each node beside CPUs and GPUs: shared memory, disk, open files."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_ft.doctor.finding import Finding, Severity
from ray_ft.doctor.probe import Node

SHM = "/dev/shm"  # noqa: S108 - where Linux has it
#: NCCL's buffers between the GPUs of a node; Docker gives 64 MiB, and NVIDIA's guide asks for 1 GiB.
SHM_FOR_GPUS = 1 << 30
#: Free bytes under which nothing more can be placed there.
FULL = 64 << 20
#: Share of a disk in use from which Ray creates no more objects: its local_fs_capacity_threshold.
DISK_FULL = 0.95
#: Free bytes under which logs and spilled objects will soon fill a disk.
DISK_LOW = 512 << 20
#: Ray asks for 65536 open files; under this a node with many workers runs out.
FILES, FILES_FEW = 8192, 1024


def look() -> dict[str, Any]:
    """Bytes in all and free of shared memory and of the disks in use; how many files this process may open."""
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    disks = {}
    for purpose, folder in _folders().items():
        disks[purpose] = {"folder": folder, **_space(folder)}
    return {
        "shm": _space(SHM) if os.path.isdir(SHM) else None,
        "disks": disks,
        "files": files,
        "most_files": most_files,
    }


def _folders() -> dict[str, str]:
    """What is written to on this node, by purpose."""
    import ray

    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folders = {"downloaded models": str(home)}
    if ray.is_initialized():  # also inside a task
        import ray._private.worker

        folders["Ray's logs and spilled objects"] = ray._private.worker._global_node.get_session_dir_path()
    return folders


def _space(folder: str) -> dict[str, int]:
    place = Path(folder)
    while not place.exists():  # made when it is first needed: of the disk that it will lie on
        place = place.parent
    found = os.statvfs(place)
    return {"total": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def check(nodes: Mapping[str, tuple[Node, Mapping[str, Any]]]) -> list[Finding]:
    """What follows from what `look` said on each node."""
    findings = []
    for name, (node, facts) in nodes.items():
        findings += _shm(name, node, facts["shm"])
        for purpose, disk in facts["disks"].items():
            findings += _disk(name, purpose, disk)
        findings += _files(name, facts) if node.id else []  # Ray raises its own processes' limit
    if not findings:
        least = min((facts["shm"]["free"] for _, facts in nodes.values() if facts["shm"]), default=0)
        disk = min((disk["free"] for _, facts in nodes.values() for disk in facts["disks"].values()), default=0)
        what = f"at least {_gib(least)} of shared memory and {_gib(disk)} of disk free on each node"
        findings = [Finding("room", Severity.OK, f"{len(nodes)} node{'s' * (len(nodes) != 1)}", what)]
    return findings


def _shm(name: str, node: Node, shm: Mapping[str, int] | None) -> list[Finding]:
    if shm is None:
        return []
    ways = (
        "make it larger: mount -o remount,size=… /dev/shm; docker --shm-size=…; Kubernetes: emptyDir, medium: Memory",
        "see what holds it: ls -l /dev/shm, and end what is left of processes that died",
    )
    if shm["free"] < FULL:
        what = f"{SHM} is full: {_gib(shm['free'])} free of {_gib(shm['total'])}"
        return [Finding("room.shm", Severity.ERROR, name, what, ways)]
    store = int(node.resources.get("object_store_memory", 0))
    needed = store + (SHM_FOR_GPUS if node.gpus > 1 else 0)
    if shm["total"] < needed:
        what = f"{SHM} has {_gib(shm['total'])}; Ray's object store and NCCL may use {_gib(needed)}"
        return [Finding("room.shm", Severity.WARNING, name, what, ways)]
    return []


def _disk(name: str, purpose: str, disk: Mapping[str, Any]) -> list[Finding]:
    used = 1 - disk["free"] / max(disk["total"], 1)
    what = f"the disk of {disk['folder']} ({purpose}) is {used:.0%} full: {_gib(disk['free'])} free"
    ways = (
        "delete what is not needed: old Ray sessions below /tmp/ray, models below ~/.cache/huggingface",
        "place it on a larger disk: ray start --temp-dir, HF_HOME",
    )
    if used > DISK_FULL:
        # At 95% Ray fails; a disk of many TiB that holds only models may still be of use.
        bad = purpose.startswith("Ray") or disk["free"] < DISK_LOW
        return [Finding("room.disk", Severity.ERROR if bad else Severity.WARNING, name, what, ways)]
    if disk["free"] < DISK_LOW:
        return [Finding("room.disk", Severity.WARNING, name, what, ways)]
    return []


def _files(name: str, facts: Mapping[str, Any]) -> list[Finding]:
    if not 0 <= facts["files"] < FILES:  # negative: no limit
        return []
    severity = Severity.ERROR if facts["files"] < FILES_FEW else Severity.WARNING
    what = f"processes may open {facts['files']} files (the user may raise it to {facts['most_files']})"
    ways = ("ulimit -n 65536 before ray start, or LimitNOFILE= of its service",)
    return [Finding("room.open_files", severity, name, what, ways)]


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2g} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
