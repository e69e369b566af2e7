"""Learn by interaction: the student writes stories, a teacher scores them over HTTP, PPO learns from the scores.

    python train_interact.py                                         the built-in teacher (a rubric, not an LLM)
    python train_interact.py --teacher-url http://127.0.0.1:11434/v1 --teacher-model llama3.1:8b
    python train_interact.py --reward my_reward.py:score             any callable is a teacher

One step: write stories (each goes to the teacher the moment it ends), read them under the frozen starting checkpoint
while the teacher grades, turn scores into rewards, update the student by PPO, and write everything down. Now and then
the student is looked at from outside, by stories to openings that it never trains on, and the best one is kept.
"""

import contextlib
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import tinystory  # noqa: F401  (before torch, whose import takes seconds: see there)

# isort: split

import torch
from tqdm import tqdm

from tinystory import ops
from tinystory.config import INTERACT_PRESETS, InteractConfig, as_dict, parse
from tinystory.data import babylm
from tinystory.data.babylm import WordBudget
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.calibration import calibrated
from tinystory.evaluate.stories import distinct_ngrams
from tinystory.ops import fastest
from tinystory.report.charts import text_curve
from tinystory.report.run import write_report
from tinystory.rl import ppo
from tinystory.rl.advantages import Critic
from tinystory.rl.collapse import signs_of_collapse
from tinystory.rl.reward import differences, plots, story_reward
from tinystory.rubric.process import builtin_teacher
from tinystory.run import distributed
from tinystory.run.device import Interrupted, Stop, dtype_name, now, peak_memory_mb, pick_device, pick_dtype
from tinystory.run.errors import UserError, command
from tinystory.run.folder import LOOKS, SAMPLES, RunLog, atomic_write, held, read_metrics, read_records
from tinystory.run.paths import usage
from tinystory.run.text import printable
from tinystory.student import checkpoint, memory
from tinystory.student.generate import Story, encode_opening, generate, require_room
from tinystory.student.model import ValueHead
from tinystory.teacher.grade import Grade, agreement, require_scores, score_means
from tinystory.teacher.grader import Grader, open_grader

PRETRAIN_RUN = Path("runs/pretrain")
# Words taken in during interaction at which a checkpoint is kept.
INTERACTION_CHECKPOINTS = {f"chck_{n}00K": n * 100_000 for n in range(1, 10)} | {"chck_1M": 1_000_000}
LOOK_INDEX = 10**9  # stories of a look are numbered from here: the same draws each time, and none of training's


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, INTERACT_PRESETS, argv)
    distributed.start(config.device)
    with distributed.on_rank0(held(Path(config.out))):
        interact(config)


def interact(config: InteractConfig) -> None:
    rank0, n = distributed.is_rank0(), config.stories_per_step
    for flag, count in (("--stories-per-step", n), ("--look-stories", config.look_stories)):
        if count < distributed.world_size():
            raise UserError(f"{flag} must be at least {distributed.world_size()}, the number of processes")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    pytorch_ops = distributed.rank0_value(lambda: fastest.pick(config.pytorch_ops, dtype, device))
    ops.run_by_pytorch(pytorch_ops)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    run = Path(config.out)
    resume_from = distributed.rank0_value(lambda: checkpoint.newest_whole(run)) if config.resume else None
    if config.resume and resume_from is None:
        print(f"{run} was stopped before its first checkpoint: it starts again")

    # Two copies of the starting checkpoint: the student, which learns, and the frozen reference of the KL penalty.
    origin = run / "checkpoints" / "start" if resume_from else starting_checkpoint(config.init)
    reference, _, _ = checkpoint.load(origin, device)
    reference.requires_grad_(False)
    student, tokenizer, facts = checkpoint.load(origin, device)
    memory.require_for_interaction(config, student.config, device)
    texts = [config.opening] if config.opening else load_openings(config.openings)
    openings = Openings(texts, config.seed, config.stories_per_opening)
    require_room(student, max((encode_opening(tokenizer, text) for text in texts), key=len), config.max_new_tokens)
    milestones = INTERACTION_CHECKPOINTS
    if config.preset == babylm.TRACK:
        babylm.check_interaction(facts, config.budget_words, config.budget_words_out)
        milestones = babylm.milestones_beyond(facts)
    critic = (ValueHead if config.critic == "head" else Critic)(student.config.n_embd).to(device)
    value_head = critic if isinstance(critic, ValueHead) else None
    parameters = dict(student.named_parameters()) | {f"critic.{k}": p for k, p in critic.named_parameters()}
    optimizer = ppo.SharpAdam(
        student.ln_f, parameters.values(), config.learning_rate, config.sharpness_rate, config.adam_eps
    )
    parameters |= {"sharpness": optimizer.sharpness}

    # The state of the run: what a checkpoint restores.
    counters: dict[str, Any] = dict(step=0, written=0, kl_coef=config.kl_coef, best_step=0)
    counters |= dict(words_in=0, words_out=0)
    if resume_from:
        checkpoint.restore(student, resume_from)
        state, counters = checkpoint.load_trainer(resume_from, tuple(counters))
        checkpoint.restore_module(critic, "critic", state)
        checkpoint.unpack_optimizer(optimizer, list(parameters), state)
    step, written, best_step = (counters[name] for name in ("step", "written", "best_step"))
    kl = ppo.AdaptiveKL(counters["kl_coef"], config.kl_target, config.kl_horizon)
    budget = WordBudget(config.budget_words, config.budget_words_out, counters["words_in"], counters["words_out"])

    def save(name: str, replace: bool = False) -> None:
        if not rank0:  # it would drop what rank 0 is writing as left half-written
            return
        folder = run / "checkpoints" / name
        state = checkpoint.pack_optimizer(optimizer, list(parameters))
        state |= {f"critic.{name}": tensor for name, tensor in critic.state_dict().items()}
        words = dict(words_in=budget.words_in, words_out=budget.words_out)
        lifetime = {f"interaction_{k}": facts.get(f"interaction_{k}", 0) + v for k, v in words.items()}
        progress = dict(step=step, written=written, best_step=best_step)
        now = facts | (lifetime if step else {})
        counters = progress | dict(kl_coef=kl.coef, **words)
        checkpoint.save(folder, student, tokenizer, facts=now, state=state, counters=counters, replace=replace)
        checkpoint.drop_older(folder)

    with contextlib.ExitStack() as stack:
        # Rank 0 alone has a grader. It is opened before the run's folder is: a mistake leaves nothing behind.
        opened = open_grader(config, builtin_teacher, corpus=facts.get("corpus"), replies=run / "replies.jsonl")
        grader = distributed.rank0_first(lambda: stack.enter_context(opened) if rank0 else None)
        scorer = cast(Grader, grader)  # for what rank 0 alone runs
        grader_facts = grader.facts if grader else {}
        looks_ahead = sum(looks_at(config, at) for at in range(step + bool(step), config.steps + 1))
        stories_ahead = (config.steps - step) * n + looks_ahead * config.look_stories
        if grader and (forecast := grader.forecast(stories_ahead, openings[0])):
            print(f"forecast: {forecast}")
        grader_facts |= distributed.rank0_value(lambda: calibrated(config, scorer))
        print(f"student {origin}, scored by {grader_facts.get('scored_by')}")
        first_words = openings.new_words(0, n)
        if step == 0 and (
            exhausted := distributed.rank0_value(lambda: exhausted_budget(config, budget, scorer, first_words, looks=2))
        ):
            raise UserError(
                f"{exhausted} does not hold a single step and the looks around it: raise it, or lower "
                "--stories-per-step or --look-stories"
            )
        resume_step = step if config.resume else None
        log = stack.enter_context(distributed.rank0_first(lambda: RunLog(run, resume_step=resume_step, writes=rank0)))
        resolved = dict(
            device=str(device),
            dtype=dtype_name(config.dtype, dtype),
            pytorch_ops=pytorch_ops,
            init=config.init or str(origin),
        )
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
                grader.send(story.index, story.opening, story.text)

        def write(first: int, count: int, opening_of: Callable[[int], str]) -> list[Story]:
            """Stories first to first + count - 1, on every rank; each writes a shard. Grading begins with the first one
            that ends on rank 0."""
            shard = distributed.shard_contiguous(count)
            with autocast():
                mine = generate(
                    student, value_head, tokenizer, [opening_of(first + i) for i in shard],
                    first_index=first + shard.start, seed=config.seed, max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature, on_story=send,
                )  # fmt: skip
            stories = distributed.all_gather_list(mine)
            for story in stories[len(shard) :]:
                send(story)
            return stories

        def look() -> dict[str, float | None]:
            """Stories to openings that are never trained on: their means, and a new checkpoint `best` if they are."""
            nonlocal best_step
            held_out = openings.held_out
            stories = write(LOOK_INDEX, config.look_stories, lambda i: held_out[(i - LOOK_INDEX) % len(held_out)])
            grades = distributed.rank0_value(lambda: scorer.collect(stop))
            budget.spend(sum(grade.reply_words for grade in grades), sum(story.words for story in stories))
            rewards = rewards_of(config, stories, grades)
            means = score_means(grades) | story_means(stories)
            given = [reward for reward in rewards if reward is not None]
            reward = sum(given) / len(given) if given else None
            log.looks(story_records(step, stories, grades, rewards))
            if distributed.rank0_value(lambda: is_best(read_records(run / LOOKS), step)):
                best_step = step
                save(checkpoint.BEST, replace=True)
            names = ("score_mean", "diversity_mean", "distinct_4", "plots", "ended", "length_mean")
            return {"held_out_reward": reward} | {f"held_out_{name}": means[name] for name in names}

        def not_looked_at() -> bool:
            return distributed.rank0_value(lambda: all(record["step"] != step for record in read_records(run / LOOKS)))

        warned = False
        with contextlib.suppress(Interrupted):
            if looks_at(config, step) and not_looked_at():
                look()
            while step < config.steps and not distributed.all_reduce_max(stop.requested):
                new_words = openings.new_words(written, n)
                ask = functools.partial(exhausted_budget, config, budget, scorer, new_words)
                exhausted = distributed.rank0_value(ask)
                if exhausted:
                    bar.write(f"{exhausted} does not hold another step")
                    break

                # 1. Write.
                began = time.perf_counter()
                stories = write(written, n, openings.__getitem__)
                wrote = time.perf_counter()

                # 2. Read the stories under the frozen reference while the teacher is still grading.
                batch = ppo.collate(stories, tokenizer, device)
                with autocast():
                    ref_logprobs, ref_states = ppo.read_reference(
                        reference, batch, config.temperature, config.micro_batch_size, states=value_head is None
                    )
                read = now(device)  # until here a GPU's time counts as reading, not as waiting for the teacher

                # 3. Wait for the grades.
                try:
                    grades = distributed.rank0_value(lambda: scorer.collect(stop))
                    require_scores(grades, config.max_unscored)
                except UserError:  # nothing has been learned in this step, so the state after the last one is saved
                    save(f"step_{step:07d}")
                    raise
                graded = time.perf_counter()

                # 4. Turn scores into rewards. A story without a score has no reward and gives no gradient.
                rewards = rewards_of(config, stories, grades)
                scored = [i for i, reward in enumerate(rewards) if reward is not None]
                batch, kept = batch.rows(torch.tensor(scored)), torch.tensor(scored, device=device)
                ref_logprobs, ref_states = ref_logprobs[kept], ref_states[kept]
                story_rewards = torch.tensor([rewards[i] for i in scored], device=device)

                # 5. PPO. Randomness is a function of (seed, step), so a resumed run repeats an unbroken one.
                torch.manual_seed(config.seed * 1_000_003 + step)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * ppo.decay(config, step)
                stats = ppo.step(
                    student, critic, optimizer, kl, batch, ref_logprobs, ref_states, story_rewards, config, autocast
                )
                updated = time.perf_counter()

                # 6. Look at the student from outside, and write everything down.
                words_before = budget.words_in
                words_read = new_words + sum(grade.reply_words for grade in grades)
                budget.spend(words_read, sum(story.words for story in stories))
                step, written = step + 1, written + n
                looked, failed = {}, None
                try:
                    looked = look() if looks_at(config, step) else {}
                except Interrupted:  # the step is logged all the same; a resumed run looks first
                    pass
                except UserError as error:
                    failed = error
                log.stories(story_records(step, stories, grades, rewards))
                log.metrics(
                    step=step, reward_mean=story_rewards.mean(), reward_std=story_rewards.std(),
                    **score_means(grades), **agreement(grades), **story_means(stories),
                    **looked, words_in=budget.words_in,
                    words_out=budget.words_out, unscored=n - len(scored),
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
                if failed:  # the teacher, at the look: what this step learned is saved
                    save(f"step_{step:07d}")
                    raise failed
                if step % config.save_every == 0:
                    save(f"step_{step:07d}")
                    if rank0:
                        write_report(run)
                    signs = distributed.rank0_value(lambda: signs_of_collapse(read_metrics(run), config.kl_target))
                    if signs and not warned:
                        bar.write(f"the stories collapse: {signs}")
                        warned = True
                    if signs and config.stop_on_collapse:
                        break
            if not distributed.all_reduce_max(stop.requested) and not_looked_at():  # an end before the last step
                look()
        bar.close()
        save(f"step_{step:07d}", replace=True)
        stopped = distributed.all_reduce_max(stop.requested)  # a signal to any process stops all of them
        if stopped and rank0:
            go_on = usage("python train_interact.py")
            print(f"stopped after step {step}, all saved; go on with: {go_on} --out {run} --resume")
        elif rank0:
            looks = list(read_records(run / LOOKS))
            sides = (("before", 0), ("after", best_step))
            shown = [{"when": when} | look for when, at in sides for look in looks if look["step"] == at]
            atomic_write(run / SAMPLES, "".join(json.dumps(record) + "\n" for record in shown))
            print_summary(run, shown, best_step)


def starting_checkpoint(init: str) -> Path:
    if not init and checkpoint.newest(PRETRAIN_RUN) is None:
        first = usage("python train_pretrain.py")
        raise UserError(f"no checkpoint under {PRETRAIN_RUN}: run {first} first, or give --init CHECKPOINT")
    return checkpoint.find(Path(init) if init else PRETRAIN_RUN)


def looks_at(config: InteractConfig, step: int) -> bool:
    """Whether the student is looked at after this many steps, if the run gets so far."""
    return step in (0, config.steps) or (config.look_every > 0 and step % config.look_every == 0)


def exhausted_budget(config: InteractConfig, budget: WordBudget, grader: Grader, new_words: int, looks: int = 1) -> str:
    """Which budget does not hold another step and so many looks; empty if all do. new_words: of openings not used
    before. (The cost is limited once more, before each request.)"""
    stories = config.stories_per_step + looks * config.look_stories
    if not budget.allows(new_words + stories * grader.most_words, stories * config.max_new_tokens):
        return f"the word budget ({budget.limit_in:,} in, {budget.limit_out:,} out)"
    affordable = grader.affords(config.stories_per_step + config.look_stories)
    return "" if affordable else f"--budget-cost {config.budget_cost:g}"


def rewards_of(config: InteractConfig, stories: list[Story], grades: list[Grade]) -> list[float | None]:
    """What each story earns, None without a score. All of a step's stories count when it is compared with others."""
    how: dict[str, Any] = dict(
        diversity=config.diversity, length_weight=config.length_weight, length_words=config.length_words,
        unfinished=config.unfinished,
    )  # fmt: skip
    return [
        None if grade.score is None else story_reward(grade.score, difference, story.words, story.ended == "eos", **how)
        for story, grade, difference in zip(stories, grades, differences([s.text for s in stories]), strict=True)
    ]


def story_means(stories: list[Story]) -> dict[str, float | None]:
    """Means per story: entropy (nats, summed over its tokens), words, tokens, difference from the others; the fraction
    that ended; and distinct_4 and the number of plots over all stories."""
    n, texts = len(stories), [story.text for story in stories]
    return {
        "entropy": sum(float(story.entropies.sum()) for story in stories) / n,
        "length_mean": sum(story.words for story in stories) / n,
        "tokens_mean": sum(len(story.tokens) for story in stories) / n,
        "ended": sum(story.ended == "eos" for story in stories) / n,
        "diversity_mean": sum(differences(texts)) / n,
        "distinct_4": distinct_ngrams(texts),
        "plots": len(plots(texts)),
    }


def story_records(step: int, stories: list[Story], grades: list[Grade], rewards: list[float | None]) -> list[dict]:
    """The lines of stories.jsonl and looks.jsonl."""
    return [
        dict(
            step=step, index=story.index, opening=story.opening, story=story.text, reply=grade.reply_or_error,
            scores=grade.scores, reward=reward, words=story.words, ended=story.ended,
        )
        for story, grade, reward in zip(stories, grades, rewards, strict=True)
    ]  # fmt: skip


SUMMARY: dict[str, Callable[[list[dict]], float]] = {  # of the stories of a look
    "reward": lambda rs: sum(given := [r["reward"] for r in rs if r["reward"] is not None]) / max(len(given), 1),
    "ended": lambda rs: sum(r["ended"] == "eos" for r in rs) / len(rs),
    "distinct_4": lambda rs: distinct_ngrams([r["story"] for r in rs]) or 0.0,
    "plots": lambda rs: len(plots([r["story"] for r in rs])),
}


def is_best(looks: Iterable[dict], step: int) -> bool:
    """Whether the look at `step` earned as much as any look, within a standard error of the difference.

    looks: records of looks.jsonl. A look's few stories tell no more than that, and the later student has learned from
    more of them; so a new look need not be the highest, but may not be clearly lower either."""
    earned: dict[int, dict[int, float]] = {}  # by step and index: one index is one opening
    for look in looks:
        if look["reward"] is not None:
            earned.setdefault(look["step"], {})[look["index"]] = look["reward"]
    if step not in earned:
        return False
    highest = max(earned.values(), key=lambda rewards: statistics.fmean(rewards.values()))
    less = [highest[index] - reward for index, reward in earned[step].items() if index in highest]
    error = statistics.stdev(less) / math.sqrt(len(less)) if len(less) > 1 else 0.0
    return bool(less) and statistics.fmean(less) <= error


def print_summary(run: Path, shown: list[dict], best_step: int) -> None:
    """The same held-out opening before and after, what a look measured, and the curve of the rewards."""
    rewards = [record.get("reward_mean") for record in read_metrics(run)]
    sides = {when: [record for record in shown if record["when"] == when] for when in ("before", "after")}
    if all(sides.values()):  # looks.jsonl can have lost one
        for when, records in sides.items():
            text = printable(f"{records[0]['opening']} {records[0]['story']}")
            print(f"\n{when}, scored {records[0]['scores']}:\n{text}")
        print(f"\n{len(sides['before'])} stories to held-out openings, before and after step {best_step}, the best:")
        for name, measure in SUMMARY.items():
            print(f"  {name:12} {measure(sides['before']):.3g} -> {measure(sides['after']):.3g}")
    print(f"mean reward per step {text_curve(rewards, 60)}")
    print(f"report: {write_report(run)}")
    print(f"next:   {usage('python scripts/sample.py')} {checkpoint.find(run)}")


if __name__ == "__main__":
    main()
