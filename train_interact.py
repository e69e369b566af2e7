"""Learn by interaction: the student writes stories, a teacher scores them over HTTP, and PPO learns
from the scores.

One step: sample stories and send each to the teacher as soon as it ends; compute the stories'
log-probabilities under the frozen starting checkpoint while the teacher grades; turn scores into
rewards; update the policy. Every --eval-every steps the student is evaluated on held-out openings,
and the best student is kept."""

import tinystory  # isort: skip  # noqa: F401  (first: it sets up OpenMP's threads and Ctrl-C)
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinystory.config import INTERACT_PRESETS, InteractConfig, parse
from tinystory.data.openings import Openings
from tinystory.evaluate import control, held_out
from tinystory.evaluate.forecast import open_budget
from tinystory.evaluate.graders import Graders, collect_scored, open_graders, send
from tinystory.evaluate.temperature import choose_temperature
from tinystory.ops.compute import Compute, resolve
from tinystory.report.ending import print_control, print_interaction, print_stopped
from tinystory.report.run import live_report
from tinystory.rl import learners, ppo, score_model
from tinystory.rl.batch import Batch, collate
from tinystory.rl.budget import Budget
from tinystory.rl.policy import Policy, RunState, rollout
from tinystory.rl.reward import story_rewards
from tinystory.rl.start import (
    load_students,
    open_openings,
    recorded_options,
    starting_point,
    teacher_defaults,
    words_of_milestones,
)
from tinystory.run import distributed
from tinystory.run.collapse import CollapseDetector
from tinystory.run.device import peak_memory_mb
from tinystory.run.errors import Interrupted, Stop, UserError, command
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, STORIES, Record, read_metrics
from tinystory.run.step_log import ProgressBar, Stages
from tinystory.student import checkpoint
from tinystory.student.generate import Story
from tinystory.student.model import Student
from tinystory.teacher.grade import NOT_ASKED, Grade


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, INTERACT_PRESETS, argv, teacher_defaults)
    learners.check(config)
    distributed.start(config.device)
    if config.brought and distributed.is_rank0():
        print(
            f"--teacher-url brings {config.brought}; to have all stories graded: --teacher-prompt grades"
        )
    with distributed.run_folder(config), open_run(config) as run:
        interact(run)
        finish(run)
    distributed.end_if_stopped(run.stop)


@dataclass
class InteractionRun:
    """An open run: students, teacher, limits and logs. reference: the starting checkpoint, frozen,
    for the KL penalty. update_report: rewrites report.html if the last version is old enough."""

    config: InteractConfig
    compute: Compute
    reference: Student
    policy: Policy
    state: RunState
    openings: Openings
    graders: Graders
    budget: Budget
    log: RunLog
    stop: Stop
    update_report: Callable[[], None]
    detector: CollapseDetector
    bar: ProgressBar
    stages: Stages


def interact(run: InteractionRun) -> None:
    """Run steps until the last step, a signal, the end of the budget, or a collapse."""
    config, policy, state, stages = run.config, run.policy, run.state, run.stages
    with contextlib.suppress(Interrupted), run.bar:
        if held_out.is_evaluated(config, state.step):
            evaluate(run)
        while goes_on(run):
            stages.begin("rollout")
            indices = range(state.written, state.written + config.stories_per_step)
            openings = [run.openings[index] for index in indices]
            stories = rollout(policy, openings, state.written, partial(on_story, run))

            stages.begin("reference")  # while the teacher grades
            batch = collate(stories, run.compute.device)
            with run.compute.autocast():
                batch = ppo.with_reference(policy, batch, run.reference)

            stages.begin("teacher")
            try:
                grades, scores, prediction = grade_stories(run, stories, batch)
            except UserError:
                save(run)
                raise

            stages.begin("update")
            rewards = story_rewards(config, stories, scores)
            statistics = ppo.step(policy, batch, rewards, state.kl_coef, state.step)
            policy.require_finite(state.step + 1)

            stages.begin("")
            words_before = state.words_in
            words_in = run.budget.opening_words(state) + sum(grade.reply_words for grade in grades)
            state.end_step(stories, words_in, asked=len(grades) - grades.count(NOT_ASKED))
            scored = len(stories) - rewards.count(None)
            state.kl_coef = ppo.next_kl_coef(state.kl_coef, statistics["kl"], scored, config)
            record = log_step(run, stories, grades, scores, rewards, statistics | prediction)
            save_milestones(run, words_before)
            if state.step % config.save_every == 0:
                save(run)
            if held_out.is_evaluated(config, state.step):
                record |= evaluate(run)
            run.update_report()
            if warn(run, record):
                break
        if not distributed.stop_signal(run.stop):
            evaluate(run)
    save(run, replace=True)


# ---- the stages of a step ------------------------------------------------------------------------


def goes_on(run: InteractionRun) -> bool:
    """Whether another step remains and fits in the budget. Prints the limit that it would
    exceed."""
    if run.state.step >= run.config.steps or distributed.stop_signal(run.stop):
        return False
    limit = distributed.rank0_value(lambda: run.budget.exhausted(run.state))
    if limit:
        run.bar.write(f"{limit} does not suffice for another step: the run ends")
    return not limit


def on_story(run: InteractionRun, story: Story) -> None:
    """Send a finished story to the teacher at once. With --grades the stories to grade are chosen
    later."""
    if not run.config.grades:
        send(run.graders.teacher, story)
    run.bar.update()


def grade_stories(
    run: InteractionRun, stories: Sequence[Story], batch: Batch
) -> tuple[list[Grade], list[float | None], dict[str, Any]]:
    """Grades (NOT_ASKED for stories that --grades leaves out), scores (predicted for the stories
    left out), and the metrics of the prediction."""
    if not run.config.grades:
        grades = collect_grades(run, range(len(stories)))
        return grades, [grade.score for grade in grades], {}
    model, state = run.policy.score_model, run.state
    features = score_model.story_features(batch, stories)
    count = score_model.grades_of_step(run.config, state.step, state.asked)
    chosen = distributed.rank0_value(lambda: model.choose(features, count))
    for row in chosen:
        send(run.graders.teacher, stories[row])
    grades = collect_grades(run, chosen)
    known = [grade.score for grade in grades]
    scores, prediction = score_model.with_predictions(model, features, stories, known, chosen)
    score_model.require_a_score(scores, state.step, state.asked)
    return grades, scores, prediction


def collect_grades(run: InteractionRun, sent: Sequence[int]) -> list[Grade]:
    """The step's grades, one per story; NOT_ASKED for rows that are not in `sent`. Raises UserError
    if too many grades have no score."""
    received = collect_scored(run.config, run.graders.teacher, run.stop)
    grades = [NOT_ASKED] * run.config.stories_per_step
    for row, grade in zip(sent, received, strict=True):
        grades[row] = grade
    return grades


def log_step(
    run: InteractionRun,
    stories: Sequence[Story],
    grades: list[Grade],
    scores: Sequence[float | None],
    rewards: list[float | None],
    statistics: dict[str, Any],
) -> Record:
    """The step's metrics, after writing them and the stories to the log. scores: the teacher's
    scores and the predicted ones."""
    state = run.state
    records = held_out.story_records(state.step, stories, grades, rewards, run.policy.history)
    if run.config.grades:
        for record, grade, score in zip(records, grades, scores, strict=True):
            record["predicted"] = score if grade == NOT_ASKED else None
    run.log.append(STORIES, records)
    metrics = statistics | held_out.step_means(stories, grades, records)
    metrics |= {"words_in": state.words_in, "words_out": state.words_out}
    metrics |= run.stages.seconds
    metrics["peak_memory_mb"] = peak_memory_mb(run.compute.device)
    metrics |= run.graders.teacher.stats()
    shown = {"reward": "reward_mean", "words": "length_mean", "kl": "kl"}
    run.bar.end_step({name: metrics[key] for name, key in shown.items()})
    return run.log.metrics(step=state.step, **metrics)


def warn(run: InteractionRun, record: Record) -> bool:
    """Whether a new warning ends the run. Prints new warnings."""
    warnings = distributed.rank0_value(lambda: run.detector.add(record))
    for warning in warnings.values():
        run.bar.write(warning)
    is_serious = bool(warnings.keys() & {"collapse", "kl"})
    return run.config.stop_on_collapse and is_serious


def evaluate(run: InteractionRun) -> dict[str, Any]:
    """Metrics of stories that continue the held-out openings; {} if this step was evaluated before.
    Adds the metrics to the record of the last step, and saves the student as the checkpoint `best`
    if it is the best so far. Raises Interrupted."""
    config, state, log = run.config, run.state, run.log
    if state.evaluated_before > state.step:
        return {}
    if state.step:
        save(run)
    stories, grades, records = held_out.evaluate(
        run.policy, state.step, run.openings.held_out, run.graders, run.stop
    )
    log.append(EVALUATIONS, records)
    words_before = state.words_in
    state.spend(stories, sum(grade.reply_words for grade in grades))
    state.evaluated_before = state.step + 1
    save_milestones(run, words_before)
    if held_out.becomes_best(config, log.folder, state.step):
        state.best_step = state.step
        save(run, checkpoint.BEST, replace=True)

    metrics = held_out.held_out_metrics(records)
    metrics |= {"words_in": state.words_in, "words_out": state.words_out}
    if state.step:  # the costs of grading before the first step go to the record of that step
        log.add_metrics(state.step, metrics, run.graders.examiner.stats())
    return metrics


def save(run: InteractionRun, name: str = "", *, replace: bool = False) -> None:
    """Write a checkpoint of the last step. Called every --save-every steps, before an evaluation,
    when the teacher fails, and at the end. So a failing teacher loses no finished step, and a
    killed process loses fewer than --save-every steps. A resumed run repeats an evaluation that the
    checkpoint does not include."""
    folder = run.log.folder / "checkpoints" / (name or f"step_{run.state.step:07d}")
    run.policy.save(folder, run.state, replace=replace)


def save_milestones(run: InteractionRun, words_before: int) -> None:
    """Write a checkpoint for each milestone between `words_before` and the present words in."""
    for name in run.budget.passed(words_before, run.state.words_in):
        save(run, name)


# ---- before and after the loop -------------------------------------------------------------------


@contextlib.contextmanager
def open_run(config: InteractConfig) -> Iterator[InteractionRun]:
    """Yields a run that is ready for the next step; leaving the block closes teacher and records.

    The order: students and openings; the teacher; the budget, with a forecast of the cost; the
    run's folder, last, so that no error that the user can fix leaves files behind; for a new run,
    the temperature and the first checkpoint."""
    distributed.require_one_each("--stories-per-step", config.stories_per_step)
    distributed.require_one_each("--eval-stories", config.eval_stories)
    compute = resolve(config.device, config.dtype)
    start, newest = starting_point(config)
    reference, policy, state = load_students(config, compute, start, newest)
    openings = open_openings(config, policy)
    milestones = words_of_milestones(config, policy.history)

    with contextlib.ExitStack() as stack:
        opening_graders = open_graders(config, start, policy, reference, openings)
        graders, facts = stack.enter_context(opening_graders)
        budget = open_budget(config, state, openings, milestones, graders.teacher)
        if config.control:
            print(control.note_on_grades(config, graders.examiner, openings))

        folder = Path(config.out)
        resume_step = state.step if config.resume else None
        log = stack.enter_context(distributed.open_log(folder, resume_step, state.evaluated_before))
        stories = config.steps * config.stories_per_step
        bar = ProgressBar(total=stories, initial=state.written, unit="stories")
        run = InteractionRun(
            config=config,
            compute=compute,
            reference=reference,
            policy=policy,
            state=state,
            openings=openings,
            graders=graders,
            budget=budget,
            log=log,
            stop=stack.enter_context(Stop().listening()),
            update_report=stack.enter_context(live_report(folder, distributed.is_rank0())),
            detector=CollapseDetector(read_metrics(folder), config.kl_target),
            bar=bar,
            stages=Stages(bar, compute.device),
        )

        if not newest and not config.temperature:
            facts["tried_temperatures"] = choose_temperature(
                policy, reference, openings, graders.teacher, state
            )
        log.config(recorded_options(config, compute, policy, start, newest) | facts)
        if not newest:
            save(run, "start")
        yield run


def finish(run: InteractionRun) -> None:
    """Print how to resume a stopped run, or the results of a finished run. A control is compared with
    its run first."""
    if run.config.control and not distributed.stop_signal(run.stop):
        with contextlib.suppress(Interrupted):
            control.compare(run.policy, run.reference, run.openings, run.graders, run.stop)
    if distributed.stop_signal(run.stop):
        print_stopped(run.config, "train_interact.py", f"step {run.state.step}")
    elif distributed.is_rank0():
        held_out.write_samples(run.log.folder, run.state.best_step)
        print_control(run.config) if run.config.control else print_interaction(run.config)


if __name__ == "__main__":
    main()
