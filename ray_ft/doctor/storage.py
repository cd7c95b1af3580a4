"""Whether every node writes to the run's storage, and reads there what the others wrote.

Three rounds: each node writes a file of its own, then opens the others' by name, then the files are taken away. Opened
by name, as a network file system may show an old listing for a while. Limits: a few files; no load test.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ray_ft import paths
from ray_ft.doctor.finding import Finding, Severity, names
from ray_ft.doctor.probe import Answer, Node, ask, ask_each
from ray_ft.errors import first_line

#: What each node writes and its neighbour reads to see how fast the storage is, in bytes.
SAMPLE = 16 << 20
#: Bytes per second and node under which it is called slow: ten minutes for each GB-sized shard of a checkpoint.
SLOW_RATE = 4 << 20
#: Seconds for one small file after which it is called slow.
SLOW_SECONDS = 3.0
#: How long a node looks for another's file: network file systems and object stores may need a moment.
PATIENCE = 5.0


def examine(nodes: Sequence[Node], storage: str, *, quick: bool) -> tuple[list[Finding], list[dict[str, Answer]]]:
    """Write, read and clean up on all nodes.

    Returns:
        What was found, and the answers of each round, whose clocks others may use.
    """
    folder = paths.join(storage, f".doctor-{uuid.uuid4().hex[:8]}")
    sample = 0 if quick else SAMPLE
    written = ask_each([(node, (folder, number, sample)) for number, node in enumerate(nodes)], write)
    there = [number for number, node in enumerate(nodes) if _wrote(written[node.name])]
    try:
        looking = [
            (node, (folder, _others(number, there), _neighbour(number, there, sample)))
            for number, node in enumerate(nodes)
        ]
        seen = ask_each(looking, read)
    finally:
        # Each by itself: where the folder is not shared there are as many as nodes.
        ask(nodes, clean, folder)
    return check(storage, [node.name for node in nodes], written, seen, sample), [written, seen]


def _others(number: int, there: Sequence[int]) -> list[int]:
    return [other for other in there if other != number]


def _neighbour(number: int, there: Sequence[int], sample: int) -> int | None:
    """Whose sample this node reads: the next one's, as its own is still in its memory."""
    later = [*(other for other in there if other > number), *_others(number, there)]
    return later[0] if later and sample else None


def _wrote(answer: Answer) -> bool:
    return not answer.error and not answer.value["error"]


# ------------------------------------------------------------------------------------------------------- on each node


def write(folder: str, number: int, sample: int) -> dict[str, Any]:
    """Write this node's file, and a sample of so many bytes. Returns {error, seconds, rate (bytes/s; 0: no sample)}."""
    try:
        began = time.monotonic()
        paths.write_bytes(paths.join(folder, f"{number}"), _content(folder, number))
        seconds, rate = time.monotonic() - began, 0.0
        if sample:
            began = time.monotonic()
            paths.write_bytes(paths.join(folder, f"{number}.sample"), os.urandom(sample))
            rate = sample / max(time.monotonic() - began, 1e-6)
    except Exception as error:  # whatever the storage's library raises is the finding
        return {"error": f"{type(error).__name__}: {first_line(error)}", "seconds": 0.0, "rate": 0.0}
    return {"error": "", "seconds": seconds, "rate": rate}


def read(folder: str, others: Sequence[int], neighbour: int | None) -> dict[str, Any]:
    """Read the others' files. Returns {unseen: {number: why}, seconds of the slowest, rate (bytes/s; 0: no sample)}."""
    unseen: dict[int, str] = {}
    slowest = rate = 0.0
    end = time.monotonic() + PATIENCE
    for number in others:
        began = time.monotonic()
        while why := _unlike(folder, number):
            if time.monotonic() > end:
                unseen[number] = why
                break
            time.sleep(0.2)
        slowest = max(slowest, time.monotonic() - began)
    if neighbour is not None and neighbour not in unseen:
        began = time.monotonic()
        size = len(paths.read_bytes(paths.join(folder, f"{neighbour}.sample")))
        rate = size / max(time.monotonic() - began, 1e-6)
    return {"unseen": unseen, "seconds": slowest, "rate": rate}


def clean(folder: str) -> None:
    """Take the files away, wherever this node sees them; another one may do so at the same time."""
    with contextlib.suppress(OSError):
        paths.delete_dir(folder)


def _unlike(folder: str, number: int) -> str:
    """Why a file is not what its node wrote, or nothing."""
    try:
        same = paths.read_bytes(paths.join(folder, f"{number}")) == _content(folder, number)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return "" if same else "its content differs"


def _content(folder: str, number: int) -> bytes:
    return f"ray-ft doctor {folder} {number}\n".encode()


# ------------------------------------------------------------------------------------------------------ what follows


def check(
    storage: str, nodes: Sequence[str], written: Mapping[str, Answer], seen: Mapping[str, Answer], sample: int
) -> list[Finding]:
    """What follows from what `write` and `read` said on each node, numbered in their order."""
    findings = []
    refused = {node: written[node].error or written[node].value["error"] for node in nodes if not _wrote(written[node])}
    for why in sorted(set(refused.values())):
        where = [node for node, its in refused.items() if its == why]
        findings.append(
            Finding(
                "storage.writable",
                Severity.ERROR,
                names(where),
                f"cannot write to run.storage {storage}: {why}",
                (
                    "mount it there for writing, with the permissions of the user that runs Ray",
                    "for s3:// or gs:// give every node the rights: an instance role, or a secrets folder",
                    "choose another place with run.storage=…",
                ),
            )
        )
    findings += _not_shared(storage, nodes, refused, seen)
    slow = _slow(nodes, written, seen, sample)
    if slow and not findings:
        findings.append(
            Finding(
                "storage.slow",
                Severity.WARNING,
                names(slow),
                f"run.storage {storage} is slow: {'; '.join(slow.values())}",
                (
                    "checkpoints take long: a larger train.checkpoint.every, or faster storage",
                    "look for other work on the same storage, and for one in another region",
                ),
            )
        )
    if not findings:
        rates = [answer.value["rate"] for answer in written.values() if answer.value["rate"]]
        speed = f", the slowest at {min(rates) / 1e6:.0f} MB/s" if rates else ""
        what = "writes and reads back" if len(nodes) == 1 else "each writes, and reads what the others wrote"
        findings.append(Finding("storage", Severity.OK, names(nodes), f"{storage}: {what}{speed}"))
    return findings


def _not_shared(
    storage: str, nodes: Sequence[str], refused: Mapping[str, str], seen: Mapping[str, Answer]
) -> list[Finding]:
    failed = {node: seen[node].error for node in nodes if seen[node].error and node not in refused}
    blind = {node: seen[node].value["unseen"] for node in nodes if not seen[node].error and seen[node].value["unseen"]}
    findings = [
        Finding(
            "storage.readable",
            Severity.ERROR,
            node,
            f"cannot read from run.storage {storage}: {why}",
            ("mount it there, or choose another place with run.storage=…",),
        )
        for node, why in failed.items()
    ]
    if blind:
        # Where all miss one node's file, that node is the odd one; else all have a place of their own.
        missed = set.intersection(*(set(unseen) for unseen in blind.values()))
        apart = [nodes[number] for number in sorted(missed)]
        alone = [node for node in blind if len(blind[node]) >= len(nodes) - len(refused) - 1]
        odd = apart if len(apart) == 1 and len(nodes) > 2 else (alone if len(alone) == 1 else list(blind))
        why = next(iter(next(iter(blind.values())).values()))
        findings.append(
            Finding(
                "storage.shared",
                Severity.ERROR,
                names(odd),
                f"run.storage {storage} is another place there than on the others: what one node wrote, another does "
                f"not find ({why})",
                (
                    "mount the shared file system at this path on every node",
                    "choose storage that all nodes reach: run.storage=s3://…, gs://… or a mounted network folder",
                ),
            )
        )
    return findings


def _slow(
    nodes: Sequence[str], written: Mapping[str, Answer], seen: Mapping[str, Answer], sample: int
) -> dict[str, str]:
    slow = {}
    for node in nodes:
        if written[node].error or seen[node].error:
            continue
        wrote, saw = written[node].value, seen[node].value
        rates = [("writes", wrote["rate"]), ("reads", saw["rate"])] if sample else []
        said = [f"{verb} {rate / 1e6:.1f} MB/s" for verb, rate in rates if 0 < rate < SLOW_RATE]
        if (seconds := max(wrote["seconds"], saw["seconds"])) > SLOW_SECONDS:
            said.append(f"a small file takes {seconds:.1f} s")
        if said:
            slow[node] = f"{node} {' and '.join(said)}"
    return slow
