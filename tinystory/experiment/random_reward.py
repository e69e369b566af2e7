"""The control's reward, for `train_interact.py --reward tinystory/experiment/random_reward.py:random_reward`."""

import hashlib
from collections.abc import Sequence


def random_reward(opening: str, stories: Sequence[str]) -> list[float]:
    """Three whole numbers from 0 to 3 a story, as a teacher gives them, but drawn from the story's hash; their sum as a
    share of 9. Everything else in the reward, the length term too, stays as it is with a teacher."""
    digests = (hashlib.blake2b(story.encode("utf-8", "replace"), digest_size=3).digest() for story in stories)
    return [sum(byte % 4 for byte in digest) / 9 for digest in digests]
