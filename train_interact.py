"""Learn by interaction: the student writes stories, a teacher scores them over HTTP, and PPO learns
from the scores.

One step: write stories (each is sent to the teacher as soon as it ends), compute their
log-probabilities under the frozen starting checkpoint while the teacher grades, turn scores into
rewards, update the policy. Every --eval-every steps it is evaluated on held-out openings, and the
best student is kept."""

import tinystory  # isort: skip  # noqa: F401  (first: it sets up OpenMP's threads and Ctrl-C)
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinystory.config import INTERACT_PRESETS, InteractConfig, given_again, parse
from tinystory.data.openings import Openings
from tinystory.evaluate.forecast import print_forecast
from tinystory.evaluate.graders import open_graders
from tinystory.evaluate.held_out import (
    FIRST_INDEX,
    is_best,
    is_evaluated,
    reward_mean,
    story_means,
    story_records,
    write_samples,
)
from tinystory.evaluate.intervals import mean_of
from tinystory.evaluate.temperature import choose_temperature, trial_stories
from tinystory.ops.compute import Compute, resolve
from tinystory.report.before_after import summary
from tinystory.report.run import live_report
from tinystory.rl import learners, ppo
from tinystory.rl.batch import Batch, Reference, collate
from tinystory.rl.budget import Budget
from tinystory.rl.policy import Policy, RunState, rollout, rollout_means
from tinystory.rl.reward import story_rewards
from tinystory.rl.score_model import (
    FEWEST_SCORES,
    grades_of_step,
    story_features,
    with_predictions,
)
from tinystory.rl.start import (
    begin_at,
    load_students,
    open_openings,
    print_rest_of_pretraining,
    starting_checkpoint,
    words_of_milestones,
)
from tinystory.run import distributed
from tinystory.run.collapse import CollapseDetector
from tinystory.run.device import peak_memory_mb
from tinystory.run.errors import Interrupted, Stop, UserError, command
from tinystory.run.log import RunLog
from tinystory.run.paths import hint
from tinystory.run.records import EVALUATIONS, STORIES, Record, read_metrics, read_records
from tinystory.run.step_log import Progress, Stages
from tinystory.run.text import printable
from tinystory.student import checkpoint
from tinystory.student.generate import Story
from tinystory.student.model import Student
from tinystory.teacher.grade import NOT_ASKED, Grade, Grader, require_scores, score_means


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, INTERACT_PRESETS, argv)
    learners.check(config)
    distributed.start(config.device)
    with distributed.run_folder(config), open_run(config) as run:
        interact(run)
        report(run)


@dataclass
class InteractionRun:
    """What a run holds while it is open. reference: the starting checkpoint, frozen, for the KL
    penalty. grader: idle on all ranks but 0. judge: the second judge, None without --judge and on
    all ranks but 0. update_report: rewrites report.html if it is due."""

    config: InteractConfig
    compute: Compute
    reference: Student
    policy: Policy
    state: RunState
    openings: Openings
    grader: Grader
    judge: Grader | None
    budget: Budget
    log: RunLog
    stop: Stop
    update_report: Callable[[], None]
    detector: CollapseDetector
    bar: Progress
    stages: Stages


def interact(run: InteractionRun) -> None:
    """Train until the last step, a signal, the end of the budget, or a collapse.

    A step's records are written when its update is done, and its state is saved every --save-every
    steps and before each evaluation, since a teacher can fail. A resumed run repeats an evaluation
    that its state does not count."""
    config, policy, state, stages = run.config, run.policy, run.state, run.stages
    with contextlib.suppress(Interrupted), run.bar:
        if is_evaluated(config, state.step):
            evaluate(run)
        while state.step < config.steps and not stopped(run) and not budget_exhausted(run):
            stages.begin("rollout")
            stories = write_stories(run)

            stages.begin("reference")  # while the teacher grades
            batch = collate(stories, run.compute.device)
            with run.compute.autocast():
                reference = ppo.read_reference(run.reference, batch, config)

            stages.begin("teacher")
            grades, scores, prediction = grade_stories(run, stories, batch, reference)

            stages.begin("update")
            rewards = story_rewards(config, stories, scores)
            torch.manual_seed(config.seed * 1_000_003 + state.step)  # as in a run never stopped
            statistics = ppo.step(policy, batch, reference, rewards, state.kl_coef, state.step)
            policy.require_finite(state.step + 1)

            stages.begin("")
            words_before = state.words_in
            count_step(run, stories, grades, statistics)
            record = log_step(run, stories, grades, scores, rewards, statistics | prediction)
            save_milestones(run, words_before)
            if state.step % config.save_every == 0:
                save(run)
            if is_evaluated(config, state.step):
                record |= evaluate(run)
            if warn(run, record):
                break
        if not stopped(run):
            evaluate(run)
    save(run, replace=True)


# ---- the stages of a step ------------------------------------------------------------------------


def stopped(run: InteractionRun) -> bool:
    """Whether a signal reached any process, which stops all of them."""
    return bool(distributed.all_reduce_max(run.stop.requested))


def budget_exhausted(run: InteractionRun) -> bool:
    limit = distributed.rank0_value(lambda: run.budget.exhausted(run.state))
    if limit:
        run.bar.write(f"{limit} does not hold another step")
    return bool(limit)


def write_stories(run: InteractionRun) -> list[Story]:
    """The step's stories. Each goes to the teacher as soon as it ends, unless --grades are to be
    chosen among them."""
    first_index = run.state.written
    openings = [run.openings[first_index + row] for row in range(run.config.stories_per_step)]

    def on_story(story: Story) -> None:
        if not run.config.grades:
            send(run, story)
        run.bar.update()

    return rollout(run.policy, openings, first_index, on_story)


def send(run: InteractionRun, story: Story) -> None:
    run.grader.send(story.index, story.opening, story.text, story.tokens.tolist())


def grade_stories(
    run: InteractionRun, stories: Sequence[Story], batch: Batch, reference: Reference
) -> tuple[list[Grade], list[float | None], dict[str, Any]]:
    """A grade per story, NOT_ASKED for those that --grades leaves out; their scores, predicted for
    these; and the metrics of the prediction."""
    if not run.config.grades:
        grades = collect_grades(run, range(len(stories)))
        return grades, [grade.score for grade in grades], {}
    model = run.policy.score_model
    features = story_features(batch, reference, stories)
    count = grades_of_step(run.config, run.state.step, run.state.asked)
    chosen = distributed.rank0_value(lambda: model.choose(features, count))
    if distributed.is_rank0():
        for row in chosen:
            send(run, stories[row])
    grades = collect_grades(run, chosen)
    teacher_scores = [grade.score for grade in grades]
    scores, prediction = with_predictions(model, features, stories, teacher_scores, chosen)
    require_a_score(run, scores)
    return grades, scores, prediction


def collect_grades(run: InteractionRun, sent: Sequence[int]) -> list[Grade]:
    """The step's grades, NOT_ASKED outside the rows `sent`. If the teacher fails, the state after
    the last step is saved."""
    try:
        received = distributed.rank0_value(lambda: run.grader.collect(run.stop))
        tolerated = run.config.max_unscored
        if run.config.grades:  # of a few grades, one that is refused stops no run
            tolerated = max(tolerated, 1 / max(len(received), 1))
        require_scores(received, tolerated)
    except UserError:
        save(run)
        raise
    grades = [NOT_ASKED] * run.config.stories_per_step
    for row, grade in zip(sent, received, strict=True):
        grades[row] = grade
    return grades


def require_a_score(run: InteractionRun, scores: Sequence[float | None]) -> None:
    """Raises UserError for a step without any score, the teacher's or a predicted one: there would
    be nothing to learn from. The state after the last step is saved."""
    if any(score is not None for score in scores):
        return
    save(run)
    raise UserError(
        f"no story of step {run.state.step + 1} has a score: all --grades were given ("
        f"{run.state.asked} so far), and fewer than {FEWEST_SCORES} scores are kept to predict from; "
        "all earlier steps are saved, so go on with --resume and more --grades than that"
    )


def count_step(
    run: InteractionRun,
    stories: Sequence[Story],
    grades: Sequence[Grade],
    statistics: dict[str, Any],
) -> None:
    """Count the step and its words, and adapt the KL coefficient."""
    state = run.state
    opening_words = run.budget.opening_words(state)
    reply_words = sum(grade.reply_words for grade in grades)
    state.spend(stories, opening_words + reply_words)
    state.step += 1
    state.written += len(stories)
    state.asked += len(grades) - grades.count(NOT_ASKED)
    with_reward = len(stories) - int(statistics["unscored"])
    state.kl_coef = ppo.next_kl_coef(state.kl_coef, statistics["kl"], with_reward, run.config)


def log_step(
    run: InteractionRun,
    stories: Sequence[Story],
    grades: list[Grade],
    scores: Sequence[float | None],
    rewards: list[float | None],
    statistics: dict[str, Any],
) -> Record:
    """Record the step's stories and metrics, and return the metrics. scores: the teacher's and the
    predicted."""
    state = run.state
    records = story_records(state.step, stories, grades, rewards, run.policy.history)
    if run.config.grades:
        for record, grade, score in zip(records, grades, scores, strict=True):
            record["predicted"] = score if grade == NOT_ASKED else None
    run.log.append(STORIES, records)

    means = story_means(records)
    graded_scores = [grade.score for grade in grades]
    unscored = graded_scores.count(None) - grades.count(NOT_ASKED)
    metrics = statistics | {"unscored": unscored}
    metrics |= score_means(grades)
    metrics |= means
    metrics |= rollout_means(stories, graded_scores)
    metrics |= {"words_in": state.words_in, "words_out": state.words_out}
    metrics |= run.stages.seconds
    metrics["peak_memory_mb"] = peak_memory_mb(run.compute.device)
    metrics |= run.grader.stats()
    run.bar.end_step(
        {
            "reward": statistics["reward_mean"],
            "words": means["length_mean"],
            "kl": statistics["kl"],
        }
    )
    return run.log.metrics(step=state.step, **metrics)


def save(run: InteractionRun, name: str = "", *, replace: bool = False) -> None:
    folder = run.log.folder / "checkpoints" / (name or f"step_{run.state.step:07d}")
    run.policy.save(folder, run.state, replace=replace)


def save_milestones(run: InteractionRun, words_before: int) -> None:
    """Keep a checkpoint for each milestone that the words taken in have passed."""
    for name in run.budget.passed(words_before, run.state.words_in):
        save(run, name)


def warn(run: InteractionRun, record: Record) -> bool:
    """Show new warnings in the terminal and the report. Returns whether they end the run."""
    run.update_report()
    warnings = distributed.rank0_value(lambda: run.detector.add(record))
    if distributed.is_rank0():
        for warning in warnings.values():
            run.bar.write(warning)
    is_serious = bool(warnings.keys() & {"collapse", "kl"})
    return run.config.stop_on_collapse and is_serious


def evaluate(run: InteractionRun) -> dict[str, Any]:
    """Metrics of stories to the held-out openings, which are added to the record of the last step;
    {} if the state counts this evaluation. The best student is kept as the checkpoint `best`. Raises
    Interrupted."""
    config = run.config
    state = run.state
    if state.evaluated == state.step:
        return {}
    if state.step:
        save(run)
    held_out = run.openings.held_out
    openings = [held_out[i % len(held_out)] for i in range(config.eval_stories)]

    def on_story(story: Story) -> None:
        if config.eval_graded:
            send(run, story)

    stories = rollout(run.policy, openings, FIRST_INDEX, on_story)
    grades = [NOT_ASKED] * len(stories)
    if config.eval_graded:
        grades = distributed.rank0_value(lambda: run.grader.collect(run.stop))
    rewards = story_rewards(config, stories, [grade.score for grade in grades])
    records = story_records(state.step, stories, grades, rewards, run.policy.history)
    if config.judge:
        for record, score in zip(records, judge_scores(run, stories), strict=True):
            record["judge"] = score
    run.log.append(EVALUATIONS, records)
    words_before = state.words_in
    state.spend(stories, sum(grade.reply_words for grade in grades))
    state.evaluated = state.step
    save_milestones(run, words_before)

    # Without grades, each later student becomes `best`.
    if not config.eval_graded or distributed.rank0_value(
        lambda: is_best(read_records(run.log.folder / EVALUATIONS), state.step)
    ):
        state.best_step = state.step
        save(run, checkpoint.BEST, replace=True)

    means = {"reward": reward_mean(records), "score_mean": score_means(grades)["score_mean"]}
    means |= story_means(records)
    if config.judge:
        means["judge"] = mean_of(record["judge"] for record in records)
    metrics = {f"held_out_{name}": value for name, value in means.items()}
    metrics |= {"words_in": state.words_in, "words_out": state.words_out}
    if state.step:  # what grading cost before the first step is in its record
        run.log.add_metrics(state.step, metrics, run.grader.stats())
    return metrics


def judge_scores(run: InteractionRun, stories: Sequence[Story]) -> list[float | None]:
    """The second judge's scores, 0..1, which are reported and never become a reward."""

    def scores() -> list[float | None]:
        assert run.judge is not None
        pairs = [(story.opening, story.text) for story in stories]
        return [grade.score for grade in run.judge.grade_each(pairs)]

    return distributed.rank0_value(scores)


# ---- before and after the loop -------------------------------------------------------------------


@contextlib.contextmanager
def open_run(config: InteractConfig) -> Iterator[InteractionRun]:
    """A run, ready for its next step. In this order: the students and openings; the teacher, which
    prints what it will cost; the budget; the run's folder, so that it is written only once whatever
    the user can fix was found; and for a new run its temperature and first checkpoint. Leaving the
    block closes teacher and records."""
    distributed.require_one_each("--stories-per-step", config.stories_per_step)
    distributed.require_one_each("--eval-stories", config.eval_stories)
    folder = Path(config.out)
    compute = resolve(config.device, config.dtype)
    resumed = None
    if config.resume:
        resumed = distributed.rank0_value(lambda: checkpoint.newest_whole(folder))
    start = folder / "checkpoints" / "start" if resumed else starting_checkpoint(config)
    reference, policy = load_students(config, start, compute)
    if not resumed and config.temperature:
        begin_at(config.temperature, reference, policy)
    state = policy.restore(resumed) if resumed else RunState(config.kl_coef)
    if not resumed:
        print_rest_of_pretraining(start, policy.history)
    openings = open_openings(config, policy)
    milestones = words_of_milestones(config, policy.history)

    with contextlib.ExitStack() as stack:
        grader, judge, facts = stack.enter_context(
            open_graders(config, start, policy, reference, openings)
        )
        print(printable(f"student {start}, scored by {facts['scored_by']}"))
        print_forecast(config, state, grader, openings)
        budget = Budget(config, openings, milestones, grader.most_words, grader.affords)
        trial = trial_stories(config, state)
        distributed.rank0_value(lambda: budget.require_first_step(state, trial))

        log = stack.enter_context(open_log(config, state))
        stop = stack.enter_context(Stop().listening())
        distributed.broadcast_from_rank0(
            [*policy.student.parameters(), *policy.critic.parameters()]
        )
        bar = Progress(
            total=config.steps * config.stories_per_step,
            initial=state.written,
            unit="stories",
            disable=not distributed.is_rank0(),
        )
        run = InteractionRun(
            config=config,
            compute=compute,
            reference=reference,
            policy=policy,
            state=state,
            openings=openings,
            grader=grader,
            judge=judge,
            budget=budget,
            log=log,
            stop=stop,
            update_report=stack.enter_context(live_report(folder, distributed.is_rank0())),
            detector=CollapseDetector(read_metrics(folder), config.kl_target),
            bar=bar,
            stages=Stages(bar, compute.device),
        )
        if not resumed and not config.temperature:
            config.temperature, facts["tried_temperatures"] = choose_temperature(
                policy, openings, grader, state
            )
            begin_at(config.temperature, reference, policy)
        facts["student"] = student_facts(policy)
        options = asdict(config) | compute.recorded | facts
        if resumed:
            del options["init"]  # config.json has it
        else:
            options["init"] = config.init or str(start)
        log.config(options)
        if not resumed:
            save(run, "start")
        yield run


def open_log(config: InteractConfig, state: RunState) -> RunLog:
    resume_step = state.step if config.resume else None
    return distributed.rank0_first(
        lambda: RunLog(
            Path(config.out),
            resume_step=resume_step,
            last_evaluation=state.evaluated,
            writes=distributed.is_rank0(),
        )
    )


def student_facts(policy: Policy) -> dict[str, Any]:
    """What config.json records of the student, for the report's title."""
    return {
        "corpus": policy.history.get("corpus"),
        "words": policy.history.get("words"),
        "parameters": sum(parameter.numel() for parameter in policy.student.parameters()),
    }


def report(run: InteractionRun) -> None:
    """Print how to resume a run that was asked to stop, or what a finished one learned."""
    config, state, folder = run.config, run.state, run.log.folder
    asked_to_stop = stopped(run)
    if not distributed.is_rank0():
        return
    if asked_to_stop:
        resume = hint("train_interact.py", "--out", folder, "--resume", *given_again(config))
        print(f"stopped after step {state.step}, all saved; go on with: {resume}")
        return
    write_samples(folder, state.best_step)
    print(summary(folder))
    print(printable(f"report: {folder / 'report.html'}"))
    print(f"next:   {hint('scripts/sample.py', checkpoint.find(folder))}")


if __name__ == "__main__":
    main()
