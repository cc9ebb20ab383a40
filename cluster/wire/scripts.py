"""The protocol's steps that must not be torn apart, as Lua that the broker runs.

A message is always in exactly one place: a queue, one node's hash of
unacknowledged messages, or the list of those given up. Each script moves it
whole, and each that acts for a node asks the fence first, so that a node that
was declared dead changes nothing any more.

An entry in a node's hash is ``cmsgpack{queue list, wake list, raw message}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.commands.core import Script
from redis.exceptions import ResponseError

from cluster.settings import MAX_DELIVERIES
from cluster.wire import keys

#: The first word of the error by which a script refuses a fenced node.
FENCED_ERROR = "FENCED"
#: The first word of the error by which REGISTER refuses a name in use.
TAKEN_ERROR = "TAKEN"

_FENCE = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  return redis.error_reply('FENCED this node was declared dead')
end
"""

# give_back(entry, returns key, given-up key, most deliveries, node, 'front' or 'back',
# counted, started). A task with an ETA is held long before it is run, and has killed nobody
# unless it had started.
_GIVE_BACK = """
local function waiting(raw)
  local fine, message = pcall(cjson.decode, raw)
  local headers = fine and type(message) == 'table' and message.headers
  return type(headers) == 'table' and type(headers.eta) == 'string'
end
local function give_back(entry, returns, given_up, most, node, where, counted, started)
  local e = cmsgpack.unpack(entry)
  if counted and (started or not waiting(e[3])) then
    local digest = redis.sha1hex(e[3])
    local times = redis.call('HINCRBY', returns, digest, 1)
    if times >= most then
      redis.call('HDEL', returns, digest)
      redis.call('LPUSH', given_up, cjson.encode({message = e[3], node = node, times = times}))
      return
    end
  end
  redis.call(where == 'front' and 'RPUSH' or 'LPUSH', e[1], e[3])
  redis.call('LPUSH', e[2], '1')
end
"""

# The numbers in a node's hash, the last hand-out first: given back to the front
# of their queues in this order, the oldest is next again.
_NUMBERS = """
local function numbers_of(hash)
  local numbers = redis.call('HKEYS', hash)
  table.sort(numbers, function(a, b) return tonumber(a) > tonumber(b) end)
  return numbers
end
"""

#: Hand out the next message. KEYS: fence, the node's hash, counter, returns,
#: then the lists by priority and queue, then each queue's wake list.
#: ARGV: node, how many lists, how many queues.
#: Returns {list, number, times it came back, message}; where there is none, how
#: many the node holds, so that it can tell whether a reply was lost. The tokens
#: are cleared then, so that who blocks on them next is woken by a message
#: published from now on and by no older one.
TAKE = (
    _FENCE
    + """
local lists, queues = tonumber(ARGV[2]), tonumber(ARGV[3])
for i = 0, lists - 1 do
  local raw = redis.call('RPOP', KEYS[5 + i])
  if raw then
    local number = redis.call('INCR', KEYS[3])
    local wake = KEYS[5 + lists + i % queues]
    redis.call('HSET', KEYS[2], number, cmsgpack.pack({KEYS[5 + i], wake, raw}))
    local returned = 0
    if redis.call('EXISTS', KEYS[4]) == 1 then
      returned = tonumber(redis.call('HGET', KEYS[4], redis.sha1hex(raw)) or 0)
    end
    return {KEYS[5 + i], number, returned, raw}
  end
end
for i = 0, queues - 1 do redis.call('DEL', KEYS[5 + lists + i]) end
return redis.call('HLEN', KEYS[2])
"""
)

#: Acknowledge. KEYS: fence, the node's hash, returns, started. ARGV: node, number.
ACK = (
    _FENCE
    + """
if redis.call('EXISTS', KEYS[3]) == 1 then
  local entry = redis.call('HGET', KEYS[2], ARGV[2])
  if entry then redis.call('HDEL', KEYS[3], redis.sha1hex(cmsgpack.unpack(entry)[3])) end
end
redis.call('SREM', KEYS[4], ARGV[2])
return redis.call('HDEL', KEYS[2], ARGV[2])
"""
)

#: Put back at the end of its queue. KEYS: fence, the node's hash, returns, given up, started.
#: ARGV: node, number, most deliveries, '1' if a process died of it.
REJECT = (
    _FENCE
    + _GIVE_BACK
    + """
local entry = redis.call('HGET', KEYS[2], ARGV[2])
if not entry then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('SREM', KEYS[5], ARGV[2])
give_back(entry, KEYS[3], KEYS[4], tonumber(ARGV[3]), ARGV[1], 'back', ARGV[4] == '1', true)
return 1
"""
)

#: Give back what the broker handed out and the node never got (the reply was
#: lost with the connection). KEYS as REJECT, but for started. ARGV: node, the numbers it knows.
RECONCILE = (
    _FENCE
    + _GIVE_BACK
    + _NUMBERS
    + """
local known = {}
for i = 2, #ARGV do known[ARGV[i]] = true end
local lost = 0
for _, number in ipairs(numbers_of(KEYS[2])) do
  if not known[number] then
    local entry = redis.call('HGET', KEYS[2], number)
    redis.call('HDEL', KEYS[2], number)
    give_back(entry, KEYS[3], KEYS[4], 0, ARGV[1], 'front', false, false)
    lost = lost + 1
  end
end
return lost
"""
)

#: Fence a node and give back all it holds, oldest to the front of its queue.
#: KEYS: fence, the node's hash, returns, given up, workers, started.
#: ARGV: node, most deliveries, why, '1' if the node died with the messages.
#: Returns how many messages it held, or -1 if it was fenced before.
RELEASE = (
    _GIVE_BACK
    + _NUMBERS
    + """
redis.call('HDEL', KEYS[5], ARGV[1])
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[3]) == 0 then return -1 end
local numbers = numbers_of(KEYS[2])
for _, number in ipairs(numbers) do
  give_back(redis.call('HGET', KEYS[2], number), KEYS[3], KEYS[4],
            tonumber(ARGV[2]), ARGV[1], 'front', ARGV[4] == '1',
            redis.call('SISMEMBER', KEYS[6], number) == 1)
end
redis.call('DEL', KEYS[2], KEYS[6])
return #numbers
"""
)

#: Take part. KEYS: fence, workers. ARGV: node, registration.
REGISTER = (
    _FENCE
    + """
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 0 then
  return redis.error_reply('TAKEN a worker of this name takes part already')
end
return 1
"""
)

#: Store a result and tell who waits. KEYS: fence, result. ARGV: node, value, expiry in s or 0.
STORE = (
    _FENCE
    + """
if tonumber(ARGV[3]) > 0 then
  redis.call('SETEX', KEYS[2], ARGV[3], ARGV[2])
else
  redis.call('SET', KEYS[2], ARGV[2])
end
redis.call('PUBLISH', KEYS[2], ARGV[2])
return 1
"""
)


def is_fenced(error: ResponseError) -> bool:
    """Whether a script refused because the node is fenced."""
    return str(error).startswith(FENCED_ERROR)


def is_taken(error: ResponseError) -> bool:
    """Whether REGISTER refused because the name is in use."""
    return str(error).startswith(TAKEN_ERROR)


def take_arguments(node: str, queues: Sequence[str], lists: Sequence[str]) -> list[Any]:
    """The keys and arguments of TAKE, as EVALSHA wants them.

    Args:
        node: who takes.
        queues: the queues' names.
        lists: their lists, by priority and then in the order of ``queues``.
    """
    names = [
        keys.FENCED,
        keys.unacked(node),
        keys.HANDOUTS,
        keys.RETURNS,
        *lists,
        *(keys.wake(queue) for queue in queues),
    ]
    return [len(names), *names, node, len(lists), len(queues)]


class Scripts:
    """The scripts, bound to one client; a missing one is loaded by redis-py itself."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.take_script: Script = client.register_script(TAKE)
        self._ack: Script = client.register_script(ACK)
        self._reject: Script = client.register_script(REJECT)
        self._reconcile: Script = client.register_script(RECONCILE)
        self._release: Script = client.register_script(RELEASE)
        self._register: Script = client.register_script(REGISTER)

    def take(self, node: str, queues: Sequence[str], lists: Sequence[str]) -> list[Any] | int:
        """Hand out a message: ``[list, number, returned, raw]``, or how many ``node`` holds."""
        count, *rest = take_arguments(node, queues, lists)
        reply: list[Any] | int = self.take_script(keys=rest[:count], args=rest[count:])
        return reply

    def ack(self, node: str, number: int) -> None:
        self._ack(
            keys=[keys.FENCED, keys.unacked(node), keys.RETURNS, keys.started(node)],
            args=[node, number],
        )

    def start(self, node: str, number: int) -> None:
        """A task with an ETA runs now. For the others, being taken is being started."""
        self.client.sadd(keys.started(node), number)

    def reject(self, node: str, number: int, *, died: bool, most: int = MAX_DELIVERIES) -> None:
        """Put a message back; ``died``: its task took a process with it, which counts."""
        self._reject(
            keys=[
                keys.FENCED,
                keys.unacked(node),
                keys.RETURNS,
                keys.GIVEN_UP,
                keys.started(node),
            ],
            args=[node, number, most, int(died)],
        )

    def reconcile(self, node: str, known: Sequence[int]) -> int:
        """Give back what ``node`` was handed and doesn't know of; returns how many."""
        lost: int = self._reconcile(
            keys=[keys.FENCED, keys.unacked(node), keys.RETURNS, keys.GIVEN_UP],
            args=[node, *known],
        )
        return lost

    def release(self, node: str, why: str, *, died: bool, most: int = MAX_DELIVERIES) -> int:
        """Fence ``node`` and give back what it holds.

        Returns how many messages it held, or -1 if it had been fenced before.
        """
        held: int = self._release(
            keys=[
                keys.FENCED,
                keys.unacked(node),
                keys.RETURNS,
                keys.GIVEN_UP,
                keys.WORKERS,
                keys.started(node),
            ],
            args=[node, most, why, int(died)],
        )
        return held

    def register(self, node: str, registration: str) -> None:
        """Take part. From now on the guardian misses the node when it is gone."""
        self._register(keys=[keys.FENCED, keys.WORKERS], args=[node, registration])
