"""average.py: the mean of the weights of two interactions of one student."""

import copy

import pytest
import torch
from conftest import SHORT, cli, fails

import train_interact as interact
from scripts import average
from tinystory.run.errors import UserError
from tinystory.student import checkpoint


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Two runs of one student, and a run of it at another temperature."""
    folder = tmp_path_factory.mktemp("average")
    for name, seed, temperature in (("a", 1, 0.5), ("b", 2, 0.5), ("warm", 3, 0.6)):
        options = cli("--init {} --out {} --reward constant", place / "p", folder / name)
        options += cli("--seed {} --temperature {}", seed, temperature)
        interact.main([*SHORT, *options])
    return folder


def test_the_mean_is_the_students_and_its_words_are_those_of_both_runs(runs, tmp_path, capsys):
    # the newest, because the best of a run may be the student before interaction
    newest_a, newest_b = (checkpoint.newest(runs / name) for name in ("a", "b"))
    average.main([str(newest_a), str(newest_b), str(tmp_path / "mean")])
    printed = capsys.readouterr().out
    assert f"written: {tmp_path / 'mean'}" in printed and "(step 4)" in printed
    mean, _, history = checkpoint.load(checkpoint.find(tmp_path / "mean"))
    a, _, a_history = checkpoint.load(newest_a)
    b, _, b_history = checkpoint.load(newest_b)
    for name, tensor in mean.state_dict().items():
        expected = (a.state_dict()[name].double() + b.state_dict()[name].double()) / 2
        assert torch.equal(tensor, expected.float()), name
    for name in average.SPENT:
        assert history[name] == a_history[name] + b_history[name] > 0
    assert history["words"] == a_history["words"]


def test_every_weight_is_the_mean(student):
    others = []
    for factor in (1, 2, 6):
        other = copy.deepcopy(student)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(factor)
        others.append(other)
    average.load_mean(student, others)
    for name, tensor in others[0].state_dict().items():  # the mean of the factors is 3
        torch.testing.assert_close(student.state_dict()[name], 3 * tensor)


def test_words_of_an_earlier_interaction_are_counted_once():
    start = {"words": 5, "interaction_words_in": 100, "interaction_words_out": 1000}
    a = start | {"interaction_words_in": 103, "interaction_words_out": 1200}
    b = start | {"interaction_words_in": 104, "interaction_words_out": 1030}
    total = {"words": 5, "interaction_words_in": 107, "interaction_words_out": 1230}
    assert average.summed(start, [a, b]) == total
    # a student that has not interacted before, and a run without a step
    assert average.summed({"words": 5}, [{"words": 5}, total]) == total


def test_errors_say_what_to_do(runs, place, tmp_path, capsys):
    a, b, out = str(runs / "a"), str(runs / "b"), str(tmp_path / "mean")
    assert "two runs or more" in fails(average.main, [a, out], capsys)
    error = fails(average.main, [a, str(runs / "warm"), out], capsys)
    assert "another temperature" in error and "--temperature" in error
    assert "not of a run of train_interact.py" in fails(
        average.main, [a, str(place / "p"), out], capsys
    )
    newest = str(checkpoint.newest(runs / "a"))
    for same in (a, newest):
        assert "of one run" in fails(average.main, [a, b, same, out], capsys)
    assert not (tmp_path / "mean").exists()
    # a run's own files, and whatever is in a folder, stay
    for taken in (a, b + "/checkpoints/mean"):
        assert taken in fails(average.main, [a, b, taken], capsys)
    with pytest.raises(UserError):
        checkpoint.find(runs / "a/checkpoints/mean")
