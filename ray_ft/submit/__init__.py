"""Verbs as jobs on a cluster: send the working directory, start the verb on the head node, follow it, stop it.

A job is known by its submission id, ``<verb>-<run>-<n>``, and carries its run in its metadata, so that `attach` and
`stop` take either. Nothing is kept on this machine. Limits: what a head node forgets when it is started again (its jobs
and their text) is not to be had back; runs, on their storage, are, by submitting the same run again.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_ft import __version__
from ray_ft.errors import ResourceError
from ray_ft.submit import follow as following
from ray_ft.submit.api import RUN, STORAGE, VERB, VERSION, Api, Job, NoAnswer, find_address
from ray_ft.submit.check import (
    ABOUT_RECIPE,
    Checked,
    check_arguments,
    check_environment,
    check_line,
    check_recipe,
)
from ray_ft.submit.package import Package, collect
from ray_ft.submit.show import shown
from ray_ft.view import View

__all__ = [
    "VERBS",
    "prepare",
    "check_environment",
    "collect",
    "send",
    "attach",
    "stop",
    "find",
    "submission_id",
    "Api",
    "find_address",
    "Job",
    "Checked",
]

VERBS = ("train", "tune", "evaluate", "export", "generate")
STOP_SECONDS = 600  # that a job has from SIGTERM to its end: a step, a checkpoint; Ray's own default is 3
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # read by Ray's supervisor of the job, from the job's environment
ANSWER_SECONDS = 60.0  # for a request whose answer was lost


def prepare(
    verb: str,
    arguments: Sequence[str],
    given: Mapping[str, Any],
    package: Package,
) -> Checked:
    """Check a verb's arguments against what the job will find.

    Args:
        given: the same arguments by name, as the verb's command line reads them.

    Raises:
        RecipeError, CredentialError: it cannot work, or would show a secret.
    """
    check_line(arguments)
    if verb in ABOUT_RECIPE:
        overrides = list(given.get("overrides") or ())
        options = [one for one in arguments if one.startswith("-")]
        return check_recipe(given["path"], overrides, options, package)
    return check_arguments(verb, given, arguments, package)


def send(
    api: Api, verb: str, checked: Checked, package: Package, environment: Mapping[str, str], say: Callable[[str], None]
) -> str:
    """Send the package where the cluster has it not yet, and start the job. Returns its submission id.

    Raises:
        ResourceError: a job of this run is alive; the cluster does not answer, or refuses it.
        RecipeError: the package is too large.
    """
    version = api.ray_version()
    if warning := api.warning:
        say(warning)
    if checked.own and not api.one_node():
        raise ResourceError(
            f"each node has its own {', '.join(checked.own)}",
            ["name storage that every node reaches: s3://…, gs://…, or a folder that they all mount"],
        )
    jobs = api.jobs()
    for job in jobs:
        if checked.alone and not job.over and _writes(job, checked):
            raise ResourceError(
                f"{job.id} is at work on the run {checked.run} already",
                [f"ray-ft attach {job.id}", f"ray-ft stop {job.id}, and submit again to go on", "another run.name"],
            )
    for note in checked.notes:
        say(note)
    archive, content = package.build()
    say(f"{package.root}: {package.describe()}; {len(content) / 2**20:.1f} MiB to send")
    if not api.has_package(archive):
        api.upload(archive, content)
    entrypoint = shlex.join(["exec", "python", "-m", f"jobs.{verb}", *checked.arguments])
    runtime_env = {
        "working_dir": f"gcs://{archive}",
        "env_vars": {STOP_WAIT: str(STOP_SECONDS), **environment},
    }
    described = {VERB: verb, RUN: checked.run, STORAGE: checked.storage, VERSION: __version__}
    number = _next_number(verb, checked.run, jobs)
    while True:
        name = submission_id(verb, checked.run, number)
        if _accepted(api, name, entrypoint, runtime_env, described):
            break
        number += 1  # somebody took the number meanwhile
    say(f"submitted {name} to {api.address}, Ray {version}")
    return name


def attach(api: Api, job: str, view: View) -> Job:
    """Show a job from its first line until it is over.

    Raises:
        ResourceError, CredentialError: see `follow`.
    """
    with shown(view) as screen:
        return following.follow(api, job, screen)


def stop(api: Api, job: Job, view: View) -> tuple[Job, tuple[int, int] | None]:
    """Ask a job to end with a checkpoint, and wait until it has.

    Returns:
        The job, over; and the step that it ended at and of how many, where it said so.

    Raises:
        ResourceError: it did not end in `STOP_SECONDS` and a minute; or see `Api`.
    """
    if not job.over:
        api.stop(job.id)
        view.line(f"{job.id} was asked to end with a checkpoint; waiting up to {STOP_SECONDS} s")
    until = time.monotonic() + STOP_SECONDS + ANSWER_SECONDS
    while not job.over:
        if time.monotonic() > until:
            raise ResourceError(
                f"{job.id} has not ended", [f"ray-ft attach {job.id} shows what it does", "ray-ft stop again"]
            )
        time.sleep(following.LOOK_SECONDS)
        job = _known(api, job.id) or job
    return job, following.stopped_at(api.logs(job.id))


def find(api: Api, name: str) -> Job:
    """The job of a submission id, or the newest of a run of that name, one that is alive first.

    Raises:
        ResourceError: there is none; names those that there are.
    """
    jobs = api.jobs()
    for job in jobs:
        if job.id == name:
            return job
    of_run = [job for job in jobs if job.run and job.run == name]
    if of_run:
        return max(of_run, key=lambda job: (not job.over, job.started or 0))
    known = [job.id for job in jobs][-5:]
    raise ResourceError(
        f"the cluster at {api.address} knows neither a job nor a run {name!r}",
        [f"one of {', '.join(known)}"] if known else ["it has no jobs: ray-ft submit train RECIPE"],
    )


def submission_id(verb: str, run: str, number: int) -> str:
    """Readable, and without the slash of a sweep's trials, which would end a part of a URL."""
    return f"{verb}-{re.sub(r'[^A-Za-z0-9._-]+', '-', run).strip('-')}-{number}"


def _next_number(verb: str, run: str, jobs: Sequence[Job]) -> int:
    stem = submission_id(verb, run, 0)[:-1]
    taken = [int(job.id[len(stem) :]) for job in jobs if job.id.startswith(stem) and job.id[len(stem) :].isdigit()]
    return max(taken, default=0) + 1


def _writes(job: Job, checked: Checked) -> bool:
    same = (job.run, job.metadata.get(STORAGE)) == (checked.run, checked.storage)
    return same and job.verb in ABOUT_RECIPE


def _accepted(
    api: Api, name: str, entrypoint: str, runtime_env: Mapping[str, Any], described: Mapping[str, str]
) -> bool:
    """Whether the cluster took the job; False where another one has its id.

    The answer may be lost on the way while the job was taken: then it is there, and must not be sent twice.
    """
    try:
        answer = api.submit(name, entrypoint, dict(runtime_env), dict(described))
    except NoAnswer:
        job = _known(api, name)
        if job is None or job.entrypoint != entrypoint:
            raise
        return True
    if answer.status_code == 200:
        return True
    if "already exists" in answer.text:
        return False
    said = (answer.text.strip().splitlines() or [""])[-1]
    raise ResourceError(f"the cluster at {api.address} refuses the job: {said[:300]}", ["ray-ft doctor --address …"])


def _known(api: Api, name: str) -> Job | None:
    """The job, also where the connection has to come back first."""
    until = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return api.job(name)
        except NoAnswer:
            if time.monotonic() > until:
                raise
            time.sleep(following.FIRST_WAIT)
