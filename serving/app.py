"""The Serve application, built from an exported model's manifest alone.

    serve run serving.app:build run=runs/demo
    serve deploy serving/config.yaml
    ray-ft serve runs/demo

Limits: no authentication and no request limits of its own; whoever reaches the port can ask the model.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from ray_ft import paths
from ray_ft.errors import ServeError
from ray_ft.paths import Manifest

if TYPE_CHECKING:
    from ray.serve import Application

ARGS = {
    "run": "run directory or export folder, a path or URI",
    "model_name": "name under which clients ask for the model",
    "replicas": "copies of the model",
    "max_model_len": "longest prompt plus answer, in tokens",
}


def build(args: dict[str, Any]) -> Application:
    """The OpenAI-compatible application of one exported model.

    Args:
        args: ``run`` (required), and ``model_name``, ``replicas``, ``max_model_len``, which replace the manifest's
            values. Numbers may be text, as ``serve run`` passes them.

    Raises:
        ServeError: an argument is unknown, missing or of no use; there is no complete export; or it cannot fit.
    """
    options = check_args(args)
    manifest, hf_config = load(options.pop("run"))
    return build_from(manifest, hf_config, **options)


def check_args(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with numbers as numbers; absent ones left out."""
    options: dict[str, Any] = {}
    for key, value in args.items():
        if key not in ARGS:
            near = difflib.get_close_matches(key, ARGS, n=1, cutoff=0.5)
            known = ", ".join(f"{name} ({what})" for name, what in ARGS.items())
            raise ServeError(
                f"unknown argument {key!r} of serving.app:build",
                [f"did you mean {near[0]!r}?" if near else f"known: {known}"],
            )
        if value is None or value == "":
            continue
        if key in ("replicas", "max_model_len"):
            least = 1 if key == "replicas" else 8
            try:
                number = int(str(value))
            except ValueError:
                number = 0
            if number < least:
                raise ServeError(
                    f"argument {key} = {value!r} of serving.app:build is not a whole number of at least {least}",
                    [f"leave it out: the value in the manifest's serve section ({ARGS[key]})"],
                )
            options[key] = number
        else:
            options[key] = str(value)
    if "run" not in options:
        raise ServeError(
            "serving.app:build needs the argument 'run'",
            ["serve run serving.app:build run=PATH", "in a config file: args: {run: PATH}"],
        )
    return options


def load(run: str) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and ``config.json`` of an export, after a check that every file is there at its full size.

    Sizes only: hashing 54 GB would take minutes before a replica starts, and `ray-ft export` has done it.

    Raises:
        ServeError: there is no manifest, or a file is missing or cut short.
    """
    manifest = Manifest.load(run)
    files: dict[str, dict[str, Any]] = manifest.content["files"]
    fs, folder = paths.filesystem(manifest.folder)
    infos = fs.get_file_info([paths.join(folder, name) for name in files])
    faults = []
    for (name, expected), info in zip(files.items(), infos, strict=True):
        if info.type != pafs.FileType.File:
            faults.append(f"{name} is missing")
        elif info.size != expected["bytes"]:
            faults.append(f"{name} has {info.size:,} bytes instead of {expected['bytes']:,}")
    if "config.json" not in files:
        faults.append("config.json is not listed")
    if faults:
        raise ServeError(
            f"the export in {manifest.folder!r} is not what its manifest says: {'; '.join(faults)}",
            ["export the run again: ray-ft export RUN", "copy the whole folder again"],
        )
    return manifest, paths.read_json(paths.join(manifest.folder, "config.json"))


def build_from(manifest: Manifest, hf_config: dict[str, Any], **options: Any) -> Application:
    """As `build`, of a manifest that is already loaded.

    Connects to Ray where that has not happened, as ``serve run`` builds before it connects: to the cluster of
    ``RAY_ADDRESS``, of `ray start` on this machine, or a new one. (Its ``--address`` comes too late to be seen here.)
    """
    import ray
    from ray.serve.llm import build_openai_app

    from serving import engine

    if not ray.is_initialized():
        ray.init(namespace="serve")
    plan = engine.plan(manifest, hf_config, engine.Cluster.read(), **options)
    return build_openai_app(
        {
            "llm_configs": [engine.llm_config(plan)],
            "ingress_cls_config": {"ingress_cls": "serving.replica.Ingress"},
            # One ingress per replica; Ray starts at least two, each a process that imports vLLM (0.6 GiB).
            # On CPU it reserves nothing: the node's CPUs are the replicas' threads.
            "ingress_deployment_config": {
                "num_replicas": plan.replicas,
                "max_ongoing_requests": 1_000_000,
                "ray_actor_options": {"num_cpus": 1 if plan.device == "gpu" else 0},
            },
        }
    )
