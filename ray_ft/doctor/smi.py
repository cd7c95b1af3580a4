"""What nvidia-smi says: each GPU's state from `nvidia-smi -q -x`, and the ways between GPUs from `nvidia-smi topo`.

The XML form is read because it only ever gains fields: one that a driver lacks, or a card does not have ("N/A"), is
None here. Limits: MIG instances are not listed singly; used memory does not say whose it is where processes hide.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any
from xml.etree import ElementTree

MIB = 1 << 20
#: A node with a broken GPU can take half a minute to answer; a well one without persistence mode, some seconds.
SECONDS = 40.0
#: Reasons for lower clocks that a person can do something about; the others are how a GPU works.
SLOWED = {
    "hw_slowdown": "the card slows itself down",
    "hw_thermal_slowdown": "it is too hot",
    "sw_thermal_slowdown": "the driver keeps it from getting too hot",
    "hw_power_brake_slowdown": "the machine's power supply asks for less",
}


class Unanswered(Exception):
    """nvidia-smi is not there, or says what is wrong instead of answering. `there`: whether it is installed."""

    def __init__(self, why: str, there: bool) -> None:
        super().__init__(why)
        self.there = there


def run(*arguments: str) -> str:
    """The output of nvidia-smi.

    Raises:
        Unanswered: it is not there, fails, or takes longer than `SECONDS`.
    """
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise Unanswered("nvidia-smi is not on PATH", there=False) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unanswered(f"nvidia-smi: {error}", there=True) from error
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines() or ["nothing"]
        raise Unanswered(f"nvidia-smi ended with {done.returncode}: {said[0][:200]}", there=True)
    return done.stdout


def states(xml: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The driver and each GPU, from the output of `nvidia-smi -q -x`.

    Returns:
        {driver, cuda}: its version, and the newest CUDA that it runs; and of each GPU: index, name, uuid, total, used
        and free (bytes), ecc (on or not), uncorrected (errors since the driver was loaded), remap_pending,
        remap_failed, recovery (what the driver asks for, "" for nothing), celsius, margin (degrees until it slows
        down), slowed (names of `SLOWED`), watts and usual_watts (power limits), width and usual_width (PCIe lanes),
        persistence, mig, fabric (state of its registration with the NVLink switches, "" without), processes.
    """
    root = ElementTree.fromstring(xml)  # noqa: S314 - written by the driver's own tool, on this machine
    versions = {"driver": _text(root, "driver_version") or "", "cuda": _text(root, "cuda_version") or ""}
    return versions, [_gpu(index, gpu) for index, gpu in enumerate(root.findall("gpu"))]


def _gpu(index: int, gpu: ElementTree.Element) -> dict[str, Any]:
    reasons = gpu.find("clocks_event_reasons")
    if reasons is None:
        reasons = gpu.find("clocks_throttle_reasons")  # as it was called up to driver 530
    power = gpu.find("gpu_power_readings")
    if power is None:
        power = gpu.find("power_readings")
    return {
        "index": index,
        "name": _text(gpu, "product_name") or "unknown",
        "uuid": _text(gpu, "uuid") or "",
        "total": _bytes(gpu, "fb_memory_usage/total"),
        "used": _bytes(gpu, "fb_memory_usage/used"),
        "free": _bytes(gpu, "fb_memory_usage/free"),
        "ecc": _flag(gpu, "ecc_mode/current_ecc"),
        "uncorrected": _uncorrected(gpu),
        "remap_pending": any(
            _flag(gpu, path) for path in ("remapped_rows/remapped_row_pending", "retired_pages/pending_retirement")
        ),
        "remap_failed": _flag(gpu, "remapped_rows/remapped_row_failure"),
        "recovery": _recovery(gpu),
        "celsius": _number(gpu, "temperature/gpu_temp"),
        "margin": _margin(gpu),
        "slowed": [name for name in SLOWED if reasons is not None and _active(reasons, name)],
        "watts": _first(power, "current_power_limit", "enforced_power_limit", "power_limit"),
        "usual_watts": _first(power, "default_power_limit"),
        "width": _number(gpu, "pci/pci_gpu_link_info/link_widths/current_link_width"),
        "usual_width": _number(gpu, "pci/pci_gpu_link_info/link_widths/max_link_width"),
        "persistence": _flag(gpu, "persistence_mode"),
        "mig": _flag(gpu, "mig_mode/current_mig"),
        "fabric": _text(gpu, "fabric/state") or "",
        "processes": [
            {
                "pid": int(_number(one, "pid") or 0),
                "name": _text(one, "process_name") or "",
                "bytes": _bytes(one, "used_memory"),
            }
            for one in gpu.iterfind("processes/process_info")
        ],
    }


def _text(where: ElementTree.Element | None, path: str) -> str | None:
    text = ((where.findtext(path) if where is not None else None) or "").strip()
    return None if text in ("", "N/A", "Not Supported", "Insufficient Permissions") else text


def _number(where: ElementTree.Element | None, path: str) -> float | None:
    """The number at the beginning: "45 C", "16x", "700.00 W"."""
    found = re.match(r"-?[\d.]+", _text(where, path) or "")
    return float(found[0]) if found else None


def _first(where: ElementTree.Element | None, *paths: str) -> float | None:
    return next((number for path in paths if (number := _number(where, path)) is not None), None)


def _bytes(where: ElementTree.Element, path: str) -> int | None:
    number = _number(where, path)
    return None if number is None else int(number) * MIB


def _flag(where: ElementTree.Element, path: str) -> bool | None:
    text = _text(where, path)
    return None if text is None else text in ("Yes", "Enabled", "Active")


def _active(reasons: ElementTree.Element, name: str) -> bool:
    return any(_flag(reasons, f"{prefix}_{name}") for prefix in ("clocks_event_reason", "clocks_throttle_reason"))


def _uncorrected(gpu: ElementTree.Element) -> int | None:
    """Since the driver was loaded. Older drivers say double_bit/total, newer ones count SRAM and DRAM apart."""
    volatile = gpu.find("ecc_errors/volatile")
    if volatile is None:
        return None
    if (total := _number(volatile, "double_bit/total")) is not None:
        return int(total)
    counts = [_number(volatile, entry.tag) for entry in volatile if "uncorrectable" in entry.tag]
    known = [count for count in counts if count is not None]
    return int(sum(known)) if known else None


def _recovery(gpu: ElementTree.Element) -> str:
    action = _text(gpu, "gpu_recovery_action") or "None"
    if action != "None":
        return action
    return "Reset" if _flag(gpu, "gpu_reset_status/reset_required") else ""


def _margin(gpu: ElementTree.Element) -> float | None:
    """Degrees until the card slows down: said by newer cards, the difference of two temperatures on older ones."""
    if (margin := _number(gpu, "temperature/gpu_temp_tlimit")) is not None:
        return margin
    now = _number(gpu, "temperature/gpu_temp")
    limit = _number(gpu, "temperature/gpu_temp_slow_threshold")
    return None if now is None or limit is None else limit - now


def matrix(text: str) -> list[list[str]]:
    """The GPU-to-GPU part of what `nvidia-smi topo -m` or `-p2p r` prints; [] where it is something else.

    Returns:
        One row for each GPU: "X" on the diagonal; NV18, PIX, PXB, PHB, NODE or SYS; or OK, CNS, GNS, TNS, NS, DR, U.
    """
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # the head line comes underlined
    head = next((line.split() for line in plain.splitlines() if re.match(r"\s*GPU0\s", f"{line} ")), [])
    count = sum(1 for word in head if re.fullmatch(r"GPU\d+", word))
    rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    rows = [row[1 : count + 1] for row in rows if row != head]
    return rows if count and len(rows) == count and all(len(row) == count for row in rows) else []
