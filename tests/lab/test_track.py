"""lab/track.py: the values in a tracker, read by the tracker's reader, are those of
metrics.jsonl."""

import sys

import pytest
from conftest import SHORT, fails, metrics

import train_interact
from lab import track
from tinystory.report.before_after import from_start
from tinystory.run.folder import locked
from tinystory.run.log import RunLog
from tinystory.run.records import read_metrics


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """An interaction of four steps, evaluated at 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("tracked") / "i"
    reward = f"{place / 'reward.py'}:score"
    argv = [*SHORT, "--init", str(place / "p"), "--out", str(folder), "--reward", reward]
    train_interact.main(argv)
    return folder


def numbers_by_step(run):
    records = from_start(run, read_metrics(run))
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    return {record["step"]: track.numbers_of(record) for record in records}


def test_tensorboard_reads_back_what_metrics_jsonl_holds(run, capsys):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    for _ in range(2):  # a second call replaces the first
        track.main([str(run), "tensorboard"])
        assert f"tensorboard --logdir {run / 'tensorboard'}\n" in capsys.readouterr().out
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={TENSORS: 0})
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for tag in {*events.Tags()["tensors"]} - {"stories/text_summary"}:
        for event in events.Tensors(tag):
            numbers = steps.setdefault(event.step, {})
            assert tag not in numbers
            numbers[tag] = make_ndarray(event.tensor_proto).item()
    assert steps == numbers_by_step(run)
    tables = {
        event.step: make_ndarray(event.tensor_proto).item().decode()
        for event in events.Tensors("stories/text_summary")
    }
    assert tables.keys() == {0, 2, 4} and all(table.count("\n") == 5 for table in tables.values())


class Module:
    """wandb or trackio, as lab/track.py calls them."""

    def __init__(self):
        self.sent = []

    def init(self, **settings):
        self.settings = settings

    def log(self, values, step):
        self.sent.append((step, values))

    def Table(self, columns, data):
        return data

    def finish(self):
        self.sent.append("finished")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_number_and_a_table_per_evaluation(
    run, name, capsys, monkeypatch
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    module = Module()
    monkeypatch.setitem(sys.modules, name, module)
    track.main([str(run), name])
    command = {"wandb": f"wandb sync {run / 'wandb'}/offline-run-*", "trackio": "trackio show"}
    assert command[name] in capsys.readouterr().out
    assert module.settings["config"]["steps"] == 4
    assert module.settings.get("mode") == ("offline" if name == "wandb" else None)
    assert module.sent.pop() == "finished"
    tables = {step: values["stories"] for step, values in module.sent if "stories" in values}
    numbers = {step: values for step, values in module.sent if "stories" not in values}
    assert numbers == numbers_by_step(run)
    assert tables.keys() == {0, 2, 4} and all(len(rows) == 4 for rows in tables.values())


def test_a_run_that_goes_on_is_followed_to_its_end_and_no_step_is_sent_twice(tmp_path, monkeypatch):
    """Not even after a kill, when a resumed run repeats a step."""
    module = Module()
    monkeypatch.setitem(sys.modules, "trackio", module)
    held = locked(tmp_path)
    held.__enter__()
    with RunLog(tmp_path, resume_step=None) as log:
        log.config({"device": "cpu"})
        for step in (1, 2):
            log.metrics(step=step, loss=1.0)

    def resume(seconds):
        with RunLog(tmp_path, resume_step=1) as log:
            for step in (2, 3):
                log.metrics(step=step, loss=1.0)
        held.__exit__(None, None, None)

    monkeypatch.setattr(track.time, "sleep", resume)
    track.main([str(tmp_path), "trackio"])
    assert (
        [step for step, _ in module.sent[:-1]]
        == [1, 2, 3]
        == [record["step"] for record in metrics(tmp_path)]
    )


def test_a_tracker_that_is_not_installed_or_no_run_is_one_sentence(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert "pip install trackio" in fails(track.main, [str(run), "trackio"], capsys)
    assert "holds no run" in fails(track.main, [str(tmp_path), "trackio"], capsys)
