"""What slides share and wait for: a bounded number of blocks in flight, and of bytes on a disk."""

import asyncio
import heapq
from collections import deque


class FairSlots:
    """At most `size` blocks or slides at a time; the next slot goes to the slide with the least left to do.

    So a small slide overtakes a large one, and the last large slide has all the slots. Used by one event loop.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken, self._number = 0, 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @property
    def size(self) -> int:
        """How many may be taken; those that are taken stay so where it becomes less."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size
        self._next()

    async def take(self, left: int) -> None:
        """Wait for a slot; `left`: what its slide has to do, such as blocks. To be given back by `give_back`."""
        self._number += 1
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (left, self._number, mine))
        self._next()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        self._taken -= 1
        self._next()

    def _next(self) -> None:
        while self._waiting and (self._taken < self.size or self._waiting[0][2].done()):
            slot = heapq.heappop(self._waiting)[2]
            if not slot.done():  # else cancelled
                self._taken += 1
                slot.set_result(None)


class Space:
    """At most `size` bytes taken together, in the order in which they were asked for. Used by one event loop.

    So a large slide is not overtaken for ever by small ones.
    """

    def __init__(self, size: float) -> None:
        self.size = size
        self._taken = 0.0
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    async def take(self, size: float) -> None:
        """Wait for space; at most `self.size`. To be given back by `give_back`."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, mine))
        self._next()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give_back(size)
            else:
                self._next()
            raise

    def give_back(self, size: float) -> None:
        self._taken -= size
        self._next()

    def _next(self) -> None:
        while self._waiting:
            size, first = self._waiting[0]
            if not first.done():
                if self._taken + size > self.size:
                    return
                self._taken += size
                first.set_result(None)
            self._waiting.popleft()
