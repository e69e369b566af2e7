"""The terminal and the report show the same two numbers and the same typical pair."""

import json
import re
import sys

import pytest
from conftest import story_record

from scripts import watch
from tinystory.evaluate.held_out import write_samples
from tinystory.report.before_after import BeforeAfter, evaluation_means, summary
from tinystory.report.run import write_report
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, SAMPLES
from tinystory.teacher.grade import NOT_ASKED

GAINS = {0: -0.3, 1: 0.0, 2: 0.1, 3: 0.2, 4: 0.4}  # by opening; the median is 0.1


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluation(step, rewards, **other):
    return [
        story_record(step, i, story=f"story {step} {i}", reward=reward, **other)
        for i, reward in rewards.items()
    ]


@pytest.fixture(autouse=True)
def hundred_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def run(tmp_path):
    """A finished interaction of three steps, with the best student at step 2."""
    with RunLog(tmp_path, resume_step=None) as log:
        log.config(
            {
                "student": {"parameters": 1_800_000, "corpus": ["builtin", "/home/me/own.txt"]},
                "device": "cpu",
            }
        )
        for step in range(1, 4):
            log.metrics(step=step, reward_mean=0.5, held_out_reward=0.5 + step / 100)
    before, after = (
        evaluation(0, dict.fromkeys(GAINS, 0.5)),
        evaluation(2, {i: 0.5 + g for i, g in GAINS.items()}),
    )
    write(tmp_path / EVALUATIONS, [*before, *evaluation(1, dict.fromkeys(GAINS, 0.4)), *after])
    write(
        tmp_path / SAMPLES,
        [r | {"when": w} for w, rs in (("before", before), ("after", after)) for r in rs],
    )
    return tmp_path


def text_of(page):
    return " ".join(
        re.sub("<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL).split()
    )


def test_terminal_and_report_say_the_same_numbers_and_show_the_same_pair(run):
    terminal, page = " ".join(summary(run).split()), text_of(write_report(run))
    for said in (
        "The mean reward went from 0.5 before interaction to 0.58 after step 2, which may be chance: the "
        "95 % interval of the gain per held-out opening is -0.241 to 0.401.",
        "This pair has the median gain in reward among 5 held-out openings with two different, "
        "non-empty stories that end.",
    ):
        assert said in terminal and said in page, said
    assert "from step 0: ▁▃▆█" in terminal
    for text in (terminal, page):
        assert text.index("story 0 2") < text.index("story 2 2")
    first_screen = page.split("One opening during interaction")[0]
    assert "story 2 4" not in first_screen and "reward 0.6:" in terminal


def test_the_curves_begin_with_the_evaluation_before_the_first_step(run, capsys):
    watch.main([str(run)])
    assert "held-out reward 0.5 → 0.53" in capsys.readouterr().out
    curve = re.search(
        r'class="line" d="M([^"]*)"/><circle', write_report(run).read_text().split("held out")[0]
    )
    assert curve
    held_out = re.findall(r'<path class="line" d="M([^"]+)"', write_report(run).read_text())[1]
    assert held_out.count(",") == 4  # steps 0 to 3


def test_the_title_says_what_it_is(run):
    page = text_of(write_report(run))
    assert (
        page.count(
            "A student of 1.8M parameters, pretrained on builtin, own.txt and taught by scores"
        )
        == 2
    )  # <title> and heading
    before_options, _, options = write_report(run).read_text().partition("<summary>Options")
    assert "/home/me" not in before_options
    assert "/home/me" in options


def test_a_story_without_an_end_is_typical_only_if_no_pair_has_two(tmp_path):
    def pair_of(*ended):
        before = evaluation(0, dict.fromkeys(range(3), 0.5))
        after = [
            r | {"ended": end}
            for r, end in zip(evaluation(1, {0: 0.6, 1: 0.7, 2: 0.8}), ended, strict=True)
        ]
        rule, pair = BeforeAfter(before, after).typical()
        return pair[1]["index"], "that end" in rule

    assert pair_of("eos", "eos", "eos") == (1, True)
    assert pair_of("eos", "length", "length") == (0, True)
    assert pair_of("length", "length", "length") == (1, False)
    rule, pair = BeforeAfter(evaluation(0, {0: 0.5}), evaluation(1, {1: 0.5})).typical()
    assert rule.startswith("There is no pair to show") and pair == ()


def test_a_typical_pair_is_never_one_story_twice_and_never_an_empty_one(tmp_path):
    before = evaluation(0, dict.fromkeys(range(4), 0.5))
    after = evaluation(1, {0: 0.9, 1: 0.1, 2: 0.9, 3: 0.6})
    after[0]["story"] = before[0]["story"].replace(" ", "\n ")  # the same once it is wrapped
    after[1]["story"] = "\u200b \n"
    before[2]["story"] = ""
    rule, pair = BeforeAfter(before, after).typical()
    assert [record["index"] for record in pair] == [3, 3]
    assert "among 1 held-out openings with two different, non-empty stories that end." in rule

    finished(tmp_path, 1, before[:3], after[:3])
    terminal = summary(tmp_path)
    page = text_of(write_report(tmp_path))
    for text in (terminal, page):
        assert "There is no pair to show" in " ".join(text.split())
        assert "story 1 2" not in text
    assert "\n\n\n" not in terminal  # no empty paragraph instead


def finished(folder, best, *evaluations):
    """A finished run with evaluations of steps 0, 1, ... and a checkpoint `best` of one of them."""
    write(folder / EVALUATIONS, [record for records in evaluations for record in records])
    with RunLog(folder, resume_step=None) as log:
        for step in range(1, len(evaluations)):
            log.metrics(step=step, reward_mean=0.5)
    write_samples(folder, best)


def test_a_run_that_did_not_help_says_so_and_what_to_try(tmp_path):
    finished(
        tmp_path,
        0,
        evaluation(0, {0: 0.6, 1: 0.5}),
        evaluation(1, {0: 0.2, 1: 0.1}),
        evaluation(2, {0: 0.5, 1: 0.41}),
    )
    for text in (" ".join(summary(tmp_path).split()), text_of(write_report(tmp_path))):
        assert "The mean reward fell from 0.55 before interaction to 0.455 after step 2: " in text
        assert "The run did not help" in text and "--stories-per-step" in text
        assert "checkpoints/best is the student before interaction" in text
        assert "doctor.py --calibrate" in text and "story 2 0" in text
        assert "best is the student after" not in text


NOT_GRADED = {"reply": NOT_ASKED.error, "reward": None}


def test_a_run_without_graded_evaluations_shows_a_pair_and_no_empty_place(tmp_path):
    """The last pair: a human compares the first ones afterwards, without labels."""
    before, after = ([r | NOT_GRADED for r in evaluation(step, GAINS)] for step in (0, 1))
    after[4]["ended"] = "length"
    finished(tmp_path, 1, before, after)
    terminal, page = summary(tmp_path), text_of(write_report(tmp_path))
    for text in (" ".join(terminal.split()), page):
        assert (
            "This pair is for the last held-out opening with two different, non-empty stories that "
            "end." in text
        )
        assert text.index("story 0 3") < text.index("story 1 3")
        assert "no pair" not in text and NOT_ASKED.error not in text and "no score" not in text
        assert "not graded" in text and "its evaluations have no rewards" in text
    assert "every evaluation" not in terminal and "\n\n\n" not in terminal
    html = (tmp_path / "report.html").read_text()
    assert "<b></b>" not in html and "Bars are" not in page and "Do not compare" not in page


def test_without_rewards_the_second_judge_chooses_the_pair_and_gives_the_result(tmp_path):
    before, after = ([r | NOT_GRADED for r in evaluation(step, GAINS)] for step in (0, 1))
    for record in before:
        record["judge"] = 0.2
    for record, gain in zip(after, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        record["judge"] = 0.2 + gain
    finished(tmp_path, 1, before, after)
    for text in (" ".join(summary(tmp_path).split()), text_of(write_report(tmp_path))):
        assert "The mean score by the second judge rose from 0.2 before interaction to 0.5" in text
        assert "This pair has the median gain in score by the second judge among 5 held-out" in text
        assert "not graded, second judge 0.5" in text and "story 1 2" in text


def test_the_best_student_of_a_run_that_helped_is_named(tmp_path):
    finished(tmp_path, 1, evaluation(0, {0: 0.5}), evaluation(1, {0: 0.6}), evaluation(2, {0: 0.2}))
    for text in (" ".join(summary(tmp_path).split()), text_of(write_report(tmp_path))):
        assert "checkpoints/best is the student after step 1" in text
        assert "did not help" not in text and "not below" in text


def test_a_run_whose_evaluations_have_no_reward_names_no_best_student(tmp_path):
    finished(tmp_path, 0, evaluation(0, {0: None}), evaluation(1, {0: None}))
    for text in (" ".join(summary(tmp_path).split()), text_of(write_report(tmp_path))):
        assert "no checkpoints/best" in text and "did not help" not in text
        assert "best is the student" not in text


def test_a_story_shows_its_score_and_how_its_reward_was_made_of_it(tmp_path):
    """Also if a callable gave the score, without criteria."""
    scores = {"readability": 3, "coherence": 2, "creativity": 2}
    finished(
        tmp_path,
        1,
        evaluation(0, {0: 0.4}, score=0.25, difference=0.5),
        evaluation(1, {0: 0.6}, scores=scores, score=7 / 9, difference=0.75),
    )
    first = "reward 0.4, score 0.25 of 1, difference 0.5"
    second = "reward 0.6, score 7 of 9 (readability 3, coherence 2, creativity 2), difference 0.75"
    for text in (" ".join(summary(tmp_path).split()), text_of(write_report(tmp_path))):
        assert first in text and second in text


def test_a_weighted_rubrics_score_is_the_weighted_one(tmp_path):
    """Weights 3 and 1: (3 * 3 + 1 * 1) / 4 of 3, on a scale of two criteria."""
    records = evaluation(1, {0: 0.6}, scores={"humour": 3, "plot": 1}, score=10 / 12, difference=1)
    finished(tmp_path, 1, evaluation(0, {0: 0.5}), records)
    assert evaluation_means(records)["score_mean"] == pytest.approx(5)
    assert "score 5 of 6 (humour 3, plot 1)" in summary(tmp_path)


@pytest.mark.parametrize(
    "gains, said",
    [
        (
            (0.1, 0.15, 0.15),
            "rose from 0.5 before interaction to 0.633 after step 1: the 95 % interval",
        ),
        (
            (-0.1, -0.15, -0.15),
            "fell from 0.5 before interaction to 0.367 after step 1: the 95 % int",
        ),
        (
            (-0.1, 0.1, 0.3),
            "went from 0.5 before interaction to 0.6 after step 1, which may be chance",
        ),
        (
            (0.0, 0.0, 0.0),
            "went from 0.5 before interaction to 0.5 after step 1, which may be chance",
        ),
        ((0.4,), "went from 0.5 before interaction to 0.9 after step 1: too few stories to say"),
    ],
)
def test_a_reward_rose_or_fell_only_if_the_interval_of_the_paired_gains_excludes_0(
    tmp_path, gains, said, monkeypatch
):
    """The colours in the table follow the same rule."""
    before = evaluation(0, dict.fromkeys(range(len(gains)), 0.5))
    after = evaluation(1, {i: 0.5 + gain for i, gain in enumerate(gains)})
    write(tmp_path / EVALUATIONS, before + after)
    assert said in " ".join(summary(tmp_path).split())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    is_coloured = "\033[32m" in summary(tmp_path) or "\033[31m" in summary(tmp_path)
    assert is_coloured == ("rose" in said or "fell" in said)


def test_a_gain_is_paired_by_opening(tmp_path):
    """Openings differ more than the student does: only the pairs show that each story is better."""
    rewards = {i: i / 10 for i in range(8)}
    after = {i: reward + 0.01 for i, reward in reversed(rewards.items())}
    comparison = BeforeAfter(evaluation(0, rewards), evaluation(1, after))
    assert "The mean reward rose from 0.35 before" in comparison.conclusion()


CHANCE = "cannot tell a story from shuffled words: it puts the story first with probability 0.5"


@pytest.mark.parametrize(
    "calibration, is_said",
    [
        ({"best_auc_ci": [0.3, 0.7], "verdict": CHANCE}, True),
        ({"best_auc_ci": None, "verdict": CHANCE}, True),
        ({"best_auc_ci": [0.6, 0.9], "verdict": "puts a story above shuffled words"}, False),
        (None, False),
    ],
)
def test_that_a_teacher_cannot_judge_stands_beside_the_headline(run, calibration, is_said):
    with RunLog(run, resume_step=3) as log:
        log.config({"calibration": calibration})
    terminal, page = " ".join(summary(run).split()), text_of(write_report(run))
    for text in (terminal, page):
        _, _, after_headline = text.partition("-0.241 to 0.401.")
        assert after_headline.startswith(f" But this teacher {CHANCE}.") == is_said
        assert ("But this teacher" in text) == is_said


def test_scores_that_look_random_are_said_beside_the_headline_of_the_terminal(run):
    """The report has the warnings above the headline."""
    with RunLog(run, resume_step=3) as log:
        for step in range(4, 10):
            log.metrics(step=step, reward_mean=0.5, scored=200, score_mode=1.0, score_mean=4.5)
    terminal, page = " ".join(summary(run).split()), text_of(write_report(run))
    warning = "had the same score (4.5 in the last), so the student learns nothing from the teacher"
    assert (
        terminal.index("-0.241 to 0.401.")
        < terminal.index(warning)
        < terminal.index("from step 0:")
    )
    assert page.index(warning) < page.index("-0.241 to 0.401.")


def test_a_run_scored_by_a_callable_shows_rewards_and_no_scores(tmp_path):
    write(tmp_path / EVALUATIONS, evaluation(0, {0: 0.5, 1: 0.7}) + evaluation(1, {0: 0.6, 1: 0.8}))
    text = summary(tmp_path)
    assert "before interaction, reward 0.5:" in text and "None" not in text and "score" not in text


def test_the_shift_in_styles_is_shown(tmp_path):
    records = [evaluation(step, {0: 0.5, 1: 0.7}) for step in (0, 1)]
    comparison = BeforeAfter(*records)
    assert comparison.styles() == ""
    for record, kind in zip(
        (*records[0], *records[1]), ("list", "story", "story", "story"), strict=True
    ):
        record["style"] = kind
    assert "list 50% → 0%" in comparison.styles() and "story 50% → 100%" in comparison.styles()


def test_an_unfinished_run_is_compared_at_its_latest_evaluation(run):
    (run / SAMPLES).unlink()
    assert "to 0.58 after step 2" in " ".join(summary(run).split())
    write(run / EVALUATIONS, evaluation(0, {0: 0.5}))
    assert summary(run) == ""
    assert "Before and after" not in text_of(write_report(run))


def test_a_terminals_summary_fits_eighty_columns_and_colours_the_gain(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    measures = {"judge": 0.25, "score": 0.5}
    records = [
        *evaluation(0, dict.fromkeys(GAINS, 0.5), **measures),
        *evaluation(2, dict.fromkeys(GAINS, 0.58), **measures),
    ]
    write(run / EVALUATIONS, records)
    assert max(map(len, summary(run).split("\n"))) <= 80
    assert summary(run).count("stories for held-out openings") == 1, "the table is not broken"

    plain = summary(run)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text = summary(run)
    assert text.count("\033[32m") == 1 and "\033[32m0.58 ± 0\033[0m" in text  # the reward
    assert text.count("\033[36m") == 2  # the two openings
    assert re.sub(r"\033\[\d+m", "", text) == plain
