"""The packages that only peers need, in a folder of their own: the environment stays what the lock says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = ROOT / "requirements" / "peers.txt"
FOLDER = ROOT / ".peers"


def folder() -> str:
    """Where they are; installed there first if they are not, or if the list has changed."""
    stamp, wanted = FOLDER / "installed.txt", LIST.read_text(encoding="utf-8")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
        done = subprocess.run([*pip, "--upgrade", "--target", FOLDER, "-r", LIST], stdout=sys.stderr, check=False)
        if done.returncode:
            sys.exit(f"pip could not install {LIST} into {FOLDER}: what it said is above")
        stamp.write_text(wanted, encoding="utf-8")
    return str(FOLDER)


def environment(threads: int) -> dict[str, str]:
    """For a peer's process: it finds these packages, asks no hub, and computes with as many threads."""
    path = os.pathsep.join(filter(None, [folder(), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
