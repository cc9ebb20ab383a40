"""What must hold, whatever happens: checked at each request that the server executes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from miniredis import READS, Request, Server
from redis.exceptions import ResponseError

from cluster.wire import keys
from cluster.wire.scripts import is_fenced

#: How often a task's process may die. One less than usual makes the machine's way shorter.
MOST = 2

#: What a node that leaves says.
LEFT = "it left"


class Violation(AssertionError):
    """The protocol doesn't hold what it promises."""


@dataclass(eq=False, repr=False)
class Execution:
    """A message in the hands of a worker's process."""

    node: str
    number: int
    task: str
    tag: str
    waits_for: str  # what keeps it from being run at once, if anything
    runs: bool
    stored: bool = False
    outcome: str = ""  # "done", "put back" or "died"

    def __repr__(self) -> str:
        return f"<{self.task} on {self.node} as {self.number}>"


@dataclass(frozen=True)
class Place:
    """Where a message is: a queue's list, a node's hash, or the list of those given up."""

    kind: str
    name: str = ""
    number: int = 0

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind, self.name, str(self.number or ""))))


@lru_cache(maxsize=10_000)
def task_of(raw: bytes) -> str:
    """The id of the task that a message stands for."""
    task: str = json.loads(raw)["headers"]["id"]
    return task


@dataclass
class Audit:
    """Follows every message from request to request.

    Args:
        server: whose requests these are.
        lists: the keys of the queues' lists.
        is_well: whether a node gives its signs of life, so that nobody may take it for dead.
    """

    server: Server
    lists: tuple[str, ...]
    is_well: Callable[[str], bool]
    executions: dict[tuple[str, int], Execution] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)  # somebody tried to publish it
    published: set[str] = field(default_factory=set)  # it arrived
    settled: dict[str, Execution] = field(default_factory=dict)  # by whose acknowledgement
    failed: set[str] = field(default_factory=set)  # given up, and its caller told
    given_up: set[str] = field(default_factory=set)
    deaths: Counter[str] = field(default_factory=Counter)
    violated: bool = False  # the rest would only confuse
    note: Callable[[str], object] = lambda _: None  # what happens, for who reads of a violation
    _places: dict[str, Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server.around = self.around

    @property
    def fenced(self) -> dict[str, str]:
        """Why, by node."""
        found = self.server.data.get(keys.FENCED.encode(), {})
        return {node.decode(): why.decode() for node, why in found.items()}

    def around(self, who: str, request: Request, carry_out: Callable[[Request], Any]) -> Any:
        """Carry out a request, and look at what it did."""
        if request[0] in READS:
            return carry_out(request)
        try:
            return self._watched(who, request, carry_out)
        except Violation:
            self.violated = True
            raise

    def _watched(self, who: str, request: Request, carry_out: Callable[[Request], Any]) -> Any:
        fenced = self.fenced
        before = copy.deepcopy(self.server.data) if who in fenced else None
        reply: Any = None
        try:
            reply = carry_out(request)
        except ResponseError as error:
            reply = error
            raise
        finally:
            if before is not None:
                self._check_fenced(who, request, before, reply)
            self._follow(who, fenced)
        return reply

    def _check_fenced(
        self, who: str, request: Request, before: dict[bytes, Any], reply: Any
    ) -> None:
        if self.server.data != before:
            raise Violation(f"the fenced node {who} changed something by {request}")
        if request[0] in (b"EVALSHA", b"EVAL") and reply != -1:
            refused = isinstance(reply, ResponseError) and is_fenced(reply)
            if not refused and not str(reply).startswith("No matching script"):
                raise Violation(f"the fenced node {who} isn't told so, but {reply!r}")

    def _follow(self, who: str, fenced: dict[str, str]) -> None:
        places, before = self._find(), self._places
        self._places = places
        for task in before.keys() | places.keys():
            was, now = before.get(task), places.get(task)
            if was != now:
                self._check_move(who, task, was, now)
        for node in self.fenced.keys() - fenced.keys():
            self.note(f"{who} fenced {node}")
            if who == "guardian" and not self.server.arriving and self.is_well(node):
                raise Violation(f"{node} was declared dead and is well")

    def _find(self) -> dict[str, Place]:
        found: list[tuple[bytes, Place]] = []
        for name in self.lists:
            messages = self.server.data.get(name.encode(), [])
            found += [(raw, Place("queue", name)) for raw in messages]
        prefix = keys.unacked("").encode()
        for key, value in self.server.data.items():
            if key.startswith(prefix) and isinstance(value, list):
                node, _, number = key.removeprefix(prefix).decode().partition(":")
                record = self.server.data.get(keys.unacked(node).encode(), {})
                if number.encode() not in record:
                    raise Violation(f"{node} holds {number} without a record")
                found += [(raw, Place("node", node, int(number))) for raw in value]
        for entry in self.server.data.get(keys.GIVEN_UP.encode(), []):
            found.append((json.loads(entry)["message"].encode(), Place("given up")))
        places: dict[str, Place] = {}
        for raw, place in found:
            task = task_of(raw)
            if task in places:
                raise Violation(f"{task} is in two places: {places[task]} and {place}")
            places[task] = place
        return places

    def _check_move(self, who: str, task: str, was: Place | None, now: Place | None) -> None:
        move = f"{who} moved {task} from {was} to {now}"
        self.note(move)
        match was:
            case None:
                if now is None or now.kind != "queue" or task not in self.sent:
                    raise Violation(move)
                if task in self.published:
                    raise Violation(f"{move}: it was there before")
                self.published.add(task)
            case Place("queue"):
                if now is None or now.kind != "node" or who != now.name or who in self.fenced:
                    raise Violation(f"{move}: that isn't a living node's taking")
            case Place("node", node, number):
                self._check_leaving(move, task, self.executions.get((node, number)), was, now)
            case _:
                if now is not None or who != "manager" or task not in self.failed:
                    raise Violation(f"{move}: its caller hasn't been told")

    def _check_leaving(
        self, move: str, task: str, execution: Execution | None, was: Place, now: Place | None
    ) -> None:
        """A message leaves a node."""
        if now is None:
            self._settle(move, task, execution)
        elif now.kind == "queue":
            self._give_back(move, task, execution, self.fenced.get(was.name))
        elif now.kind == "given up" and task not in self.given_up:
            self.given_up.add(task)
        else:
            raise Violation(move)

    def _settle(self, move: str, task: str, execution: Execution | None) -> None:
        if execution is None or not execution.stored:
            raise Violation(f"{move}: it has no result")
        if execution.outcome != "done":
            raise Violation(f"{move}: nobody acknowledged it")
        if task in self.settled:
            raise Violation(f"{move}: acknowledged before by {self.settled[task]}")
        self.settled[task] = execution

    def _give_back(
        self, move: str, task: str, execution: Execution | None, why: str | None
    ) -> None:
        """``why``: for what its node is fenced, if it is."""
        if execution is None:
            return  # the node never heard of it
        if why is None and not execution.outcome:
            raise Violation(f"{move}: it is being run there")
        if why in (None, LEFT) and execution.outcome == "done":
            raise Violation(f"{move}: it was done there")
        died = execution.outcome == "died" or why not in (None, LEFT)
        if died and execution.runs and not execution.waits_for:
            self.deaths[task] += 1
            if self.deaths[task] >= MOST:
                raise Violation(f"{move}: it has killed {self.deaths[task]} processes")

    def begin(self, execution: Execution) -> None:
        """A worker's process has been handed a message."""
        if execution.node in self.fenced:
            return  # fenced as the reply was on its way: it will find out
        self.executions[execution.node, execution.number] = execution

    def check_running(self, nodes: set[str]) -> None:
        """What these nodes' processes hold is theirs alone, unless they were declared dead.

        Args:
            nodes: whose processes are there.
        """
        fenced = self.fenced
        for execution in self.executions.values():
            if execution.node not in nodes or execution.node in fenced or execution.outcome:
                continue
            place = self._places.get(execution.task)
            if place != Place("node", execution.node, execution.number):
                raise Violation(f"{execution} goes on, and its message is in: {place}")

    @property
    def unsettled(self) -> set[str]:
        """Those published that are neither done nor given up."""
        return self.published - self.settled.keys() - self.failed
