"""Training sequences: whole documents packed into sequences, or a stream of documents cut every
`context` tokens.

In a stream, most sequences begin in the middle of a story. With packing, only documents longer than
a sequence are cut (Ding et al. 2024, arXiv 2404.10830). A student trained with packing tells better
stories after the same number of words (lab/LOG.md)."""

from bisect import bisect_left, insort
from itertools import chain, pairwise

import numpy as np
import torch
from numpy import ndarray

from tinystory.data.shards import Dataset, TokenFile
from tinystory.run.errors import UserError

# Begin and end of the part of training without the corpora that pause, as fractions of all words.
PAUSE = 0.3, 0.91


class Windows:
    """Sequences of `context` + 1 tokens, for inputs and shifted targets, reshuffled in each
    epoch."""

    def __init__(self, file: TokenFile, context: int, batch_size: int, seed: int, packing: str):
        """packing: "whole" or "stream". Raises UserError for a file shorter than one sequence."""
        if len(file) <= context:
            raise UserError(
                f"the corpus has {len(file)} tokens to train on, fewer than one sequence of --context {context}: "
                "give a larger --corpus or a smaller --context"
            )
        self.file = file
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.pieces = pieces(file, context, packing)
        if packing == "stream":  # drop the last, shorter piece
            self.pieces = self.pieces[: (len(file) - 1) // context]
        self.epoch = 0
        self.order = self._shuffled(0)
        self.count = len(self.order)  # the same in every epoch: it depends on the lengths alone

    def batch(self, number: int) -> tuple[torch.Tensor, int]:
        """Batch `number`: tokens (batch_size, context + 1) int64, and the number of words that
        begin in the inputs."""
        first = number * self.batch_size
        at = np.stack([self._positions(first + i) for i in range(self.batch_size)])
        words = int(self.file.words[at[:, :-1]].sum(dtype=np.int64))
        return torch.from_numpy(self.file.tokens[at].astype(np.int64)), words

    def batches_of(self, words: float) -> int:
        """The number of batches that hold about `words` words, including the words of filled-up
        sequences."""
        tokens = words * len(self.file) / self.file.word_count
        return round(tokens / (self.context * self.batch_size))

    def _positions(self, index: int) -> ndarray:
        """(context + 1,) int64: token positions of a sequence in the file. The positions after the
        last piece fill the sequence up."""
        epoch, position = divmod(index, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = self._shuffled(epoch)
        at = token_positions(self.pieces[self.order[position]])
        after = at[-1] + 1
        filling = np.arange(after, after + self.context + 1 - len(at))
        return np.concatenate([at, filling]) % len(self.file)

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return pack(self.pieces, self.context, rng.permutation(len(self.pieces)))


class Curriculum:
    """Curriculum: batches of all documents, except in the middle of training (PAUSE), which leaves
    out the corpora that pause, such as dull text (filler). A student learns coreference sooner from
    dull text, in which names are twice as frequent, and everything else sooner from stories. The
    text at the end of training decides how often the student writes dull text (lab/LOG.md)."""

    def __init__(self, whole: Windows, middle: Windows, words: int):
        """words: total words of training, counting repeats."""
        begin, end = PAUSE
        self.whole = whole
        self.middle = middle
        self.batches_before = whole.batches_of(begin * words)
        self.batches_paused = middle.batches_of((end - begin) * words)

    def batch(self, number: int) -> tuple[torch.Tensor, int]:
        """Batch `number` of the training: tokens (batch_size, context + 1) int64, and the number of
        words that begin in the inputs."""
        if number < self.batches_before:
            return self.whole.batch(number)
        paused = number - self.batches_before
        if paused < self.batches_paused:
            return self.middle.batch(paused)
        return self.whole.batch(number - self.batches_paused)


def open_windows(
    data: Dataset, context: int, batch_size: int, seed: int, packing: str, words: int
) -> Windows | Curriculum:
    """The batches of a training on so many words: of a curriculum if some of the corpora pause and
    the others fill a sequence."""
    whole = Windows(data.train, context, batch_size, seed, packing)
    if context < len(data.middle) < len(data.train):
        return Curriculum(whole, Windows(data.middle, context, batch_size, seed, packing), words)
    return whole


def pieces(file: TokenFile, context: int, packing: str) -> ndarray:
    """(n, 3) int64: begin and end of each piece in the file, and whether a document begins with the
    piece. Documents are cut every `context` tokens; "stream" treats the file, without the first
    token, as one document."""
    bounds = file.offsets if packing == "whole" else np.array([1, len(file)])
    begins = np.concatenate([np.arange(*document, context) for document in pairwise(bounds)])
    next_bounds = bounds[np.searchsorted(bounds, begins, side="right")]
    ends = np.minimum(begins + context, next_bounds)
    return np.stack([begins, ends, np.isin(begins, bounds)], 1)


def pack(pieces: ndarray, context: int, order: ndarray) -> list[list[int]]:
    """Lists of piece indices, one list per sequence of up to `context` tokens, by best-fit
    decreasing: the longest piece is packed first, ties in `order`, (n,) int64. In a sequence,
    pieces from the middle of a document come first, and the other pieces are in `order`. The
    sequences are in the `order` of their first pieces."""
    lengths = pieces[:, 1] - pieces[:, 0]
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    sequences = best_fit(longest_first.tolist(), lengths.tolist(), context)

    rank = np.argsort(order)
    begins_document = pieces[:, 2]
    rank_in_sequence = (begins_document * len(pieces) + rank).tolist()
    for sequence in sequences:
        sequence.sort(key=rank_in_sequence.__getitem__)
    sequences.sort(key=lambda sequence: rank[sequence[0]])
    return sequences


def best_fit(pieces: list[int], lengths: list[int], context: int) -> list[list[int]]:
    """Lists of pieces with at most `context` tokens per list. One piece after another joins the
    fullest list that still has room for it; without such a list, the piece begins a new one.
    lengths: number of tokens of piece 0, 1, ..."""
    with_room: list[list[list[int]]] = [[] for _ in range(context + 1)]  # lists by their room
    rooms: list[int] = []  # sorted: where with_room is not empty
    for piece in pieces:
        length = lengths[piece]
        least = bisect_left(rooms, length)
        if least == len(rooms):
            room = context
            joined = []
        else:
            room = rooms[least]
            joined = with_room[room].pop()
            if not with_room[room]:
                del rooms[least]
        joined.append(piece)

        room -= length
        if not with_room[room]:
            insort(rooms, room)
        with_room[room].append(joined)
    return list(chain.from_iterable(with_room))


def token_positions(sequence: ndarray) -> ndarray:
    """(tokens + 1,) int64: the position of the token before the first piece, then the positions of
    the pieces' tokens in the file. Before the first document the position is -1, the file's last
    token, which is also `</s>`."""
    tokens = [np.arange(begin, end) for begin, end, _ in sequence]
    return np.concatenate([sequence[:1, 0] - 1, *tokens])
