"""The token that lets into a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from ray_ft import credentials
from ray_ft.cli.app import app
from ray_ft.view import View


@app.command()
def token(
    show: Annotated[bool, typer.Option("--show", help="Print the token itself, and nothing else.")] = False,
) -> None:
    """Make the token that lets into a cluster, if there is none, and say where it is."""
    made = credentials.make_token()
    closed = credentials.close_token()
    if show:
        with credentials.revealing(credentials.token()):
            print(credentials.token())
        return
    view, path = View(), credentials.token_file()
    if closed:
        view.line(closed)
    view.line(f"{'made' if made else 'there is'} the cluster's token: {path}, which only you can read")
    view.line("whoever has it can run anything on the cluster. Each node and each of its users needs the same file:")
    view.line("  cluster/*.yaml bring it to the nodes that they start (file_mounts)")
    view.line(f"  another machine: scp -p {path} USER@HOST:.ray/auth_token")
    view.line("  Kubernetes: KubeRay makes one for each cluster; cluster/kuberay/README.md says how to fetch it")
    view.line("Ray asks for it where RAY_AUTH_MODE=token is set before it starts, as cluster/start.sh does")
