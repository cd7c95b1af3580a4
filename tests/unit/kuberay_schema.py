"""Makes kuberay_schema.json, KubeRay's kinds as one JSON schema, from the operator's own definitions (CRDs).

    python tests/unit/kuberay_schema.py v1.7.0 ray.io_rayclusters.yaml ray.io_rayjobs.yaml ray.io_rayservices.yaml

The files are in helm-chart/kuberay-operator/crds of ray-project/kuberay, at the tag of that version. Descriptions are
left out, and what occurs more than once is written once: of 3.4 MB 37 kB remain. Stricter than Kubernetes, which drops
fields that it does not know: here they are refused. Limits: CEL rules (x-kubernetes-validations) are not checked.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FILE = HERE / "kuberay_schema.json"
VERSION = "v1"  # of the kinds; v1alpha1 is older

#: What JSON schema and CRDs both have. Formats (int32, …) are notes to programmers, except those that bound a number.
SAME = ("type", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "required")
BOUNDS = {"int32": 1 << 31, "int64": 1 << 63}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
#: Of an object whose schema says no more than that it is one, as CRDs do for metadata.
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 253, "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": TEXTS,
        "annotations": TEXTS,
    },
    "additionalProperties": False,
}


def convert(schema: dict[str, Any], key: str = "") -> dict[str, Any]:
    """A CRD's schema (OpenAPI v3) as JSON schema, without descriptions; fields that it does not have are refused."""
    made: dict[str, Any] = {name: schema[name] for name in SAME if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if (limit := BOUNDS.get(schema.get("format", ""))) and made.get("type") == "integer":
        made = {"minimum": -limit, "maximum": limit - 1} | made
    if schema.get("nullable"):
        made["type"] = [made["type"], "null"]
    if "items" in schema:
        made["items"] = convert(schema["items"])
    if made.get("type") == "object":
        free = schema.get("x-kubernetes-preserve-unknown-fields", False)
        if "properties" in schema:
            made["properties"] = {name: convert(one, name) for name, one in schema["properties"].items()}
            made["additionalProperties"] = free
        elif isinstance(more := schema.get("additionalProperties"), dict):
            made["additionalProperties"] = convert(more)
        elif key == "metadata":
            return METADATA
    return made


def shared(kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One schema of all kinds: what is needed in more than one place is in ``$defs``, under the hash of its content."""
    bodies: dict[str, dict[str, Any]] = {}  # each distinct part once, its own parts as references

    def refer(schema: dict[str, Any]) -> dict[str, Any]:
        folded = within(schema, refer)
        key = hashlib.sha256(json.dumps(folded, sort_keys=True).encode()).hexdigest()[:8]
        if bodies.setdefault(key, folded) != folded:
            raise ValueError(f"two parts have the hash {key}: take more of its digits")
        return {"$ref": f"#/$defs/{key}"}

    tops = {kind: within(schema, refer) for kind, schema in kinds.items()}
    uses = Counter(re.findall(r"#/\$defs/(\w+)", json.dumps([tops, bodies])))

    def kept(key: str) -> bool:
        """Whether a reference to it is less than the thing itself."""
        return uses[key] > 1 and len(json.dumps(bodies[key])) > len(json.dumps({"$ref": f"#/$defs/{key}"}))

    def unfold(schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in schema:
            return within(schema, unfold)
        key = schema["$ref"].rpartition("/")[2]
        return schema if kept(key) else unfold(bodies[key])

    return {
        "kinds": {kind: unfold(schema) for kind, schema in tops.items()},
        "$defs": {key: unfold(body) for key, body in bodies.items() if kept(key)},
    }


def within(schema: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The schema with `change` done to each of its parts."""
    made = dict(schema)
    if "properties" in made:
        made["properties"] = {name: change(one) for name, one in made["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = change(made[key])
    return made


def main() -> None:
    release, *files = sys.argv[1:]
    kinds = {}
    for file in files:
        crd = yaml.safe_load(Path(file).read_text())
        [schema] = [one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == VERSION]
        made = convert(schema)
        # Whoever writes a file says what it is; the operator alone writes `status`.
        made["required"] = sorted({"apiVersion", "kind", "metadata", "spec", *made.get("required", [])})
        del made["properties"]["status"]
        made["properties"]["apiVersion"] = {"const": f"{crd['spec']['group']}/{VERSION}"}
        made["properties"]["kind"] = {"const": crd["spec"]["names"]["kind"]}
        kinds[crd["spec"]["names"]["kind"]] = made
    source = f"ray-project/kuberay {release} (Apache-2.0), made by tests/unit/kuberay_schema.py"
    FILE.write_text(json.dumps({"source": source, **shared(kinds)}, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{FILE.name}: {', '.join(kinds)}, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
