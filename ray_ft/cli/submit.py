"""Verbs as jobs on a cluster: submit, attach, stop, jobs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.main import get_group

from ray_ft.cli.app import app
from ray_ft.errors import RecipeError
from ray_ft.view import View

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265."),
]
JobOrRun = Annotated[str, typer.Argument(metavar="JOB|RUN", help="Submission id, or name of a run: its newest job.")]


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="train, tune, evaluate, export or generate.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS…", help="As the verb takes them: recipe, key.path=value, --to …")
    ] = None,
    address: Address = None,
    working_dir: Annotated[str, typer.Option(help="Folder that the job takes along: recipes and code.")] = ".",
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Environment variable to pass on; no secrets. Repeatable.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Take along what is left out otherwise. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave out more; as in .gitignore. Repeatable.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for it.")] = False,
) -> None:
    """Run a verb as a job on a cluster; the same command continues a run that was stopped."""
    from ray_ft import submit as submitting

    view = View()
    if verb not in submitting.VERBS:
        raise RecipeError(f"{verb!r} cannot be submitted", [f"one of {', '.join(submitting.VERBS)}"])
    given = _read(verb, arguments or [])
    environment = submitting.check_environment(env or ())
    package = submitting.collect(working_dir, include or (), exclude or ())
    checked = submitting.prepare(verb, arguments or [], given, package)
    with _connected(address) as (api, to):
        job = submitting.send(api, verb, checked, package, environment, view.line)
        if detach:
            view.line(f"next: ray-ft attach {job}{to}")
            return
        _follow(api, job, view, to)


@app.command()
def attach(job: JobOrRun, address: Address = None) -> None:
    """Follow a job from its first line; ends as the job does."""
    from ray_ft import submit as submitting

    with _connected(address) as (api, to):
        _follow(api, submitting.find(api, job).id, View(), to)


@app.command()
def stop(job: JobOrRun, address: Address = None) -> None:
    """End a job with a checkpoint, from which the same submission goes on."""
    from ray_ft import submit as submitting

    view = View()
    with _connected(address) as (api, to):
        found = submitting.find(api, job)
        if found.over:
            view.line(f"{found.id} is over already: {found.status.lower()}")
            return
        ended, step = submitting.stop(api, found, view)
        if ended.status != "STOPPED":
            view.line(f"{ended.id} ended by itself meanwhile: {ended.status.lower()}")
        elif step is not None:
            at = f"after step {step[0]} of {step[1]}, with a checkpoint"
            view.line(f"{ended.id} stopped {at}; submitting it again goes on")
        else:
            view.line(f"{ended.id} stopped; what it wrote last: ray-ft attach {ended.id}{to}")


@app.command()
def jobs(
    address: Address = None,
    running: Annotated[bool, typer.Option("--running", help="Only those that are not over.")] = False,
) -> None:
    """List the jobs of a cluster."""
    from ray_ft.submit.show import table

    view = View()
    with _connected(address) as (api, _):
        found = [job for job in api.jobs() if not (running and job.over)]
        if found:
            view.console.print(table(found))
        else:
            view.line(f"no {'running ' * running}jobs at {api.address}")


def _read(verb: str, arguments: list[str]) -> dict[str, Any]:
    """A verb's arguments by name, read by the verb's own command line: what it would refuse there, it refuses here."""
    command = get_group(app).commands[verb]
    with command.make_context(f"ray-ft {verb}", list(arguments)) as context:
        return dict(context.params)


@contextmanager
def _connected(address: str | None) -> Iterator[tuple[Any, str]]:
    """The API, and the option that leads a next command to the same cluster."""
    from ray_ft.submit import Api, find_address

    api = Api(find_address(address))
    try:
        yield api, f" --address {shlex.quote(address)}" if address else ""
    finally:
        api.close()


def _follow(api: Any, job: str, view: View, to: str) -> None:
    """Until the job is over, and end as it did; Ctrl-C leaves it alone."""
    from ray_ft import submit as submitting
    from ray_ft.submit.follow import exit_code

    try:
        ended = submitting.attach(api, job, view)
    except KeyboardInterrupt:
        view.line(f"\n{job} goes on; ray-ft attach {job}{to} follows it, ray-ft stop {job}{to} ends it")
        raise typer.Exit(130) from None
    code = exit_code(ended)
    if ended.status == "FAILED" and ended.exit_code is None:  # the entry point never ran, or was lost
        view.line(ended.message.strip())
    view.line(f"{job} {ended.status.lower()}" + (f", exit status {code}" if ended.status == "FAILED" else ""))
    raise typer.Exit(code)
