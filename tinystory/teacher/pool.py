"""Load balancing, retries and failover over one or several servers of one model."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from tqdm import tqdm

from tinystory.teacher.api import Failure
from tinystory.teacher.endpoint import Endpoint

T = TypeVar("T")
# A story is given up after this number of failed requests. With the pauses below, this takes a
# minute or more.
FAILURES = 8
# Seconds before the first retry; doubled for each further retry, up to LONGEST_PAUSE_S, with
# jitter.
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class ServerPool:
    """Distributes requests over servers. If more requests wait than slots are free, each server
    gets a new request for each answer; otherwise a request goes to the server with the fewest
    requests in flight. A server that cannot be reached, refuses the key or fails FAILURES times in
    a row is left out if another server is available."""

    def __init__(self, endpoints: Sequence[Endpoint]):
        self.endpoints = endpoints
        self._waiting: deque[asyncio.Future[Endpoint]] = deque()  # requests without a slot

    @asynccontextmanager
    async def slot(self, first: bool) -> AsyncIterator[Endpoint]:
        """Yields the server of a free slot, after waiting for one. The block holds the slot. first:
        skip the queue, for a request that held a slot before."""
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

    async def ask(self, request: Callable[[Endpoint], AsyncIterator[T]]) -> T:
        """The last answer that `request(endpoint)` yields. After a transient failure it is called
        again, for the answers that are still missing. Raises Failure when an answer is given up,
        at the latest after the server's `deadline_s` for this answer."""
        now = asyncio.get_running_loop().time
        began: float | None = None  # when the answer that is awaited was first asked for
        failures = 0  # since the last answer
        while True:
            async with self.slot(first=began is not None) as endpoint:
                sent = now()
                began = sent if began is None else began
                try:
                    async for answer in request(endpoint):  # noqa: B007  (the last one is returned)
                        endpoint.answered(now() - sent)
                        began = sent = now()
                        failures = 0
                    return answer
                except Failure as error:
                    failure = error
                endpoint.failed(failure)
                if failure.pause_s > endpoint.deadline_s:  # no answer can come in time
                    wait = (
                        f"it accepts no request for {failure.pause_s:,.0f} s: continue after that"
                    )
                    failure = Failure(f"{failure}; {wait}", status=failure.status, fatal=True)
                # a server that is left out does not count as a failure of the story
                if self._is_left_out(endpoint, failure):
                    continue

            failures += 1
            pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            tries_left = failures < FAILURES or failure.busy
            too_late = now() + pause > began + endpoint.deadline_s
            if not failure.again or not tries_left or too_late:
                failure.url = endpoint.probe.url
                raise failure
            endpoint.ledger.total["retries"] += 1
            await asyncio.sleep(pause)

    def _is_left_out(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Whether the server is left out. Leaves it out if the failure affects every story and
        another server is open."""
        refused = failure.fatal and failure.status is not None
        gone = refused or failure.unreachable or endpoint.failures >= FAILURES
        others = any(other.is_open for other in self.endpoints if other is not endpoint)
        if gone and others and endpoint.is_open:
            leave_out(endpoint, failure)
        return not endpoint.is_open


def leave_out(endpoint: Endpoint, failure: Failure) -> None:
    """Send no further requests to this server, and print a warning."""
    endpoint.is_open = False
    tqdm.write(f"warning: {endpoint} {failure}; the other servers take over its requests")
