"""What a tracker holds, read back by its own reader, is metrics.jsonl; and no failure of a tracker
ends a run."""

import sys

import pytest
from conftest import SHORT, SMALL, fails, metrics

import train_interact
import train_pretrain
from tinystory.report.before_after import from_start
from tinystory.run import track
from tinystory.run.folder import read_config
from tinystory.student import checkpoint


def numbers(records) -> dict[int, dict[str, float]]:
    """The numbers of records by step; of those that a resumed run repeats, without what the clock
    says."""
    steps: dict[int, dict[str, float]] = {}
    for record in records:
        assert record["step"] not in steps  # nothing twice
        numbers = {
            key: value
            for key, value in record.items()
            if type(value) in (int, float) and key != "step"
        }
        if "reward_mean" in record and record["step"] > 2:
            numbers = {
                key: value for key, value in numbers.items() if not key.endswith(("_s", "_mb"))
            }
        steps[record["step"]] = numbers
    return steps


def assert_holds(steps, run):
    """A tracker's numbers by step are those of an interaction's curves, from the evaluation before
    it on."""
    (shown,), first = numbers(from_start(run, [])).values(), steps.pop(0)
    assert steps == numbers(metrics(run))
    assert first.keys() == {key for key in steps[4] if key.startswith("held_out_")}
    assert (
        shown == pytest.approx({key: first[key] for key in shown}) and shown["held_out_reward"] > 0
    )


def interact(place, out, *more):
    reward = f"{place / 'reward.py'}:score"
    train_interact.main(
        [*SHORT, "--init", str(place / "p"), "--out", str(out), "--reward", reward, *more]
    )


def interrupted(place, out, tracker):
    """A run of four steps that is resumed from step 2 after all of them, and so repeats steps 3 and
    4."""
    interact(place, out, "--track", tracker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "newest_whole", lambda run: run / "checkpoints" / "step_0000002")
        interact(place, out, "--resume")
    assert read_config(out)["resumed"][0]["step"] == 2


def test_tensorboard_reads_back_what_metrics_jsonl_holds(place, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    interrupted(place, tmp_path / "i", "tensorboard")
    more = [
        "--corpus",
        str(place / "corpus.txt"),
        "--words",
        "800",
        "--out",
        str(tmp_path / "p"),
        *SMALL,
    ]
    train_pretrain.main([*more, "--track", "tensorboard"])
    for run in (tmp_path / "i", tmp_path / "p"):
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={TENSORS: 0})
        events.Reload()
        steps: dict[int, dict[str, float]] = {}
        for tag in {*events.Tags()["tensors"]} - {"stories/text_summary"}:
            for event in events.Tensors(tag):
                assert tag not in steps.setdefault(event.step, {"step": event.step})
                steps[event.step][tag] = make_ndarray(event.tensor_proto).item()
        sent = numbers(steps.values())
        assert len(sent) >= 4
        if run.name == "i":
            assert_holds(sent, run)
        else:
            assert sent == numbers(metrics(run))
    events = EventAccumulator(str(tmp_path / "i" / "tensorboard"), size_guidance={TENSORS: 0})
    events.Reload()
    tables = {
        e.step: make_ndarray(e.tensor_proto).item().decode()
        for e in events.Tensors("stories/text_summary")
    }
    assert tables.keys() == {0, 2, 4} and all(table.count("\n") == 5 for table in tables.values())


def test_trackio_reads_back_what_metrics_jsonl_holds(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install trackio")
    from trackio.sqlite_storage import SQLiteStorage

    interrupted(place, tmp_path / "i", "trackio")
    (run,) = SQLiteStorage.get_runs("tinystory")
    logs = SQLiteStorage.get_logs("tinystory", run)
    tables = [log for log in logs if "stories" in log]
    assert_holds(numbers(log for log in logs if "stories" not in log), tmp_path / "i")
    assert [table["step"] for table in tables] == [0, 2, 4] and len(
        tables[0]["stories"]["_value"]
    ) == 4


def test_wandb_is_offline_and_one_run_however_often_it_is_resumed(place, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    pytest.importorskip("wandb", reason="pip install wandb")
    interrupted(place, tmp_path / "i", "wandb")
    runs = [path.name for path in (tmp_path / "i" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len({name.split("-", 3)[3] for name in runs}) == 1


class Broken:
    """A tracker that fails at its n-th call."""

    def __init__(self, n):
        self.n = n

    def init(self, **settings):
        self.called()

    def called(self, *args, **settings):
        self.n -= 1
        if self.n < 0:
            raise ConnectionError("no\nroute \x1b[31mto host")

    log = finish = Table = called


@pytest.mark.parametrize("n", [0, 1, 3, 99])
def test_a_tracker_that_fails_says_so_once_and_stops_no_run(
    place, tmp_path, capsys, monkeypatch, n
):
    monkeypatch.setitem(sys.modules, "trackio", Broken(n))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    interact(place, tmp_path / "i", "--track", "trackio")
    output = capsys.readouterr()
    warnings = (output.out + output.err).count(
        "warning: trackio failed (no route [31mto host): the run goes on"
    )
    assert warnings == (n < 99) and len(metrics(tmp_path / "i")) == 4


def test_a_tracker_that_is_not_installed_is_one_sentence(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["--init", str(place / "p"), "--out", str(tmp_path / "i"), "--track", "wandb"]
    assert (
        "pip install wandb" in fails(train_interact.main, argv, capsys)
        and not (tmp_path / "i").exists()
    )


def test_a_tracker_asked_for_on_resume_gets_the_steps_from_there_on(place, tmp_path, monkeypatch):
    sent = []

    class Sink:
        def __init__(self, *_):
            self.log = self.table = lambda step, _: sent.append(step)
            self.close = lambda: sent.append("closed")

    monkeypatch.setattr(track, "TensorBoard", Sink)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    interact(place, tmp_path / "i", "--steps", "2")
    interact(place, tmp_path / "i", "--resume", "--steps", "4", "--track", "tensorboard")
    assert sent == [3, 4, 4, "closed"]  # and the evaluation of step 4
