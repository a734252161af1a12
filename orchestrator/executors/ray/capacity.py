"""How many workers a cluster holds, and what each reserves. Pure: works on node resources as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import ClusterError
from orchestrator.executors.settings import ClusterSettings

WORKER_BYTES = 2 * 2**30
"""Memory reckoned per worker without a GPU: its libraries, a small model and its activations."""


@dataclass(frozen=True)
class NodeResources:
    cpus: float
    gpus: float
    memory_bytes: float


@dataclass(frozen=True)
class Layout:
    slots: int
    cpus_per_worker: int
    """Cores a worker reserves, and its arithmetic threads."""
    gpus_per_worker: float


def layout(settings: ClusterSettings, nodes: Sequence[NodeResources]) -> Layout:
    """Workers for a cluster. Raises ClusterError for what it can never hold: Ray would wait for it without end."""
    gpus = sum(n.gpus for n in nodes)
    share = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(gpus >= 1)
    if share:
        room = sum(int(n.gpus / share + 1e-9) for n in nodes)
        if room == 0 or (settings.slots or 1) > room:
            raise ClusterError(
                f"{settings.slots or 1} workers with {share:g} GPU each do not fit: the cluster has {gpus:g} GPUs on {len(nodes)} nodes, "
                f"room for {room}; lower cluster.slots, or set cluster.gpus_per_worker (0: CPU only)"
            )
    else:
        # One per core, where memory allows: a worker costs about the same on any machine.
        room = sum(max(1, min(int(n.cpus), int(n.memory_bytes // WORKER_BYTES))) for n in nodes if n.cpus >= 1)
    slots = settings.slots or max(1, room)
    with_gpus = [n for n in nodes if not share or n.gpus >= min(share, 1)]
    cores = settings.threads or max(1, int(sum(n.cpus for n in with_gpus) // slots))
    fits = sum(min(int(n.cpus // cores), int(n.gpus / share + 1e-9) if share else slots) for n in with_gpus)
    if fits < slots and settings.threads is None:
        cores, fits = 1, sum(min(int(n.cpus), int(n.gpus / share + 1e-9) if share else slots) for n in with_gpus)
    if fits < slots:
        if settings.slots is None and fits:
            return Layout(fits, cores, share)
        raise ClusterError(
            f"{slots} workers with {cores} cores each do not fit: the cluster has {sum(n.cpus for n in nodes):g} cores on "
            f"{len(nodes)} nodes, room for {fits}; lower cluster.slots or cluster.threads"
        )
    return Layout(slots, cores, share)
