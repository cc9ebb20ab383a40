"""What will be done to the cluster and when, from a seed. Pure: no clock, no cluster."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Seconds between two faults, in which they come in bursts as well as apart.
PAUSES = (0.0, 0.02, 0.1, 0.3, 0.6, 1.0)

#: How many workers, by turns of the seed.
FEWEST, MOST = 4, 8


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault, as the plan sees it.

    Args:
        name: of the function that does it.
        weight: how often, beside the others.
        group: kinds of which no two come within ``gap`` seconds, if any.
        gap: seconds.
    """

    name: str
    weight: int
    group: str = ""
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """After a pause, one fault. ``pick`` says which worker, counted round among those there are."""

    pause: float
    fault: str
    pick: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    seed: int
    workers: int
    concurrency: int
    steps: tuple[Step, ...]


def make_plan(seed: int, kills: int, kinds: Sequence[Kind]) -> Plan:
    """The same for the same arguments.

    Args:
        seed: any number.
        kills: how many faults.
        kinds: to choose from.
    """
    rng = random.Random(f"plan {seed}")
    workers, concurrency = rng.randint(FEWEST, MOST), rng.choice((1, 1, 2))
    steps: list[Step] = []
    now = 0.0
    last: dict[str, float] = {}  # when a group was last chosen from
    while len(steps) < kills:
        pause = rng.choice(PAUSES)
        while not (fit := _fit(kinds, now + pause, last)):
            pause += 1.0
        now += pause
        [kind] = rng.choices(fit, weights=[each.weight for each in fit])
        if kind.group:
            last[kind.group] = now
        steps.append(Step(pause, kind.name, rng.randrange(MOST)))
    return Plan(seed, workers, concurrency, tuple(steps))


def _fit(kinds: Sequence[Kind], now: float, last: Mapping[str, float]) -> list[Kind]:
    """Those that may be chosen now."""
    return [kind for kind in kinds if kind.group not in last or now - last[kind.group] >= kind.gap]
