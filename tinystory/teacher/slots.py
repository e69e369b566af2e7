"""How many requests may be on their way at once."""

import asyncio
import time
from collections import deque
from contextlib import asynccontextmanager


class Slots:
    """How many requests may be on their way: `most`, halved whenever the server says that it is too many (at most
    once a second: a burst is one complaint), and one more again for each full round that goes well."""

    def __init__(self, most: int):
        self.most, self.limit, self.taken = most, float(most), 0
        self._narrowed = 0.0
        self._queue: deque[asyncio.Future] = deque()

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

    def widen(self) -> None:
        self.limit = min(self.limit + 1 / self.limit, self.most)

    def narrow(self) -> None:
        if time.monotonic() - self._narrowed > 1.0:
            self._narrowed = time.monotonic()
            self.limit = max(self.limit / 2, 1.0)
