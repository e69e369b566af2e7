"""The random control: `train_interact.py --reward tinystory/experiment/random_reward.py:random_reward`."""

import hashlib
from collections.abc import Sequence


def random_reward(opening: str, stories: Sequence[str]) -> list[float]:
    """Per story, the sum of three scores from 0 to 3 divided by 9, as from a teacher, but drawn from the story's hash.
    The other terms of the reward stay the same."""
    digests = (hashlib.blake2b(story.encode("utf-8", "replace"), digest_size=3).digest() for story in stories)
    return [sum(byte % 4 for byte in digest) / 9 for digest in digests]
