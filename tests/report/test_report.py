"""The report has the right numbers, shows a model's output as text, and stays small and streaming
however long the run."""

import json
import math
import random
import re
import shlex
import weakref
from html.parser import HTMLParser

import numpy as np
import pytest

from tinystory.report.before_after import followed
from tinystory.report.run import RANDOM, drawn, first_and_last, live_report, write_report
from tinystory.run.errors import UserError
from tinystory.run.log import RunLog
from tinystory.run.records import EVALUATIONS, STORIES

EVIL = "</p></article><script>alert(1)</script><img src=x onerror=y>&lt;\x00\x1b[31m\u202e\ud800 {name} %s"
VOID = {"meta", "path", "rect", "circle"}


def test_escape_sequences_of_a_folders_name_and_of_a_device_reach_no_page(tmp_path):
    run = tmp_path / "run\x1b[2J"
    with RunLog(run, resume_step=None) as log:
        log.config({"student": {"parameters": 1, "corpus": ["\x1b[31m"]}, "scored_by": "\x1b[1m"})
        log.metrics(step=1, reward_mean=0.5)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"device": "\x1b]0;owned\x07"}))
    text = write_report(run).read_text()
    assert "owned" in text and "run[2J" in text and text.replace("\n", "").isprintable()


def story(step, index, reward=0.5, **other):
    record = {
        "step": step,
        "index": index,
        "opening": "Once upon a time,",
        "story": f"a cat ran {step} {index}.",
        "reply": "2 1 2",
        "scores": {"readability": 2, "coherence": 1, "creativity": 2},
        "score": 5 / 9,
        "reward": reward,
        "words": 5,
        "ended": "eos",
    }
    return record | other


def interaction_run(folder, steps=20, stories=()):
    with RunLog(folder, resume_step=None) as log:
        log.config(
            {"teacher_url": "http://127.0.0.1:9/v1", "note": EVIL, "device": "cpu", "steps": 16}
        )
        for step in range(1, steps + 1):
            log.metrics(
                step=step,
                reward_mean=step / 100,
                held_out_reward=0.5,
                score_mode=1.0 if step > 5 else 0.3,
                score_mean=4.5,
                readability_mean=1 + step / 100,
                coherence_mean=1.5,
                creativity_mean=2.0,
                kl=None if step == 3 else step * 0.1,
                kl_coef=0.2,
                entropy=math.nan,
                words_in=100 * step,
                words_out=50 * step,
                unscored=2,
                rollout_s=1.0,
                teacher_s=2.0,
                update_s=1.0,
            )
        if stories:
            log.append(STORIES, stories)


class Page(HTMLParser):
    """Every tag, attribute and text of a page; fails on tags that do not nest."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


def check_self_contained(page):
    assert not page.tags & set(
        "script img link iframe object embed base form audio video use".split()
    )
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action"}
    assert not any(n.startswith("on") for n in names)
    assert not any("url(" in (value or "") for _, value in page.attributes)


def test_the_page_of_a_run_reloads_itself_until_the_run_is_over(tmp_path):
    interaction_run(tmp_path, 12, [story(step, 0) for step in range(1, 13)])
    with pytest.raises(UserError), live_report(tmp_path, True) as update:
        update()
        page = Page(tmp_path / "report.html")
        assert ("http-equiv", "refresh") in page.attributes and ("content", "10") in page.attributes
        assert "UTC · running" in page.text
        check_self_contained(page)
        (tmp_path / "report.html").unlink()
        update()  # not due
        assert not (tmp_path / "report.html").exists()
        raise UserError("the teacher has gone")
    page = Page(tmp_path / "report.html")
    assert ("http-equiv", "refresh") not in page.attributes and "running" not in page.text
    with live_report(tmp_path / "other rank", False) as update:
        update()


def test_the_page_sums_what_a_run_took(tmp_path):
    interaction_run(tmp_path, 20, [story(step, 0) for step in range(1, 21)])
    text = Page(write_report(tmp_path)).text
    assert (
        "From step 10: all stories of the last 5 steps had the same score (4.5 in the last)" in text
    )
    assert "words_in2,000words_out1,000kl_coef0.2rollout_s20teacher_s40update_s20unscored40" in text


def test_what_models_and_servers_write_stays_text(tmp_path):
    stories = [
        story(1, 0, story=EVIL, opening=EVIL),
        story(1, 1, reward=None, scores=None, score=None, reply=EVIL, story="x"),
    ]
    interaction_run(tmp_path, 2, stories)
    unsaid = dict(opening=EVIL, story=EVIL, scores={EVIL: 1}, reward=0.5, reply=None)
    with RunLog(tmp_path, resume_step=2) as log:
        log.append(
            EVALUATIONS, [story(step, 0, **unsaid) | {"story": f"{EVIL}{step}"} for step in (0, 2)]
        )
    path = write_report(tmp_path)
    page = Page(path)
    check_self_contained(page)
    shown = "</p></article><script>alert(1)</script><img src=x onerror=y>&lt;"
    # both stories drawn at random, one of them with its reply, a pair with a criterion each, which
    # are also the stories of the opening that is followed, and the option
    assert page.text.count(shown) == (2 + 1) + 2 * 3 + 2 * 3 + 1
    assert "default-src 'none'" in path.read_text() and "\x1b" not in path.read_text()


def test_an_endless_story_does_not_make_an_endless_page(tmp_path):
    interaction_run(
        tmp_path, 2, [story(1, index, story=f"{index} " + "la" * 10**6) for index in range(3)]
    )
    assert write_report(tmp_path).stat().st_size < 200_000


def test_a_long_run_is_streamed():
    class Record(dict):
        """A dict that can be watched."""

    alive = weakref.WeakSet()
    most = 0

    class Watched(Record):
        __hash__ = object.__hash__

    def stories():
        nonlocal most
        for n in range(3000):
            record = Watched(story(n // 10, n % 10, reward=math.sin(n)))
            alive.add(record)
            most = max(most, len(alive))
            yield record

    first_and_last(stories())
    # The first step and the last one are kept whole; there are ten stories per step.
    assert most <= 2 * 10 + 10


def told(step, texts):
    return [story(step, i, story=text) for i, text in enumerate(texts)]


def test_the_page_shows_collapse(tmp_path):
    """All stories of the last step are the same. The shown stories are drawn at random, repeats
    included, and are the same each time."""
    rng = random.Random(0)
    different = [" ".join(f"w{rng.randrange(999)}" for _ in range(20)) for _ in range(8)]
    same = ["a girl named Peanut had a scarf and then it was gone for ever", *different[:1]]
    interaction_run(tmp_path, 2, told(1, different) + told(2, same[:1] * 7 + same[1:]))
    path = write_report(tmp_path)
    page = Page(path)
    assert "Step 1: 8 clusters in 8 stories, the largest of 1" in page.text
    assert "Step 2: 2 clusters in 8 stories, the largest of 7" in page.text
    widths = [
        value
        for name, value in page.attributes
        if name == "style" and "flex-grow: 7" in (value or "")
    ]
    assert widths == ["flex-grow: 7"]
    samples = page.text.split("Samples of the last step")[1]
    assert samples.count("named Peanut") >= RANDOM - 1
    first = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def evaluated_run(folder, rewards):
    """A run with an evaluation at each step from 0 on. rewards: of the evaluation's stories, per
    step."""
    interaction_run(folder, len(rewards) - 1, [story(1, 0)])
    with RunLog(folder, resume_step=len(rewards) - 1) as log:
        for step, values in enumerate(rewards):
            texts = [f"word {step} came home"] * len(values)
            if step == 1:
                texts[-1] = ""
            log.append(
                EVALUATIONS,
                [
                    story(step, index, reward=value, story=texts[index])
                    for index, value in enumerate(values)
                ],
            )


def test_one_opening_is_followed_over_the_evaluations(tmp_path):
    """The last with no empty story: the last opening has one after step 1."""
    evaluated_run(tmp_path, [[0.2, 0.3, 0.4], [0.2, 0.3, 0.5], [0.5, 0.3, 0.5]])
    assert [record["index"] for record in followed(tmp_path)] == [1, 1, 1]
    text = Page(write_report(tmp_path)).text
    followed_text = text.split("One opening during interaction")[1].split(
        "Diversity and mode collapse"
    )[0]
    assert all(f"word {step}" in followed_text for step in range(3))


def test_a_followed_story_that_hardly_changed_is_shown_first_and_last_only(tmp_path):
    words = " ".join(f"word{i}" for i in range(40))
    texts = [words, f"{words} more", f"{words} again", f"another {words[::-1]}", words]
    interaction_run(tmp_path, 4)
    with RunLog(tmp_path, resume_step=4) as log:
        log.append(EVALUATIONS, [story(step, 0, story=text) for step, text in enumerate(texts)])
    assert [record["step"] for record in followed(tmp_path)] == [0, 3, 4]


def test_rewards_of_evaluations_have_standard_errors(tmp_path):
    evaluated_run(tmp_path, [[0.2, 0.4], [0.3, 0.7], [0.5, None]])
    bars = re.findall(
        r'class="error" d="M[\d.]+,([\d.]+)V([\d.]+)"', write_report(tmp_path).read_text()
    )
    lengths = [float(low) - float(high) for low, high in bars]
    assert len(lengths) == 2  # none of a single story
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.3)


def test_the_page_says_what_to_run_next(tmp_path):
    interaction_run(tmp_path / "it's a run", 1, [story(1, 0)])
    text = Page(write_report(tmp_path / "it's a run")).text
    folder = shlex.quote(str(tmp_path / "it's a run"))
    assert "What next" in text and f"python scripts/sample.py {folder}" in text


def test_stories_at_random_do_not_depend_on_their_reward():
    indices = []
    for step in range(300):
        indices += [
            each["index"] for each in drawn([[story(step, i, reward=i / 40) for i in range(40)]])
        ]
    assert len(indices) == 300 * RANDOM
    assert abs(np.mean(indices) - 19.5) < 1.5  # the standard error of the mean is 0.3


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 9, 400])
@pytest.mark.parametrize("with_stories", [False, True])
def test_a_run_of_any_length_gives_a_page(tmp_path, steps, with_stories):
    stories = [story(step, 0) for step in range(1, steps + 1)] if with_stories else []
    interaction_run(tmp_path, steps, stories)
    path = write_report(tmp_path)
    check_self_contained(page := Page(path))
    assert not re.search(r"\bnan\b", path.read_text(), re.IGNORECASE) and "None" not in page.text
    assert ("drawn at random" in page.text) == (with_stories and steps > 0)
    before = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == before


def test_a_callable_in_the_teachers_place_gives_rewards_without_scores(tmp_path):
    with RunLog(tmp_path, resume_step=None) as log:
        for step in range(1, 4):
            log.metrics(step=step, reward_mean=step / 10, readability_mean=None, unscored=0)
            log.append(
                STORIES, [story(step, 0, reward=step / 10, scores=None, score=None, reply="")]
            )
    text = Page(write_report(tmp_path)).text
    assert "drawn at random" in text and "Scores" not in text and "without a score" not in text


def test_a_card_says_how_the_reward_was_made(tmp_path):
    stories = [
        story(1, 0, scores=None, score=1.0, difference=0.5),
        story(1, 1, scores=None, score=None, difference=0.6, predicted=0.25),
        story(1, 2),
    ]
    interaction_run(tmp_path, 1, stories)
    text = Page(write_report(tmp_path)).text
    assert "reward 0.5, score 1 of 1, difference 0.5 · 5 words" in text
    assert "reward 0.5, predicted score 0.25 of 1, difference 0.6" in text
    assert "score 5 of 9 (readability 2, coherence 1, creativity 2) · 5 words" in text
    assert "(score × (1 - diversity + diversity × difference) + length_weight" in text


def test_pretraining(tmp_path):
    with RunLog(tmp_path, resume_step=None) as log:
        log.config({"corpus": ["builtin"], "device": "cpu"})
        for step in range(1, 101):
            log.metrics(
                step=step,
                words=step * 1000,
                tokens=step * 1300,
                loss=8 / step,
                val_loss=8 / step if step % 50 == 0 or step == 1 else None,
                val_bits_per_byte=None,
                lr=1e-3,
                grad_norm=1.0,
                tokens_per_s=9000.0,
            )
    page = Page(write_report(tmp_path))
    check_self_contained(page)
    assert "train 0.08" in page.text and "Training words100kTraining tokens130k" in page.text
    assert "bits per byte" not in page.text and "val 0.08" in page.text


def test_pretrainings_page_says_what_is_next_and_why_the_loss_falls_at_its_end(tmp_path):
    for corpus, explained in ([["builtin", "dull"], True], [["builtin"], False], [["dull"], False]):
        with RunLog(tmp_path, resume_step=None) as log:
            log.config({"corpus": corpus})
            log.metrics(step=1, words=10, loss=2.0, val_loss=2.0)
        page = write_report(tmp_path).read_text()
        assert ("when the text comes back" in page) == explained
    assert "scripts/sample.py" in page
    assert "train_interact.py" not in page  # there is no student yet


@pytest.mark.parametrize("last, drawn", [(0.0104, False), (0.02, True)])
def test_a_kl_coefficient_that_hardly_changes_has_no_chart(tmp_path, last, drawn):
    with RunLog(tmp_path, resume_step=None) as log:
        log.config({})
        for step, coefficient in enumerate((0.0096, 0.01, last), 1):
            log.metrics(step=step, reward_mean=0.5, kl=1.0, kl_coef=coefficient)
    page = write_report(tmp_path).read_text()
    assert ("KL coefficient</text>" in page) == drawn
    assert f"<dt>kl_coef</dt><dd>{last}</dd>" in page


def test_pretrainings_page_follows_one_opening_from_noise_to_the_last_story(tmp_path):
    with RunLog(tmp_path, resume_step=None) as log:
        log.metrics(step=1, words=1000, tokens=1300, loss=8.0)
        for step in range(0, 1001, 100):
            text = f"{EVIL} at step {step}."
            log.append(
                EVALUATIONS,
                [story(step, 0, story=text, scores=None, score=None, reward=None, reply=None)],
            )
    page = Page(write_report(tmp_path))
    check_self_contained(page)
    steps = [step for step in range(0, 1001, 100) if f"at step {step}." in page.text]
    assert steps == [0, 100, 200, 400, 800, 1000]
    assert "no score" not in page.text


def test_what_the_teacher_took_is_summed(tmp_path):
    interaction_run(tmp_path / "callable")
    assert "teacher_requests" not in write_report(tmp_path / "callable").read_text()
    with RunLog(tmp_path / "run", resume_step=None) as log:
        for step in range(1, 6):
            log.metrics(
                step=step,
                reward_mean=0.5,
                teacher_requests=70,
                teacher_retries=6,
                teacher_cached=0,
                teacher_tokens_in=40_000,
                teacher_tokens_out=400,
                teacher_cost=0.25 * step,
            )
    page = Page(write_report(tmp_path / "run"))
    for words in ("teacher_requests350", "teacher_retries30", "200k", "2,000", "teacher_cost1.25"):
        assert words in page.text, words
