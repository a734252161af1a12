"""The `cluster` group of the configuration, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from orchestrator.errors import ConfigError, unknown_name

KINDS = ("in_process", "ray_local", "ray_existing")
AUTH = ("token", "disabled")


@dataclass(frozen=True)
class ClusterSettings:
    kind: str = "ray_local"
    slots: int | None = None
    """Workers, each with a model of its own. `None`: one per GPU; without GPUs one per core, as far as memory goes."""
    threads: int | None = None
    """Arithmetic threads of a worker, and the cores it reserves. `None`: its share of the cores; in process, torch's choice."""
    gpus_per_worker: float | None = None
    """0, 1, or a fraction to put several workers on one GPU. `None`: 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """ray_existing: host:port of the head; `None` or auto: RAY_ADDRESS, or the cluster of this machine."""
    nodes: int | None = None
    """ray_existing: nodes to wait for before workers are placed, `startup_timeout_s` at the most. `None`: those that are there."""
    auth: str | None = None
    """token: `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or ~/.ray/auth_token holds it (ray_local makes its own). disabled: none.
    `None`: token; for ray_existing as `RAY_AUTH_MODE` says, where it is set."""
    namespace: str | None = None
    """Of Ray, for the workers. `None`: one of their own."""
    object_store_mb: int = 200
    """ray_local. Only small messages go through it; Ray's minimum is 75."""
    startup_timeout_s: float = 60.0
    """Longest wait for `nodes`, for the first workers, and for one that takes the place of another."""

    @staticmethod
    def from_config(values: Mapping[str, Any]) -> ClusterSettings:
        """Raises ConfigError for an unknown key or a value that is not allowed."""
        names = [f.name for f in fields(ClusterSettings)]
        for name in values:
            if name not in names:
                raise ConfigError(unknown_name("key of cluster", str(name), names))
        settings = ClusterSettings(**dict(values))
        _check(settings)
        return settings


def _check(s: ClusterSettings) -> None:
    if s.kind not in KINDS:
        raise ConfigError(unknown_name("cluster.kind", str(s.kind), KINDS))
    if s.auth is not None and s.auth not in AUTH:
        raise ConfigError(unknown_name("cluster.auth", str(s.auth), AUTH))
    for name in ("slots", "threads", "nodes"):
        value = getattr(s, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"cluster.{name}={value!r}; give a whole number from 1, or null")
    gpus = s.gpus_per_worker
    # Ray packs several workers on one GPU, but gives one worker whole GPUs only.
    if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, (int, float)) or gpus < 0 or (gpus > 1 and gpus != int(gpus))):
        raise ConfigError(f"cluster.gpus_per_worker={gpus!r}; give 0, a fraction of a GPU, a whole number, or null")
    if not isinstance(s.object_store_mb, int) or s.object_store_mb < 75:
        raise ConfigError(f"cluster.object_store_mb={s.object_store_mb!r}; Ray needs at least 75")
    if isinstance(s.startup_timeout_s, bool) or not isinstance(s.startup_timeout_s, (int, float)) or s.startup_timeout_s <= 0:
        raise ConfigError(f"cluster.startup_timeout_s={s.startup_timeout_s!r}; give a positive number of seconds")
    for name in ("address", "nodes"):
        if getattr(s, name) is not None and s.kind != "ray_existing":
            raise ConfigError(f"cluster.{name}={getattr(s, name)!r} with cluster.kind={s.kind}; it needs cluster=ray_existing")
    if s.address is not None and "://" in s.address:
        raise ConfigError(
            f"cluster.address={s.address!r} names a proxy, whose connections do not last a sweep; "
            "run bitgrid on a machine of the cluster with cluster.address=host:port, or as a job there with cluster.address=auto"
        )
