"""Findings as a person reads them: the worst first, each with its ways out; or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ray_ft.doctor.finding import Finding, Severity, worst
from ray_ft.view import View

TITLES = {
    Severity.ERROR: ("bold red", "errors: a run would fail, or not do what it says"),
    Severity.WARNING: ("bold yellow", "warnings: a run works, but slower or less safely than it should"),
    Severity.NOTE: ("bold", "notes"),
    Severity.OK: ("bold green", "fine"),
}


def show(findings: Sequence[Finding], view: View) -> None:
    """A table for each severity, and one line that sums up."""
    for severity in sorted(TITLES, reverse=True):
        of_it = [finding for finding in findings if finding.severity == severity]
        if not of_it:
            continue
        style, title = TITLES[severity]
        view.console.print(f"[{style}]{title}[/]")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(max_width=34)
        table.add_column()
        for finding in of_it:
            ways = "".join(f"\n→ {way}" for way in finding.ways_out)
            table.add_row(f"  {finding.name}", escape(finding.where), escape(finding.what + ways))
        view.console.print(table)
    view.line(summary(findings))


def summary(findings: Sequence[Finding]) -> str:
    """How many of each severity, in words."""
    counts = [
        (severity, sum(one.severity == severity for one in findings)) for severity in sorted(TITLES, reverse=True)
    ]
    words = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "note", Severity.OK: "fine"}
    said = [
        f"{count} {words[severity]}{'s' * (count != 1 and severity != Severity.OK)}"
        for severity, count in counts
        if count
    ]
    return f"doctor: {', '.join(said)}"


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """{worst, findings: [{name, severity, where, what, ways_out}]}, severities in lower case."""
    return {
        "worst": worst(findings).name.lower(),
        "findings": [
            {
                "name": one.name,
                "severity": one.severity.name.lower(),
                "where": one.where,
                "what": one.what,
                "ways_out": list(one.ways_out),
            }
            for one in findings
        ],
    }
