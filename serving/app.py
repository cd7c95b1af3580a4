"""The Serve applications: an engine for each set of weights, and the gateway in front of them.

    serve run serving.app:build run=runs/demo
    serve deploy serving/config.yaml
    ray-ft serve runs/demo

`build` makes one application of everything, for Serve's own tools. `ray-ft serve` keeps the gateway and each engine in
applications of their own, so that an engine can be replaced while the others answer (serving/rollout.py).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray_ft import hub, paths
from ray_ft.errors import ServeError
from serving import engine, models
from serving.models import Model

if TYPE_CHECKING:
    from ray.serve import Application

APPLICATION = "ray-ft"  # name of the gateway's application; those of engines begin with it

#: The gateway computes nothing that could hold an event loop up: everything in one spares each request four changes of
#: thread (Ray Serve reads this when the replica's process begins).
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}

ARGS = {
    "run": "run directory or export folder, a path or URI, or a list of them",
    "base": "serve also the models that they were trained from",
    "model_name": "name under which clients ask for the model",
    "replicas": "copies of the model",
    "max_model_len": "longest prompt plus answer, in tokens",
    "api_keys_file": "file of API keys on the gateway's node, in place of serve.gateway.api_keys_file",
}


def build(args: dict[str, Any]) -> Application:
    """Everything in one application, with the gateway behind Serve's proxy.

    Connects to Ray where that has not happened, as ``serve run`` builds before it connects: to the cluster of
    ``RAY_ADDRESS``, of `ray start` on this machine, or a new one. (Its ``--address`` comes too late to be seen here.)

    Args:
        args: ``run`` (required), and ``base``, ``model_name``, ``replicas``, ``max_model_len``, ``api_keys_file``,
            which replace the manifest's values. Numbers may be text, as ``serve run`` passes them.

    Raises:
        ServeError: an argument is unknown, missing or of no use; there is no complete export; or it cannot fit.
    """
    import ray
    from ray import serve

    from serving.endpoint import Endpoint

    options = check_args(args)
    keys_file = options.pop("api_keys_file", None)
    found = models.load(options.pop("run"), **options)
    settings, keys = gateway_of(found, keys_file)
    if settings["open"]:
        raise ServeError(
            "serve.gateway.open asks for no key, and where Serve's own proxy listens is not known here",
            ["ray-ft serve RUN, which listens on serve.host", "serve.gateway.open=false, and export again"],
        )
    if not keys and not settings["api_keys_file"]:
        raise ServeError(
            "there are no API keys, and Serve's own tools show none that is made here",
            [
                f"set {settings['api_keys_env']}=NAME:KEY where the cluster's head was started",
                "name a file: the argument api_keys_file; ray-ft key makes its lines",
            ],
        )
    if not ray.is_initialized():
        ray.init(namespace="serve")
    cluster = engine.Cluster.read()
    plans = {name_of(model): engine.plan(model, cluster) for model in found}
    gateway = serve.deployment(Endpoint, name="gateway", **gateway_options(routes(found, plans)))
    handles: Any = {name: deployment(each) for name, each in plans.items()}
    return gateway.bind(settings, keys, handles=handles)


def check_args(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with `run` as a list and numbers as numbers; absent ones left out."""
    options: dict[str, Any] = {}
    for key, value in args.items():
        if key not in ARGS:
            near = difflib.get_close_matches(key, ARGS, n=1, cutoff=0.5)
            known = ", ".join(f"{name} ({what})" for name, what in ARGS.items())
            raise ServeError(
                f"unknown argument {key!r} of serving.app:build",
                [f"did you mean {near[0]!r}?" if near else f"known: {known}"],
            )
        if value is None or value == "" or value == []:
            continue
        if key in ("replicas", "max_model_len"):
            options[key] = _number(key, value)
        elif key == "base":
            options[key] = str(value).lower() in ("true", "1", "yes")
        elif key == "run":
            options[key] = [value] if isinstance(value, str) else [str(one) for one in value]
        else:
            options[key] = str(value)
    if "run" not in options:
        raise ServeError(
            "serving.app:build needs the argument 'run'",
            ["serve run serving.app:build run=PATH", "in a config file: args: {run: PATH}"],
        )
    return options


def _number(key: str, value: Any) -> int:
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
    return number


def name_of(model: Model) -> str:
    """The engine's application: another one for each version, so that two versions can stand side by side."""
    return f"{APPLICATION}-{model.name.replace('/', '--')}-{model.version}"


def gateway_of(found: Sequence[Model], keys_file: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """(The settings of the gateway: those of the first model, hashes of the keys in the environment by name).

    Args:
        keys_file: of API keys, in place of the first model's.

    A relative path of the keys file is meant from here, not from where Ray starts the gateway.

    Raises:
        ServeError: what the environment holds is no list of keys.
    """
    from serving.gateway.keys import Keys

    settings = dict(found[0].serve["gateway"])
    settings["api_keys_file"] = keys_file or settings["api_keys_file"]
    if settings["api_keys_file"]:
        settings["api_keys_file"] = os.path.abspath(settings["api_keys_file"])
    return settings, dict(Keys.parse_env(os.environ.get(settings["api_keys_env"], "")))


def gateway_options(fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "num_replicas": 1,
        "max_ongoing_requests": 1_000_000,  # its own settings limit what waits, for each model
        "user_config": {"routes": list(fields)},
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": ONE_LOOP}},
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 10,
    }


def deployment(plan: engine.Plan) -> Application:
    """The engine of one plan, as a deployment."""
    from ray.serve.llm import build_llm_deployment

    from serving import classifier

    if plan.model.classifies:
        return classifier.deployment(plan)

    return build_llm_deployment(engine.llm_config(plan), name_prefix="")


def routes(found: Sequence[Model], plans: Mapping[str, engine.Plan]) -> list[dict[str, Any]]:
    """The fields of `serving.gateway.routes.Route`, with the engine's application as ``backend``.

    ``sleeps`` is of that backend: it may have no replica at all, and must not be woken to see how it does.
    """
    bases = {model.folder: model.name for model in found if model.base}
    made: list[dict[str, Any]] = []
    for model in found:
        name = name_of(model)
        common = {
            "backend": name,
            "sleeps": plans[name].replicas[0] == 0,
            "kind": "classify" if model.classifies else "generate",
            "max_model_len": plans[name].engine["max_model_len"],
            "chat": not model.classifies and has_chat_template(model),
            "vision": "vision_config" in model.hf_config,
        }
        made += [
            {
                **common,
                "name": each.name,
                "engine_name": each.name,
                "details": each.details,
                "compare": bases.get(each.manifest.content["base"]),
                "examples": list(model.examples),
            }
            for each in model.served
        ]
        if model.base:
            details = {"run": None, "step": 0, "base": model.folder, "created": None}
            made.append({**common, "name": model.name, "engine_name": model.name, "details": details, "examples": []})
    return made


def has_chat_template(model: Model) -> bool:
    folder = hub.model_folder(model.folder, weights=False)
    if paths.exists(paths.join(folder, "chat_template.jinja")):
        return True
    tokenizer = paths.join(folder, "tokenizer_config.json")
    return paths.exists(tokenizer) and bool(paths.read_json(tokenizer).get("chat_template"))
