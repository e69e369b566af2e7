"""Two processes under torchrun compute what one does, up to the order of sums."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import LIMIT_S, ROOT, SHORT, SMALL, cli, metrics, read_lines
from safetensors.torch import load_file

import train_interact as interact
import train_pretrain as pretrain
from tinystory.run import distributed
from tinystory.run.errors import TORCHRUN, UserError
from tinystory.run.folder import lock_holder, locked, read_config
from tinystory.student import checkpoint

BOTH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import os, train_interact, train_pretrain
from tinystory.data import shards
from tinystory.student import checkpoint
if os.environ["RANK"] != "0":  # writes no checkpoint and drops none, which could be the one that rank 0 is writing
    checkpoint.save = checkpoint.drop_older = None
elif "SAVES_FOR_EVER" in os.environ:
    checkpoint.save = lambda *args, **kwargs: [open(os.environ["SAVES_FOR_EVER"], "w"), __import__("time").sleep(3600)]
shards.cache_dir = lambda: __import__("pathlib").Path(sys.argv[1])
split = sys.argv.index("--then")
train_pretrain.main(sys.argv[2:split])
train_interact.main(sys.argv[split + 1 :])
"""


TORCHRUN_2 = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]


def on_two_processes(*command, succeeds=True) -> str:
    """What a script prints under torchrun. succeeds: whether it must succeed, or must not."""
    words = [*TORCHRUN_2, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode == 0) == succeeds, done.stderr[-2000:]
    return done.stdout


def assert_alike(a, b) -> None:
    assert len(metrics(a)) == len(metrics(b)) > 0
    for one, two in zip(metrics(a), metrics(b), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {
            name for name in one if name.endswith("_s") or name == "peak_memory_mb"
        }:
            want = one[name] if one[name] is None else pytest.approx(one[name], rel=1e-3, abs=1e-4)
            assert two[name] == want, name
    left, right = (load_file(checkpoint.newest(run) / "model.safetensors") for run in (a, b))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=2e-4)


@pytest.mark.slow
def test_two_processes_do_what_one_does(place, tmp_path):
    """Both complete loops: uneven rows and stories, minibatches, an unscored story, reading on, a
    temperature that is chosen."""
    reading = SMALL + cli("--corpus {} --dtype float32 --words 1500", place / "corpus.txt")
    reading += ["--batch-size", "5", "--micro-batch-size", "2", "--learning-rate", "1e-3"]
    writing = SHORT + cli(
        "--reward {}:some --max-unscored 0.5 --minibatch-size 3", place / "reward.py"
    )
    writing += "--stories-per-step 7 --steps 2 --micro-batch-size 2 --learning-rate 1e-4".split()
    writing += "--dtype float32 --kl-in loss --temperature 0".split()

    def both(name: str) -> list[str]:
        p, i = tmp_path / name / "p", tmp_path / name / "i"
        start = ["--init", str(tmp_path / "one" / "p")]  # the same weights
        return [*reading, "--out", str(p)], [*writing, *start, "--out", str(i)]

    for command, argv in zip((pretrain, interact), both("one"), strict=True):
        command.main(argv)
    script = tmp_path / "both.py"
    script.write_text(BOTH)
    first, second = both("two")
    printed = on_two_processes(script, place / "cache", *first, "--then", *second)
    assert printed.count("parameters") == 1  # only rank 0 prints
    for part in ("p", "i"):
        assert_alike(tmp_path / "one" / part, tmp_path / "two" / part)
    one, two = (read_lines(tmp_path / name / "i" / "stories.jsonl") for name in ("one", "two"))
    assert [s["index"] for s in one] == [s["index"] for s in two] == list(range(14))
    options = [read_config(tmp_path / name / "i")["options"] for name in ("one", "two")]
    for name in ("temperature", "tried_temperatures"):
        assert options[0][name] == options[1][name], name
    # those of the first step are identical
    assert [s["story"] for s in one[:7]] == [s["story"] for s in two[:7]]


@pytest.mark.slow
def test_two_processes_have_the_same_stories_graded(place, tmp_path):
    """This holds in a first step, where the stories are bit-identical."""
    flags = [*SHORT, "--dtype", "float32", "--reward", f"{place / 'reward.py'}", "--steps", "1"]
    flags += ["--stories-per-step", "20", "--grades", "8", "--init", str(place / "p")]
    interact.main([*flags, "--out", str(tmp_path / "one")])
    on_two_processes(ROOT / "train_interact.py", *flags, "--out", tmp_path / "two")
    one, two = (read_lines(tmp_path / name / "stories.jsonl") for name in ("one", "two"))
    assert [story["story"] for story in one] == [story["story"] for story in two]
    graded = [story["index"] for story in one if story["reply"] == ""]
    assert len(graded) == 8
    assert graded == [story["index"] for story in two if story["reply"] == ""]


@pytest.mark.slow
def test_a_signal_to_any_process_stops_an_interaction_and_is_told_once(place, tmp_path):
    pretrain.main(
        SMALL + cli("--corpus {} --words 1000 --out {}", place / "corpus.txt", tmp_path / "p")
    )
    script = tmp_path / "signalled.py"
    script.write_text(
        BOTH.split("split =")[0]
        + """
from tinystory.rl import ppo
step = ppo.step
def signalled(*arguments):
    os.kill(os.getpid(), 15)
    return step(*arguments)
if os.environ["RANK"] == "1":
    ppo.step = signalled
train_interact.main(sys.argv[2:])
"""
    )
    argv = SHORT + cli(
        "--steps 3 --reward random --init {} --out {}", tmp_path / "p", tmp_path / "i"
    )
    printed = on_two_processes(script, place / "cache", *argv, succeeds=False)
    assert printed.count("stopped after step 1, everything is saved") == 1
    assert "Mean reward" not in printed
    assert len(metrics(tmp_path / "i")) == 1


def under_torchrun(place, out) -> tuple[subprocess.Popen, list[int]]:
    """A long pretraining on two processes that has logged a step: torchrun, and the workers in the
    order of ranks."""
    script = out.parent / "one.py"
    script.write_text(BOTH.split("split =")[0] + "train_pretrain.main(sys.argv[2:])\n")
    argv = ["--corpus", str(place / "corpus.txt"), *SMALL, "--words", "100M", "--out", str(out)]
    launch = subprocess.Popen(
        [*TORCHRUN_2, script, place / "cache", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while launch.poll() is None and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.1)
    listed = subprocess.run(
        ["pgrep", "-P", str(launch.pid)], capture_output=True, text=True
    ).stdout.split()
    return launch, sorted(map(int, listed))


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        not Path(f"/proc/{pid}/stat").exists()
        or ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_under_torchrun_ends_the_step_and_saves_and_twice_ends_at_once(
    place, tmp_path, times, monkeypatch
):
    """Ctrl-C as a terminal sends it: to torchrun, which passes the signal on to the workers in
    their own sessions."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # seconds, then SIGKILL
    if times == 2:
        # so that the first does not suffice
        monkeypatch.setenv("SAVES_FOR_EVER", str(tmp_path / "saving"))
    launch, workers = under_torchrun(place, tmp_path / "p")
    os.killpg(launch.pid, signal.SIGINT)
    if times == 2:
        while launch.poll() is None and not (tmp_path / "saving").exists():
            time.sleep(0.1)
        os.killpg(launch.pid, signal.SIGINT)
    launch.communicate(timeout=LIMIT_S)
    assert len(workers) == 2 and not any(map(running, workers))
    assert launch.returncode != 0
    newest = checkpoint.newest_whole(tmp_path / "p")
    assert (newest is None) == (times == 2)
    if newest:
        assert checkpoint.read_counters(newest)["step"] == metrics(tmp_path / "p")[-1]["step"]
    with locked(tmp_path / "p"):  # the lock is free again
        assert metrics(tmp_path / "p")


def collectives(rank: int, folder: str) -> None:
    """Runs in each of two processes; a failed assertion sets the exit code."""
    distributed.dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (7,), (2,), (5, 5))]
    for i, p in enumerate(parameters):
        if rank == 0 or i != 2:  # a process without rows has no gradient
            p.grad = torch.full_like(p, float(10 * i + rank + 1))
    distributed.all_reduce_gradients(parameters)
    assert [float(p.grad.mean()) for p in parameters] == [3.0, 23.0, 21.0, 63.0]
    assert all(p.grad.min() == p.grad.max() and p.grad.shape == p.shape for p in parameters)

    weights = torch.full((4,), float(rank))
    distributed.broadcast_from_rank0([weights])
    assert not weights.any()
    expected = "00 10 11".split()
    assert distributed.all_gather_list([f"{rank}{i}" for i in range(1 + rank)]) == expected
    assert distributed.all_reduce_max(rank == 1) and distributed.all_reduce_max(0.25 * rank) == 0.25
    assert distributed.rank0_value(lambda: distributed.rank() + 7) == 7
    with pytest.raises(UserError, match="the key is bad"):
        distributed.rank0_value(refused)
    assert distributed.rank0_first(lambda: rank) == rank
    with pytest.raises(UserError, match="the key is bad"):
        distributed.rank0_first(refused)

    config = pretrain.PretrainConfig(out=f"{folder}/seen-by-{rank}")
    with distributed.run_folder(config) as config:
        assert config.out == f"{folder}/seen-by-0" and "out" not in config.given
        assert distributed.rank0_value(lambda: lock_holder(Path(config.out)))


def refused():
    assert distributed.is_rank0(), "rank 0 alone asks"
    raise UserError("the key is bad")


def test_collectives_of_two_processes(tmp_path):
    fork = torch.multiprocessing.get_context("fork")
    processes = [fork.Process(target=collectives, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
    assert [process.exitcode for process in processes] == [0, 0]


def test_with_one_process_everything_is_a_no_op():
    x = torch.arange(5.0)
    assert distributed.shard_strided([1, 2, 3]) == [1, 2, 3]
    assert distributed.shard_contiguous(7) == range(7)
    assert distributed.all_reduce_sum(x) is x and distributed.all_reduce_max(0.5) == 0.5
    assert distributed.all_gather_list([1]) == [1]
    assert distributed.rank0_value(lambda: 3) == 3 and distributed.is_rank0()


@pytest.mark.parametrize("processes,device", [(3, "auto"), (2, "cuda:1")])
def test_processes_need_a_gpu_each(monkeypatch, processes, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in TORCHRUN:
        monkeypatch.setenv(name, str(processes) if name == "LOCAL_WORLD_SIZE" else "0")
    with pytest.raises(UserError, match="this machine has 2: set --nproc-per-node to 2"):
        distributed.start(device)


def test_shards_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares, blocks = [], []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.shard_strided(list(range(8))))
        blocks += [*distributed.shard_contiguous(8)]
    assert sorted(row for rows in shares for row in rows) == blocks == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
