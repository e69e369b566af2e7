"""README's commands, in the printed order, in one folder."""

import contextlib
import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from conftest import LIMIT_S, ROOT, metrics, tiny_stories
from fault_server import FaultServer

import train_interact
from tinystory.config import InteractConfig
from tinystory.config.command_line import FIRST
from tinystory.evaluate.forecast import demo_stories, stories_to_grade
from tinystory.rl.policy import RunState
from tinystory.run.folder import read_config, write_config
from tinystory.student import checkpoint
from tinystory.teacher.ledger import Ledger

# What is appended to each command, so that it takes seconds.
SMALLER = {
    "train_pretrain": "--corpus corpus.txt --words 2000 --n-layer 1 --n-embd 64 --vocab-size 320 "
    "--batch-size 4 --device cpu",
    "train_interact": "--steps 1 --stories-per-step 4 --eval-stories 2 --max-new-tokens 12 "
    "--device cpu",
    "scripts.sample": "--stories 2 --max-new-tokens 12 --device cpu",
    "scripts.export_hf": "",
    "scripts.doctor": "--per-kind 2 --max-new-tokens 12 --device cpu",
}
FEWER_GRADES = "--grades 8 --stories-per-step 16"
# Models of README's servers, which a local server replaces.
MODELS = ("llama3.1:8b", "gpt-6-luna")
COMMAND = re.compile(r"(?:# my_reward\.py +)?((?:make|python) .*?)(?: {2,}#.*)?")
ROW = re.compile(r"\|.*\| (.*) \|")


def commands() -> list[str]:
    """The commands of README's code blocks and of its table of teachers. Those left out install,
    or start a server."""
    printed = []
    in_block = False
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("```"):
            in_block = not in_block
        elif in_block and (command := COMMAND.fullmatch(line)):
            printed.append(command[1])
        elif row := ROW.fullmatch(line):
            if row[1] == "the command that it prints":
                printed.append("python scripts/teach.py")
            elif row[1].startswith("`--teacher-url"):
                printed.append(f"python train_interact.py {row[1].strip('`')}")
    return printed


def test_the_price_of_the_demo_follows_from_its_presets():
    text = " ".join((ROOT / "README.md").read_text().split())
    grades, tokens = re.search(r"asks for (1 \d+) grades of (\d+) prompt tokens", text).groups()
    demo = InteractConfig()
    assert int(grades.replace(" ", "")) == stories_to_grade(demo, RunState(demo.kl_coef))
    price_in, price_out = map(float, re.search(r"At the \$(.*?) and \$(.*?) per", text).groups())
    cents = re.search(r"all grades cost about (\d+) cents, and 64 answers about (\d+) cent", text)
    ledger = Ledger(price_in, price_out, 0.0, (0, 0, 0))
    for way, reply_tokens, told in (("grades", 6, cents[1]), ("event", 1, cents[2])):
        stories = demo_stories(way)
        cost = ledger.price(stories * int(tokens), stories * reply_tokens)
        assert math.ceil(100 * cost) == int(told)


def test_the_commands_of_the_readme_are_found():
    found = commands()
    assert found[:5] == [
        "make demo",
        "python scripts/sample.py",
        "make test",
        "python train_pretrain.py",
        "python train_interact.py",
    ]
    assert found[5].startswith("python scripts/export_hf.py runs/interact ")
    assert len([command for command in found if "--teacher-url" in command]) == 6
    assert found[-3] == "python scripts/teach.py"
    assert found[-1] == "python train_interact.py --reward my_reward.py"


def test_the_two_commands_stand_in_the_first_block_with_their_price_and_ci_runs_the_second():
    block = re.search(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    assert block.splitlines()[0] == "git clone URL && cd tinystory"
    for command in ("make demo", "make test"):
        price = rf"^{command} +# .*: \d+ minutes, after installing \d+ MB"
        assert re.search(price, block, re.M), command
    assert re.search("^make test$", (ROOT / ".ci" / "run").read_text(), re.M)


def test_a_demo_installs_no_package_of_the_tests_and_make_test_does():
    def installs(target: str) -> str:
        command = ["make", "--dry-run", "--assume-new=pyproject.toml", target]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    demo, tests = installs("demo"), installs("test")
    assert "pip install --quiet --editable .\n" in demo and "[test]" not in demo
    assert "1 GB" in demo and "download.pytorch.org/whl/cpu" in demo
    assert "pip install --quiet --editable '.[test]'" in tests
    for target in re.findall(r"^([a-z-]+):.*\.venv/ready$", (ROOT / "Makefile").read_text(), re.M):
        assert "pytest" not in installs(target), f"{target} needs .venv/tests"


def test_help_lists_the_options_of_the_readmes_commands():
    training = [command for command in commands() if command.startswith("python train_")]
    flags = re.findall(r"--(?:no-)?([a-z-]+)", " ".join(training))
    assert len(flags) > 5 and {flag.replace("-", "_") for flag in flags} <= FIRST


def demo() -> list[str]:
    """The commands of `make demo` that train."""
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    return re.findall(r"\$\(PY\) (.*?)(?: \$\(call .*)?$", recipe[1], re.M)


# In place of Python: it begins a run as a train command does, and is stopped if there is such a
# file.
STAND_IN = """#!/bin/sh
echo "$@" >> commands
for out; do test "$before" = --out && break; before=$out; done
mkdir -p "$out" && touch "$out/config.json"
rm stop 2>/dev/null && kill -INT $$
test "$1" = train_pretrain.py || touch "$out/samples.jsonl"
"""


def test_a_demo_that_was_stopped_goes_on_and_one_that_ended_is_replaced(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", ".venv/ready", "stop"):
        (tmp_path / name).touch()
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    make = ["make", "-C", tmp_path, "PY=./python", "demo"]
    pretraining, interaction = demo()

    assert subprocess.run(make, capture_output=True).returncode != 0
    subprocess.run(make, capture_output=True, check=True)
    subprocess.run(make, capture_output=True, check=True)
    assert (tmp_path / "commands").read_text().splitlines() == [
        pretraining,
        f"{pretraining} --resume",
        interaction,
        pretraining,
        interaction,
    ]


def run(command: str, url: str = "") -> None:
    """Run a command of README in this process, made smaller. url: the server that replaces the
    command's server."""
    script, *arguments = shlex.split(command.removeprefix("python "))
    if Path(script).stem.startswith("python"):  # a printed command may name its interpreter
        script = arguments.pop(0)
    if Path(script).is_absolute():
        script = str(Path(script).relative_to(ROOT))
    name = script.removesuffix(".py").replace("/", ".")
    if "--teacher-url" in arguments and url:
        arguments[arguments.index("--teacher-url") + 1] = url
    arguments += SMALLER[name].split()
    if name == "train_interact" and url:
        arguments.append("--no-calibrate")  # the server's grades are all equal
    if name == "train_interact" and not {"--reward", "--teacher-url"} & set(arguments):
        arguments += ["--corpus", "corpus.txt"]  # SMALLER's, in place of the built-in one
    if "--grades" in arguments:
        arguments += FEWER_GRADES.split()
    importlib.import_module(name).main(arguments)


@contextlib.contextmanager
def teaching():
    """The command that teach.py prints, and a person who grades what comes."""
    teach = subprocess.Popen(
        [sys.executable, ROOT / "scripts/teach.py", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    over = threading.Event()
    try:
        url = re.search(r"http://\S+", teach.stdout.readline())[0]
        command = teach.stdout.readline().removeprefix("and start: ").strip()
        person = threading.Thread(target=grade_all, args=(url, over))
        person.start()
        yield command
    finally:
        over.set()
        person.join(LIMIT_S)
        teach.kill()
        teach.wait()
        teach.stdout.close()


def grade_all(url: str, over: threading.Event) -> None:
    while not over.wait(0.05):
        with urllib.request.urlopen(f"{url}/state?who=ada", timeout=LIMIT_S) as answer:
            item = json.load(answer)["item"]
        if item:
            scores = {"readability": 2, "coherence": 1, "creativity": 1}
            grade = item | {"who": "ada", "action": "grade", "scores": scores}
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/do", json.dumps(grade).encode(), headers)
            urllib.request.urlopen(request, timeout=LIMIT_S).close()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty folder with a corpus and README's reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinystory.data.shards.cache_dir", lambda: tmp_path / "cache")
    (tmp_path / "corpus.txt").write_text("\n<|endoftext|>\n".join(tiny_stories(150)))
    readme = (ROOT / "README.md").read_text()
    reward = re.search(r"^```python\n(# my_reward\.py .*?)^```", readme, re.M | re.S)
    (tmp_path / "my_reward.py").write_text(reward[1])
    return tmp_path


def test_the_style_part_of_make_test_looks_at_no_file_of_a_user(clone):
    """README's reward is there already; a demo leaves a folder runs/."""
    for name in ("pyproject.toml", "setup.py", "train_pretrain.py", "train_interact.py"):
        shutil.copy(ROOT / name, clone)
    for name in ("tinystory", "scripts", "lab", "tests", "examples"):
        shutil.copytree(ROOT / name, clone / name)
    (clone / "runs" / "demo").mkdir(parents=True)
    (clone / "out").mkdir()
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    ruff = re.findall(r"\.venv/bin/(ruff .*)", recipe[1])
    assert len(ruff) == 2
    for arguments in ruff:
        command = [sys.executable, "-m", *arguments.split(), "--no-cache"]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def yes_or_fox(asked: dict) -> str:
    """The reply to a question of yes or no, or to a request without a story."""
    return "yes" if "Answer yes or no" in asked["messages"][-1]["content"] else "A fox."


def test_every_command_works_in_the_printed_order_whatever_ran_before(clone, capsys, short_pauses):
    """Before, a student was pretrained and interacted, in the folders of "By hand"."""
    before = ["python train_pretrain.py", "python train_interact.py --reward my_reward.py"]
    printed = []
    with FaultServer(models=MODELS, other=yes_or_fox) as server:
        for command in [*before, *commands()]:
            if command == "make test":
                continue
            if command == "python scripts/teach.py":
                with teaching() as following:
                    run(following)
                printed.append(capsys.readouterr().out)
                continue
            for part in demo() if command == "make demo" else [command]:
                run(part, server.url)
                printed.append(capsys.readouterr().out)

    folders, starts = [], []
    for text in printed:
        if report := re.search(r"^report: (.*)/report\.html$", text, re.M):
            folders.append(report[1])
            # a human is asked to compare stories first
            assert re.search(rf"^(next|then): .* {report[1]}\b", text, re.M)
        if start := re.search(r"^student (runs/.*)/checkpoints/", text, re.M):
            starts.append(start[1])
    by_hand = ["runs/pretrain-2", *(f"runs/interact-{number}" for number in range(2, 8))]
    assert folders == [
        *("runs/pretrain", "runs/interact"),
        *("runs/demo/pretrain", "runs/demo/interact"),
        *by_hand,
        *("runs/teach/interact", "runs/interact-8"),
    ]
    assert starts == ["runs/pretrain", "runs/demo/pretrain", *["runs/pretrain-2"] * 8]
    assert (clone / "out" / "model.safetensors").exists() and (clone / "out.gguf").exists()
    said = "runs/interact is taken, so the folder of this run is runs/interact-2"
    assert [said in text for text in printed].count(True) == 1


def test_a_resume_without_out_continues_the_newest_run_that_began_without_it(clone, capsys):
    run("python train_pretrain.py")
    for _ in range(2):
        run("python train_interact.py --reward my_reward.py")
    run("python train_interact.py --reward my_reward.py --out runs/interact-mine")
    capsys.readouterr()
    train_interact.main(["--resume", "--steps", "2", "--reward", "my_reward.py"])
    assert "--resume: the newest run without --out is runs/interact-2" in capsys.readouterr().out
    assert [len(metrics(clone / f"runs/interact{end}")) for end in ("", "-2", "-mine")] == [1, 2, 1]


def test_a_pretraining_that_was_stopped_is_said_with_the_command_that_goes_on(clone, capsys):
    run("python train_pretrain.py")
    run("python train_interact.py --reward my_reward.py --out ended")
    assert "of its pretraining" not in capsys.readouterr().out

    pretraining = Path("runs/pretrain")
    newest = checkpoint.newest(pretraining)
    words = checkpoint.load(newest)[2]["words"]
    record = read_config(pretraining)
    record["options"]["words"] = 3000
    write_config(pretraining, record)
    for out, init in (("by-default", ""), ("named", f"--init {newest.absolute()}")):
        run(f"python train_interact.py --reward my_reward.py --out {out} {init}")
        (line,) = re.findall("^this student has read .*$", capsys.readouterr().out, re.M)
        assert (
            f"read {words // 30} % of the words of its pretraining; to continue the pretraining: "
            in line
        )
        assert line.endswith("train_pretrain.py --out runs/pretrain --resume")
