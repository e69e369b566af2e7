"""How many requests may be on their way at once, and for how long."""

import asyncio
from collections import deque
from contextlib import asynccontextmanager

BUSY_COSTS = 0.5  # of a slot: a round of requests that are all turned away halves the limit
SLOWER, SHORTEST_S = 3.0, 10.0  # a request is given so many times the slowest of the last answers, and never less
KNOWN = 32  # answers, and a full round of them, after which it is known how slow the slowest are


class Slots:
    """How many requests may be on their way: `most`; fewer by half a slot for each that the server turns away, and more
    by one for each full round that goes well.

    So a round of which a share s is turned away takes off s/2 of the limit, as DCTCP (RFC 8257) does for a share of
    marked packets: a server that now and then refuses is asked on at full width, an overloaded one at half of it within
    a round.
    """

    def __init__(self, most: int):
        self.most, self.limit, self.taken = most, float(most), 0
        self._queue: deque[asyncio.Future] = deque()
        self._seconds: deque[float] = deque(maxlen=2 * max(most, KNOWN))  # of the last answers

    @asynccontextmanager
    async def one(self, first: bool):
        """Wait for a slot and hold it; `first` before all that wait, for a story that held one before."""
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

    def turned_away(self) -> None:
        self.limit = max(self.limit - BUSY_COSTS, 1.0)

    def patience(self, longest: float, timeouts: int) -> float:
        """Seconds to wait for an answer: `longest`, or less once enough answers have shown how long one takes at most;
        twice as much after each of a story's `timeouts`, as TCP does (RFC 6298), for a server that has become slow."""
        if len(self._seconds) < max(self.most, KNOWN):
            return longest
        return min(longest, max(SLOWER * max(self._seconds), SHORTEST_S) * 2**timeouts)
