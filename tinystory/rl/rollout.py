"""Rollout: the policy writes stories, each process a shard of them, and rank 0 sends them to the teacher."""

from collections.abc import Callable, Sequence

from tinystory.config import InteractConfig
from tinystory.rl.policy import Policy
from tinystory.run import distributed
from tinystory.student.generate import Story, generate


def rollout(
    config: InteractConfig, policy: Policy, openings: Sequence[str], first_index: int,
    send: Callable[[int, str, str], None],
) -> list[Story]:  # fmt: skip
    """Stories first_index, first_index + 1, ... to these openings, on every rank. On rank 0 each is sent (its index,
    opening and text), those of its own shard as soon as they end."""

    def on_story(story: Story) -> None:
        if distributed.is_rank0():
            send(story.index, story.opening, story.text)

    shard = distributed.shard_contiguous(len(openings))
    with policy.compute.autocast():
        local = generate(
            policy.student, policy.value_head, policy.tokenizer, openings[shard.start : shard.stop],
            first_index=first_index + shard.start, seed=config.seed, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, on_story=on_story,
        )  # fmt: skip
    stories = distributed.all_gather_list(local)
    for story in stories[len(local) :]:
        on_story(story)
    return stories
