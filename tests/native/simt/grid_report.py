"""How much longer the attention kernels take on an H100 than if all SMs ended together.

List scheduling on paper. 132 SMs hold two blocks each, and a block starts where one ends. A tile
takes one unit of time, in the forward pass two; a block takes one more for its beginning, and in
the backward pass one for its end. The backward pass adds to dQ in the last fifth of a tile, after
waiting for the block's turn. The report compares the order of csrc/cuda/tiles.cuh (`longest_first`)
with the earlier order: head by head, in the backward pass from the shortest block to the longest.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

PLACES = 2 * 132
CACHE = 32 << 20  # bytes of the L2 cache for what the blocks of a group of heads share
ROWS = 128  # of a block, in 16-bit types at head size 64
QUERIES = 32  # of a tile in the backward pass
TURN = 0.2  # the part of a tile's time in which dQ is added
Order = list[tuple[int, int]]  # head and block


def groups(heads: int, shared_bytes: int) -> Iterator[range]:
    fit = max(1, CACHE // shared_bytes)
    count = -(-heads // fit)
    size = -(-heads // count)
    for first in range(0, heads, size):
        yield range(first, min(first + size, heads))


def forward_loss(order: Order) -> float:
    """Block i takes the keys of tiles 0 to i."""
    ends, work = [0.0] * PLACES, 0.0
    for _, block in order:
        time = 1.0 + 2 * (block + 1)
        work += time
        heapq.heappush(ends, heapq.heappop(ends) + time)
    return max(ends) / (work / PLACES) - 1


def backward_loss(order: Order, tokens: int, last_first: bool) -> float:
    """Block i takes the queries from the block's keys on, from the last query to the first or back;
    `last_first` also turns the order in which blocks add to dQ."""
    ends, work = [0.0] * PLACES, 0.0
    added: dict[tuple[int, int, int], float] = {}  # when a block added to dQ of a head's tile
    for head, block in order:
        time = heapq.heappop(ends) + 1
        own = range(block * (ROWS // QUERIES), -(-tokens // QUERIES))
        for tile in reversed(own) if last_first else own:
            before = block - 1 if last_first else block + 1
            time += 1 - TURN
            time = max(time, added.get((head, tile, before), 0.0)) + TURN
            added[head, tile, block] = time
        work += len(own) + 2
        heapq.heappush(ends, time + 1)
    return max(ends) / (work / PLACES) - 1


def report(heads: int, tokens: int) -> str:
    blocks = range(-(-tokens // ROWS))
    head_by_head = [(head, block) for head in range(heads) for block in reversed(blocks)]

    def longest_first(longest: list[int], shared_bytes: int) -> Order:
        parts = groups(heads, tokens * 64 * shared_bytes)
        return [(head, block) for part in parts for block in longest for head in part]

    losses = [
        forward_loss(head_by_head),
        forward_loss(longest_first(list(reversed(blocks)), 2 * 2)),
        backward_loss(head_by_head, tokens, last_first=False),
        backward_loss(longest_first(list(blocks), 2 * 2 + 4), tokens, last_first=True),
    ]
    return f"{heads:5} {tokens:6}" + "".join(f"{loss:16.1%}" for loss in losses)


if __name__ == "__main__":
    print("heads tokens  forward before           now backward before             now")
    for heads, tokens in ((192, 512), (384, 512), (192, 1024), (96, 2048), (48, 4096)):
        print(report(heads, tokens))
