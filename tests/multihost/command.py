"""A bed by hand: the command line of `testbed`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from . import process, testbed


def main() -> None:
    parser = argparse.ArgumentParser(description=testbed.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("start", help="make a bed that lives until stop")
    start.add_argument("bed")
    start.add_argument("--hosts", type=int, default=3)
    start.add_argument("--cpus", type=float, nargs="+", default=[1], help="of all hosts, or of each")
    start.add_argument("--no-token", action="store_true", help="Ray without authentication")
    start.add_argument("--no-resolve", action="store_true", help="host names do not resolve")
    start.add_argument("--no-ray", action="store_true", help="hosts without Ray")
    start.add_argument("--dashboard", action="store_true", help="on the head, port 8265")
    start.add_argument("--ssh", action="store_true", help="sshd on each host, which lets root in with the bed's key")
    start.add_argument("--share", nargs="*", default=[], help="folders below /tmp that every host sees")
    for verb, about in (
        ("kill", "the host loses its power"),
        ("cut", "unplug its network"),
        ("heal", "plug it in again"),
        ("revive", "start a host that was killed"),
    ):
        one = verbs.add_parser(verb, help=about)
        one.add_argument("bed")
        one.add_argument("host", type=int)
    shell = verbs.add_parser("shell", help="a shell on a host, or one command")
    shell.add_argument("bed")
    shell.add_argument("host", type=int)
    shell.add_argument("command", nargs=argparse.REMAINDER)
    ps = verbs.add_parser("ps", help="a host's processes, with the machine's process ids")
    ps.add_argument("bed")
    ps.add_argument("host", type=int)
    for verb, about in (("nodes", "what Ray says is alive"), ("stop", "end the bed")):
        verbs.add_parser(verb, help=about).add_argument("bed")
    verbs.add_parser("list", help="the beds that there are")
    options = parser.parse_args()
    try:
        _do(options)
    except testbed.BedError as error:
        sys.exit(f"error: {error}")


def _do(options: argparse.Namespace) -> None:
    if options.verb == "list":
        print("\n".join(testbed.names()))
        return
    if options.verb == "start":
        bed = testbed.Bed(
            options.hosts,
            options.cpus * options.hosts if len(options.cpus) == 1 else options.cpus,
            name=options.bed,
            token=not options.no_token,
            resolve=not options.no_resolve,
            dashboard=options.dashboard,
            ray=not options.no_ray,
            share=options.share,
            ssh=options.ssh,
            detached=True,
        )
        bed.start()
        print(f"{options.hosts} hosts; next: python -m tests.multihost.testbed shell {shlex.quote(bed.name)} 0")
        return
    bed = testbed.Bed.load(options.bed)
    if options.verb == "shell":
        os.execvpe("nsenter", [*bed.enter(options.host), *(options.command or ["bash"])], bed.environment())
    elif options.verb == "ps":
        for pid in bed.processes(options.host):
            print(pid, process.command_line(pid)[:150])
    elif options.verb == "nodes":
        for node in bed.nodes():
            print(node["address"], "alive" if node["alive"] else "dead", node["id"])
    elif options.verb == "stop":
        bed.stop()
    else:
        {"kill": bed.kill, "cut": bed.cut, "heal": bed.heal, "revive": bed.start_host}[options.verb](options.host)
