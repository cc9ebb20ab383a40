"""That the machine finds what is wrong: each of these mistakes breaks a promise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import msgpack
import pytest
from audit import Violation
from hypothesis import Phase
from machine import Focus, run
from miniredis import Fate, Link
from world import QUEUES

from cluster.broker import workers as guardian_module
from cluster.broker.messages import Dead
from cluster.broker.presence import Presence
from cluster.wire import keys, scripts
from cluster.wire.ledger import CONNECTION_ERRORS, Ledger, guarded

Patch = Callable[[pytest.MonkeyPatch], None]


def script(name: str, *changes: tuple[str, str]) -> Patch:
    """Other text in a script."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        text: str = getattr(scripts, name)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        monkeypatch.setattr(scripts, name, text)

    return apply


def unfenced(name: str) -> Patch:
    return script(name, (scripts._FENCE, ""))


def method(owner: type, name: str, instead: Callable[..., object]) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, instead)


def take_in_two_steps(self: scripts.Scripts, node: str, queues: object, lists: list[str]) -> object:
    """As kombu does: pop, then record."""
    for position, name in enumerate(lists):
        raw = self.client.rpop(name)
        if raw is not None:
            number = self.client.incr(keys.HANDOUTS)
            entry = msgpack.packb([name, keys.wake(QUEUES[position % len(QUEUES)])])
            self.client.hset(keys.unacked(node), str(number), entry)
            self.client.lpush(f"{keys.unacked(node)}:{number}", raw)
            return [name.encode(), number, 0, raw]
    return int(self.client.hlen(keys.unacked(node)))


def flush_and_forget(self: Ledger) -> None:
    while self._unsent:
        _, settle = self._unsent.pop(0)
        with suppress(*CONNECTION_ERRORS):
            guarded(self.node, settle)


def reconcile_all(self: Ledger) -> None:
    self.scripts.reconcile(self.node, self.scripts.held(self.node))


def reconcile_by_what_is_known(self: Ledger) -> None:
    """All but what is known as it is sent; it may be carried out later."""
    self.flush()
    known = {*self._numbers.values(), *(number for number, _ in self._unsent)}
    others = set(range(1, 100)) - known
    guarded(self.node, lambda: self.scripts.reconcile(self.node, others))


def hear_at_once(self: Presence, silences: dict[str, float], _: float) -> set[str]:
    return {node for node, seconds in silences.items() if seconds > self.patience}


def compare_alone(self: Ledger, held: int) -> None:
    if held != len(self._numbers) + len(self._unsent):
        self.reconcile()


def reconcile_without_the_unsent(self: Ledger) -> None:
    self.flush()
    lost = self.scripts.held(self.node) - set(self._numbers.values())
    guarded(self.node, lambda: self.scripts.reconcile(self.node, lost))


def release_at_any_rate(self: Ledger, why: str) -> None:
    self.flush()
    guarded(self.node, lambda: self.scripts.release(self.node, why, died=False))


def bury_and_forget(self: guardian_module.Workers, nodes: list[str], why: str) -> object:
    for node in nodes:
        held = self._scripts.release(node, why, died=True)
        if held >= 0:
            yield Dead(node, held, why)


ALL = Focus()
CALM = Focus(
    fates=(),
    blows=(),
    disasters=(),
    seconds=(3.0,),
    steps=("turn", "turn", "store"),
    large=(False,),
)
FROZEN = Focus(
    fates=(),
    blows=("freeze",),
    disasters=(),
    seconds=(15.0,),
    steps=("turn", "store", "store"),
    waits_for=("",),
    large=(False,),
)
ACKNOWLEDGING = Focus(
    fates=(Fate.LOST,),
    blows=(),
    disasters=(),
    seconds=(0.2,),
    steps=("turn", "finish"),
    waits_for=("",),
    large=(False,),
    usual=1,
)


@dataclass(frozen=True)
class Mistake:
    """What may be wrong, how the machine says so, and where to look for it."""

    apply: Patch
    found: str
    focus: Focus = ALL


MISTAKES = {
    "a fenced node takes": Mistake(unfenced("TAKE"), "the fenced node", FROZEN),
    "a fenced node isn't told as it acknowledges": Mistake(
        unfenced("ACK"),
        "isn't told so",
        replace(FROZEN, steps=("turn", "store", "acknowledge")),
    ),
    "a fenced node stores a result": Mistake(
        unfenced("STORE"), "fenced node .* changed something", FROZEN
    ),
    "what is large is sent without a watch": Mistake(
        method(Link, "watch", lambda *_: {}),
        "fenced node .* changed something|in two places|it was there before",
        replace(FROZEN, large=(True,), fates=(Fate.LATE,), usual=1),
    ),
    "a fenced node isn't told as it rejects": Mistake(
        unfenced("REJECT"), "isn't told so", replace(FROZEN, steps=("turn", "put back"))
    ),
    "a fenced node starts a task": Mistake(
        script(
            "MARK", (scripts._FENCE, ""), ("redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0", "false")
        ),
        "fenced node .* changed something",
        replace(FROZEN, steps=("turn", "start"), waits_for=("eta", "limit")),
    ),
    "a dead node isn't fenced": Mistake(
        script("RELEASE", ("'HSETNX', KEYS[1], ARGV[1], ARGV[3]) == 0", "'EXISTS', KEYS[1]) == 2")),
        "goes on|being run|done there|nobody notices|not done",
        FROZEN,
    ),
    "the dead keep their messages": Mistake(
        script("RELEASE", ("in ipairs(numbers) do", "in ipairs({}) do")), "without a record"
    ),
    "a message is popped, then recorded": Mistake(
        method(scripts.Scripts, "take", take_in_two_steps), "from queue .* to None"
    ),
    "nobody is woken for what comes back": Mistake(
        script("REJECT", ("redis.call('LPUSH', e[2], '1')", "")),
        "nobody is woken",
        replace(CALM, steps=("turn", "turn", "put back")),
    ),
    "nobody is woken for what is published": Mistake(
        script("PUT", ("redis.call('LPUSH', KEYS[4], '1')", "")), "nobody is woken", CALM
    ),
    "a task is never given up": Mistake(
        script("REJECT", ("#deaths >= most", "#deaths > most")), "it has killed 2 processes"
    ),
    "what is sent again is published again": Mistake(
        script("PUT", ("if last and", "if false and")), "in two places|it was there before"
    ),
    "what a node holds is given back as lost": Mistake(
        method(Ledger, "reconcile", reconcile_all), "being run|done there", ACKNOWLEDGING
    ),
    "what was given back as lost is given back by what it is not": Mistake(
        method(Ledger, "reconcile", reconcile_by_what_is_known),
        "being run|done there",
        Focus(
            fates=(Fate.LATE, Fate.LOST),
            blows=("break_connections",),
            disasters=(),
            seconds=(0.2,),
            steps=("turn",),
            waits_for=("",),
        ),
    ),
    "an acknowledgement that isn't sent is forgotten": Mistake(
        method(Ledger, "flush", flush_and_forget), "done there", ACKNOWLEDGING
    ),
    "an acknowledgement that isn't sent waits for the next": Mistake(
        method(Ledger, "compare", compare_alone), "not done after", ACKNOWLEDGING
    ),
    "what is done and not settled is given back as lost": Mistake(
        method(Ledger, "reconcile", reconcile_without_the_unsent), "done there", ACKNOWLEDGING
    ),
    "what is done and not settled is given back at the end": Mistake(
        method(Ledger, "release", release_at_any_rate),
        "done there",
        replace(ACKNOWLEDGING, steps=("turn", "finish", "leave")),
    ),
    "after the broker was away, its workers are dead": Mistake(
        method(Presence, "broker_was_away", lambda *_: None),
        "is well|nobody notices",
        replace(CALM, disasters=("server",), seconds=(0.2, 0.3)),
    ),
    "who is silent is never dead": Mistake(
        method(Presence, "hear", lambda *_: set()),
        "nobody notices",
        replace(FROZEN, seconds=(24.0,)),
    ),
    "a pause of the guardian's is the workers' silence": Mistake(
        method(Presence, "hear", hear_at_once),
        "is well",
        replace(CALM, disasters=("sleep",)),
    ),
    "a death whose report gets no answer is never told": Mistake(
        method(guardian_module.Workers, "_bury", bury_and_forget),
        "never heard",
        Focus(
            fates=(Fate.UNANSWERED,), blows=("die",), disasters=(), seconds=(3.0,), steps=("turn",)
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(mistake: Mistake, monkeypatch: pytest.MonkeyPatch):
    mistake.apply(monkeypatch)
    with pytest.raises(Violation, match=mistake.found):
        run(
            mistake.focus,
            steps=20,
            max_examples=1000,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        )
