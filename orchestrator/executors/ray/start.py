"""Starting a Ray cluster on this machine, or joining one, and leaving it as it was found.

Authentication is always decided here, by `RAY_AUTH_MODE`, which Ray reads once when it is first used in a process:
a local cluster gets a fresh random token that lives in the environment of its processes only (Ray binds every interface,
so a cluster without one would be open to the network); joining takes the cluster's token unless told that it has none. An
explicit address never turns authentication on by itself in Ray, and a wrong token makes `ray.init` retry for 20 s and then tell
only that it could not connect: hence the question to the head first, which answers in milliseconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from orchestrator.errors import ClusterError
from orchestrator.executors.settings import ClusterSettings

log = logging.getLogger(__name__)
PROJECT = Path(__file__).resolve().parents[3]
"""Holds the packages that workers import."""
FOLDER = "bitgrid-ray-"
"""Start of the names of folders for logs and sockets; the process id follows."""
TOKEN_HELP = (
    "give the cluster's token in RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token "
    "(`ray get-auth-token` on its head shows it), or set cluster.auth=disabled for a cluster without authentication"
)
PROBE_S = 10.0
"""Longest wait for the head's answer."""
POLL_S = 0.5
"""Between two looks for a head or nodes that are waited for."""


@dataclass
class Session:
    """A connection to Ray. `close` undoes what opening it did, and nothing else."""

    connected_here: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    """What workers need in their environment, where they do not inherit it from a cluster started here."""
    restore: Mapping[str, str | None] = field(default_factory=dict)
    """Variables of this process as they were."""
    folder: Path | None = None
    speech: Callable[..., None] | None = None
    """Ray's own printing, while it is put off."""

    def close(self) -> None:
        """Ends a cluster started here, disconnects from one joined here."""
        import ray

        if self.connected_here and ray.is_initialized():
            ray.shutdown()
        if self.speech is not None:
            ray._private.worker.print_to_stdstream = self.speech
        _set_environment(self.restore)
        _reload_authentication()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_session(settings: ClusterSettings, cores: int) -> Session:
    """Connect, by starting a cluster (ray_local, with `cores` to share out) or joining one. Raises ClusterError.

    Where this process is connected to Ray already, that connection is used, and left open.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as e:
        raise ClusterError(f"Ray cannot be imported ({e}); install it with bitgrid's dependencies, or use cluster=in_process") from e
    if ray.is_initialized():
        return Session(env=_worker_environment())
    return _start(settings, cores) if settings.kind == "ray_local" else _join(settings)


def _worker_environment() -> dict[str, str]:
    """Where workers find the code."""
    path = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "RAY_USAGE_STATS_ENABLED": "0"}


def _start(settings: ClusterSettings, cores: int) -> Session:
    import ray

    if threading.current_thread() is not threading.main_thread():
        # Ray's processes end with the thread that started them.
        raise ClusterError("a local Ray cluster can be started from the main thread only; start it there, or use cluster=in_process")
    token = settings.auth != "disabled"
    variables = {**_worker_environment(), "RAY_AUTH_MODE": "token" if token else "disabled"}
    if token:
        variables["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folder = _own_folder()
    session = Session(connected_here=True, restore=_set_environment(variables), folder=folder)
    try:
        _reload_authentication()
        with _own_sigterm():
            session.speech = _silence()
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=settings.namespace,
                object_store_memory=settings.object_store_mb * 2**20,
                _temp_dir=str(folder),
            )
    except KeyboardInterrupt:
        session.close()
        raise
    except (Exception, SystemExit) as e:
        kept, session.folder = session.folder, None
        session.close()
        raise ClusterError(f"a local Ray cluster did not start: {e}; its logs are in {kept}; cluster=in_process works without Ray") from e
    return session


def _own_folder() -> Path:
    """A new folder for a cluster of this process; those of processes that were killed are removed. Raises ClusterError.

    Its path is short, since sockets live in it, and its own, so that the cluster is not found by address=auto from elsewhere.
    """
    try:
        parent = Path("/tmp") if os.access("/tmp", os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
        return _new_folder(parent)
    except OSError as e:
        raise ClusterError(
            f"a local Ray cluster needs a folder for its sockets, and none can be made: {e}; make /tmp or the folder that TMPDIR names "
            "writable, or use cluster=in_process"
        ) from e


def _new_folder(parent: Path) -> Path:
    for old in parent.glob(f"{FOLDER}*-*"):
        owner = old.name.removeprefix(FOLDER).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=parent))


def _join(settings: ClusterSettings) -> Session:
    import ray

    named = settings.address if settings.address not in (None, "auto") else None
    address = named or os.environ.get("RAY_ADDRESS")
    # Ray's own default is none: whoever joins a cluster that is open to its network says so.
    mode = settings.auth or os.environ.get("RAY_AUTH_MODE") or "token"
    session = Session(connected_here=True, env=_worker_environment(), restore=_set_environment({"RAY_AUTH_MODE": mode}))
    try:
        _reload_authentication()
        if mode == "token" and not _token_found():
            # Ray would end this process.
            raise ClusterError(f"a Ray cluster is joined with its token, and none is found; {TOKEN_HELP}")
        if address not in (None, "auto"):
            wait_s = settings.startup_timeout_s if settings.nodes else 0.0
            _check_head(str(address), "RAY_ADDRESS" if named is None else "cluster.address", mode, wait_s)
        with _own_sigterm():
            session.speech = _silence()
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, namespace=settings.namespace)
    except (ClusterError, KeyboardInterrupt):
        session.close()
        raise
    except (Exception, SystemExit) as e:
        session.close()
        raise ClusterError(
            f"the Ray cluster at {address or 'auto'} cannot be joined: {e}; it must run the same Ray version ({_version()}) and "
            f"Python, and its token must be known: {TOKEN_HELP}"
        ) from e
    return session


def _token_found() -> bool:
    """In the environment, the file it names, or the default file."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled, without stubs

    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    return bool(loader.has_token(ignore_auth_mode=True))


def _check_head(address: str, setting: str, mode: str, wait_s: float = 0.0) -> None:
    """Ask the head at host:port whether it is there, waiting for it `wait_s`, and lets us in. `setting`: what names it.

    Raises ClusterError, in bounded time.
    """
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ClusterError(
            f"{setting}={address} names a proxy or a dashboard, which a sweep cannot join; give cluster.address=host:port of the head, "
            "for example 10.0.0.1:6379"
        )
    if not host or not port.isdigit():
        raise ClusterError(f"{setting}={address!r} is not host:port, for example 10.0.0.1:6379")
    until = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=PROBE_S).close()
            break
        except OSError as e:
            if time.monotonic() >= until:
                raise ClusterError(
                    f"nothing answers at {setting}={address} ({e}); start a cluster there with `ray start --head --port={port}`, "
                    "or correct the address"
                ) from e
            time.sleep(POLL_S)
    refusal = _ask(address)
    if refusal is not None and refusal.of_token:
        raise ClusterError(f"the Ray cluster at {address} refuses: {refusal.reason}; {TOKEN_HELP}")
    if refusal is not None:
        raise ClusterError(
            f"{setting}={address} answers, but not as the head of a cluster of Ray {_version()}: {refusal.reason}; "
            "give the address that `ray start --head` shows, whose port is 6379 unless it was told another"
        )
    if mode == "token" and _is_open(address):
        # Its workers, which have no token, could not answer this process.
        raise ClusterError(f"the Ray cluster at {address} runs without authentication, which must be said: set cluster.auth=disabled")


@dataclass(frozen=True)
class _Refusal:
    reason: str
    of_token: bool = False
    """For want of the right token."""


def _ask(address: str) -> _Refusal | None:
    """`None` when the head answers; why not otherwise."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    answers: list[_Refusal | None] = []

    def ask() -> None:
        try:
            GcsClient(address=address)
            answers.append(None)
        except AuthenticationError as e:
            answers.append(_Refusal(str(e).split(".")[0], of_token=True))
        except BaseException as e:
            answers.append(_Refusal(f"{type(e).__name__}: {e}"))

    thread = threading.Thread(target=ask, daemon=True)
    with _without_stderr():
        thread.start()
        thread.join(PROBE_S)
    return answers[0] if answers else _Refusal(f"no answer to Ray's protocol within {PROBE_S:.0f} s")


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's C++ writes a warning of its own there when it is refused."""
    if sys.stderr is None:  # was closed: the descriptor may be another file's
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _is_open(address: str) -> bool:
    """Whether a head that lets us in does so without a token, too."""
    before = _set_environment({"RAY_AUTH_MODE": "disabled"})
    try:
        _reload_authentication()
        return _ask(address) is None
    finally:
        _set_environment(before)
        _reload_authentication()


def _version() -> str:
    import ray

    return str(ray.__version__)


def _silence() -> Callable[..., None]:
    """Log what Ray would print about dead workers, a page each, in the middle of the display; returns the printing.

    `log_to_driver=False` does not cover these messages, and the failure is told by whoever lost the worker.
    """
    import ray

    speech: Callable[..., None] = ray._private.worker.print_to_stdstream

    def log_instead(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        log.debug("%s", "\n".join(data["lines"]))

    ray._private.worker.print_to_stdstream = log_instead
    return speech


def _set_environment(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set (or with `None` unset) variables; returns what they were."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


def _reload_authentication() -> None:
    """Make Ray read mode and token anew: it keeps what it saw first."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Put back the SIGTERM handler that `ray.init` replaces. SIGTERM meanwhile is an interruption, as it is for whoever runs stages."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as e:
        if e.code == signal.SIGTERM:  # of Ray's handler
            raise KeyboardInterrupt from e
        raise
    finally:
        signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)
