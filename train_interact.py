"""Learn by interaction: the student writes stories, a teacher scores them over HTTP, PPO learns from the scores.

    python train_interact.py                                         the built-in teacher (a rubric, not an LLM)
    python train_interact.py --teacher-url http://127.0.0.1:11434/v1 --teacher-model llama3.1:8b
    python train_interact.py --reward my_reward.py:score             any callable is a teacher

One step: write stories (each goes to the teacher the moment it ends), read them under the frozen starting checkpoint
while the teacher grades, turn scores into rewards, and update the policy by PPO. Every --eval-every steps the policy is
evaluated on held-out openings, and the best student is kept.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from tinystory.config import INTERACT_PRESETS, InteractConfig, leads_out, parse, published_options
from tinystory.data import babylm
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.calibration import calibrated
from tinystory.evaluate.held_out import Evaluator, due, has_dull_tellers, story_means, story_records, write_samples
from tinystory.evaluate.likelihood import Likelihood
from tinystory.evaluate.reader import Reader
from tinystory.evaluate.second_judge import conclusion, judge_run
from tinystory.ops.compute import resolve
from tinystory.report.before_after import summary
from tinystory.report.charts import text_curve
from tinystory.report.run import live_report
from tinystory.rl import learners, ppo
from tinystory.rl.batch import collate
from tinystory.rl.collapse import Watch, score_relations
from tinystory.rl.policy import RunState, load_policy, rollout, rollout_means
from tinystory.rl.replay import CorpusReplay
from tinystory.rl.reward import story_rewards
from tinystory.rubric.process import builtin_teacher
from tinystory.run import distributed
from tinystory.run.device import Stop, peak_memory_mb
from tinystory.run.errors import Interrupted, UserError, command
from tinystory.run.folder import Record, RunLog, locked, read_metrics, recorded_options
from tinystory.run.paths import hint
from tinystory.run.step_log import Progress, Stages
from tinystory.student import checkpoint, memory
from tinystory.student.generate import encode_opening, require_room
from tinystory.teacher.budget import Budget
from tinystory.teacher.callable import CallableGrader
from tinystory.teacher.grade import Grader, require_scores, score_means
from tinystory.teacher.grader import open_grader

PRETRAIN_RUN = Path("runs/pretrain")
# Words taken in during interaction at which a checkpoint is kept.
INTERACTION_CHECKPOINTS = {f"chck_{n}00K": n * 100_000 for n in range(1, 10)} | {"chck_1M": 1_000_000}


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, INTERACT_PRESETS, argv)
    learners.check(config)
    distributed.start(config.device)
    with distributed.on_rank0(locked(Path(config.out), new=not config.resume)), contextlib.ExitStack() as stack:
        interact(config, stack)


def interact(config: InteractConfig, stack: contextlib.ExitStack) -> None:
    """The whole run. stack: closes the teacher and the records when it ends."""
    n, rank0, run = config.stories_per_step, distributed.is_rank0(), Path(config.out)
    distributed.require_one_each("--stories-per-step", n)
    distributed.require_one_each("--eval-stories", config.stories_per_evaluation)
    compute = resolve(config.device, config.dtype, config.pytorch_ops)
    resume_from = checkpoint.to_resume(run) if config.resume else None

    # Two copies of the starting checkpoint: the policy, which learns, and the frozen reference of the KL penalty.
    origin = run / "checkpoints" / "start" if resume_from else starting_checkpoint(config.init)
    reference, tokenizer, history = checkpoint.load(origin, compute.device)
    reference.requires_grad_(False)
    policy = load_policy(config, origin, compute)
    memory.require_for_interaction(config, reference.config, compute.device)
    for warning in published_options(config) if rank0 else ():
        print(f"warning: {warning}")
    openings = Openings(load_openings(config.openings), config.seed, config.stories_per_opening)
    if openings.train == openings.held_out:
        print("there is one opening, so none is held out: evaluations use the one that is trained on")
    longest = max(len(encode_opening(tokenizer, text)) for text in openings.train + openings.held_out)
    require_room(reference, longest, config.max_new_tokens)
    replay = CorpusReplay(config, history, tokenizer, reference.config.context)
    milestones = INTERACTION_CHECKPOINTS
    if config.preset in babylm.TRACKS:
        reads = config.budget_words if config.replay_weight else 0
        babylm.check_interaction(config.preset, history, config.budget_words, reads)
        milestones = babylm.milestones_beyond(history)
    state = policy.restore(resume_from) if resume_from else RunState(config.kl_coef)

    # Only rank 0 asks its grader. It is opened before the run's folder is: a mistake leaves nothing behind.
    opened = open_grader(
        config, builtin_teacher, corpus=history.get("corpus"), replies=run / "replies.jsonl",
        likelihood=lambda: Likelihood(reference, tokenizer, openings.train, config),
    )  # fmt: skip
    idle = CallableGrader(lambda openings, stories: [], "rank 0")
    grader: Grader = distributed.rank0_first(lambda: stack.enter_context(opened) if rank0 else idle)
    evaluations = sum(due(config, step) for step in range(state.step + bool(state.step), config.steps + 1))
    to_grade = (config.steps - state.step) * n + evaluations * config.stories_per_evaluation
    if forecast := grader.forecast(to_grade, openings[0]):
        print(f"forecast: {forecast}")
    grader_facts = grader.facts | distributed.rank0_value(lambda: calibrated(config, grader))
    reader = Reader(config.reader, config.device) if rank0 and config.reader != "none" else None
    print(f"student {origin}, scored by {grader_facts['scored_by']}")
    budget = Budget(config, grader, openings, replay)
    budget.require_first_step(state)
    resume_step = state.step if config.resume else None
    log = stack.enter_context(distributed.rank0_first(lambda: RunLog(run, resume_step=resume_step, writes=rank0)))
    size = sum(parameter.numel() for parameter in reference.parameters())
    student_facts = {"parameters": size, "corpus": history.get("corpus"), "words": history.get("words")}
    init = {"init": config.init or str(origin), "student": student_facts}
    log.config(asdict(config) | grader_facts | compute.recorded | init)
    update_report = stack.enter_context(live_report(run, rank0))
    watch = Watch(read_metrics(run), config.kl_target)

    def save(name: str = "", replace: bool = False) -> None:
        policy.save(run / "checkpoints" / (name or f"step_{state.step:07d}"), state, replace=replace)

    if not resume_from:
        save("start")
    distributed.broadcast_from_rank0([*policy.student.parameters(), *policy.critic.parameters()])
    stop = stack.enter_context(Stop().listening())
    evaluator = Evaluator(config, policy, openings, grader.scorer, log, stop)
    bar = Progress(total=config.steps * n, initial=state.written, unit="story", disable=not rank0)
    stages = Stages(bar, compute.device)

    def send(index: int, opening: str, story: str) -> None:
        grader.send(index, opening, story)
        bar.update()

    with contextlib.suppress(Interrupted), bar:
        if due(config, state.step) and not evaluator.done(state.step):
            evaluator.evaluate(state)
        # A signal to any process stops all of them.
        while state.step < config.steps and not distributed.all_reduce_max(stop.requested):
            if exhausted := budget.exhausted(state):
                bar.write(f"{exhausted} does not hold another step")
                break
            stages.begin("rollout")
            prompts = [openings[state.written + i] for i in range(n)]
            dropout = config.rollout_dropout if state.step else 0.0
            stories = rollout(policy, prompts, state.written, send, dropout)
            stages.begin("reference")
            batch = collate(stories, compute.device)
            with compute.autocast():
                batch = ppo.reread(policy, batch) if dropout else batch
                batch = ppo.read_reference(reference, batch, config)
            stages.begin("teacher")
            try:
                grades = distributed.rank0_value(lambda: grader.collect(stop))
                require_scores(grades, config.max_unscored)
            except UserError:  # nothing has been learned in this step, so the state after the last one is saved
                save()
                raise
            stages.begin("update")
            scores = [config.invented_score if grade.score is None else grade.score for grade in grades]
            rewards = story_rewards(config, stories, scores)
            torch.manual_seed(config.seed * 1_000_003 + state.step)  # so that a resumed run repeats an unbroken one
            texts = replay.batches(state.step)
            stats = ppo.step(policy, batch, rewards, state.kl_coef, state.step, texts)
            stages.end()

            words_before = state.words_in
            words_in = openings.new_words(state.written, n, config.charge_opening and state.step == 0)
            words_in += sum(grade.reply_words for grade in grades) + int(stats["words_replayed"])
            state.advance(stories, words_in)
            state.kl_coef = ppo.next_kl_coef(state.kl_coef, stats["kl"], n - int(stats["unscored"]), config)
            stats["unscored"] = sum(grade.score is None for grade in grades)  # also those with an invented score
            evaluation, failure = evaluator.evaluate_if_due(state)
            records = story_records(state.step, stories, grades, rewards, has_dull_tellers(history))
            means = story_means(records)
            log.stories(records)
            record = log.metrics(
                step=state.step, **stats, **score_means(grades), **means,
                **rollout_means(stories), **score_relations([grade.score for grade in grades], stories), **evaluation,
                words_in=state.words_in, words_out=state.words_out,
                **stages.seconds, peak_memory_mb=peak_memory_mb(compute.device), **grader.stats(),
            )  # fmt: skip
            bar.end_step({"reward": stats["reward_mean"], "words": means["length_mean"], "kl": stats["kl"]})
            for name, words in milestones.items():
                if words_before < words <= state.words_in:
                    save(name)
            if failure or state.step % config.save_every == 0:
                save()
            if failure:
                raise failure
            update_report()
            warnings = distributed.rank0_value(partial(watch.add, record))
            for warning in warnings.values() if rank0 else ():
                bar.write(warning)
            if config.stop_on_collapse and warnings.keys() & {"collapse", "kl"}:
                break
        if not distributed.all_reduce_max(stop.requested) and not evaluator.done(state.step):  # an early end
            evaluator.evaluate(state)
    save(replace=True)
    stopped = distributed.all_reduce_max(stop.requested)
    if rank0:
        judge = None if reader is None else lambda: judge_run(run, config, compute, reader, grader.grade_each)
        report(run, state, stopped=bool(stopped), judge=judge)


def starting_checkpoint(init: str) -> Path:
    if not init and checkpoint.newest(PRETRAIN_RUN) is None:
        first = hint("train_pretrain.py")
        raise UserError(f"no checkpoint under {PRETRAIN_RUN}: run {first} first, or give --init CHECKPOINT")
    return checkpoint.find(Path(init) if init else PRETRAIN_RUN)


def report(run: Path, state: RunState, *, stopped: bool, judge: Callable[[], list[Record]] | None) -> None:
    """Print how to go on with a run that was asked to stop, or what another one learned."""
    if stopped:
        resume = hint("train_interact.py", "--out", run, "--resume", *leads_out(recorded_options(run)))
        print(f"stopped after step {state.step}, all saved; go on with: {resume}")
        return
    write_samples(run, state.best_step)
    print(summary(run))
    print(f"mean reward per step {text_curve([record.get('reward_mean') for record in read_metrics(run)], 60)}")
    if judge:
        print(conclusion(judge()))
    print(f"report: {run / 'report.html'}\nnext:   {hint('scripts/sample.py', checkpoint.find(run))}")


if __name__ == "__main__":
    main()
