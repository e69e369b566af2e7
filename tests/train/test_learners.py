"""Every learner as a user runs it: stopped and resumed, refused."""

import pytest
from conftest import SHORT, assert_same_bits, cli, metrics
from runs import interrupted_at

import train_interact as interact
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.command_line import parse
from tinystory.config.presets import INTERACT_PRESETS, LEARNER_DEFAULTS
from tinystory.rl import learners
from tinystory.rl.learners import check
from tinystory.rl.start import learning_rate_for
from tinystory.run.errors import UserError
from tinystory.student import checkpoint

LEARNERS = [
    "--learner gae",
    "--learner rloo --stories-per-opening 3",
    "--learner sft-best",
    "--learner grpo --stories-per-opening 2 --kl-in loss",
    "--learner dr_grpo --stories-per-opening 2 --epochs 2",
    "--learner dpo --stories-per-opening 3 --minibatch-size 2 --epochs 2 --kl-coef 0.1",
    "--minibatch-size 2",
]


@pytest.fixture
def run(place, monkeypatch):
    """A short run of train_interact.py with more options."""
    monkeypatch.setattr("tinystory.run.collapse.WINDOW", 100)  # no advice about these runs
    start = (
        cli("--init {} --reward {}:score", checkpoint.newest(place / "p"), place / "reward.py")
        + SHORT
    )
    return lambda out, *more: interact.main([*start, "--out", str(out), *more])


@pytest.mark.parametrize("options", LEARNERS)
def test_a_stopped_run_resumes_to_the_same_bits(run, tmp_path, options):
    run(tmp_path / "whole", *options.split())
    with interrupted_at(interact, step=3):
        run(tmp_path / "parts", *options.split())
    assert checkpoint.newest(tmp_path / "parts").name == "step_0000003"
    run(tmp_path / "parts", *options.split(), "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [record["words_in"] for record in whole] == [record["words_in"] for record in parts]
    assert any(record["grad_norm"] > 0 for record in whole)  # stories of equal reward have none


def test_the_command_line_offers_the_learners_of_the_table():
    assert list(learners.LEARNERS) == list(LEARNER_DEFAULTS)


def test_a_value_head_learns_and_the_other_learners_have_none(run, tmp_path):
    for learner, more in (("gae", []), ("rloo", ["--stories-per-opening", "2"])):
        run(tmp_path / learner, "--learner", learner, *more)
        state = checkpoint.load_file(checkpoint.newest(tmp_path / learner) / "trainer.safetensors")
        assert ("critic.linear.weight" in state) == (learner == "gae")
        if learner == "gae":
            assert state["critic.linear.weight"].abs().max() > 0
            assert all(record["value_loss"] > 0 for record in metrics(tmp_path / learner))
        else:
            assert not any(name.startswith("critic.") for name in state)
            assert metrics(tmp_path / learner)[-1]["explained_variance"] is None


def test_a_learner_has_defaults_which_a_preset_and_the_user_override():
    def options(argv):
        config = parse(InteractConfig, argv.split())
        check(config)
        return config.stories_per_opening, config.learning_rate, config.kl_coef

    default = InteractConfig()
    assert options("") == (1, default.learning_rate, default.kl_coef)
    assert options("--learner grpo") == (8, default.learning_rate, default.kl_coef)
    assert options("--learner dpo") == (2, 4e-4, 0.1)
    assert options("--learner dpo --learning-rate 1e-4 --stories-per-opening 4") == (4, 1e-4, 0.1)
    paper = INTERACT_PRESETS["paper"]
    assert options("--learner dpo --preset paper") == (2, paper["learning_rate"], paper["kl_coef"])
    for learner in LEARNER_DEFAULTS:
        options(f"--learner {learner}")


def test_the_learning_rate_falls_for_a_wider_student_unless_the_user_gave_one(capsys):
    width = 2 * PretrainConfig.n_embd
    usual = InteractConfig.learning_rate
    for argv, rate in {
        "": usual / 2,
        f"--learning-rate {usual}": usual,
        "--learner dpo": 2e-4,
        "--learner dpo --learning-rate 4e-4": 4e-4,
        "--preset paper": 1e-6,  # for a width of 768
    }.items():
        assert learning_rate_for(parse(InteractConfig, argv.split()), width) == rate
        assert ("is for a width of" in capsys.readouterr().out) == (rate in (usual / 2, 2e-4))
    config = parse(InteractConfig, ["--learning-rate", "1e-3"]).replaced(temperature=1.0)
    assert learning_rate_for(config, width) == 1e-3


def test_a_refusal_names_what_to_give():
    for argv, words in (
        ("--learner ppo", ("--learner gae", "ridge")),
        ("--learner gae --value-coef 0", ("--value-coef",)),
        ("--value-coef 1", ("--value-coef", "gae")),
        (
            "--learner grpo --stories-per-opening 1",
            ("--stories-per-opening 2", "--stories-per-step"),
        ),
        ("--learner sft-best --lam 0.5", ("--lam", "ridge or gae")),
        (
            "--learner dpo --stories-per-opening 1",
            ("--stories-per-opening 2", "--stories-per-step"),
        ),
        ("--learner dpo --stories-per-opening 2 --kl-coef 0", ("--kl-coef 0", "beta")),
        ("--learner dpo --stories-per-opening 2 --kl-in loss", ("--kl-in", "rloo")),
        ("--learner dpo --stories-per-opening 2 --minibatch-size 3", ("--minibatch-size", "even")),
    ):
        with pytest.raises(UserError) as error:
            check(parse(InteractConfig, argv.split()))
        assert all(word in str(error.value) for word in words)
