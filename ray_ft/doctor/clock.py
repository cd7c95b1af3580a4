"""Whether the nodes' clocks agree: signed requests to storage and TLS refuse a clock that is minutes off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray_ft.doctor.finding import Finding, Severity
from ray_ft.doctor.probe import Answer

#: Seconds: logs and lock times no longer tell what came first; certificates and signatures (S3: 15 minutes) fail.
OFF, FAR_OFF = 1.0, 60.0


def check(rounds: Iterable[Mapping[str, Answer]]) -> list[Finding]:
    """Of each node, the most exact of several answers counts, and only what it is off beyond doubt."""
    best: dict[str, Answer] = {}
    for answers in rounds:
        for node, answer in answers.items():
            if not answer.error and answer.slack < best.get(node, Answer()).slack:
                best[node] = answer
    findings = []
    for node, answer in sorted(best.items()):
        surely = max(abs(answer.ahead) - answer.slack, 0.0)
        if surely > OFF:
            direction = "ahead of" if answer.ahead > 0 else "behind"
            findings.append(
                Finding(
                    "clock.skew",
                    Severity.ERROR if surely > FAR_OFF else Severity.WARNING,
                    node,
                    f"its clock is {abs(answer.ahead):.1f} s (±{answer.slack:.1f} s) {direction} this one's",
                    ("run a time service on every node: chronyd or systemd-timesyncd", "timedatectl says what it does"),
                )
            )
    if best and not findings:
        most = max(abs(answer.ahead) + answer.slack for answer in best.values())
        findings = [Finding("clock", Severity.OK, f"{len(best)} node{'s' * (len(best) != 1)}", f"within {most:.2g} s")]
    return findings
