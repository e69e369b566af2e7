"""The temperature at which a student begins to interact."""

import shutil

import torch
from conftest import SHORT, fails

import train_interact as interact
from tinystory.config import InteractConfig
from tinystory.evaluate import temperature
from tinystory.rl.reward import story_rewards
from tinystory.run.folder import read_config
from tinystory.run.records import read_metrics
from tinystory.student import checkpoint


def test_the_temperature_becomes_the_students_own(place, tmp_path):
    """Policy and reference begin with it, and everything later samples at 1."""
    flags = [*SHORT, "--reward", "constant", "--steps", "1", "--temperature", "0.5"]
    interact.main([*flags, "--init", str(place / "p"), "--out", str(tmp_path / "i")])
    tokens = torch.arange(9)[None]
    before, _, _ = checkpoint.load(checkpoint.newest(place / "p"))
    start, _, _ = checkpoint.load(tmp_path / "i/checkpoints/start")
    with torch.no_grad():
        torch.testing.assert_close(start(tokens), 2 * before(tokens), rtol=1e-4, atol=1e-4)
    (record,) = read_metrics(tmp_path / "i")
    assert abs(record["kl"]) < 0.3  # the step's stories are drawn before it changes anything


def test_the_temperature_of_the_highest_mean_is_the_best():
    rewards = {1.0: [0.5, 0.1], 0.5: [0.4, 0.3], 0.4: [0.35, 0.35]}
    assert temperature.best_temperature(rewards) == 0.5  # and not the lower one of the same mean
    assert temperature.best_temperature(rewards | {1.0: [0.4, 0.4]}) == 1.0
    assert temperature.best_temperature({1.0: [0.1, None], 0.5: [0.2, 0.9]}) == 0.5
    assert temperature.best_temperature({1.0: [None], 0.5: [None]}) == 1.0


def test_a_few_grades_try_few_stories():
    def count(grades):
        return temperature.stories_per_temperature(InteractConfig(grades=grades))

    assert [count(64), count(768), count(0)] == [8, 32, 32]


def test_the_temperature_with_the_highest_reward_is_chosen(place, tmp_path, monkeypatch, capsys):
    means = [0.1, 0.2, 0.5, 0.3, 0.2]  # one per temperature that is tried
    sizes = []

    def rewards_of(config, stories, *more):
        sizes.append(len(stories))
        if len(sizes) <= len(means):
            return [means[len(sizes) - 1]] * len(stories)
        return story_rewards(config, stories, *more)

    monkeypatch.setattr(temperature, "story_rewards", rewards_of)
    run = tmp_path / "i"
    flags = [*SHORT, "--reward", "constant", "--steps", "1", "--temperature", "0"]
    interact.main([*flags, "--init", str(place / "p"), "--out", str(run)])
    chosen = temperature.TEMPERATURES[2]
    assert sizes[: len(means)] == [temperature.STORIES] * len(means)
    assert f"temperature {chosen}; mean reward of 32 stories" in capsys.readouterr().out
    options = read_config(run)["options"]
    assert options["temperature"] == chosen
    assert options["tried_temperatures"] == dict(
        zip(map(str, temperature.TEMPERATURES), means, strict=True)
    )
    tokens = torch.arange(9)[None]
    before, _, _ = checkpoint.load(checkpoint.newest(place / "p"))
    start, _, _ = checkpoint.load(run / "checkpoints/start")
    with torch.no_grad():
        torch.testing.assert_close(start(tokens), before(tokens) / chosen, rtol=1e-4, atol=1e-4)

    interact.main(["--out", str(run), "--resume", "--steps", "2"])
    assert len(read_metrics(run)) == 2
    assert read_config(run)["options"] == options | {"resume": True, "steps": 2}


def test_the_trial_counts_against_the_budget(place, tmp_path, capsys, monkeypatch):
    """A story is 16 words: the trial 160 times, a step 6 times and an evaluation 4 times 16."""
    monkeypatch.setattr("tinystory.data.tokenizer.Tokenizer.decode", lambda self, ids: "w " * 16)
    trial = temperature.STORIES * len(temperature.TEMPERATURES)
    needed = 16 * (trial + 6 + 2 * 4)
    flags = [*SHORT, "--init", str(place / "p"), "--reward", "constant", "--temperature", "0"]
    flags += ["--out", str(tmp_path / "i"), "--budget-words-out"]
    line = fails(interact.main, [*flags, str(needed - 1)], capsys)
    assert "does not suffice for the trial of --temperature 0 (160 stories), one step" in line
    interact.main([*flags, str(needed)])
    assert [record["words_out"] for record in read_metrics(tmp_path / "i")] == [needed]
    counters = checkpoint.read_counters(checkpoint.newest(tmp_path / "i"))
    assert counters["words_out"] == needed


def test_a_run_killed_before_its_first_checkpoint_counts_the_words_of_the_trial(place, tmp_path):
    """As if killed when config.json was written, which has the chosen temperature."""
    run = tmp_path / "i"
    init = ["--init", str(place / "p"), "--out", str(run)]
    interact.main([*SHORT, *init, "--reward", "random", "--steps", "1", "--temperature", "0"])
    counters = checkpoint.read_counters(checkpoint.newest(run))
    options = read_config(run)["options"]
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "config.json":
            path.unlink()
    interact.main([*init, "--resume"])
    assert checkpoint.read_counters(checkpoint.newest(run)) == counters
    assert read_config(run)["options"] == options | {"resume": True}
