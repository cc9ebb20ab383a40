"""Thousands of tasks on a cluster whose processes are killed and frozen at random, by a seed.

What happens, one module each, in the order of a run:

``plan``
    from a seed: the faults, their order, the pauses between them. Pure.
``app``, ``load``
    the tasks, each with a result that can be told in advance; who sends and collects them.
``record``
    what is written down while it runs: every execution, by the task itself.
``faults``, ``wiretap``
    what is done to the cluster, and to which of its processes; aiming at a moment.
``drive``
    all of these at once.
``referee``
    from what was written down: is each result there and right, and why was each task run that was
    run more than once? Pure, and tested by itself (``tests/unit/test_chaos_referee.py``).
``report``
    what it found, as text and JSON.

    make chaos              # about two minutes; with a seed of its own, which it prints
    make chaos SEED=7 KILLS=1000

The same seed gives the same plan: the same faults in the same order with the same pauses, and the
same tasks in the same order from each client. It doesn't give the same interleaving of both, which
is up to the machine.
"""
