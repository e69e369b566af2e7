"""Figures on the pages are those of the JSON that the lab wrote."""

import json
import re
from functools import partial
from statistics import fmean
from typing import Any

from conftest import ROOT
from test_texts import cells, row, text_of

from lab import gain
from lab.gain import BEST_OF_4
from lab.intervals import interval
from tinystory.evaluate.intervals import mean_of

DEMO: dict[str, dict[str, Any]] = json.loads((ROOT / "lab" / "results" / "demo.json").read_text())
STUDENTS: list[dict[str, Any]] = json.loads((ROOT / "lab" / "gain.json").read_text())
READERS: list[dict[str, Any]] = json.loads((ROOT / "lab/results/readings.json").read_text())
# pairs by comparison and seed: won by the control, by interaction, or a tie
BLIND: dict[str, dict[str, dict[str, int]]] = json.loads(
    (ROOT / "lab/results/blind.json").read_text()
)
# gains from a teacher's texts, and blind comparisons with the student before them, by seed
WRITING: dict[str, Any] = json.loads((ROOT / "lab/results/writing.json").read_text())
# gains and measures by number of scores
SCORES: list[dict[str, Any]] = json.loads((ROOT / "lab/results/scores.json").read_text())
SENTENCES: list[dict[str, Any]] = json.loads((ROOT / "lab/results/sentences.json").read_text())
TWO_MORE: list[dict[str, Any]] = json.loads((ROOT / "lab/results/sentences_again.json").read_text())
# the gains of readings.json: controls without training, then interaction and trained controls
(
    COOLER,
    BEST_BEFORE,
    ENDED_BEFORE,
    BEST_AFTER,
    READ,
    IN_RANDOM_ORDER,
    LIKELIHOOD,
    CONSTANT,
    TWO_STEPS,
) = READERS[0]["gain"]
# the gains of lab/gain.json: controls without training, two seeds of interaction, shuffled scores
LOWER, _, FIRST, SECOND, SHUFFLED = STUDENTS[0]["gain"]


def best_temperature() -> str:
    """The row before interaction, at a lower temperature, with the highest score."""
    rows = [name for name in DEMO if name.startswith("before, temperature")]
    return max(rows, key=lambda name: DEMO[name]["score"])


def test_the_readmes_table_of_the_demo():
    before, after = "before interaction", "the demo"
    columns = [before, best_temperature(), "`--reward constant`", "`shuffled: `", after]
    for words, key, shown in (
        ("teacher's score", "score", "{:.1f}"),
        ("texts that are stories", "story", "{:.0%}"),
        ("clusters among 64", "clusters", "{:.0f}"),
        ("bits per byte", "best_bits", "{:.3f}"),
    ):
        expected = [shown.format(DEMO[name][key]).replace("%", " %") for name in columns]
        assert row("README.md", words)[1:] == expected


def test_the_table_of_the_demo():
    rows = {
        "before interaction": "before interaction",
        "before, at the best temperature": best_temperature(),
        "before, best of 4 by log-likelihood": "before, best of 4 by likelihood",
        "before, best of 4 by reward": "before, best of 4 by reward",
        "the demo": "the demo",
        "`--grades 64": "`--grades 64 --steps 8 --eval-every 0`",
        "`--control`": "`shuffled: `",
        "`--reward likelihood`": "`--reward likelihood`",
        "`--reward constant`": "`--reward constant`",
    }
    for words, name in rows.items():
        measures = DEMO[name]
        bits = measures["best_bits"]
        assert row("lab/results/demo.md", words)[1:] == [
            f"{measures['reward']:.3f} ± {measures['standard_error']:.3f}",
            f"{measures['score']:.2f}",
            *(f"{measures[key]:.2f}" for key in ("story", "ended", "distinct_4")),
            f"{measures['clusters']:.0f}, {measures['largest']:.0f}",
            "" if bits is None else f"{bits:.3f}",
        ]


def test_what_the_demo_gains_over_its_controls():
    few = "`--grades 64 --steps 8 --eval-every 0`"
    text = text_of("lab/results/demo.md")
    for name, words in {
        "`shuffled: `": "{} above the same scores in random order",
        "`--reward constant`": "{} above a constant score",
        "`--reward likelihood`": "{} above likelihood",
        "before, best of 4 by reward": "{} above the best of 4",
        best_temperature(): "{} above the best temperature",
        few: "({} more)",
    }.items():
        pairs = zip(DEMO["the demo"]["reward_by_seed"], DEMO[name]["reward_by_seed"], strict=True)
        gains = [control - demo if name == few else demo - control for demo, control in pairs]
        assert words.format(interval(gains)) in text


def test_what_the_findings_say_of_the_demo():
    before, demo, shuffled = (
        DEMO[name] for name in ("before interaction", "the demo", "`shuffled: `")
    )
    text = text_of("lab/findings.md")
    assert f"from {100 * before['story']:.0f} to {100 * demo['story']:.0f} %" in text
    assert f"score from {before['score']:.1f} to {demo['score']:.1f} of 9" in text
    assert f"they are {100 * shuffled['story']:.0f} % and {shuffled['score']:.1f}" in text
    assert f"rise from {before['best_bits']:.3f} to {demo['best_bits']:.3f}" in text
    assert f"to {shuffled['best_bits']:.3f} with the same scores in random order" in text


def gains(words: int, name: str) -> list[float]:
    return [student["gain"][name] for student in STUDENTS if student["words"] == words]


def test_the_gain_of_fifteen_students_and_of_their_scores():
    with_first, with_second, shuffled = (
        gain.seed_means(STUDENTS, [student["gain"][name] for student in STUDENTS])
        for name in (FIRST, SECOND, SHUFFLED)
    )
    gained = [sum(pair) / 2 for pair in zip(with_first, with_second, strict=True)]
    above = [mean - control for mean, control in zip(with_first, shuffled, strict=True)]
    for page, sentence in {
        "lab/results/english.md": "interaction gains {}. Shuffled scores gain {} less",
        "lab/findings.md": "of the best of four**: {}. Shuffled scores gain {} less",
    }.items():
        assert sentence.format(interval(gained), interval(above)) in text_of(page)


def test_the_table_of_gains_by_words_of_pretraining():
    page = (ROOT / "lab/results/english.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) M \| (.*) \|$", page, re.M)
    by_words = gain.by_words(STUDENTS)
    assert [float(words) for words, _ in rows] == [words / 1e6 for words in by_words]
    for (_, row_cells), (words, group) in zip(rows, by_words.items(), strict=True):
        before = interval([student["rows"][student["before"]]["coherence"] for student in group])
        shown = [
            before,
            *(interval(gains(words, name)) for name in (FIRST, SECOND, SHUFFLED, LOWER, BEST_OF_4)),
        ]
        assert row_cells.split(" | ")[:6] == [str(each) for each in shown]


def test_the_words_of_pretraining_that_interaction_stands_for(capsys):
    gain.print_equivalents(STUDENTS, (FIRST, BEST_OF_4))
    rows = capsys.readouterr().out.splitlines()
    row = next(row for row in rows if row.startswith("| 800,000 "))
    shown = re.findall(r"[\d.]+ \[[\d., ]+\]", row)
    text = text_of("lab/findings.md")
    assert f"stands for {shown[0]} times the words" in text
    assert f"the best of four for {shown[1]}" in text


def shown_mean(students: list[dict[str, Any]], name: str, key: str, decimals: int) -> str:
    """The mean of a measure over the students, as in a table; "" if none has it."""
    mean = mean_of(student["rows"][name].get(key) for student in students)
    return "" if mean is None else f"{mean:.{decimals}f}"


def win_rates(counts: dict[str, dict[str, int]], winner: str) -> str:
    """The mean over the seeds of the rate of won pairs, a tie counting one half, with its interval."""
    return str(
        interval(
            [(wins[winner] + wins["tie"] / 2) / sum(wins.values()) for wins in counts.values()]
        )
    )


def test_the_table_of_every_story_read():
    rows = {
        ("before",): READERS[0]["before"],
        ("temperature 0.4",): COOLER,
        ("before", "first of four"): ENDED_BEFORE,
        ("before", "best of four"): BEST_BEFORE,
        ("**every story read**",): READ,
        ("every story read", "best of four"): BEST_AFTER,
        ("same scores in random order",): IN_RANDOM_ORDER,
        ("own likelihood",): LIKELIHOOD,
        ("likelihood", "two steps"): TWO_STEPS,
        ("a constant score",): CONSTANT,
    }
    check_rows("| students | coherence | gain |", READERS, rows)


def check_rows(
    header: str, students: list[dict[str, Any]], rows: dict[tuple[str, ...], str]
) -> None:
    """The table below `header` on the page of English has the means of these rows over the
    students, in this order; the first cell has all the words, and the seeds if some have no such
    row."""
    page = (ROOT / "lab/results/english.md").read_text()
    table = page.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    for (words, name), line in zip(rows.items(), table, strict=True):
        first_cell, *others = cells(line)
        assert all(word in line for word in words)
        with_row = [student for student in students if name in student["rows"]]
        seeds = "; ".join(str(student["seed"]) for student in with_row)
        assert (f"({seeds})" in first_cell) == (len(with_row) < len(students))
        gains = [student["gain"][name] for student in with_row if name in student["gain"]]
        mean = partial(shown_mean, with_row, name)
        assert others == [
            mean("coherence", 3),
            ("" if not gains else f"{gains[0]:.3f}" if len(gains) == 1 else str(interval(gains))),
            mean("ended", 2),
            mean("clusters", 0),
            mean("score", 1),
            mean("best_bits", 3),
        ]


def test_what_the_pages_say_of_every_story_read():
    def more(name: str, control: str) -> str:
        gains = [
            student["gain"] for student in READERS if {name, control} <= student["gain"].keys()
        ]
        return str(interval([each[name] - each[control] for each in gains]))

    english, findings = text_of("lab/results/english.md"), text_of("lab/findings.md")
    gain_of_reading = interval([student["gain"][READ] for student in READERS])
    assert (
        f"interaction gains {gain_of_reading}, {more(READ, IN_RANDOM_ORDER)} more than" in english
    )
    assert f"and {more(READ, CONSTANT)} more than a constant score" in english
    assert f"Likelihood gains {more(LIKELIHOOD, READ)} more" in english
    assert f"interaction gains {more(READ, BEST_BEFORE)} more than it" in english
    assert f"interaction gains {more(READ, TWO_STEPS)} more with" in english
    assert f"gain {gain_of_reading} nats per token" in findings
    assert f"(by {more(LIKELIHOOD, READ)})" in findings
    lost = interval([-student["gain"][IN_RANDOM_ORDER] for student in READERS])
    assert f"The same scores in random order lose {lost}" in findings


def test_the_table_by_number_of_scores():
    page = (ROOT / "lab/results/english.md").read_text()
    header = "| scores | gain | clusters of 64 |"
    table = page.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    for number, line in zip(SCORES[0]["gain"], table, strict=True):
        students = [student for student in SCORES if number in student["gain"]]
        gains = [student["gain"][number] for student in students]
        label = cells(line)[0].partition(":")[0]
        seeds = "; ".join(str(student["seed"]) for student in students)
        shown_seeds = "" if len(students) == len(SCORES) else f" ({seeds})"
        assert label.replace("3 072", "3072") == number + shown_seeds
        assert cells(line)[1:] == [
            str(interval(gains)) if len(gains) > 1 else f"{gains[0]:.3f}",
            shown_mean(students, number, "clusters", 0),
            shown_mean(students, number, "first_r_squared", 2),
        ]
    english = text_of("lab/results/english.md")
    for number, fewer, words in (
        ("768", "256", "768 scores gain {} more than 256"),
        ("3072", "768", "all scores {} more than 768"),
    ):
        more = [student["gain"][number] - student["gain"][fewer] for student in SCORES]
        assert words.format(interval(more)) in english


def test_the_table_of_scores_at_each_sentences_end():
    page = (ROOT / "lab/results/english.md").read_text()
    header = "| reward | coherence | gain | ended |"
    table = page.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    for name, line in zip(SENTENCES[0]["rows"], table, strict=True):
        students = [student for student in SENTENCES if name in student["rows"]]
        seeds = "; ".join(str(student["seed"]) for student in students)
        gains = [student["gain"][name] for student in students if name in student["gain"]]
        mean = partial(shown_mean, students, name)
        assert cells(line) == [
            name if len(students) == len(SENTENCES) else f"{name} ({seeds})",
            mean("coherence", 3),
            str(interval(gains)) if gains else "",
            mean("ended", 2),
            mean("clusters", 0),
            mean("score", 1),
        ]


def gained(*names: str) -> list[float]:
    """By student, the mean gain of rows of sentences.json."""
    gains = [student["gain"] for student in SENTENCES]
    return [fmean(gain[name] for name in names) for gain in gains]


def above(control: str, *names: str) -> str:
    """How much more coherence than the control rows have on the same openings: their mean by
    student, with its interval over the students that have all of them."""
    differences = []
    for student in SENTENCES:
        by_name = [student["above"][name].get(control) for name in names]
        if None not in by_name:
            differences.append(fmean(by_name))
    return str(interval(differences))


def test_what_the_pages_say_of_scores_at_each_sentences_end():
    english, findings = text_of("lab/results/english.md"), text_of("lab/findings.md")
    names = [*SENTENCES[0]["rows"]]
    before, cooler, best, best_at_04, first, second, mean, *others, constant = names
    first_at_055, mean_at_055, at_the_end, shuffled, likelihood, _, averaged_likelihood = others
    more_than_its_runs = [
        of_mean - of_runs
        for of_mean, of_runs in zip(gained(mean), gained(first, second), strict=True)
    ]
    for sentence in (
        f"gains {interval(gained(mean))}: {above(shuffled, mean)} more than random order",
        f"{above(constant, mean)} more than a constant score",
        f"{above(best, mean)} more than the best of four",
        f"and {above(averaged_likelihood, mean)} more than two steps of likelihood averaged too",
        f"**One run** gains {interval(gained(first, second))}",
        f"{above(best, first, second)} more than the best of four",
        f"The mean gains {interval(more_than_its_runs)} more than its runs",
        f"the mean gains {interval(gained(mean_at_055))} with",
        f"{above(best, mean_at_055)} more than the best of four",
        f"{above(averaged_likelihood, mean_at_055)} more than two steps of likelihood averaged too",
        f"alone gains {interval(gained(cooler))}",
        f"the best of four there {interval(gained(best_at_04))}",
        f"gains {above(cooler, mean)} more than the former, and {above(best_at_04, mean)} more than",
        f"The first runs gain {interval(gained(first_at_055))} with",
        f"By sentence gains {above(at_the_end, first, second)} more",
        f"(the mean gains {above(likelihood, mean)} more)",
        f"{above(shuffled, first, second)} more than random order, "
        f"{above(constant, first, second)} more than a constant score and",
    ):
        assert sentence in english
    for sentence in (
        f"gain {interval(gained(mean))} nats per token, {above(best, mean)} more than the best of four",
        f"{above(best_at_04, mean)} more than the best of four at temperature 0.4",
        f"leave {shown_mean(SENTENCES, mean, 'clusters', 0)} clusters among",
    ):
        assert sentence in findings
    for key, words in (
        ("best_bits", "bits per byte at the best temperature go from {} to {}"),
        ("repeated_name", "names at the folded one from {} to {}"),
    ):
        values = (shown_mean(SENTENCES, name, key, 3) for name in (before, mean))
        assert words.format(*values) in english
    pronouns = {shown_mean(SENTENCES, name, "he_or_she", 3) for name in (before, mean)}
    assert len(pronouns) == 1 and f"pronouns stay at {pronouns.pop()}. BLiMP" in english


def test_two_more_students():
    page = (ROOT / "lab/results/english.md").read_text()
    header = "| reward, two more students |"
    table = page.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    for name, line in zip(TWO_MORE[0]["rows"], table, strict=True):
        gains = [student["gain"].get(name) for student in TWO_MORE]
        assert cells(line) == [
            name,
            *("" if gain is None else f"{gain:.3f}" for gain in gains),
            shown_mean(TWO_MORE, name, "ended", 2),
            shown_mean(TWO_MORE, name, "clusters", 0),
            shown_mean(TWO_MORE, name, "score", 1),
            shown_mean(TWO_MORE, name, "best_bits", 3),
        ]

    english = text_of("lab/results/english.md")
    of_five, of_two = "by sentence, the mean of the two runs", "by sentence, the mean of two runs"
    gains = gained(of_five) + [student["gain"][of_two] for student in TWO_MORE]
    assert f"Over all seven students, the mean of two runs gains {interval(gains)}," in english
    for control, words in (
        ("the same scores in random order", "random order"),
        ("temperature 0.4", "temperature 0.4"),
        ("before, best of 4 by the two judges", "the best of four"),
        ("temperature 0.4, best of 4 by the two judges", "the best of four at temperature 0.4"),
        (
            "likelihood, in two steps, the mean of two runs",
            "two steps of likelihood averaged too",
        ),
    ):
        differences = [student["above"][of_five][control] for student in SENTENCES]
        for student in TWO_MORE:
            differences.append(student["gain"][of_two] - student["gain"][control])
        assert f"{interval(differences)} more than {words}" in english
    fewer = [
        student["rows"]["before"]["clusters"] - student["rows"][name]["clusters"]
        for students, name in ((SENTENCES, of_five), (TWO_MORE, of_two))
        for student in students
    ]
    half = interval(fewer).half
    assert f"It has {fmean(fewer):.1f} ± {half:.1f} clusters fewer than before" in english


def test_the_picture_of_coherence_and_diversity():
    names = {
        "temperature 0.4": "temperature 0.4",
        "before, best of 4 by the two judges": "best of 4",
        "temperature 0.4, best of 4 by the two judges": "best of 4, at 0.4",
        "by sentence": "by sentence",
        "by sentence, the mean of the two runs": "mean of two runs",
        "the mean of the two runs, at temperature 0.55": "mean, at 0.55",
        "at the end of the story": "at the end, three students",
        "the same scores in random order": "random order",
        "the student's own likelihood as the score": "likelihood",
        "likelihood, in two steps, the mean of two runs": "likelihood, two steps, mean of two",
    }
    picture = gain.draw_clusters(SENTENCES, "before", names, ["mean of two runs", "mean, at 0.55"])
    assert (ROOT / ".github/diversity.svg").read_text() == picture


def test_the_blind_comparisons():
    text = text_of("lab/results/english.md")
    for control, words in {
        "before": "to before in {}",
        "a constant score": "to a constant score in {}",
        "before, best of four": "to the best of four before in {}",
        "likelihood, two steps": "to two steps of likelihood in {}",
        "likelihood": "to likelihood in only {}",
        "mean of two runs: before": "the mean of two runs to before in {}",
        "mean of two runs: before, best of four": "from the best of four ({})",
        "mean of two runs: likelihood, two steps": "from two steps of likelihood averaged too ({})",
    }.items():
        assert words.format(win_rates(BLIND[control], "interaction")) in text
    of_first_runs = [
        win_rates(BLIND[f"by sentence: {control}"], "interaction")
        for control in ("before", "before, best of four", "likelihood, two steps")
    ]
    assert f"The first runs: {', '.join(of_first_runs)} (likelihood not averaged)" in text


def test_the_table_of_a_teacher_that_writes():
    page = (ROOT / "lab/results/writing.md").read_text()
    students = WRITING["students"]
    header = "| learned from | mean gain |"
    table = page.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    words = (
        *("before", "temperature 0.4", "best of four", "every story", "real stories"),
        *("Qwen: continuations, read", "Qwen: continuations, preferred", "Qwen: corrections, read"),
        *("Qwen: corrections, preferred", "read, then preferred", "corrections of other stories"),
        *("better of two", "two at random", "64 answers", "in random order", "64 grades"),
        *("a constant score", "large model: corrections, read"),
        *("large model: corrections, preferred", "128 corrections, read"),
        *("128 corrections of other", "real stories", "best of four"),
    )
    for name, word, line in zip(students[0]["rows"], words, table, strict=True):
        assert word in cells(line)[0]
        assert ("(200 stories)" in line) == (students[0]["rows"][name]["stories"] == 200)
        gains = [student["gain"][name] for student in students if name in student["gain"]]
        mean = partial(shown_mean, students, name)
        assert cells(line)[1:] == [
            str(interval(gains)) if gains else "",
            mean("ended", 2),
            *(mean(key, 0) for key in ("clusters", "words")),
            mean("score", 1),
        ]


def test_the_blind_comparisons_of_a_teacher_that_writes():
    text = text_of("lab/results/writing.md")
    for name, words in {
        "128 large corrections, read": "128 corrections by the large model in {}",
        "correction, prefer": "preferred Qwen's corrections in {}",
        "as many words of real stories, read": "read real stories in {}",
    }.items():
        assert words.format(win_rates(WRITING["blind"][name], "taught")) in text
