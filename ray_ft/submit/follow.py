"""A job from here: its lines as they come, whatever happens to the connection, until it ends.

The API gives what the job has printed so far, as a whole; what was shown already is known by its length. So nothing is
lost or shown twice when the connection, the dashboard or this machine was away, and `attach` is the same from the
start. Limits: a line is shown once it is complete; each look fetches the whole text, so looks become rarer as it grows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Protocol

from ray_ft.errors import ResourceError
from ray_ft.submit.api import Api, Job, NoAnswer

LOOK_SECONDS = 1.0
SLOW_BYTES = 2 << 20  # of text, for each of which looks are a second further apart
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
AWAY_SECONDS = 15 * 60.0  # without any answer, until this gives up; the job does not
UNREADABLE = 5  # failed looks at the text of a job that is over
PATIENCE_SECONDS = 20.0  # until a job that has not begun is said to wait

#: What Ray's own parts write into a job's text.
_RAYS = re.compile(r"^(\d{4}-\d\d-\d\d [\d:,]+\s+INFO job_manager\.py:\d+ -- |Running entrypoint for job )")
_STOPPED = re.compile(r"^stopped after step (\d+) of (\d+)", re.MULTILINE)


class Screen(Protocol):
    """Who shows it."""

    def line(self, text: str) -> None:
        """A line that the job printed."""

    def say(self, text: str) -> None:
        """A line of this command's own."""


def follow(api: Api, name: str, screen: Screen, wait: Callable[[float], None] = time.sleep) -> Job:
    """Show a job's lines until it is over.

    Args:
        wait: pauses for so many seconds.

    Raises:
        ResourceError: the cluster does not know the job, or does not answer for `AWAY_SECONDS`.
        CredentialError: the token was refused.
    """
    shown, away_since, pause, began, told, unread = 0, None, FIRST_WAIT, time.monotonic(), False, 0
    while True:
        job = None
        try:
            job = api.job(name)  # before its text: of a job that is over, that is whole
            text = api.logs(name) if job else ""
        except NoAnswer as error:
            unread += job is not None and job.over
            if job is not None and unread == UNREADABLE:
                screen.say(f"what the job printed cannot be read: {error.what}")
                return job
            if away_since is None:
                away_since = time.monotonic()
                screen.say(f"{error.what}; the job goes on, trying again")
            elif time.monotonic() - away_since > AWAY_SECONDS:
                raise
            wait(pause)
            pause = min(2 * pause, LONGEST_WAIT)
            continue
        if away_since is not None:
            screen.say(f"connected again after {time.monotonic() - away_since:.0f} s")
            away_since, pause = None, FIRST_WAIT
        if job is None:
            raise ResourceError(
                f"the cluster at {api.address} knows no job {name}",
                ["ray-ft jobs", "a head node that was started again has forgotten them: submit the run again"],
            )
        end = len(text) if job.over else text.rfind("\n") + 1
        if end > shown:
            for line in text[shown:end].removesuffix("\n").split("\n"):
                if not _RAYS.match(line):
                    screen.line(line)
            shown = end
        if job.over:
            return job
        if job.status == "PENDING" and not told and time.monotonic() - began > PATIENCE_SECONDS:
            told = True
            screen.say("the job waits for the head node to start it")
        wait(LOOK_SECONDS + len(text) / SLOW_BYTES)


def exit_code(job: Job) -> int:
    """Of a job that is over: its entry point's own; 143, as of SIGTERM, where it was stopped."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 143
    return job.exit_code or 1


def stopped_at(text: str) -> tuple[int, int] | None:
    """The step that a job's text names as its last, and of how many; None where it names none."""
    found = _STOPPED.findall(text)
    return (int(found[-1][0]), int(found[-1][1])) if found else None
