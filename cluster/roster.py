"""Which workers there are, and how each is. Pure: it is told, and answers.

A worker comes in by being launched, becomes *joined* by its registration and
*ready* by its answer to a ping, and is *gone* when its platform says that it
ended or the guardian that its connection did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.model import Phase, Registration, WorkerRef, WorkerStatus, WorkerView

_ACCEPTED = WorkerStatus(Phase.PENDING)


@dataclass(slots=True)
class Seat:
    """One worker's place."""

    ref: WorkerRef
    status: WorkerStatus = _ACCEPTED
    node: str = ""
    ready_since: float | None = None
    gone: bool = False

    @property
    def ready(self) -> bool:
        """Whether it has answered a ping, be it gone or not."""
        return self.ready_since is not None


class Roster:
    """The workers of one cluster, in the order they were launched."""

    def __init__(self) -> None:
        self._seats: dict[WorkerRef, Seat] = {}

    # -- being told -------------------------------------------------------------

    def launched(self, refs: Iterable[WorkerRef]) -> None:
        """The platform has accepted these."""
        for ref in refs:
            self._seats.setdefault(ref, Seat(ref))

    def joined(self, registration: Registration) -> None:
        """A worker has registered. One that nobody launched isn't ours to count."""
        for seat in self._seats.values():
            if seat.ref.id == registration.worker and not seat.gone:
                seat.node = registration.node

    def answered(self, nodes: Iterable[str], now: float) -> None:
        """These nodes have answered a ping."""
        for node in nodes:
            seat = self.of(node)
            if seat is not None and not seat.ready and not seat.gone:
                seat.ready_since = now

    def described(self, statuses: Mapping[WorkerRef, WorkerStatus]) -> list[Seat]:
        """What the platform says; returns those that it thereby learns are gone."""
        gone = []
        for ref, status in statuses.items():
            seat = self._seats[ref]
            seat.status = status
            if status.final and not seat.gone:
                seat.gone = True
                gone.append(seat)
        return gone

    def lost(self, node: str) -> Seat | None:
        """The guardian declared this node dead; returns its seat if that is news."""
        seat = self.of(node)
        if seat is None or seat.gone:
            return None
        seat.gone = True
        seat.node = node  # its registration may never be heard
        return seat

    # -- answering --------------------------------------------------------------

    @property
    def ready(self) -> tuple[str, ...]:
        """The nodes that have answered and aren't gone."""
        return tuple(seat.node for seat in self._seats.values() if seat.ready and not seat.gone)

    @property
    def unanswered(self) -> tuple[str, ...]:
        """The nodes that have registered and not yet answered a ping."""
        return tuple(
            seat.node
            for seat in self._seats.values()
            if seat.node and not seat.ready and not seat.gone
        )

    @property
    def coming(self) -> int:
        """How many are launched, not gone and not ready yet."""
        return sum(not seat.ready and not seat.gone for seat in self._seats.values())

    @property
    def unfinished(self) -> tuple[WorkerRef, ...]:
        """The workers whose platform may still have a change to tell."""
        return tuple(ref for ref, seat in self._seats.items() if not seat.status.final)

    @property
    def starting(self) -> tuple[WorkerRef, ...]:
        """The unfinished workers that haven't registered: nothing else reaches them."""
        return tuple(
            ref for ref, seat in self._seats.items() if not seat.status.final and not seat.node
        )

    @property
    def failed(self) -> tuple[Seat, ...]:
        """Those that ended in another way than by being told to leave."""
        return tuple(
            seat
            for seat in self._seats.values()
            if seat.status.final and seat.status.phase is not Phase.EXITED
        )

    @property
    def gone(self) -> tuple[Seat, ...]:
        """Those that won't come back, however they went."""
        return tuple(seat for seat in self._seats.values() if seat.gone)

    @property
    def statuses(self) -> Mapping[WorkerRef, WorkerStatus]:
        """All workers there ever were."""
        return {ref: seat.status for ref, seat in self._seats.items()}

    def find(self, worker: str) -> WorkerRef | None:
        """The worker of this id or node name."""
        for ref, seat in self._seats.items():
            if worker in (ref.id, seat.node):
                return ref
        return None

    def views(self) -> tuple[WorkerView, ...]:
        """For people to look at."""
        return tuple(
            WorkerView(seat.ref.id, seat.node, seat.ready and not seat.gone, seat.status)
            for seat in self._seats.values()
        )

    def of(self, node: str) -> Seat | None:
        """The seat of the worker with this node name.

        Also of one whose registration hasn't been heard of yet, and that may be dead already: the
        node's name begins with the worker's id (:func:`cluster.wire.identity.new_node_name`).
        """
        worker = node.rpartition("@")[0].rpartition("-")[0]
        unheard = None
        for seat in self._seats.values():
            if seat.node == node:
                return seat
            if seat.ref.id == worker and not seat.node:
                unheard = seat
        return unheard
