"""Learn by interaction: the student writes stories, a teacher scores them over HTTP, and PPO learns
from the scores.

One step: write stories (each is sent to the teacher as soon as it ends), compute their
log-probabilities under the frozen starting checkpoint while the teacher grades, turn scores into
rewards, update the policy. Every --eval-every steps it is evaluated on held-out openings, and the
best student is kept."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from tinystory.config import INTERACT_PRESETS, InteractConfig, leads_out, parse, published_options
from tinystory.data import babylm
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.calibration import calibrated
from tinystory.evaluate.held_out import (
    Evaluator,
    due,
    has_dull_tellers,
    story_means,
    story_records,
    write_samples,
)
from tinystory.evaluate.reader import Reader
from tinystory.evaluate.scoring import Likelihood
from tinystory.evaluate.second_judge import conclusion, judge_run
from tinystory.ops.compute import resolve
from tinystory.report.before_after import summary
from tinystory.report.run import live_report
from tinystory.rl import learners, ppo
from tinystory.rl.batch import collate
from tinystory.rl.budget import Budget
from tinystory.rl.policy import Policy, RunState, load_policy, rollout, rollout_means
from tinystory.rl.replay import CorpusReplay, Texts
from tinystory.rl.reward import story_rewards
from tinystory.rl.score_model import sent_to_teacher, with_predictions
from tinystory.rubric.process import builtin_teacher
from tinystory.run import distributed
from tinystory.run.collapse import CollapseDetector
from tinystory.run.device import peak_memory_mb
from tinystory.run.errors import Interrupted, Stop, UserError, command
from tinystory.run.folder import Record, RunLog, locked, read_metrics, recorded_options
from tinystory.run.paths import hint
from tinystory.run.step_log import Progress, Stages
from tinystory.student import checkpoint, memory
from tinystory.student.generate import Story, encode_opening, require_room
from tinystory.teacher.callable import CallableGrader
from tinystory.teacher.grade import Grade, Grader, require_scores, score_means
from tinystory.teacher.grader import open_grader

PRETRAIN_RUNS = Path("runs/pretrain"), Path("runs/demo/pretrain")
NOT_SENT = Grade(None, None, error="not sent to the teacher (--graded)")
# Words taken in during interaction at which a checkpoint is kept.
INTERACTION_CHECKPOINTS = {f"chck_{n}00K": n * 100_000 for n in range(1, 10)} | {
    "chck_1M": 1_000_000
}


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, INTERACT_PRESETS, argv)
    learners.check(config)
    distributed.start(config.device)
    with (
        distributed.on_rank0(locked(Path(config.out), new=not config.resume)),
        InteractionRun(config) as run,
    ):
        interact(run)
        report(run)


class InteractionRun(contextlib.ExitStack):
    """A run opened for its next step: policy, grader and records. Leaving the block closes teacher
    and records."""

    def __init__(self, config: InteractConfig):
        super().__init__()
        folder, rank0 = Path(config.out), distributed.is_rank0()
        distributed.require_one_each("--stories-per-step", config.stories_per_step)
        distributed.require_one_each("--eval-stories", config.eval_stories)
        self.config, self.compute = config, resolve(config.device, config.dtype)
        resumed = (
            distributed.rank0_value(lambda: checkpoint.newest_whole(folder))
            if config.resume
            else None
        )
        origin = folder / "checkpoints" / "start" if resumed else starting_checkpoint(config.init)
        # The starting checkpoint, frozen, for the KL penalty.
        self.reference = checkpoint.load(origin, self.compute.device)[0].requires_grad_(False)
        self.policy = policy = load_policy(config, origin, self.compute)
        self.state = policy.restore(resumed) if resumed else RunState(config.kl_coef)
        memory.require_for_interaction(config, self.reference.config, self.compute.device)
        for warning in published_options(config) if rank0 else ():
            print(f"warning: {warning}")
        self.openings = open_openings(config, policy)
        self.replay = CorpusReplay(
            config, policy.history, policy.tokenizer, self.reference.config.context
        )
        milestones = words_of_milestones(config, policy.history)
        with contextlib.ExitStack() as stack:
            self.grader = self.open_grader(stack, folder)
            facts = self.grader.facts | distributed.rank0_value(
                lambda: calibrated(config, self.grader)
            )
            self.reader = (
                Reader(config.reader, config.device) if rank0 and config.reader != "none" else None
            )
            print(f"student {origin}, scored by {facts['scored_by']}")
            scorer = self.grader.scorer
            self.budget = Budget(
                config, self.openings, milestones, scorer.most_words, scorer.affords
            )
            texts = self.replay.batches(self.state.step)
            distributed.rank0_value(lambda: self.budget.require_first_step(self.state, texts))
            resume_step = self.state.step if config.resume else None
            self.log = distributed.rank0_first(
                lambda: RunLog(folder, resume_step=resume_step, writes=rank0)
            )
            stack.enter_context(self.log)
            student = {name: policy.history.get(name) for name in ("corpus", "words")}
            student["parameters"] = sum(
                parameter.numel() for parameter in self.reference.parameters()
            )
            start = {"init": config.init or str(origin), "student": student}
            self.log.config(asdict(config) | facts | self.compute.recorded | start)
            self.stop = stack.enter_context(Stop().listening())
            self.update_report = stack.enter_context(live_report(folder, rank0))
            distributed.broadcast_from_rank0(
                [*policy.student.parameters(), *policy.critic.parameters()]
            )
            self.evaluator = Evaluator(config, policy, self.openings, scorer, self.log, self.stop)
            self.detector = CollapseDetector(read_metrics(folder), config.kl_target)
            total = config.steps * config.stories_per_step
            self.bar = Progress(
                total=total, initial=self.state.written, unit="story", disable=not rank0
            )
            self.stages = Stages(self.bar, self.compute.device)
            if not resumed:
                save(self, "start")
            self.push(stack.pop_all())

    def open_grader(self, stack: contextlib.ExitStack, folder: Path) -> Grader:
        """Rank 0's grader (other ranks' are idle), opened before the run's folder: a mistake leaves
        nothing behind."""
        config, policy = self.config, self.policy
        opened = open_grader(
            config,
            builtin_teacher,
            corpus=policy.history.get("corpus"),
            replies=folder / "replies.jsonl",
            likelihood=lambda: Likelihood(
                self.reference, policy.tokenizer, self.openings.train, config
            ),
        )
        idle = CallableGrader(lambda openings, stories: [], "rank 0")
        grader: Grader = distributed.rank0_first(
            lambda: stack.enter_context(opened) if distributed.is_rank0() else idle
        )
        if forecast := grader.forecast(
            stories_to_grade(config, self.state, config.graded_per_step), self.openings[0]
        ):
            everything = f"; without --graded {stories_to_grade(config, self.state, config.stories_per_step):,} stories"
            print(f"forecast: {forecast}{everything if config.graded else ''}")
        return grader


def interact(run: InteractionRun) -> None:
    """Train until the last step, a signal, the end of the budget, or a collapse."""
    config, policy, state, stages = run.config, run.policy, run.state, run.stages
    with contextlib.suppress(Interrupted), run.bar:
        if due(config, state.step):
            evaluate_at_rest(run)
        while goes_on(run, texts := run.replay.batches(state.step)):
            stages.begin("rollout")
            prompts = [run.openings[state.written + i] for i in range(config.stories_per_step)]
            dropout = config.rollout_dropout if state.step else 0.0
            sent = sent_to_teacher(len(prompts), config.graded, config.seed, state.step)
            stories = rollout(
                policy, prompts, state.written, run.grader.send, run.bar, dropout, sent
            )
            stages.begin("reference")
            batch = collate(stories, run.compute.device)
            with run.compute.autocast():  # while the teacher grades
                batch = ppo.reread(policy, batch) if dropout else batch
                batch = ppo.read_reference(run.reference, batch, config)
            stages.begin("teacher")
            grades, prediction = collect(run, sent), dict[str, Any]()
            scores = [grade.score for grade in grades]
            if config.graded:
                scores, prediction = with_predictions(
                    policy.score_model, batch, stories, scores, sent
                )
            stages.begin("update")
            if config.unreadable_score != "none":
                scores = [
                    float(config.unreadable_score) if score is None else score for score in scores
                ]
            rewards = story_rewards(config, stories, scores)
            # so that a resumed run repeats an unbroken one
            torch.manual_seed(config.seed * 1_000_003 + state.step)
            stats = ppo.step(policy, batch, rewards, state.kl_coef, state.step, texts)
            policy.require_finite(state.step + 1)
            texts = ()  # so that the next step's are not held beside them
            stages.begin("")
            milestones = count(run, stories, grades, stats)
            evaluation, failure = run.evaluator.evaluate_if_due(state)
            record = log(run, stories, grades, scores, rewards, stats | prediction | evaluation)
            for name in milestones:
                save(run, name)
            if failure or state.step % config.save_every == 0:
                save(run)
            if failure:
                raise failure
            if warn(run, record):
                break
        if not stopped(run):
            evaluate_at_rest(run)
    save(run, replace=True)


# ---- the stages of a step ------------------------------------------------------------------------


def goes_on(run: InteractionRun, texts: Texts) -> bool:
    """Whether there is another step, which would replay `texts`. A signal to any process stops all
    of them."""
    if run.state.step >= run.config.steps or stopped(run):
        return False
    if exhausted := distributed.rank0_value(lambda: run.budget.exhausted(run.state, texts)):
        run.bar.write(f"{exhausted} does not hold another step")
    return not exhausted


def stopped(run: InteractionRun) -> bool:
    return bool(distributed.all_reduce_max(run.stop.requested))


def collect(run: InteractionRun, sent: Sequence[int]) -> list[Grade]:
    """The step's grades, NOT_SENT outside `sent`. If the teacher fails, the state after the last
    step is saved."""
    try:
        grades = distributed.rank0_value(lambda: run.grader.collect(run.stop))
        require_scores(grades, run.config.max_unscored)
    except UserError:
        save(run)
        raise
    by_row = dict(zip(sent, grades, strict=True))
    return [by_row.get(row, NOT_SENT) for row in range(run.config.stories_per_step)]


def count(
    run: InteractionRun, stories: Sequence[Story], grades: list[Grade], stats: dict[str, Any]
) -> list[str]:
    """Count the step, adapt the KL coefficient, and return the milestones (words taken in) that
    were passed."""
    state, before = run.state, run.state.words_in
    replies, scored = (
        sum(grade.reply_words for grade in grades),
        len(stories) - int(stats["unscored"]),
    )
    state.spend(stories, run.budget.opening_words(state) + replies + int(stats["words_replayed"]))
    state.step, state.written = state.step + 1, state.written + len(stories)
    state.kl_coef = ppo.next_kl_coef(state.kl_coef, stats["kl"], scored, run.config)
    return run.budget.passed(before, state.words_in)


def log(
    run: InteractionRun,
    stories: Sequence[Story],
    grades: list[Grade],
    scores: Sequence[float | None],
    rewards: list[float | None],
    stats: dict[str, Any],
) -> Record:
    """Record the step's stories and metrics, and return the metrics. scores: the teacher's and the
    predicted."""
    state, graded = run.state, [grade.score for grade in grades]
    predicted = [
        score if grade == NOT_SENT else None for grade, score in zip(grades, scores, strict=True)
    ]
    mixed = has_dull_tellers(run.policy.history)
    records = story_records(
        state.step, stories, grades, rewards, mixed, predicted if run.config.graded else ()
    )
    means, unscored = story_means(records), graded.count(None) - grades.count(NOT_SENT)
    run.log.stories(records)
    run.bar.end_step(
        {"reward": stats["reward_mean"], "words": means["length_mean"], "kl": stats["kl"]}
    )
    return run.log.metrics(
        step=state.step,
        **stats | {"unscored": unscored},
        **score_means(grades),
        **means,
        **rollout_means(stories, graded),
        words_in=state.words_in,
        words_out=state.words_out,
        **run.stages.seconds,
        peak_memory_mb=peak_memory_mb(run.compute.device),
        **run.grader.stats(),
    )


def save(run: InteractionRun, name: str = "", *, replace: bool = False) -> None:
    folder = run.log.folder / "checkpoints" / (name or f"step_{run.state.step:07d}")
    run.policy.save(folder, run.state, replace=replace)


def warn(run: InteractionRun, record: Record) -> bool:
    """Show new warnings in the terminal and the report. Returns whether they end the run."""
    run.update_report()
    warnings = distributed.rank0_value(lambda: run.detector.add(record))
    for warning in warnings.values() if distributed.is_rank0() else ():
        run.bar.write(warning)
    return run.config.stop_on_collapse and bool(warnings.keys() & {"collapse", "kl"})


def evaluate_at_rest(run: InteractionRun) -> None:
    """Evaluate at the start or end, unless it is on record. The state is saved first: the teacher
    can fail."""
    if not run.evaluator.done(run.state.step):
        if run.state.step:
            save(run)
        run.log.track({"step": run.state.step} | run.evaluator.evaluate(run.state))


# ---- before and after the loop -------------------------------------------------------------------


def starting_checkpoint(init: str) -> Path:
    """The checkpoint that --init names; by default the newest under runs/pretrain, or else that of
    `make demo`."""
    run = Path(init) if init else next(filter(checkpoint.newest, PRETRAIN_RUNS), None)
    if run is None:
        first = hint("train_pretrain.py")
        raise UserError(
            f"no checkpoint under {PRETRAIN_RUNS[0]}: run {first} first, or give --init CHECKPOINT"
        )
    return checkpoint.find(run)


def open_openings(config: InteractConfig, policy: Policy) -> Openings:
    """Raises UserError if an opening does not fit the student's context with its story."""
    openings = Openings(load_openings(config.openings), config.seed, config.stories_per_opening)
    if openings.train == openings.held_out:
        print(
            "there is one opening, so none is held out: evaluations use the one that is trained on"
        )
    longest = max(
        len(encode_opening(policy.tokenizer, text)) for text in openings.train + openings.held_out
    )
    require_room(policy.student, longest, config.max_new_tokens)
    return openings


def words_of_milestones(config: InteractConfig, history: dict[str, Any]) -> dict[str, int]:
    """Words taken in at which checkpoints are kept, by name. Raises UserError for what BabyLM does
    not allow."""
    if config.preset not in babylm.TRACKS:
        return INTERACTION_CHECKPOINTS
    replayed = config.budget_words if config.replay_weight else 0
    babylm.check_interaction(config.preset, history, config.budget_words, replayed)
    return babylm.milestones_beyond(history)


def stories_to_grade(config: InteractConfig, state: RunState, per_step: int) -> int:
    """Number of stories left to grade: `per_step` in each step, and `eval_stories` in each
    evaluation."""
    evaluations = sum(
        due(config, step) for step in range(state.step + bool(state.step), config.steps + 1)
    )
    return (config.steps - state.step) * per_step + evaluations * config.eval_stories


def report(run: InteractionRun) -> None:
    """Print how to resume a run that was asked to stop, or what a finished one learned."""
    config, state, folder, reader = run.config, run.state, run.log.folder, run.reader
    asked_to_stop = stopped(run)
    if not distributed.is_rank0():
        return
    if asked_to_stop:
        resume = hint(
            "train_interact.py", "--out", folder, "--resume", *leads_out(recorded_options(folder))
        )
        print(f"stopped after step {state.step}, all saved; go on with: {resume}")
        return
    write_samples(folder, state.best_step)
    print(summary(folder))
    if reader is not None:
        print(conclusion(judge_run(folder, config, run.compute, reader, run.grader.grade_each)))
    print(
        f"report: {folder / 'report.html'}\nnext:   {hint('scripts/sample.py', checkpoint.find(folder))}"
    )


if __name__ == "__main__":
    main()
