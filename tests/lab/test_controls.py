"""lab/controls.py: what each control changes in a run, and that it changes nothing afterwards."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT, metrics, read_lines

import lab
import train_interact
from lab import controls, verdicts
from lab.reader import Reader
from tinystory.config import InteractConfig
from tinystory.evaluate.control import Comparison
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.run.errors import UserError
from tinystory.student.generate import Story


def run_of(place, out, control):
    """A run with sixteen of forty stories graded, by their number of letters, under a control."""
    letters = out.parent / "letters.py"
    letters.write_text(
        "def score(opening, stories):\n    return [(1 + len(s)) / 1000 for s in stories]\n"
    )
    flags = ["--reward", str(letters), "--grades", "16", "--steps", "2", "--diversity", "0"]
    flags += ["--stories-per-step", "20", "--length-weight", "0", "--unfinished", "1"]
    with controls.CHANGES[control]():
        train_interact.main([*SHORT, *flags, "--init", str(place / "p"), "--out", str(out)])
    return read_lines(out / "stories.jsonl")


def graded(stories):
    return [story for story in stories if story["reply"] == ""]


def test_a_random_choice_is_another_one_and_repeats_itself(place, tmp_path):
    runs = [
        run_of(place, tmp_path / name, control)
        for name, control in [("a", "random choice"), ("b", "random choice"), ("c", "")]
    ]
    one, again, chosen = ([story["index"] for story in graded(stories[:20])] for stories in runs)
    assert one == again and len(one) == len(chosen) == 8


def test_without_a_model_only_graded_stories_have_a_reward(place, tmp_path):
    stories = run_of(place, tmp_path / "a", "no model")
    assert len(graded(stories)) == 16
    assert all((story["reward"] is None) == (story["reply"] != "") for story in stories)
    assert "predicted" not in metrics(tmp_path / "a")[0]
    stories = run_of(place, tmp_path / "b", "")  # the control is over
    assert all(story["reward"] is not None for story in stories)


def test_the_readers_part_is_given_at_the_end_of_each_sentence(tokenizer, monkeypatch):
    """One story has two sentences and an end token; the other is cut off in its only sentence."""
    parts = {"Tom ran. Mia saw a ball!": [-0.4, 0.1], "Ben sat": [-0.2]}
    judges = SimpleNamespace(NO_COHERENCE=-1.0, score=None)
    monkeypatch.setattr(lab, "two_judges", judges, raising=False)
    monkeypatch.setattr(
        Reader, "by_sentence", lambda self, pairs: [np.array(parts[text]) for _, text in pairs]
    )
    # in the place of PPO's step: the token rewards
    monkeypatch.setattr(
        ppo, "step", lambda policy, batch, rewards: ppo.token_rewards(batch, rewards, 0.0)
    )
    config = InteractConfig(init="x", diversity=0.5, length_weight=0.25, unfinished=0.8)
    stories = []
    for index, (text, ended) in enumerate(zip(parts, ("eos", "length"), strict=True)):
        ids = tokenizer.encode(" " + text)
        tokens = torch.tensor(ids + [tokenizer.eos] * (ended == "eos"))
        zeros = torch.zeros(len(tokens))
        opening = torch.tensor([tokenizer.eos])
        stories.append(Story(7 + index, "Once", text, opening, tokens, zeros, zeros, zeros, ended))
    batch = collate(stories, torch.device("cpu"))
    batch.ref_logprobs = batch.logprobs
    with controls.CHANGES["by sentence"]():
        Reader.by_sentence(None, [("Once", text) for text in parts])
        rewards = train_interact.story_rewards(config, stories, [0.6, 0.7], [0.5, 1.0])
        by_token = ppo.step(SimpleNamespace(tokenizer=tokenizer), batch, torch.tensor(rewards))
    first, second = by_token.split(batch.lengths.tolist())

    # the sum is the reward of the whole story
    torch.testing.assert_close(torch.stack([first.sum(), second.sum()]), torch.tensor(rewards))
    # with a difference of 0.5, a score counts three quarters, half of it is the reader's
    scale = 0.75 / 1.25 / 2
    places = first.nonzero().flatten().tolist()
    assert tokenizer.decode(stories[0].tokens[: places[0] + 1].tolist()) == " Tom ran."
    assert first[places[0]].item() == pytest.approx(-0.4 * scale)
    before_last = len(first) - 2  # the last token is the end token
    assert places[1:] == [before_last, before_last + 1]
    assert first[before_last].item() == pytest.approx(0.1 * scale)
    # a sentence that was cut off ends at the last token
    assert second.nonzero().flatten().tolist() == [len(second) - 1]
    assert ppo.token_rewards(batch, torch.tensor(rewards), 0.0)[places[0]] == 0  # afterwards


def test_another_reward_has_no_sentences(monkeypatch):
    judges = SimpleNamespace(NO_COHERENCE=-1.0, score=None)
    monkeypatch.setattr(lab, "two_judges", judges, raising=False)
    with controls.CHANGES["by sentence"](), pytest.raises(UserError, match=r"lab/two_judges\.py"):
        train_interact.story_rewards(InteractConfig(init="x"), [], [], [])


def test_a_control_stands_before_the_options():
    assert controls.split("--lam 0.9") == ("", "--lam 0.9")
    assert controls.split("") == ("", "")
    assert controls.split("shuffled: --grades 64") == ("shuffled", " --grades 64")
    assert controls.split("--teacher-url http://127.0.0.1:9")[0] == ""
    with pytest.raises(UserError, match="'mixed' is not a control: give one of shuffled"):
        controls.split("mixed: --grades 64")


def test_verdicts_are_counted_by_measure(capsys):
    """Three controls that differ much, and a first control far below the run."""

    def measures(words):
        return {"words": [words - 0.1, words, words + 0.1]}

    controls = [measures(words) for words in (1.0, 5.0, 9.0)]
    one = Comparison("shuffled", 40, measures(0.0), measures(5.0), controls, controls)
    verdicts.print_table([one, one])
    assert capsys.readouterr().out.splitlines()[-1] == "| words | 0 | 0 | 0 | 2 | 2 |"
