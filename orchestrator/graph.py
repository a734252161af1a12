"""The stages of a running plan and what hangs on what: missing inputs, dependants, ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from orchestrator.retries import Tries
from orchestrator.stage import Stage, Status


@dataclass
class Node:
    stage: Stage
    order: int
    """Of being added; decides among equals."""
    status: Status = Status.PENDING
    missing: set[str] = field(default_factory=set)
    """Keys of inputs that are not there yet."""
    dependants: set[str] = field(default_factory=set)
    rank_s: float = 0.0
    """Estimated seconds of the longest path from its start to the end of the plan."""
    blocked_by: str | None = None
    """Key of the failed stage behind DEP_FAILED."""
    tries: Tries = field(default_factory=Tries)
    request_id: str | None = None
    """The request it runs in, while RUNNING."""
    started: int = 0
    succeeded: int = 0
    """Event numbers of its last start and success: they order the two between stages."""


class Graph:
    """Nodes by key. A node's `missing` and `dependants` are kept by `add` and `expect`; statuses by the scheduler."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, stages: Mapping[str, Stage], done: Collection[str]) -> list[Node]:
        """New nodes, connected. Known keys are left as they are. Raises ValueError for a missing input and for a cycle."""
        new = {key: stage for key, stage in stages.items() if key not in self.nodes}
        for stage in new.values():
            for key in stage.inputs.values():
                if key not in new and key not in self.nodes and key not in done:
                    raise ValueError(f"{stage.label}: its input {key[:12]} is neither planned nor done; add the stage that makes it")
        for key, stage in new.items():
            self.nodes[key] = Node(stage, len(self.nodes))
        for key in new:
            self._connect(self.nodes[key])
        self.rank()
        return [self.nodes[key] for key in new]

    def add_finished(self, stage: Stage) -> Node:
        """A node whose artifact exists, for a stage that was not planned because of that."""
        node = self.nodes[stage.key] = Node(stage, len(self.nodes), Status.CACHED)
        self._connect(node)
        return node

    def expect(self, node: Node) -> list[Node]:
        """Make a stage that runs again wait for those of its inputs that do, too (it was finished when they were set aside), and all its
        unfinished dependants for it; returns these."""
        self._connect(node)
        waiting = [n for n in self.nodes.values() if node.stage.key in n.stage.inputs.values() and not n.status.finished]
        for other in waiting:
            node.dependants.add(other.stage.key)
            other.missing.add(node.stage.key)
        self.rank()
        return waiting

    def dead_input(self, node: Node) -> Node | None:
        """An input that will not come, if there is one."""
        return next((self.nodes[key] for key in node.missing if self.nodes[key].status.finished), None)

    def waiting_below(self, node: Node) -> list[Node]:
        """Every stage that can not start without this one, nearest first. Not behind a running stage: that one's end decides."""
        seen, queue = {node.stage.key}, [node]
        for current in queue:
            for key in sorted(current.dependants - seen, key=lambda k: self.nodes[k].order):
                seen.add(key)
                if self.nodes[key].status is Status.PENDING:
                    queue.append(self.nodes[key])
        return queue[1:]

    def rank(self) -> None:
        """Set every `rank_s`: own seconds plus the longest rank among dependants (upward rank of HEFT, without communication)."""
        left = {key: len(node.dependants) for key, node in self.nodes.items()}
        ready = [key for key, count in left.items() if count == 0]
        for key in ready:
            node = self.nodes[key]
            node.rank_s = node.stage.resources.seconds + max((self.nodes[d].rank_s for d in node.dependants), default=0.0)
            for producer in set(node.stage.inputs.values()) & self.nodes.keys():
                if key in self.nodes[producer].dependants:
                    left[producer] -= 1
                    if left[producer] == 0:
                        ready.append(producer)
        if len(ready) != len(self.nodes):
            stuck = next(self.nodes[key].stage.label for key, count in left.items() if count > 0)
            raise ValueError(f"{stuck}: depends on itself through its inputs; a plan has no cycles")

    def _connect(self, node: Node) -> None:
        for key in set(node.stage.inputs.values()) & self.nodes.keys():
            producer = self.nodes[key]
            producer.dependants.add(node.stage.key)
            if producer.status not in (Status.SUCCEEDED, Status.CACHED):
                node.missing.add(key)
