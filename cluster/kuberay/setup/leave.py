"""What a Ray pod does before Kubernetes ends it: has the work that it holds saved.

    python leave.py head --seconds=600      stops the jobs that this head drives, and waits until they are over
    python leave.py worker --seconds=600    drains this node, and waits until nothing runs on it

On either a training run writes a checkpoint, and Serve lets answers end while it starts replicas elsewhere. Limits: a
machine that is taken away at short notice gives less time, and one that is lost gives none: then the newest checkpoint
counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

DASHBOARD = "http://127.0.0.1:8265"
IDLE = "ray::IDLE"  # how Ray names the process of a worker that has nothing to do
NODE = "--node_id="  # this node's identity, an argument of its raylet


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["head", "worker"])
    parser.add_argument("--seconds", type=float, required=True, help="how long to wait at most")
    parser.add_argument("--dashboard", default=DASHBOARD)
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    return stop_jobs(args.dashboard, until) if args.role == "head" else drain(args.seconds, until)


def stop_jobs(dashboard: str, until: float) -> int:
    """Stops all jobs. 0 once they are over, 1 where time ran out."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(dashboard)
    going = {JobStatus.PENDING, JobStatus.RUNNING}
    for job in client.list_jobs():
        if job.submission_id and job.status in going:
            print(f"leave: stopping {job.submission_id}", flush=True)
            client.stop_job(job.submission_id)
    while any(job.submission_id and job.status in going for job in client.list_jobs()):
        if time.monotonic() > until:
            return 1
        time.sleep(1)
    return 0


def drain(seconds: float, until: float) -> int:
    """Tells Ray that this node goes. 0 once it holds no work, 1 where time ran out or Ray refused."""
    raylets = (words for words in processes() if words[0].endswith("/raylet"))
    node = next((word.removeprefix(NODE) for words in raylets for word in words if word.startswith(NODE)), None)
    if node is None:
        print("leave: no Ray node here", flush=True)
        return 0
    # Ray drains a node that idles or one that is taken away, and only the latter may have something to save.
    command = ["ray", "drain-node", f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message=its pod is being ended", f"--deadline-remaining-seconds={int(seconds)}"]
    if subprocess.run(command, check=False).returncode:
        return 1
    while working := at_work():
        if time.monotonic() > until:
            print(f"leave: still at work: {', '.join(working)}", flush=True)
            return 1
        time.sleep(1)
    return 0


def at_work() -> list[str]:
    """Names of the tasks and actors that run in this pod, as Ray shows them in the process table."""
    return [name for name, *_ in processes() if name.startswith("ray::") and not name.startswith(IDLE)]


def processes() -> Iterator[list[str]]:
    """The command lines of the pod's processes."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if words := line.decode(errors="replace").rstrip("\0").split("\0"):
            yield words


if __name__ == "__main__":
    sys.exit(main())
