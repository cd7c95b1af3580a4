"""Whether a Ray node with GPUs is there (exit status 0, else 1): the probe of a head that serves models."""

from __future__ import annotations

import sys

from ray.util.state import list_nodes

DASHBOARD = "http://127.0.0.1:8265"


def main() -> int:
    nodes = list_nodes(address=sys.argv[1] if sys.argv[1:] else DASHBOARD, limit=1000, timeout=20)
    found = [node.node_ip for node in nodes if node.state == "ALIVE" and node.resources_total.get("GPU", 0) >= 1]
    print(f"nodes with GPUs: {', '.join(found) or 'none yet'}")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
