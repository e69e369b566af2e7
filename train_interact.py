"""Learn by interaction: the student writes stories, a teacher scores them over HTTP, PPO learns from the scores.

    python train_interact.py                                         the built-in teacher (a rubric, not an LLM)
    python train_interact.py --teacher-url http://127.0.0.1:11434/v1 --teacher-model llama3.1:8b
    python train_interact.py --reward my_reward.py:score             any callable is a teacher

One step: write stories (each goes to the teacher the moment it ends), read them under the frozen starting checkpoint
while the teacher grades, turn scores into rewards, update the student by PPO, and write everything down.
"""

import contextlib
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinystory import babylm, distributed, ppo
from tinystory.babylm import WordBudget
from tinystory.config import INTERACT_PRESETS, InteractConfig, as_dict, parse
from tinystory.device import Interrupted, Stop, peak_memory_mb, pick_device, pick_dtype
from tinystory.errors import UserError, command
from tinystory.evaluate.stories import distinct_ngrams
from tinystory.report.plots import text_curve
from tinystory.report.run import write_report
from tinystory.reward import story_reward
from tinystory.runlog import SAMPLES, RunLog, atomic_write, read_metrics, read_stories
from tinystory.student import checkpoint
from tinystory.student.generate import Story, encode_opening, generate, require_room
from tinystory.student.model import ValueHead
from tinystory.teacher.grade import Grade, require_scores, score_means
from tinystory.teacher.grader import Grader, open_grader

PRETRAIN_RUN = Path("runs/pretrain")
# Words taken in during interaction at which a checkpoint is kept.
INTERACTION_CHECKPOINTS = {f"chck_{n}00K": n * 100_000 for n in range(1, 10)} | {"chck_1M": 1_000_000}
SHOWN = 8  # stories sampled again at the end, with the draws of the first ones, for the report


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, INTERACT_PRESETS, argv)
    distributed.start(config.device)
    rank0, n = distributed.is_rank0(), config.stories_per_step
    if n < distributed.world_size():
        raise UserError(f"--stories-per-step must be at least {distributed.world_size()}, the number of processes")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    run = Path(config.out)
    resume_from = checkpoint.newest(run) if config.resume else None
    if config.resume and resume_from is None:
        raise UserError(f"--resume: {run} has no checkpoint yet; start without --resume")

    # Two copies of the starting checkpoint: the student, which learns, and the frozen reference of the KL penalty.
    origin = run / "checkpoints" / "start" if resume_from else starting_checkpoint(config.init)
    reference, _, _ = checkpoint.load(origin, device)
    reference.requires_grad_(False)
    student, tokenizer, facts = checkpoint.load(origin, device)
    require_room(student, encode_opening(tokenizer, config.opening), config.max_new_tokens)
    milestones = INTERACTION_CHECKPOINTS
    if config.preset == babylm.TRACK:
        babylm.check_interaction(facts, config.budget_words, config.budget_words_out)
        milestones = babylm.milestones_beyond(facts)
    value_head = ValueHead(student.config.n_embd).to(device)
    parameters = dict(student.named_parameters()) | {f"value_head.{k}": p for k, p in value_head.named_parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.learning_rate, eps=config.adam_eps, fused=True)

    # The state of the run: what a checkpoint restores.
    counters: dict[str, Any] = dict(step=0, written=0, kl_coef=config.kl_coef)
    counters |= dict(words_in=len(config.opening.split()), words_out=0)  # the opening counts once
    if resume_from:
        checkpoint.restore(student, resume_from)
        state, counters = checkpoint.load_trainer(resume_from)
        value_head.load_state_dict({name: state[f"value_head.{name}"] for name in value_head.state_dict()})
        checkpoint.unpack_optimizer(optimizer, list(parameters), state)
    step, written = counters["step"], counters["written"]
    kl = ppo.AdaptiveKL(counters["kl_coef"], config.kl_target, config.kl_horizon)
    budget = WordBudget(config.budget_words, config.budget_words_out, counters["words_in"], counters["words_out"])

    def save(name: str) -> Path:
        folder = run / "checkpoints" / name
        if rank0:
            state = checkpoint.pack_optimizer(optimizer, list(parameters))
            state |= {f"value_head.{name}": tensor for name, tensor in value_head.state_dict().items()}
            words = dict(words_in=budget.words_in, words_out=budget.words_out)
            lifetime = {f"interaction_{k}": facts.get(f"interaction_{k}", 0) + v for k, v in words.items()}
            counters = dict(step=step, written=written, kl_coef=kl.coef, **words)
            now = facts | (lifetime if step else {})
            checkpoint.save(folder, student, tokenizer, facts=now, state=state, counters=counters)
        return folder

    with contextlib.ExitStack() as stack:
        # Rank 0 alone has a grader. It is opened before the run's folder is: a mistake leaves nothing behind.
        opened = open_grader(config, corpus=facts.get("corpus"), replies=run / "replies.jsonl")
        grader = distributed.rank0_first(lambda: stack.enter_context(opened) if rank0 else None)
        grader_facts = grader.facts if grader else {}
        if grader and (forecast := grader.forecast((config.steps - step) * n)):
            print(f"forecast: {forecast}")
        print(f"student {origin}, scored by {grader_facts.get('scored_by')}")
        resume_step = step if resume_from else None
        log = stack.enter_context(distributed.rank0_first(lambda: RunLog(run, resume_step=resume_step, writes=rank0)))
        resolved = dict(device=str(device), dtype=str(dtype).removeprefix("torch."), init=config.init or str(origin))
        log.config(as_dict(config) | grader_facts | resolved)
        if not resume_from:
            save("start")
        distributed.broadcast_from_rank0(parameters.values())
        stop = stack.enter_context(Stop().listening())
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=step, unit="step", desc="interacting", disable=not rank0)
        )

        def send(story: Story) -> None:
            if grader:
                grader.send(story.index, story.text)

        def write(count: int, first_index: int) -> list[Story]:
            with autocast():
                return generate(
                    student, value_head, tokenizer, config.opening, count=count, first_index=first_index,
                    seed=config.seed, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                    on_story=send,
                )  # fmt: skip

        with contextlib.suppress(Interrupted):
            while step < config.steps and not distributed.all_reduce_max(stop.requested):
                exhausted = distributed.rank0_value(lambda: exhausted_budget(config, budget, grader))
                if exhausted:
                    bar.write(f"{exhausted} does not hold another step")
                    break

                # 1. Write: each rank its shard. Grading begins with the first story that ends on rank 0.
                began = time.perf_counter()
                shard = distributed.shard_contiguous(n)
                stories = distributed.all_gather_list(write(len(shard), written + shard.start))
                for story in stories[len(shard) :]:
                    send(story)
                wrote = time.perf_counter()

                # 2. Read the stories under the frozen reference while the teacher is still grading.
                batch = ppo.collate(stories, tokenizer, config.opening, device)
                with autocast():
                    ref_logprobs = ppo.reference_logprobs(reference, batch, config.temperature, config.micro_batch_size)
                read = time.perf_counter()

                # 3. Wait for the grades.
                try:
                    grades = distributed.rank0_value(lambda: grader.collect(stop))
                    require_scores(grades, config.max_unscored)
                except UserError:  # nothing has been learned in this step, so the state after the last one is saved
                    checkpoint.drop_older(save(f"step_{step:07d}"))
                    raise
                graded = time.perf_counter()

                # 4. Turn scores into rewards. A story without a score has no reward and gives no gradient.
                rewards = [reward_of(config, story, grade) for story, grade in zip(stories, grades, strict=True)]
                scored = [i for i, reward in enumerate(rewards) if reward is not None]
                kept = torch.tensor(scored, device=device)
                batch, ref_logprobs = batch.rows(kept), ref_logprobs[kept]
                story_rewards = torch.tensor([rewards[i] for i in scored], device=device)

                # 5. PPO. Randomness is a function of (seed, step), so a resumed run repeats an unbroken one.
                torch.manual_seed(config.seed * 1_000_003 + step)
                with autocast():
                    stats = ppo.step(student, value_head, optimizer, kl, batch, ref_logprobs, story_rewards, config)
                updated = time.perf_counter()

                # 6. Write everything down.
                words_before = budget.words_in
                budget.spend(sum(g.reply_words for g in grades), sum(s.words for s in stories))
                step, written = step + 1, written + n
                log.stories(story_records(config.opening, step, stories, grades, rewards))
                log.metrics(
                    step=step, reward_mean=story_rewards.mean(), reward_std=story_rewards.std(),
                    **score_means(grades), **story_means(stories),
                    words_in=budget.words_in, words_out=budget.words_out, unscored=n - len(scored),
                    rollout_s=wrote - began, reference_s=read - wrote, teacher_s=graded - read,
                    update_s=updated - graded, **stats, peak_memory_mb=peak_memory_mb(device),
                    **(grader.stats() if grader else {}),
                )  # fmt: skip
                bar.update()
                words = sum(s.words for s in stories) / n
                bar.set_postfix(reward=f"{story_rewards.mean():.3f}", words=f"{words:.0f}", kl=f"{stats['kl']:.1f}")
                for name, milestone in milestones.items():
                    if words_before < milestone <= budget.words_in:
                        save(name)
                if step % config.save_every == 0:
                    checkpoint.drop_older(save(f"step_{step:07d}"))
                    if rank0:
                        write_report(run)
        bar.close()
        checkpoint.drop_older(save(f"step_{step:07d}"))
        if stop.requested:
            print(f"stopped after step {step}, all saved; go on with: python train_interact.py --out {run} --resume")
        elif grader:
            # The first stories again: the same opening and the same draws, by the student as it is now.
            after = write(SHOWN, 0)
            grades = grader.collect(stop)
            rewards = [reward_of(config, story, grade) for story, grade in zip(after, grades, strict=True)]
            shown = [{"when": "before", **record} for record in itertools.islice(read_stories(run), SHOWN)]
            shown += [
                {"when": "after", **record} for record in story_records(config.opening, step, after, grades, rewards)
            ]
            atomic_write(run / SAMPLES, "".join(json.dumps(record) + "\n" for record in shown))
            print_summary(run, config.opening, shown)


def starting_checkpoint(init: str) -> Path:
    if not init and checkpoint.newest(PRETRAIN_RUN) is None:
        raise UserError(f"no checkpoint under {PRETRAIN_RUN}: run train_pretrain.py first, or give --init CHECKPOINT")
    return checkpoint.find(Path(init) if init else PRETRAIN_RUN)


def exhausted_budget(config: InteractConfig, budget: WordBudget, grader: Grader) -> str:
    """Which budget does not hold another step; empty if all do."""
    n = config.stories_per_step
    if not budget.allows(n * grader.most_words, n * config.max_new_tokens):
        return f"the word budget ({budget.limit_in:,} in, {budget.limit_out:,} out)"
    return "" if grader.affords(n) else f"--budget-cost {config.budget_cost:g}"


def reward_of(config: InteractConfig, story: Story, grade: Grade) -> float | None:
    if grade.score is None:
        return None
    return story_reward(grade.score, story.words, config.length_weight, config.length_words)


def story_means(stories: list[Story]) -> dict[str, float | None]:
    """Means per story: entropy (nats, summed over its tokens), words and tokens; and distinct_4 over all stories."""
    n = len(stories)
    return {
        "entropy": sum(float(story.entropies.sum()) for story in stories) / n,
        "length_mean": sum(story.words for story in stories) / n,
        "tokens_mean": sum(len(story.tokens) for story in stories) / n,
        "distinct_4": distinct_ngrams([story.text for story in stories]),
    }


def story_records(
    opening: str, step: int, stories: list[Story], grades: list[Grade], rewards: list[float | None]
) -> list[dict]:
    """The lines of stories.jsonl."""
    return [
        dict(
            step=step, index=story.index, opening=opening, story=story.text, reply=grade.reply_or_error,
            scores=grade.scores, reward=reward, words=story.words, ended=story.ended,
        )
        for story, grade, reward in zip(stories, grades, rewards, strict=True)
    ]  # fmt: skip


def print_summary(run: Path, opening: str, shown: list[dict]) -> None:
    """One story before and after, and the curve of the rewards."""
    rewards = [m["reward_mean"] for m in read_metrics(run)]
    first, last = rewards[:5], rewards[-5:]
    for when in ("before", "after"):
        story = next(r for r in shown if r["when"] == when)
        print(f"\n{when}, scored {story['scores']}:\n{opening} {story['story']}")
    print(f"\nmean reward {sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}  {text_curve(rewards, 60)}")
    print(f"report: {write_report(run)}")
    print(f"next:   python scripts/sample.py {checkpoint.newest(run)}")


if __name__ == "__main__":
    main()
