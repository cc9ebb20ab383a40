"""A chord's members, counted so that none is lost with the worker it was counted by.

Celery counts a member once, by its id, and the one that completes the header
claims the right to send the callback, for minutes. If its worker dies in
between, the member runs again, finds the claim of its own dead copy, and nobody
sends the callback. Here a member takes over what it has claimed itself before,
and a fenced node counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery.backends.redis import CHORD_PART_RETURN_LUA

from cluster.wire.keys import FENCED
from cluster.wire.scripts import FENCED_REPLY

#: KEYS and ARGV as Celery's (celery/backends/redis.py), then KEYS: whose the claim is, fence;
#: ARGV: node, or '' outside of a worker.
PART_RETURN = f"""
local mine, claimant, claim = ARGV[1] .. ':' .. ARGV[4], KEYS[7], KEYS[6]
if ARGV[9] ~= '' and redis.call('HEXISTS', KEYS[8], ARGV[9]) == 1 then
  return redis.error_reply('{FENCED_REPLY}')
end
if redis.call('GET', claim) ~= 'done' and redis.call('GET', claimant) == mine then
  redis.call('DEL', claim)
end
local function count()
{CHORD_PART_RETURN_LUA}
end
local counted = count()
if counted[4] == 1 then
  redis.call('SET', claimant, mine, 'EX', math.max(300, tonumber(ARGV[5])))
end
return counted
"""


#: Note that a chord doesn't fit into the broker. KEYS: the note. What follows a write isn't
#: refused for want of memory.
NOTE_TOO_LARGE = """
redis.call('DEL', KEYS[1])
return redis.call('SET', KEYS[1], '1', 'EX', 600)
"""


class PartReturn:
    """Stands in for Celery's script of the same purpose.

    Args:
        client: of the results.
        node: this worker's node name, or an empty string.
    """

    def __init__(self, client: Any, node: str) -> None:
        self._script = client.register_script(PART_RETURN)
        self._node = node

    def __call__(self, *, keys: Sequence[Any], args: Sequence[Any], client: Any) -> Any:
        claim = keys[5]
        claimant = (claim if isinstance(claim, str) else claim.decode()) + ".by"
        return self._script(keys=[*keys, claimant, FENCED], args=[*args, self._node], client=client)
