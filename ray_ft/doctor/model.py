"""Whether every node reaches the recipe's model and tokenizer, and finds the same there."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ray_ft import hub
from ray_ft.doctor.finding import Finding, Severity, names
from ray_ft.errors import RayFtError

#: Files of which the content is compared; of the others the size.
COMPARED = ("config.json", "tokenizer_config.json", "generation_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def look(path: str) -> dict[str, Any]:
    """Fetch what is small of the model and list what is here.

    Returns:
        error and ways_out where it cannot be had; else files {name: size, or digest of what is compared} and weights
        (whether they are here: those of a hub id or URI are downloaded when training starts).
    """
    try:
        folder = Path(hub.model_folder(path, weights=False))
    except RayFtError as error:
        return {"error": error.what, "ways_out": list(error.ways_out)}
    files = {}
    for file in sorted(folder.iterdir()):
        if file.is_file():
            compared = file.name in COMPARED
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()[:12] if compared else file.stat().st_size
    weights = any(_is_weights(name) for name in files)
    return {"error": "", "ways_out": [], "files": files, "weights": weights, "local": os.path.isdir(path)}


def check(path: str, nodes: Mapping[str, Mapping[str, Any]], working: Collection[str]) -> list[Finding]:
    """What follows from what `look` said on each node.

    Args:
        working: the nodes that may have workers; the others need no weights.
    """
    findings = []
    by_error: defaultdict[str, list[str]] = defaultdict(list)
    for node, facts in nodes.items():
        if facts["error"]:
            by_error[facts["error"]].append(node)
    for error, where in sorted(by_error.items()):
        ways = tuple(nodes[where[0]]["ways_out"])
        if len(where) < len(nodes):
            ways = (
                "copy the folder to these nodes at the same path, or keep it on storage that all nodes reach",
                *ways,
            )
        findings.append(Finding("model.reachable", Severity.ERROR, names(where), error, ways or ("see model.path",)))
    there = {node: facts for node, facts in nodes.items() if not facts["error"]}
    findings += _incomplete(path, there, working)
    whole = {node: facts for node, facts in there.items() if not _lacks(facts, node in working)}
    findings += _differing(path, whole)
    if not findings and there:
        later = not all(facts["weights"] for node, facts in there.items() if node in working)
        what = f"{path}: config and tokenizer are there"
        findings.append(Finding("model", Severity.OK, names(there), what if later else f"{path}: all of it is there"))
        if later:
            what = f"the weights of {path} are downloaded when the run starts, once on each machine"
            findings.append(Finding("model.weights", Severity.NOTE, names(there), what))
    return findings


def _incomplete(path: str, nodes: Mapping[str, Mapping[str, Any]], working: Collection[str]) -> list[Finding]:
    by_lack: defaultdict[str, list[str]] = defaultdict(list)
    for node, facts in nodes.items():
        if lacks := _lacks(facts, node in working):
            by_lack[" and no ".join(lacks)].append(node)
    return [
        Finding(
            "model.complete",
            Severity.ERROR,
            names(where),
            f"model.path {path} has no {lacks}",
            ("copy the whole folder to these nodes", "name a folder that holds config, tokenizer and weights"),
        )
        for lacks, where in by_lack.items()
    ]


def _lacks(facts: Mapping[str, Any], works: bool) -> list[str]:
    files = facts["files"]
    lacks = [] if "config.json" in files else ["config.json"]
    if not any(name in files for name in TOKENIZERS):
        lacks.append("tokenizer")
    if facts["local"] and not facts["weights"] and works:
        lacks.append("weights (*.safetensors)")
    return lacks


def _differing(path: str, nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Where the same path holds another model. Weights that are not downloaded yet are no difference."""
    groups: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    all_have = all(facts["weights"] for facts in nodes.values())
    for node, facts in nodes.items():
        groups[tuple(sorted((n, s) for n, s in facts["files"].items() if all_have or not _is_weights(n)))].append(node)
    if len(groups) < 2:
        return []
    usual = max(groups, key=lambda files: len(groups[files]))
    odd = [node for files, of in groups.items() if files != usual for node in of]
    differing = sorted({name for files in groups for name, _ in set(files) ^ set(usual)})
    return [
        Finding(
            "model.same",
            Severity.ERROR,
            names(odd),
            f"model.path {path} is not the same there: {names(differing)}",
            ("copy the same folder to every node, or keep it on storage that all nodes reach",),
        )
    ]


def _is_weights(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in hub.WEIGHTS)
