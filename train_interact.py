"""Learn by interacting: the student writes stories, a teacher scores them over HTTP, PPO learns from the scores.

    python train_interact.py                                         the built-in teacher (a rubric, not an LLM)
    python train_interact.py --teacher-url http://127.0.0.1:11434/v1 --teacher-model llama3.1:8b
    python train_interact.py --reward my_reward.py:score             any callable is a teacher

A step: write (each story goes to the teacher the moment it ends), read the stories again under the frozen starting
checkpoint while the teacher grades, turn scores into rewards and advantages, update, and write it all down.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from tinystory import babylm, distributed, ppo
from tinystory.babylm import Budget
from tinystory.config import INTERACT_PRESETS, InteractConfig, as_dict, parse
from tinystory.device import Interrupted, Stop, peak_memory_mb, pick_device, pick_dtype
from tinystory.errors import UserError, command
from tinystory.evaluate.stories import distinct_ngrams
from tinystory.report.plots import text_curve
from tinystory.report.run import write_report
from tinystory.reward import load_score, story_reward
from tinystory.rubric.process import builtin_teacher
from tinystory.runlog import SAMPLES, RunLog, atomic_write, read_metrics, read_stories
from tinystory.student import checkpoint
from tinystory.student.generate import Story, encode_opening, generate, require_room
from tinystory.student.model import ValueHead
from tinystory.teacher.client import Teacher
from tinystory.teacher.grader import CallableGrader, Grade, TeacherGrader
from tinystory.teacher.prompt import CRITERIA, Template, load_template
from tinystory.teacher.replay import Replay

PRETRAIN_RUN = Path("runs/pretrain")
MILESTONES = {f"chck_{n}00K": n * 100_000 for n in range(1, 10)} | {"chck_1M": 1_000_000}  # words taken in here
SHOWN = 8  # stories written again at the end, from the draws of the first ones, for the report


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, INTERACT_PRESETS, argv)
    distributed.start(config.device)
    first = distributed.is_first()
    if config.stories_per_step < distributed.world():
        raise UserError(f"{distributed.world()} processes need --stories-per-step {distributed.world()} at least")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    run = Path(config.out)
    resume_from = checkpoint.newest(run) if config.resume else None
    if config.resume and resume_from is None:
        raise UserError(f"--resume: {run} has no checkpoint yet; start without --resume")

    # The student as it starts, twice: one learns, the frozen one is where the KL penalty measures from.
    origin = run / "checkpoints" / "start" if resume_from else starting_checkpoint(config.init)
    reference, _, _ = checkpoint.load(origin, device)
    reference.requires_grad_(False)
    student, tokenizer, facts = checkpoint.load(origin, device)
    require_room(student, encode_opening(tokenizer, config.opening), config.max_new_tokens)
    milestones = MILESTONES
    if config.preset == babylm.TRACK:
        babylm.check_interaction(facts, config.budget_words, config.budget_words_out)
        milestones = babylm.milestones_beyond(facts)
    value_head = ValueHead(student.config.n_embd).to(device)
    parameters = dict(student.named_parameters()) | {f"value_head.{n}": p for n, p in value_head.named_parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.learning_rate, eps=config.adam_eps, fused=True)
    kl = ppo.AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    budget = Budget(config.budget_words, config.budget_words_out, words_in=len(config.opening.split()))
    step = written = 0
    if resume_from:
        checkpoint.restore(student, resume_from)
        state, counters = checkpoint.load_trainer(resume_from)
        value_head.load_state_dict({name: state[f"value_head.{name}"] for name in value_head.state_dict()})
        checkpoint.unpack_optimizer(optimizer, list(parameters), state)
        step, written, kl.coef = counters["step"], counters["written"], counters["kl_coef"]
        budget.words_in, budget.words_out = counters["words_in"], counters["words_out"]

    def save(name: str) -> Path:
        state = checkpoint.pack_optimizer(optimizer, list(parameters))
        state |= {f"value_head.{name}": tensor for name, tensor in value_head.state_dict().items()}
        counters = dict(
            step=step, written=written, kl_coef=kl.coef, words_in=budget.words_in, words_out=budget.words_out
        )
        spent = {"interaction_words_in": budget.words_in, "interaction_words_out": budget.words_out} if step else {}
        grown = facts | {name: facts.get(name, 0) + words for name, words in spent.items()}
        folder = run / "checkpoints" / name
        if not first:
            return folder
        return checkpoint.save(folder, student, tokenizer, facts=grown, state=state, counters=counters)

    def send(story: Story) -> None:
        if grader:  # the first process has it
            grader.send(story.index, story.text)

    def write(count: int, first_index: int) -> list[Story]:
        with autocast():
            return generate(
                student, value_head, tokenizer, config.opening, count=count, first_index=first_index, seed=config.seed,
                max_new_tokens=config.max_new_tokens, temperature=config.temperature, on_story=send,
            )  # fmt: skip

    with contextlib.ExitStack() as stack:
        stories_left = (config.steps - step) * config.stories_per_step
        grader, resolved = distributed.together(
            lambda: open_grader(config, run, facts.get("corpus"), stories_left, stack) if first else (None, {})
        )
        print(f"student {origin}, scored by {resolved.get('scored_by')}")
        resume_step = step if resume_from else None
        log = stack.enter_context(distributed.together(lambda: RunLog(run, resume_step=resume_step, writes=first)))
        resolved |= dict(device=str(device), dtype=str(dtype).removeprefix("torch."))
        log.config(as_dict(config) | resolved | {"init": config.init or str(origin)})
        if not resume_from:
            save("start")
        distributed.copy_from_first(parameters.values())
        stop = stack.enter_context(Stop().listening())
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=step, unit="step", desc="interacting", disable=not first)
        )
        with contextlib.suppress(Interrupted):
            while step < config.steps and not distributed.largest(stop.requested):
                n = config.stories_per_step
                spent = distributed.from_first(lambda: spent_budget(config, budget, grader))
                if spent:
                    bar.write(f"{spent} does not hold another step")
                    break

                # 1. Write; grading begins with the first story that ends. Each process writes its share.
                began = time.perf_counter()
                mine = distributed.block(n)
                stories = distributed.gather(write(len(mine), written + mine.start))
                for story in stories[len(mine) :]:
                    send(story)
                rollout_s = time.perf_counter() - began

                # 2. Read the stories under the frozen reference while the teacher is still grading.
                batch = ppo.collate(stories, tokenizer, config.opening, device)
                with autocast():
                    ref_logprobs = ppo.reference_logprobs(reference, batch, config.temperature, config.micro_batch_size)
                reference_s = time.perf_counter() - began - rollout_s
                try:
                    grades = distributed.from_first(lambda: grader.collect(stop))
                    require_scores(grades, config.max_unscored)
                except UserError:  # nothing has been learned from this step: what was before it is whole
                    checkpoint.drop_older(save(f"step_{step:07d}"))
                    raise
                teacher_s = time.perf_counter() - began - rollout_s - reference_s

                # 3. Scores become rewards. A story without a score has none, and no gradient.
                rewards = [reward(config, story, grade) for story, grade in zip(stories, grades, strict=True)]
                scored = [i for i, r in enumerate(rewards) if r is not None]
                keep = torch.tensor(scored, device=device)
                batch, ref_logprobs = batch.rows(keep), ref_logprobs[keep]
                scores = torch.tensor([rewards[i] for i in scored], device=device)

                # 4. PPO. Randomness is a function of (seed, step): a resumed run draws what an unbroken one would have.
                torch.manual_seed(config.seed * 1_000_003 + step)
                with autocast():
                    stats = ppo.step(student, value_head, optimizer, kl, batch, ref_logprobs, scores, config)
                update_s = time.perf_counter() - began - rollout_s - reference_s - teacher_s

                # 5. Write it down.
                before = budget.words_in
                budget.spend(sum(g.words for g in grades), sum(s.words for s in stories))
                step, written = step + 1, written + n
                log.stories(
                    [record(config.opening, step, s, g, r) for s, g, r in zip(stories, grades, rewards, strict=True)]
                )
                log.metrics(
                    step=step, reward_mean=scores.mean(), reward_std=scores.std(), **score_means(grades),
                    entropy=sum(float(s.entropies.sum()) for s in stories) / n,
                    length_mean=sum(s.words for s in stories) / n, tokens_mean=sum(len(s.tokens) for s in stories) / n,
                    distinct_4=distinct_ngrams([s.text for s in stories]),
                    words_in=budget.words_in, words_out=budget.words_out, unscored=n - len(scored),
                    rollout_s=rollout_s, reference_s=reference_s, teacher_s=teacher_s, update_s=update_s, **stats,
                    peak_memory_mb=peak_memory_mb(device),
                    **(grader.stats() if first else {}),
                )  # fmt: skip
                bar.update()
                words = sum(s.words for s in stories) / n
                bar.set_postfix(reward=f"{scores.mean():.3f}", words=f"{words:.0f}", kl=f"{stats['kl']:.1f}")
                for name, milestone in milestones.items():
                    if before < milestone <= budget.words_in:
                        save(name)
                if step % config.save_every == 0:
                    checkpoint.drop_older(save(f"step_{step:07d}"))
                    if first:
                        write_report(run)
        bar.close()
        checkpoint.drop_older(save(f"step_{step:07d}"))
        if stop.requested:
            print(f"stopped after step {step}, all saved; go on with: python train_interact.py --out {run} --resume")
            return

        if not first:
            return

        # The first stories again: the same opening and the same draws, by the student as it is now.
        after = write(SHOWN, 0)
        grades = grader.collect(stop)
        shown = [{"when": "before", **r} for r in itertools.islice(read_stories(run), SHOWN)]
        shown += [
            {"when": "after", **record(config.opening, step, story, grade, reward(config, story, grade))}
            for story, grade in zip(after, grades, strict=True)
        ]
        atomic_write(run / SAMPLES, "".join(json.dumps(r) + "\n" for r in shown))
    summary(run, config.opening, shown)


def open_grader(
    config: InteractConfig, run: Path, corpus: list[str] | None, stories_left: int, stack: contextlib.ExitStack
) -> tuple[CallableGrader | TeacherGrader, dict]:
    """Whoever scores, entered into the stack, and what config.json is to say of it."""
    if config.reward:
        return CallableGrader(load_score(config.reward), config.opening), {"scored_by": config.reward}
    template = load_template(config.teacher_prompt) if config.teacher_prompt else Template()
    if config.replay:
        teacher = Replay(
            Path(config.replay),
            template=template,
            max_tokens=config.teacher_max_tokens,
            logprobs=config.teacher_logprobs,
        )
    else:
        url = config.teacher_url
        if not url:
            if not (config.teacher_corpus or corpus):
                raise UserError(f"{config.init} does not say what it has read: give --teacher-corpus NAME|FILE")
            url = stack.enter_context(builtin_teacher(config.teacher_corpus or corpus))
            print(f"no --teacher-url: the built-in teacher, a rubric that stands in for an LLM, is at {url}")
        teacher = Teacher(
            url,
            config.teacher_model or None,
            concurrency=config.teacher_concurrency,
            seed=config.seed,
            temperature=config.teacher_temperature,
            max_tokens=config.teacher_max_tokens,
            deadline_s=config.teacher_timeout,
            cache=run / "replies.jsonl",  # what was paid for is not asked again after a kill
            template=template,
            logprobs=config.teacher_logprobs,
            price_in=config.price_in,
            price_out=config.price_out,
            budget_cost=config.budget_cost or None,
        )
    stack.enter_context(teacher)
    probed = teacher.probe()
    print(f"teacher: {probed}")
    if not probed.scored:
        print(f"warning: {probed.model} was shown a story and gave no scores but {probed.reply[:80]!r}")
    if not config.replay:
        print("forecast: " + forecast_line(teacher.forecast(stories_left, config.opening)))
    scored_by = f"{probed.model} at {probed.url}"
    return TeacherGrader(teacher, config.opening), {"scored_by": scored_by, "teacher": dataclasses.asdict(probed)}


def spent_budget(config: InteractConfig, budget: Budget, grader: CallableGrader | TeacherGrader) -> str:
    """What does not hold another step; empty if all do."""
    n = config.stories_per_step
    if not budget.allows(n * grader.most_words, n * config.max_new_tokens):
        return f"the word budget ({budget.limit_in:,} in, {budget.limit_out:,} out)"
    return "" if grader.affords(n) else f"--budget-cost {config.budget_cost:g}"


def forecast_line(foreseen: dict[str, float]) -> str:
    cost = f", cost {foreseen['cost']:.2f}" if foreseen["cost"] else ""
    return (
        f"{foreseen['stories']:,} stories, {foreseen['tokens_in']:,} tokens to read and {foreseen['tokens_out']:,} to "
        f"write, {foreseen['words']:,} words for the student{cost}, about {foreseen['hours']:.1f} hours of grading"
    )


def starting_checkpoint(init: str) -> Path:
    if not init and checkpoint.newest(PRETRAIN_RUN) is None:
        raise UserError(f"no checkpoint under {PRETRAIN_RUN}: run train_pretrain.py first, or give --init CHECKPOINT")
    return checkpoint.find(Path(init) if init else PRETRAIN_RUN)


def require_scores(grades: list[Grade], max_unscored: float) -> None:
    """A step with too few scores is an error, never a guess."""
    silent = [grade.reply for grade in grades if grade.score is None]
    if len(silent) > max_unscored * len(grades):
        replies = "; ".join(repr(reply[:80]) for reply in silent[:4])
        raise UserError(
            f"{len(silent)} of {len(grades)} stories got no score, more than --max-unscored {max_unscored:g} allows; "
            f"all before is saved, so mend the teacher and go on with --resume (it said {replies})"
        )


def reward(config: InteractConfig, story: Story, grade: Grade) -> float | None:
    if grade.score is None:
        return None
    return story_reward(grade.score, story.words, config.length_weight, config.length_words)


def score_means(grades: list[Grade]) -> dict[str, float | None]:
    """score_mean: the teacher's sum, 0..9, as the paper plots it (or a callable's 0..1); and each criterion's. The
    paper's three are always there, None where something else is graded."""
    scored = [g for g in grades if g.score is not None]
    sums = [sum(g.scores.values()) if g.scores else g.score for g in scored]
    names = dict.fromkeys([*CRITERIA, *(name for g in scored if g.scores for name in g.scores)])
    means = {f"{name}_mean": [g.scores[name] for g in scored if g.scores and name in g.scores] for name in names}
    means["score_mean"] = sums
    return {name: sum(values) / len(values) if values else None for name, values in means.items()}


def record(opening: str, step: int, story: Story, grade: Grade, reward: float | None) -> dict:
    """One line of stories.jsonl."""
    return dict(
        step=step, index=story.index, opening=opening, story=story.text, reply=grade.reply, scores=grade.scores,
        reward=reward, words=story.words, ended=story.ended,
    )  # fmt: skip


def summary(run: Path, opening: str, shown: list[dict]) -> None:
    """What a newcomer wants to see: the same story before and after, and the rewards' curve."""
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
