"""Learn by interaction: the student writes stories, a teacher scores them over HTTP, and PPO learns
from the scores.

One step: write stories (each is sent to the teacher as soon as it ends), compute their
log-probabilities under the frozen starting checkpoint while the teacher grades, turn scores into
rewards, update the policy. Every --eval-every steps it is evaluated on held-out openings, and the
best student is kept."""

import tinystory  # isort: skip  # noqa: F401  (first: it sets up OpenMP's threads and Ctrl-C)
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinystory.config import INTERACT_PRESETS, InteractConfig, given_again, parse
from tinystory.data import babylm
from tinystory.data.corpus import recorded_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.calibration import calibrated
from tinystory.evaluate.held_out import (
    FIRST_INDEX,
    evaluations_by_step,
    is_best,
    reward_mean,
    story_means,
    story_records,
    write_samples,
)
from tinystory.evaluate.likelihood import Likelihood
from tinystory.evaluate.temperature import (
    TEMPERATURES,
    choose_temperature,
    stories_per_temperature,
)
from tinystory.ops.compute import Compute, resolve
from tinystory.report.before_after import summary
from tinystory.report.run import live_report, number_option
from tinystory.rl import learners, ppo
from tinystory.rl.batch import collate
from tinystory.rl.budget import Budget
from tinystory.rl.policy import Policy, RunState, load_policy, rollout, rollout_means
from tinystory.rl.reward import story_rewards
from tinystory.rl.score_model import (
    FEWEST_SCORES,
    grades_of_step,
    story_features,
    with_predictions,
)
from tinystory.rubric.process import builtin_teacher
from tinystory.run import distributed
from tinystory.run.collapse import CollapseDetector
from tinystory.run.device import peak_memory_mb
from tinystory.run.errors import Interrupted, Stop, UserError, command
from tinystory.run.folder import newest_first, read_config
from tinystory.run.log import RunLog
from tinystory.run.paths import ROOT, hint
from tinystory.run.records import EVALUATIONS, STORIES, Record, read_metrics, read_records
from tinystory.run.step_log import Progress, Stages
from tinystory.run.text import printable
from tinystory.student import checkpoint
from tinystory.student.generate import Story, encode_opening, require_room
from tinystory.student.model import Student
from tinystory.teacher.grade import NOT_ASKED, Grade, Grader, require_scores, score_means
from tinystory.teacher.grader import open_grader

# Options of a run with few grades, which the forecast of one with all names: docs/teachers.md, "Few
# grades".
FEW_GRADES: dict[str, Any] = {"grades": 64, "steps": 8, "eval_every": 0}
PRETRAIN_RUNS = (Path("runs/pretrain"), Path("runs/demo/pretrain"))
# Words taken in during interaction at which a checkpoint is kept.
INTERACTION_CHECKPOINTS = {f"chck_{n}00K": n * 100_000 for n in range(1, 10)}
INTERACTION_CHECKPOINTS["chck_1M"] = 1_000_000


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
    penalty. grader: idle on all ranks but 0. update_report: rewrites report.html if it is due."""

    config: InteractConfig
    compute: Compute
    reference: Student
    policy: Policy
    state: RunState
    openings: Openings
    grader: Grader
    budget: Budget
    log: RunLog
    stop: Stop
    update_report: Callable[[], None]
    detector: CollapseDetector
    bar: Progress
    stages: Stages


def interact(run: InteractionRun) -> None:
    """Train until the last step, a signal, the end of the budget, or a collapse."""
    config, policy, state, stages = run.config, run.policy, run.state, run.stages
    with contextlib.suppress(Interrupted), run.bar:
        if due(config, state.step):
            evaluate_at_rest(run)
        while state.step < config.steps and not stopped(run):
            if budget_exhausted(run):
                break

            stages.begin("rollout")
            stories = write_stories(run)
            stages.begin("reference")  # while the teacher grades
            batch = collate(stories, run.compute.device)
            with run.compute.autocast():
                reference = ppo.read_reference(run.reference, batch, config)
            sent: Sequence[int] = range(len(stories))
            if config.grades:
                features = story_features(batch, reference, stories)
                sent = send_chosen(run, stories, features)
            stages.begin("teacher")
            grades = collect_grades(run, sent)
            scores = [grade.score for grade in grades]
            prediction: dict[str, Any] = {}
            if config.grades:
                scores, prediction = with_predictions(
                    policy.score_model, features, stories, scores, sent
                )
                require_a_score(run, scores)

            stages.begin("update")
            rewards = story_rewards(config, stories, scores)
            torch.manual_seed(config.seed * 1_000_003 + state.step)  # as in a run never stopped
            statistics = ppo.step(policy, batch, reference, rewards, state.kl_coef, state.step)
            policy.require_finite(state.step + 1)
            stages.begin("")

            words_before = state.words_in
            count_step(run, stories, grades, statistics)
            evaluation: dict[str, Any] = {}
            evaluated = False
            try:
                if due(config, state.step):
                    evaluation = evaluate(run)
                evaluated = True
            finally:  # a teacher that fails now does not cost the step
                record = log_step(
                    run, stories, grades, scores, rewards, statistics | prediction | evaluation
                )
                for name in run.budget.passed(words_before, state.words_in):
                    save(run, name)
                if state.step % config.save_every == 0 or not evaluated:
                    save(run)
            if warn(run, record):
                break
        if not stopped(run):
            evaluate_at_rest(run)
    save(run, replace=True)


def due(config: InteractConfig, step: int) -> bool:
    """Whether the student is evaluated after this step."""
    return step in (0, config.steps) or (config.eval_every > 0 and step % config.eval_every == 0)


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


def send_chosen(run: InteractionRun, stories: Sequence[Story], features: Tensor) -> list[int]:
    """Send the stories to grade, out of a whole step with these features. Returns their rows."""
    count = grades_of_step(run.config, run.state.step, run.state.asked)
    model = run.policy.score_model
    rows = distributed.rank0_value(lambda: model.choose(features, count))
    if distributed.is_rank0():
        for row in rows:
            send(run, stories[row])
    return rows


def collect_grades(run: InteractionRun, sent: Sequence[int]) -> list[Grade]:
    """The step's grades, NOT_ASKED outside `sent`. If the teacher fails, the state after the last
    step is saved."""
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


def warn(run: InteractionRun, record: Record) -> bool:
    """Show new warnings in the terminal and the report. Returns whether they end the run."""
    run.update_report()
    warnings = distributed.rank0_value(lambda: run.detector.add(record))
    if distributed.is_rank0():
        for warning in warnings.values():
            run.bar.write(warning)
    is_serious = bool(warnings.keys() & {"collapse", "kl"})
    return run.config.stop_on_collapse and is_serious


def evaluate_at_rest(run: InteractionRun) -> None:
    """Evaluate at the start or end, unless it is on record. The state is saved first: the teacher
    can fail."""
    step = run.state.step
    if distributed.rank0_value(lambda: step in evaluations_by_step(run.log.folder)):
        return
    if step:
        save(run)
    evaluate(run)


def evaluate(run: InteractionRun) -> dict[str, Any]:
    """Metrics on the held-out openings. The words count against the budget, and the best student is
    kept as the checkpoint `best`. Raises Interrupted."""
    config = run.config
    state = run.state
    held_out = run.openings.held_out
    openings = [held_out[i % len(held_out)] for i in range(config.eval_stories)]

    def on_story(story: Story) -> None:
        if config.eval_graded:
            send(run, story)

    stories = rollout(run.policy, openings, FIRST_INDEX, on_story)
    grades = [NOT_ASKED] * len(stories)
    if config.eval_graded:
        grades = distributed.rank0_value(lambda: run.grader.collect(run.stop))
    state.spend(stories, sum(grade.reply_words for grade in grades))

    rewards = story_rewards(config, stories, [grade.score for grade in grades])
    records = story_records(state.step, stories, grades, rewards, run.policy.history)
    run.log.append(EVALUATIONS, records)
    evaluations = run.log.folder / EVALUATIONS
    # Without grades, each later student becomes `best`.
    if not config.eval_graded or distributed.rank0_value(
        lambda: is_best(read_records(evaluations), state.step)
    ):
        state.best_step = state.step
        save(run, checkpoint.BEST, replace=True)

    metrics = {"reward": reward_mean(records), "score_mean": score_means(grades)["score_mean"]}
    metrics |= story_means(records)
    return {f"held_out_{name}": value for name, value in metrics.items()}


# ---- before and after the loop -------------------------------------------------------------------


@contextlib.contextmanager
def open_run(config: InteractConfig) -> Iterator[InteractionRun]:
    """A run, ready for its next step. Leaving the block closes teacher and records. Whatever the
    user can fix is found before the run's folder is written."""
    folder = Path(config.out)
    rank0 = distributed.is_rank0()
    distributed.require_one_each("--stories-per-step", config.stories_per_step)
    distributed.require_one_each("--eval-stories", config.eval_stories)
    compute = resolve(config.device, config.dtype)

    resumed = None
    if config.resume:
        resumed = distributed.rank0_value(lambda: checkpoint.newest_whole(folder))
    start = folder / "checkpoints" / "start" if resumed else starting_checkpoint(config)
    reference, _, _ = checkpoint.load(start, compute.device)
    reference.requires_grad_(False)
    policy = load_policy(config, start, compute)
    if not resumed and config.temperature:
        divide_logits(reference, policy, config.temperature)
    state = policy.restore(resumed) if resumed else RunState(config.kl_coef)
    if not resumed:
        print_rest_of_pretraining(start, policy.history)

    openings = open_openings(config, policy)
    milestones = words_of_milestones(config, policy.history)
    with contextlib.ExitStack() as stack:
        opening_grader = open_grader(
            config,
            builtin_teacher,
            corpus=corpus_of_teacher(config, start, policy.history),
            replies=folder / "replies.jsonl",
            likelihood=lambda: Likelihood(reference, policy.tokenizer, openings.train, config),
        )
        grader = distributed.rank0_first(
            lambda: stack.enter_context(opening_grader) if rank0 else Grader({"scored_by": ""})
        )
        facts = grader.facts | distributed.rank0_value(lambda: calibrated(config, grader))
        print(printable(f"student {start}, scored by {facts['scored_by']}"))
        print_forecast(config, state, grader, openings)
        budget = Budget(config, openings, milestones, grader.most_words, grader.affords)
        distributed.rank0_value(lambda: budget.require_first_step(state))

        resume_step = state.step if config.resume else None
        log = distributed.rank0_first(lambda: RunLog(folder, resume_step=resume_step, writes=rank0))
        stack.enter_context(log)
        student_facts = {
            "corpus": policy.history.get("corpus"),
            "words": policy.history.get("words"),
            "parameters": sum(parameter.numel() for parameter in reference.parameters()),
        }
        facts["student"] = student_facts
        if not resumed:
            config.init = config.init or str(start)
        stop = stack.enter_context(Stop().listening())
        distributed.broadcast_from_rank0(
            [*policy.student.parameters(), *policy.critic.parameters()]
        )
        bar = Progress(
            total=config.steps * config.stories_per_step,
            initial=state.written,
            unit="stories",
            disable=not rank0,
        )
        run = InteractionRun(
            config=config,
            compute=compute,
            reference=reference,
            policy=policy,
            state=state,
            openings=openings,
            grader=grader,
            budget=budget,
            log=log,
            stop=stop,
            update_report=stack.enter_context(live_report(folder, rank0)),
            detector=CollapseDetector(read_metrics(folder), config.kl_target),
            bar=bar,
            stages=Stages(bar, compute.device),
        )
        if not resumed and not config.temperature:
            config.temperature, means = choose_temperature(policy, openings, grader, state)
            facts["tried_temperatures"] = means
            divide_logits(reference, policy, config.temperature)
        options = asdict(config) | compute.recorded | facts
        if resumed:
            del options["init"]  # config.json has it
        log.config(options)
        if not resumed:
            save(run, "start")
        yield run


def divide_logits(reference: Student, policy: Policy, temperature: float) -> None:
    """Both begin at this temperature."""
    reference.divide_logits(temperature)
    policy.student.divide_logits(temperature)


def starting_checkpoint(config: InteractConfig) -> Path:
    """The checkpoint that --init names; by default that of the newest run in PRETRAIN_RUNS, or in
    folders that followed them (runs/pretrain-2). Raises UserError if a run is to begin again
    without it."""
    if config.init:
        return checkpoint.find(Path(config.init))
    if config.resume:
        began = read_config(Path(config.out))["options"]["init"]
        raise UserError(
            f"{config.out} has no checkpoint to go on from, and was begun from {began!r:.200}: "
            "give that again as --init"
        )
    for run in newest_first(*PRETRAIN_RUNS):
        if checkpoint.newest(run):
            return checkpoint.find(run)
    first = hint("train_pretrain.py")
    raise UserError(
        f"no checkpoint under {PRETRAIN_RUNS[0]}: run {first} first, or give --init CHECKPOINT"
    )


def print_rest_of_pretraining(start: Path, history: dict[str, Any]) -> None:
    """Say so if `start` is the newest checkpoint of a pretraining that has words left to read."""
    folder = Path(os.path.abspath(start))
    run = folder.parent.parent
    if checkpoint.newest(run) != folder:
        return
    record: Record = {}
    with contextlib.suppress(UserError):  # the checkpoint is enough for an interaction
        record = read_config(run)
    planned = number_option(record, "words")
    words = history.get("words")
    if planned is None or words is None or not 0 <= words < planned:
        return
    go_on = hint("train_pretrain.py", "--out", os.path.relpath(run), "--resume")
    percent = int(100 * words / planned)
    print(f"this student has read {percent} % of the words of its pretraining; the rest: {go_on}")


def corpus_of_teacher(
    config: InteractConfig, start: Path, history: dict[str, Any]
) -> Sequence[str]:
    """The corpus that the built-in teacher is fitted to; none if it does not grade. Raises
    UserError if only a checkpoint names it, and it is a file."""
    if config.reward or config.teacher_url:
        return ()
    return config.corpus or recorded_corpus(history.get("corpus"), start)


def open_openings(config: InteractConfig, policy: Policy) -> Openings:
    """Raises UserError if an opening does not fit the student's context with its story."""
    openings = Openings(load_openings(config.openings), config.seed, config.stories_per_opening)
    if openings.train == openings.held_out:
        print(
            "there is one opening, so none is held out: evaluations use the one that is trained on"
        )
    longest = 0
    for opening in openings.train + openings.held_out:
        longest = max(longest, len(encode_opening(policy.tokenizer, opening)))
    require_room(policy.student, longest, config.max_new_tokens)
    return openings


def words_of_milestones(config: InteractConfig, history: dict[str, Any]) -> dict[str, int]:
    """Words taken in at which checkpoints are kept, by name. Raises UserError for what BabyLM does
    not allow."""
    if config.preset not in babylm.TRACKS:
        return INTERACTION_CHECKPOINTS
    babylm.check_interaction(config.preset, history, config.budget_words)
    return babylm.milestones_beyond(history)


def print_forecast(
    config: InteractConfig, state: RunState, grader: Grader, openings: Openings
) -> None:
    """What the grades of the run and its evaluations will take, if the grader knows; then what they
    would without --grades, or, of a teacher at --teacher-url that is asked for all, with
    FEW_GRADES."""
    opening = openings[0]
    count = stories_to_grade(config, state)
    forecast = grader.forecast(count, opening)
    if not forecast:
        return
    print(f"forecast: {forecast}")
    if config.grades:
        whole = stories_to_grade(replace(config, grades=0), state)
        print(f"without --grades: {grader.forecast(whole, opening)}")
        return
    few = stories_to_grade(replace(config, **FEW_GRADES), state)
    if config.teacher_url and not state.step and few < count:
        flags = " ".join(f"--{name.replace('_', '-')} {FEW_GRADES[name]}" for name in FEW_GRADES)
        print(f"with {flags}: {grader.forecast(few, opening)}")


def stories_to_grade(config: InteractConfig, state: RunState) -> int:
    """Stories that the teacher will grade: of the steps left, of evaluations, and of the trial of
    temperatures."""
    count = (config.steps - state.step) * config.stories_per_step
    if config.grades:
        count = config.grades - state.asked
    if config.eval_graded:
        first = state.step + 1 if state.step else 0
        evaluations = sum(due(config, step) for step in range(first, config.steps + 1))
        count += evaluations * config.eval_stories
    if not config.temperature and not state.step:
        count += stories_per_temperature(config) * len(TEMPERATURES)
    return count


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
    if (ROOT / "lab").is_dir():  # in a clone
        judge = hint("lab/judge.py", folder, *given_again(config))
        print(f"judge:  {judge}")


if __name__ == "__main__":
    main()
