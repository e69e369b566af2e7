"""Load balancing, retries and failover over one or several servers of one model."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from tqdm import tqdm

from tinystory.teacher.api import Failure, in_time
from tinystory.teacher.endpoint import Endpoint

T = TypeVar("T")
FAILURES = 8  # failed requests before a story is given up: with the pauses below, a minute or more
# before the first retry, then doubled up to the longest, with jitter
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 60.0


class ServerPool:
    """While there are more requests than slots, each server takes as many as it answers; otherwise
    a request goes to the one with the fewest in flight. A server that cannot be reached, refuses
    the key or fails FAILURES times in a row is left out while another one is available."""

    def __init__(self, endpoints: Sequence[Endpoint]):
        self.endpoints = endpoints
        self._waiting: deque[asyncio.Future[Endpoint]] = deque()  # requests without a slot

    @asynccontextmanager
    async def slot(self, first: bool) -> AsyncIterator[Endpoint]:
        """Wait for a slot and hold it; yields its server. first: skip the queue, for a request that
        held one before."""
        turn: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self._admit()
        try:
            yield await turn
        finally:
            if turn.done() and not turn.cancelled():
                turn.result().taken -= 1
                self._admit()

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        while self._waiting:
            free = [
                each for each in self.endpoints if each.is_open and each.taken < int(each.limit)
            ]
            if not free:
                return
            turn = self._waiting.popleft()
            if not turn.done():
                endpoint = min(free, key=lambda endpoint: endpoint.taken)
                endpoint.taken += 1
                turn.set_result(endpoint)

    async def ask(self, request: Callable[[Endpoint], Awaitable[T]]) -> T:
        """The answer to a request, retried after transient failures. Raises Failure when giving up,
        after at most the server's `deadline_s`."""
        deadline: float | None = None  # on the monotonic clock
        failures = 0
        while True:
            async with self.slot(first=deadline is not None) as endpoint:
                start = time.monotonic()
                if deadline is None:
                    deadline = start + endpoint.options.deadline_s
                timeout = min(endpoint.options.timeout_s, max(deadline - start, 0.0))
                try:
                    answer = await in_time(request(endpoint), timeout)
                except Failure as error:
                    failure = error
                else:
                    endpoint.answered()
                    return answer
                endpoint.failed(failure)
                if self._is_left_out(endpoint, failure):  # the story is not the cause
                    continue

            failures += 1
            pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            pause += min(failure.retry_after, LONGEST_RETRY_AFTER_S)
            tries_left = failures < FAILURES or failure.busy
            too_late = time.monotonic() + pause > deadline
            if not failure.again or not tries_left or too_late:
                failure.url = endpoint.url
                raise failure
            endpoint.ledger.total["retries"] += 1
            await asyncio.sleep(pause)

    def _is_left_out(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Leave the server out if the failure calls for it and another is open; returns whether it
        is out."""
        refused = failure.fatal and failure.status is not None
        gone = refused or failure.unreachable or endpoint.failures >= FAILURES
        others = any(other.is_open for other in self.endpoints if other is not endpoint)
        if gone and others and endpoint.is_open:
            leave_out(endpoint, failure)
        return not endpoint.is_open


def leave_out(endpoint: Endpoint, failure: Failure) -> None:
    """Use the other servers only, from now on."""
    endpoint.is_open = False
    tqdm.write(f"warning: the teacher at {endpoint.url} {failure}; the others go on without it")
