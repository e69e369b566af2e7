"""Congestion control: how many requests may be in flight, and the timeout of each."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

BUSY_COSTS = 0.5  # slots per refused request, so a round that is refused altogether halves the limit
SLOWER, SHORTEST_S = 3.0, 10.0  # the timeout is this multiple of the slowest recent answer, and at least SHORTEST_S
KNOWN = 32  # answers (and at least one full round) before the slowest answer is known well enough


class Slots:
    """A limit on requests in flight: `most`, half a slot less for each request that the server refuses as busy, and one
    slot more for each full round of answers.

    So a round with a refused share s lowers the limit by s/2, as DCTCP (RFC 8257) does for a share of marked packets: a
    server that refuses now and then keeps nearly all its requests, an overloaded one has half of them within a round.
    """

    def __init__(self, most: int):
        self.most, self.limit, self.taken = most, float(most), 0
        self.shortest = SHORTEST_S
        self._queue: deque[asyncio.Future] = deque()
        self._seconds: deque[float] = deque(maxlen=2 * max(most, KNOWN))  # durations of the last answers

    @asynccontextmanager
    async def one(self, first: bool) -> AsyncIterator[None]:
        """Wait for a slot and hold it. first: ahead of the queue, for a story that has held a slot before."""
        turn = asyncio.get_running_loop().create_future()
        (self._queue.appendleft if first else self._queue.append)(turn)
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self.taken -= 1
                self._admit()

    def _admit(self) -> None:
        while self._queue and self.taken < int(self.limit):
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                self.taken += 1

    def answered(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self.limit = min(self.limit + 1 / self.limit, self.most)

    def refused(self) -> None:
        self.limit = max(self.limit - BUSY_COSTS, 1.0)

    def timeout(self, longest: float, timeouts: int) -> float:
        """Seconds to wait for an answer: `longest`, or less once enough answers have come to know the slowest; doubled
        after each of a story's `timeouts`, as TCP does (RFC 6298), in case the server has become slow."""
        if len(self._seconds) < max(self.most, KNOWN):
            return longest
        return min(longest, max(SLOWER * max(self._seconds), self.shortest) * 2**timeouts)
