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

from tinystory.config import InteractConfig
from tinystory.config.command_line import parse
from tinystory.data.openings import Openings
from tinystory.evaluate import control, held_out
from tinystory.evaluate.forecast import print_forecast
from tinystory.evaluate.graders import Graders, open_graders, taught_by
from tinystory.evaluate.story_records import held_out_metrics, step_means, story_records
from tinystory.evaluate.temperature import choose_temperature, trial_stories
from tinystory.ops.compute import Compute, resolve
from tinystory.report.before_after import from_start
from tinystory.report.ending import print_control, print_interaction, print_stopped
from tinystory.report.run import live_report
from tinystory.rl import learners, ppo, score_model
from tinystory.rl.batch import Batch, collate
from tinystory.rl.budget import Budget
from tinystory.rl.policy import Policy, RunState, rollout
from tinystory.rl.reward import differences, story_rewards, word_rewards
from tinystory.rl.start import (
    load_students,
    open_openings,
    recorded_options,
    starting_point,
    starting_temperature,
    teacher_defaults,
    words_of_milestones,
)
from tinystory.run import distributed
from tinystory.run.collapse import CollapseDetector
from tinystory.run.device import peak_memory_mb, upload
from tinystory.run.errors import Interrupted, Stop, UserError, command
from tinystory.run.folder import read_config
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, STORIES, Record, read_metrics
from tinystory.run.step_log import ProgressBar, Stages
from tinystory.student import checkpoint, memory
from tinystory.student.generate import Story
from tinystory.student.model import Student
from tinystory.teacher.grade import NOT_ASKED, Grade, require_scores


@command
def main(argv: list[str] | None = None) -> None:
    config: InteractConfig = parse(InteractConfig, argv, teacher_defaults)
    learners.check(config)
    distributed.start(config.device)
    if config.defaults and distributed.is_rank0():
        advice = "to have all stories graded: --teacher-prompt grades" if config.teacher_url else ""
        print(f"defaults for these options: {config.defaults}; {advice or 'give one to change it'}")
    with distributed.run_folder(config) as config, open_run(config) as run:
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
    bar: ProgressBar
    stages: Stages


def interact(run: InteractionRun) -> None:
    """Run steps until the last step, a signal, the end of the budget, or a collapse."""
    config, policy, state, stages = run.config, run.policy, run.state, run.stages
    with contextlib.suppress(Interrupted), run.bar:
        if held_out.is_evaluated(config, state.step):
            evaluate_late(run)
        past = from_start(run.log.folder, read_metrics(run.log.folder))
        detector = CollapseDetector(past, config.kl_target)
        while goes_on(run):
            stages.begin("rollout")
            indices = range(state.written, state.written + config.stories_per_step)
            openings = [run.openings[index] for index in indices]
            stories = rollout(policy, openings, state.written, partial(on_story, run))

            stages.begin("reference")  # while the teacher grades
            batch = collate(stories, run.compute.device)
            batch = ppo.with_reference(policy, batch, run.reference)

            stages.begin("teacher")
            try:
                grades, scores, prediction = grade_stories(run, stories, batch)
            except UserError:
                save(run)
                raise

            stages.begin("update")
            difference = differences([story.text for story in stories])
            rewards = story_rewards(config, stories, scores, difference)
            by_word = word_rewards(config, stories, grades, difference, policy.tokenizer)
            batch.rewards = upload(by_word, run.compute.device)
            statistics = ppo.step(policy, batch, rewards, state.kl_coef, state.step)
            policy.require_finite(state.step + 1)

            stages.begin("")
            words_before = state.words_in
            words_in = run.budget.opening_words(state) + sum(grade.reply_words for grade in grades)
            state.end_step(stories, words_in, asked=len(grades) - grades.count(NOT_ASKED))
            scored = len(stories) - rewards.count(None)
            state.kl_coef = ppo.next_kl_coef(state.kl_coef, statistics["kl"], scored, config)
            state.undone += int(statistics["undone"])
            records = story_records(
                state.step, stories, grades, rewards, difference, policy.history
            )
            log_stories(run, records, grades, scores)
            means = step_means(stories, grades, records)
            record = end_step(run, statistics | prediction | means, words_before)
            run.update_report()
            if warn(run, detector, record):
                break
        if not distributed.stop_signal(run.stop):
            evaluate_late(run)
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
        run.graders.teacher.send(story)
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
        run.graders.teacher.send(stories[row])
    grades = collect_grades(run, chosen)
    known = [grade.score for grade in grades]
    scores, prediction = score_model.with_predictions(model, features, stories, known, chosen)
    score_model.require_a_score(scores, state.step, state.asked)
    return grades, scores, prediction


def collect_grades(run: InteractionRun, sent: Sequence[int]) -> list[Grade]:
    """The step's grades, one per story; NOT_ASKED for rows that are not in `sent`. Raises UserError
    if too many grades have no score."""
    config = run.config
    received = run.graders.teacher.collect(run.stop)
    tolerated = config.max_unscored
    if config.grades:  # one grade without a score must not stop a run that asks for a few
        tolerated = max(tolerated, 1 / max(len(received), 1))
    require_scores(received, tolerated)
    grades = [NOT_ASKED] * config.stories_per_step
    for row, grade in zip(sent, received, strict=True):
        grades[row] = grade
    return grades


def log_stories(
    run: InteractionRun,
    records: list[Record],
    grades: Sequence[Grade],
    scores: Sequence[float | None],
) -> None:
    """Write the step's stories to the log. scores: the teacher's scores and the predicted ones."""
    if run.config.grades:
        for record, grade, score in zip(records, grades, scores, strict=True):
            record["predicted"] = score if grade == NOT_ASKED else None
    run.log.append(STORIES, records)


def end_step(run: InteractionRun, metrics: dict[str, Any], words_before: int) -> Record:
    """The step's record, which is written after the evaluation that follows the step, if there is
    one. Then checkpoints are written. If the evaluation fails or is interrupted, both are written
    without the evaluation, which a resumed run repeats. words_before: words in before the step."""
    config, state = run.config, run.state
    is_evaluated = held_out.is_evaluated(config, state.step)
    shown = {"reward": "reward_mean", "words": "length_mean", "kl": "kl"}
    run.bar.end_step({name: metrics[key] for name, key in shown.items()})
    metrics |= {"step": state.step, "words_in": state.words_in, "words_out": state.words_out}
    metrics |= run.stages.seconds
    metrics["peak_memory_mb"] = peak_memory_mb(run.compute.device)
    try:
        if is_evaluated:
            metrics |= evaluate(run)
    finally:
        record_models(run)
        record = run.log.metrics(**metrics, **run.graders.evaluator.stats())
        save_milestones(run, words_before)
        if is_evaluated or state.step % config.save_every == 0:
            save(run)
    return record


def record_models(run: InteractionRun) -> None:
    """Record in config.json that another model replied in this step, which --any-model allows."""
    if not run.config.any_model or not run.log.writes:
        return
    recorded = read_config(run.log.folder)["options"].get("taught_by")
    models = taught_by(run.config, run.graders.evaluator, recorded, run.state.step - 1)
    if models != recorded:
        run.log.set_option("taught_by", models)


def warn(run: InteractionRun, detector: CollapseDetector, record: Record) -> bool:
    """Whether a new warning ends the run. Prints new warnings."""
    if record["undone"]:
        run.bar.write(
            f"step {run.state.step}: optimizer steps undone, because they moved the student by more than "
            f"{ppo.MAX_UPDATE_KL:g} times --kl-target {run.config.kl_target:g} nats per story: "
            f"{record['undone']}; each halved the learning rates for the rest of the run"
        )
    warnings = distributed.rank0_value(lambda: detector.add(record))
    if run.config.control:  # its scores are no teacher's
        warnings = {
            kind: warnings[kind] for kind in warnings if kind not in ("signal", "predicted")
        }
    for warning in warnings.values():
        run.bar.write(warning)
    is_serious = bool(warnings.keys() & {"collapse", "kl"})
    return run.config.stop_on_collapse and is_serious


def evaluate(run: InteractionRun) -> dict[str, Any]:
    """Metrics of stories that continue the held-out openings. Saves the student as the checkpoint
    `best` if it is the best so far. Raises Interrupted."""
    config, state, log = run.config, run.state, run.log
    stories, grades, records = held_out.evaluate(
        run.policy, state.step, run.openings.held_out, run.graders, run.stop
    )
    log.append(EVALUATIONS, records)
    state.spend(stories, sum(grade.reply_words for grade in grades))
    state.evaluated_before = state.step + 1
    if held_out.becomes_best(config, log.folder, state.step):
        state.best_step = state.step
        save(run, checkpoint.BEST, replace=True)
    words = {"words_in": state.words_in, "words_out": state.words_out}
    return held_out_metrics(records) | words


def evaluate_late(run: InteractionRun) -> None:
    """Evaluate the student before the first step, and after a step that was recorded without its
    evaluation, because the evaluation was interrupted or the step turned out to be the last one.
    The record of the step gets the result; the costs of grading before the first step go to the
    record of that step."""
    state = run.state
    if state.evaluated_before > state.step:
        return
    if state.step:
        save(run)
    words_before = state.words_in
    metrics = evaluate(run)
    if state.step:
        run.log.add_metrics(state.step, metrics, run.graders.evaluator.stats())
    save_milestones(run, words_before)


def save(run: InteractionRun, name: str = "", *, replace: bool = False) -> None:
    """Write a checkpoint of the last step. Called every --save-every steps, after an evaluation,
    when the teacher fails, and at the end. So a failing teacher loses no finished step, and a
    killed process loses fewer than --save-every steps, or the step that it evaluates."""
    folder = run.log.folder / "checkpoints" / (name or f"step_{run.state.step:07d}")
    run.policy.save(folder, run.state, replace=replace)


def save_milestones(run: InteractionRun, words_before: int) -> None:
    """Write a checkpoint for each milestone between `words_before` and the present words in. A run may
    be resumed from it, so the records must come first."""
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
    config = config.replaced(
        micro_batch_size=memory.micro_batch_size(config, compute.device),
        temperature=starting_temperature(config, newest),
    )
    reference, policy, state = load_students(config, compute, start, newest)
    config = policy.config  # with a learning rate for the width of this student
    openings = open_openings(config, policy)
    milestones = words_of_milestones(config, policy.history)

    with contextlib.ExitStack() as stack:
        opening_graders = open_graders(config, start, policy, reference, openings, state.step)
        graders, facts = stack.enter_context(opening_graders)
        teacher = graders.teacher
        print_forecast(config, state, teacher, openings)
        budget = Budget(
            config, openings, milestones, teacher.most_words, teacher.affords, teacher.steps
        )
        trial = trial_stories(config, state)
        distributed.rank0_value(lambda: budget.require_first_step(state, trial))
        if config.control:
            print(control.note_on_grades(config, graders.evaluator, openings))

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
            bar=bar,
            stages=Stages(bar, compute.device),
        )

        if not newest and not config.temperature:
            facts |= choose_temperature(policy, reference, openings, teacher, state)
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
