"""The loop of train_interact.py on one page: no resume, no evaluation, no budget, one process.

    python examples/loop.py runs/demo/pretrain                           # the built-in rubric
    python examples/loop.py runs/demo/pretrain http://127.0.0.1:8080/v1  # a language model

Where this PPO is not TRL's PPOTrainer:
- The values are a ridge regression on the frozen student's hidden states, not a value head.
- The logit scale has its own learning rate, because 256 stories hardly teach anything else.
- A story's score is multiplied by how different it is from the other stories of its step.
- A story without an end token keeps half of its reward.
- The temperature is folded into the student once, so that every policy samples at temperature 1.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (first: it sets up OpenMP's threads and Ctrl-C)
from tinystory.config import InteractConfig
from tinystory.ops.compute import resolve
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.rl.policy import rollout
from tinystory.rl.reward import differences, story_rewards
from tinystory.rl.start import load_students, open_openings
from tinystory.student import checkpoint
from tinystory.evaluate.open_grader import open_grader


def main(init: str, *urls: str, **options: Any) -> None:
    config = InteractConfig(teacher_url=list(urls), **options)
    compute = resolve(config.device, config.dtype)
    reference, policy, state = load_students(config, compute, checkpoint.find(Path(init)))
    openings = open_openings(config, policy)

    with open_grader(config, corpus=["builtin"]) as teacher:
        while state.step < config.steps:
            prompts = [openings[state.written + i] for i in range(config.stories_per_step)]
            stories = rollout(policy, prompts, state.written, teacher.send)
            batch = ppo.with_reference(policy, collate(stories, compute.device), reference)
            grades = teacher.collect()

            scores = [grade.score for grade in grades]
            difference = differences([story.text for story in stories])
            rewards = story_rewards(config, stories, scores, difference)
            statistics = ppo.step(policy, batch, rewards, state.kl_coef, state.step)
            scored = len(stories) - rewards.count(None)
            state.kl_coef = ppo.next_kl_coef(state.kl_coef, statistics["kl"], scored, config)
            state.end_step(stories, sum(grade.reply_words for grade in grades), asked=scored)

            reward, kl = statistics["reward_mean"], statistics["kl"]
            print(f"step {state.step}: reward {reward:.3f}, KL {kl:.1f} nats per story")
            print(f"    {stories[0].opening} {stories[0].text}\n")
    folder = Path("runs/loop/checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    policy.save(folder / f"step_{state.step:07d}", state, replace=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
