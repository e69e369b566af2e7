"""Congestion control: how many requests each server may have in flight, the timeout of each, and who gets the next."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

BUSY_COSTS = 0.5  # slots per refused request, so a round that is refused altogether halves the limit
SLOWER, SHORTEST_S = 3.0, 10.0  # the timeout is this multiple of the slowest recent answer, and at least SHORTEST_S
KNOWN = 32  # answers (and at least one full round) before the slowest answer is known well enough


class Slots:
    """One server's limit on requests in flight: `most`, half a slot less for each request that it refuses as busy, and
    one slot more for each full round of answers.

    So a round with a refused share s lowers the limit by s/2, as DCTCP (RFC 8257) does for a share of marked packets: a
    server that refuses now and then keeps nearly all its requests, an overloaded one has half of them within a round.
    """

    def __init__(self, most: int):
        self.most, self.limit, self.taken = most, float(most), 0
        self.open = True  # whether the server is asked at all
        self.shortest = SHORTEST_S
        self._seconds: deque[float] = deque(maxlen=2 * max(most, KNOWN))  # durations of the last answers

    @property
    def free(self) -> bool:
        return self.open and self.taken < int(self.limit)

    @property
    def pace(self) -> float:
        """Mean seconds of the last answers; 0 if there are none."""
        return sum(self._seconds) / max(len(self._seconds), 1)

    def reopen(self) -> None:
        """A server that was away starts with one request."""
        self.open, self.limit = True, 1.0

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


class Queue:
    """Requests that wait for a slot of any of several servers. While there are more requests than slots, each server
    takes as many as it answers; otherwise a request goes where its answer is expected first."""

    def __init__(self, slots: Sequence[Slots]):
        self.slots = slots
        self._turns: deque[asyncio.Future[int]] = deque()

    @asynccontextmanager
    async def one(self, first: bool) -> AsyncIterator[int]:
        """Wait for a slot and hold it; yields the number of its server. first: ahead of the queue, for a story that has
        held a slot before."""
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        (self._turns.appendleft if first else self._turns.append)(turn)
        self.admit()
        try:
            yield await turn
        finally:
            if turn.done() and not turn.cancelled():
                self.slots[turn.result()].taken -= 1
                self.admit()

    def admit(self) -> None:
        """Give every free slot to the next request."""
        while self._turns and (free := [i for i, slots in enumerate(self.slots) if slots.free]):
            turn = self._turns.popleft()
            if not turn.done():
                best = free[0] if len(free) == 1 else min(free, key=self._expected)
                self.slots[best].taken += 1
                turn.set_result(best)

    def _expected(self, at: int) -> tuple[float, int]:
        """Of one more request, in order: how long, if a server slows down in proportion to what it has in flight."""
        slots = self.slots[at]
        pace = slots.pace or min((each.pace for each in self.slots if each.pace), default=1.0)  # unknown: worth a try
        return pace * (slots.taken + 1), slots.taken
