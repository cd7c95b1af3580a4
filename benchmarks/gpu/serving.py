"""Our server against vLLM's own, by `benchmarks.serve`, where there is a vLLM."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Setting

NEEDED = ("vllm", "ray")
SHOWN = 12  # last lines


def measure(setting: Setting) -> None:
    """Rows: `said`, what that benchmark printed at its end; or `why` there is none."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        setting.emit({"why": f"not installed: {', '.join(missing)}"})
        return
    if setting.small:
        setting.emit({"why": "a small run leaves it to benchmarks.serve, which needs minutes"})
        return
    command = [sys.executable, "-m", "benchmarks.serve", "--pairs", "2"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(setting.left - 10, 1))
    except subprocess.TimeoutExpired:
        setting.emit({"why": "benchmarks.serve did not end in its time"})
        return
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()][-SHOWN:]
    setting.emit({"said": lines} if done.returncode == 0 else {"why": f"benchmarks.serve failed: {lines[-1:]}"})
