"""One Ray connection for one command: quiet, private when local, ended with the command."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from ray_ft import credentials
from ray_ft.errors import CredentialError, ResourceError

if TYPE_CHECKING:
    import psutil

#: CPUs that Ray counts beside those of the machine when it runs only here: data tasks are short and mostly wait for
#: storage, and workers that reserve every core would otherwise leave none for them.
SPARE_CPUS = 1
OBJECT_STORE_BYTES = 512 << 20
#: Read before anything of ours is loaded: Ray Train's controller reaches for storage by itself. By name, as what it
#: reads is the node's. It costs each worker its start, in place of one that waits (seen: 1.2 to 3.2 s, not 0.3).
SECRETS_HOOK = "ray_ft.credentials.load"
ASK_SECONDS = 10  # for the answer of a cluster that is asked whether it takes the token


def address() -> str:
    """The cluster to use, from RAY_ADDRESS; empty: Ray of one's own on this machine."""
    value = os.environ.get("RAY_ADDRESS", "")
    return "" if value == "local" else value  # Ray's word for a cluster of one's own


@contextlib.contextmanager
def connected(workers: int = 0, cpus_per_worker: float = 0, gpus_per_worker: int = 0) -> Iterator[None]:
    """Connected to the cluster of `address` for the duration of the block, or with Ray started here for it.

    Args:
        workers: how many workers will be asked for, to say at once when they cannot be placed.

    Raises:
        ResourceError: the cluster has too few CPUs or GPUs, or cannot be reached.
    """
    import_ray_for(address())
    import ray

    if ray.is_initialized():  # the caller's own connection, which stays
        check(workers, cpus_per_worker, gpus_per_worker)
        yield
        return
    if not address():
        _check_machine(workers, cpus_per_worker)
    with ray_running(address(), OBJECT_STORE_BYTES, secrets=True):
        _quiet()
        check(workers, cpus_per_worker, gpus_per_worker)
        yield


def gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def import_ray_for(address: str) -> None:
    """To be called before Ray starts or is joined: sets what Ray reads as it is imported."""
    if not address or address.startswith("127."):
        # Ray listens on its node's address. This, Ray's default on Windows and macOS, makes that address loopback; and
        # a command that joins such a Ray has to take its address for what it is.
        loopback = os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0") == "0"
        if loopback and "ray" in sys.modules:  # somebody imported Ray before: it has read it as it was
            from ray._private import ray_constants

            ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about a default that will change
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Ray has one task per core already
    if not address:
        # Ray would make the token's file 0644. Where it is off by RAY_AUTH_MODE, there is none to make.
        if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
            credentials.make_token()
        _authenticate()
    elif credentials.token():
        # Ray shows its token to a cluster that was named to it only if told to; one without authentication ignores it.
        _authenticate()
    if line := credentials.close_token():
        print(line, file=sys.stderr)


def _authenticate() -> None:
    """Token authentication for this process and those that it starts, unless its environment says otherwise."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:
        from ray._raylet import Config

        Config.initialize("")


@contextlib.contextmanager
def ray_running(address: str, object_store_bytes: int, *, secrets: bool = False) -> Iterator[None]:
    """Connected to the cluster at `address`, or to a private one that ends with the block and leaves no process.

    Ray's own messages go to its log files, and this process keeps its signal handlers.

    Args:
        secrets: workers of the cluster read their node's secrets as they start. Those of a private Ray have them from
            this process.

    Raises:
        CredentialError: the cluster asks for a token, and there is none here or another one.
        ResourceError: no cluster answers at the address.
    """
    import_ray_for(address)
    credentials.load()
    import ray
    from ray.exceptions import AuthenticationError

    try:
        with _keeping_signals():
            if address:
                _knock(address)
                try:
                    ray.init(
                        address=address,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        runtime_env={"worker_process_setup_hook": SECRETS_HOOK} if secrets else None,
                    )
                except AuthenticationError as error:
                    raise _refused(address) from error
                except (ConnectionError, RuntimeError, ValueError) as error:
                    raise _silent(address, error) from error
            else:
                _start(object_store_bytes)
        yield
    finally:
        with closing():
            started = [] if address else _descendants()
            ray.shutdown()
            _end(started)


def _knock(address: str) -> None:
    """Refuse an address at which nothing listens, or that does not take this process's token: `ray.init` would try for
    minutes, and not say why."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():  # "auto" and Ray Client's: found by Ray alone
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ASK_SECONDS).close()
    except OSError as error:
        raise _silent(address, error) from error
    if _refuses(address):
        raise _refused(address)


def _silent(address: str, error: Exception) -> ResourceError:
    return ResourceError(
        f"no Ray cluster answers at RAY_ADDRESS={address}: {error}",
        ["start it or correct the address", "unset RAY_ADDRESS to run on this machine alone"],
    )


def _refuses(address: str) -> bool:
    """Whether a cluster does not take this process's token."""
    import grpc

    shows = os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and credentials.token()
    metadata = [("authorization", f"Bearer {credentials.token()}")] if shows else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")  # an empty message asks nothing more
        try:
            ask(b"", metadata=metadata, timeout=ASK_SECONDS)
        except grpc.RpcError as error:  # any other: Ray's own way to connect says what is wrong, or can (TLS)
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


def _refused(address: str) -> CredentialError:
    file = credentials.token_file()
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        why = f"none was shown (RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', '')})"
    else:
        why = "it does not take the one that was shown" if credentials.token() else f"there is none in {file}"
    return CredentialError(
        f"the Ray cluster at RAY_ADDRESS={address} asks for a token, and {why}",
        [
            f"copy the cluster's token to {file}, mode 600; on its head: ray-ft token --show",
            "name another file: RAY_AUTH_TOKEN_PATH",
            "leave RAY_AUTH_MODE unset, or set it to token",
        ],
    )


def _start(object_store_bytes: int) -> None:
    import ray
    from tenacity import retry, stop_after_attempt

    # On a cold disk the first start can exceed Ray's own time limit; the second finds the files in memory. Any error,
    # as Ray has raised a plain Exception for that; Ctrl-C is none.
    @retry(
        stop=stop_after_attempt(2),
        before_sleep=lambda _: ray.shutdown(),
        reraise=True,
    )
    def start() -> None:
        ray.init(
            address="local",  # never the cluster that somebody's `ray start` left on this machine
            num_cpus=_cores() + SPARE_CPUS,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )

    start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quiet() -> None:
    import ray._private.worker
    from ray.data import DataContext

    # Ray prints a paragraph on the terminal for each worker that dies, also with `log_to_driver=False`, and offers no
    # switch; what died is said by whoever started it.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def _check_machine(workers: int, cpus_per_worker: float) -> None:
    if workers * cpus_per_worker > _cores():
        raise ResourceError(
            f"train.workers = {workers} × train.cpus_per_worker = {cpus_per_worker:g} need "
            f"{workers * cpus_per_worker:g} CPUs; this machine has {_cores()}",
            [
                f"train.workers={max(int(_cores() / cpus_per_worker), 1)}",
                "a smaller train.cpus_per_worker",
                "run on a cluster: set RAY_ADDRESS, or ray job submit",
            ],
        )


def check(workers: int, cpus_per_worker: float, gpus_per_worker: int) -> None:
    """Refuse workers that the connected cluster, as it is now, cannot place.

    Raises:
        ResourceError: naming what lacks.
    """
    import ray

    have = ray.cluster_resources()
    for name, each, setting in (("GPU", gpus_per_worker, ""), ("CPU", cpus_per_worker, " × train.cpus_per_worker")):
        there = have.get(name, 0)
        # The tasks that read rows need a CPU beside those that workers hold, or the workers wait for them for ever.
        data = SPARE_CPUS if name == "CPU" and workers else 0
        if workers * each + data > there:
            extra = f" and {data} more for reading data" if data else ""
            raise ResourceError(
                f"train.workers = {workers}{setting} need {workers * each:g} {name}s{extra}; the cluster has {there:g}",
                ["fewer train.workers", "add nodes to the cluster"] + (["train.device=cpu"] if name == "GPU" else []),
            )


# ---------------------------------------------------------------------------------------------- processes and signals


def _descendants() -> list[psutil.Process]:
    """The processes below this one: the private Ray, its workers and what those started."""
    import psutil

    return psutil.Process().children(recursive=True)


def _end(processes: list[psutil.Process]) -> None:
    """Wait for processes to go, then make them go: vLLM's engine can outlive a replica that was killed."""
    import psutil

    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def abandon(status: int) -> NoReturn:
    """End this process now and all below it: where a thread that waits for Ray cannot be made to return."""
    import psutil

    sys.stdout.flush()
    below = _descendants()

    def raylet(one: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            return "raylet" in one.name()
        return False

    # Ray ends this process, with a status of its own, as soon as it sees its raylet gone.
    for process in sorted(below, key=raylet):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(status)


@contextlib.contextmanager
def handling(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` while the block runs; of no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def _keeping_signals() -> Iterator[None]:
    """Put back this process's handlers after the block: Ray installs its own for SIGTERM, which exits with 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if callable(handler):  # where there was none, Ray's is better: it lets cleaning up happen
            signal.signal(number, handler)


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """An impatient second Ctrl-C must not leave processes behind; and Ray reports its own end as an error."""
    with handling(signal.SIG_IGN), contextlib.redirect_stdout(io.StringIO()):
        yield
