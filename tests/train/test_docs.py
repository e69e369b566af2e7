"""README.md, CONTRIBUTING.md, docs/*.md and lab's pages name only existing options and files, and
every key of metrics.jsonl."""

import importlib
import re

import pytest
from conftest import ROOT, SHORT, cli, metrics

import train_interact
from tinystory.config import InteractConfig
from tinystory.config.command_line import parse
from tinystory.teacher.ledger import Ledger

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS += [ROOT / "lab" / name for name in ("README.md", "findings.md", "gpu.md", "paper.md")]
DOCS += sorted((ROOT / "lab" / "results").glob("*.md"))
OTHERS = "--help --nproc-per-node --shutdown-timeout --parallel --ctx-size --max-model-len --port"
OTHERS += " --max-logprobs --model --model_alias --gpu-memory-utilization --take_final --padding_side --no-deps"


def test_docs_name_every_key_of_metrics_jsonl(place, tmp_path):
    reward = f"{place / 'reward.py'}:score"
    train_interact.main(
        SHORT + cli("--init {} --out {} --reward {}", place / "p", tmp_path / "i", reward)
    )
    keys = {
        key for run in (place / "p", tmp_path / "i") for record in metrics(run) for key in record
    }
    keys |= {f"teacher_{key}" for key in Ledger(0.0, 0.0, 0.0, (0, 0, 0)).stats()}
    rows = "".join(re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M))
    assert len(keys) > 50 and sorted(key for key in keys if f"`{key}`" not in rows) == []


def test_contributing_names_only_constants_that_exist():
    names = set(re.findall(r"`([A-Z][A-Z_]{2,})`", (ROOT / "CONTRIBUTING.md").read_text()))
    folders = ("tinystory", "scripts", "lab", "csrc", "tests")
    sources = [
        path.read_text()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
    ]
    words = set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", "\n".join(sources)))
    assert len(names) > 5 and names - words == set()


def test_every_option_and_file_that_the_docs_name_exists(capsys):
    scripts = [f"scripts.{path.stem}" for path in ROOT.glob("scripts/*.py")]
    lab = [
        f"lab.{name}"
        for name in "babylm bench compare copied judge recipes reproduce speedrun".split()
    ]
    for name in ["train_pretrain", "train_interact", *scripts, *lab]:
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(
                ["--help-all" if name.startswith("train_") else "--help"]
            )
    options = {*OTHERS.split(), *re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)}
    for doc in DOCS:
        text = doc.read_text()
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - options == set(), doc
        files = set(re.findall(r"(?<![\w/])[\w.]+/[\w./]+\.(?:py|h|cpp|cuh?|md|txt|svg)\b", text))
        assert [
            f
            for f in files
            if "NAME" not in f and not ((ROOT / f).exists() or (doc.parent / f).exists())
        ] == []


def test_a_run_that_the_docs_name_is_there_after_make_demo_or_made_on_the_same_page():
    """README begins with `make demo`, and the commands on README make the runs that README
    names."""
    pages = [doc for doc in DOCS if doc.name != "CONTRIBUTING.md" and doc != ROOT / "README.md"]
    pages += [*ROOT.glob("scripts/*.py"), *ROOT.glob("lab/*.py")]
    made_by_demo = {"runs/demo/pretrain", "runs/demo/interact"}
    any_run = {"runs/a", "runs/b"}
    named = 0
    for page in pages:
        text = page.read_text()
        commands = re.findall(r"^.*python (?:scripts|lab)/.*runs/.*", text, re.M)
        commands += re.findall(r"^.*(?:cp -r|evaluate\.py) .*runs/.*", text, re.M)
        outputs = set(re.findall(r"average\.py runs/.* (runs/[\w-]+)", text))
        for seed in "12":  # of a loop in the shell
            outputs.update(re.findall(r"--out (runs/[\w/-]+)", text.replace("$seed", seed)))
        for run in re.findall(r"runs/[\w-]+(?:/(?!checkpoints)[\w-]+)?", "\n".join(commands)):
            assert run in outputs | made_by_demo | any_run, (page, run)
            named += 1
    assert named > 15


def test_the_values_beside_trls_options_are_todays():
    paper = parse(InteractConfig, ["--preset", "paper"])
    compared = 0
    for line in (ROOT / "docs" / "learners.md").read_text().splitlines():
        cells = line.split(" | ")
        if len(cells) != 3:
            continue
        flags = re.findall(r"`--([a-z-]+)", cells[1])
        values = cells[2].removesuffix(" |").split("; ")
        for config, text in zip((paper, InteractConfig()), values, strict=False):
            for flag, value in zip(flags, text.split(", "), strict=False):
                number = value.replace(" ", "")
                if re.fullmatch(r"[0-9.e-]+", number):
                    assert getattr(config, flag.replace("-", "_")) == float(number), (flag, config)
                    compared += 1
    assert compared >= 25
