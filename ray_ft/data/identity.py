"""What prepared rows depend on, and so the key that they are kept under; and what differs between two of them.

Kept beside the rows, so that a dataset that changed under a run is refused with what changed, not with two hashes.
Weights of sources are not part of it: they change which rows an epoch takes, not the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from ray_ft import collector, paths
from ray_ft.data.files import File, public_name
from ray_ft.recipe import AnySource

STATS = "stats.json"


def of_sources(wanted: Sequence[AnySource]) -> list[dict[str, Any]]:
    """Settings of the sources that the rows depend on, without credentials."""
    settings = [source.model_dump(mode="json", exclude={"weight"}) for source in wanted]
    return [{**found, "path": [public_name(one) for one in found["path"]]} for found in settings]


def of_files(files: Sequence[tuple[int, File]]) -> list[list[Any]]:
    """[number of the source, name, stamp, hash of the URI's query] of each; the query may hold credentials."""
    found: list[list[Any]] = []
    for number, file in files:
        query = paths.split_query(file.uri)[1]
        found.append([number, file.name, file.stamp, hashlib.sha256(query.encode()).hexdigest()[:12] if query else ""])
    return found


def key_of(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def same_stamp(one: str, other: str) -> bool:
    """Whether two stamps may be of one content.

    Some object stores give fractions of a second when they list a folder and whole seconds when asked for one object.
    """
    if one == other:
        return True
    (size, time), (other_size, other_time) = (stamp.split("-", 1) for stamp in (one, other))
    if size != other_size or not (time.isdigit() and other_time.isdigit()):
        return False
    seconds, other_seconds = divmod(int(time), 10**9), divmod(int(other_time), 10**9)
    return seconds[0] == other_seconds[0] and 0 in (seconds[1], other_seconds[1])


def describe(stamp: str) -> str:
    """A stamp for people: "1,204 bytes of 2026-11-02 13:05:09"."""
    size, _, time = stamp.partition("-")
    shown = f"{int(size):,} bytes"
    if not time.isdigit():  # a server that does not say when a file was changed
        return shown
    moment = datetime.fromtimestamp(int(time) // 10**9, UTC)
    fraction = f".{int(time) % 10**9:09d}".rstrip("0.")
    return f"{shown} of {moment:%Y-%m-%d %H:%M:%S}{fraction} UTC"


def change(before: str, now: str) -> str:
    return f"{describe(before)} → {describe(now)}"


def explain(storage: str, old_key: str, new_key: str) -> list[str]:
    """What differs between the data of two keys, a sentence each; never empty for two keys.

    Args:
        storage: `run.storage`, below which both were prepared.
    """
    if old_key == new_key:
        return []
    found = []
    for key in (old_key, new_key):
        location = paths.join(storage, "_prepared", str(key), STATS)
        content = paths.read_json(location) if paths.exists(location) else {}
        if "identity" not in content:
            why = "was prepared by an older version" if content else "is gone"
            return [f"what {key} was made of is not known: {location} {why}"]
        found.append(content["identity"])
    return differences(*found)


@collector.paused()
def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The same for two identities."""
    lines = _of_files(old["files"], new["files"])
    for number in range(max(len(old["sources"]), len(new["sources"]))):
        if number >= len(old["sources"]):
            lines.append(f"data.train.{number} is new: {_paths(new['sources'][number])}")
        elif number >= len(new["sources"]):
            lines.append(f"data.train.{number} is gone: {_paths(old['sources'][number])}")
        else:
            lines += _of_settings(f"data.train.{number}", old["sources"][number], new["sources"][number])
    lines += _of_settings("data", old["layout"], new["layout"])
    lines += _of_settings("model", *({"labels": one.get("labels")} for one in (old, new)))
    lines += _of_settings("data.images", old.get("images", {}), new.get("images", {}))
    if old["tokenizer"] != new["tokenizer"]:
        lines.append("the tokenizer changed")
    template, *special = old["template"]
    new_template, *new_special = new["template"]
    if template != new_template:
        lines.append("the chat template changed")
    for name, before, now in zip(("bos", "eos", "pad"), special, new_special, strict=True):
        if before != now:
            lines.append(f"the tokenizer's {name} token was {before}, is {now}")
    if (old["format"], old["cut"]) != (new["format"], new["cut"]):
        lines.append(f"this version prepares rows in another way (format {old['format']}, now {new['format']})")
    return lines or ["the order of files or sources changed"]


def _of_files(old: list[list[Any]], new: list[list[Any]]) -> list[str]:
    before, now = ({(source, name): rest for source, name, *rest in files} for files in (old, new))
    lines = []
    # By name: to look through all files for each one that is gone takes minutes where thousands are.
    old_sources, new_sources = (_sources_by_name(found) for found in (before, now))
    for key in sorted({*before, *now}, key=lambda key: (key[1], key[0])):
        source, name = key
        if key not in now:
            moved = [other for other in new_sources.get(name, ()) if (other, name) not in before]
            lines.append(f"{name} is gone" if not moved else f"{name} was of source {source}, is of {moved[0]}")
        elif key not in before:
            if not any((other, name) not in now for other in old_sources.get(name, ())):
                lines.append(f"{name} is new")
        elif before[key][0] != now[key][0]:
            lines.append(f"{name} changed: {change(before[key][0], now[key][0])}")
        elif before[key] != now[key]:
            lines.append(f"{name} is reached in another way: the query of its URI changed")
    return list(dict.fromkeys(lines))  # a file of two sources is told once


def _sources_by_name(files: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for source, name in files:
        found.setdefault(name, []).append(source)
    return found


def _of_settings(where: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*old, *new])
    return [
        f"{where}.{name} was {_shown(old.get(name))}, is {_shown(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _paths(source: dict[str, Any]) -> str:
    return ", ".join(source["path"])
