"""The lab stands beside the product: it imports the product, and nothing of the product imports
it."""

import ast
import importlib
import subprocess
import sys

import pytest
import setuptools
from conftest import ROOT

PRODUCT = [
    ROOT / "train_pretrain.py",
    ROOT / "train_interact.py",
    *ROOT.glob("scripts/*.py"),
    *ROOT.glob("tinystory/**/*.py"),
]
COMMANDS = (
    "babylm",
    "bench",
    "compare",
    "copied",
    "gain",
    "judge",
    "recipes",
    "reproduce",
    "track",
)


def imported(source: str) -> set[str]:
    """The first part of the name of each module that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_nothing_of_the_product_imports_the_lab():
    assert imported("def f():\n    from lab.reader import Reader") == {"lab"}
    assert len(PRODUCT) > 80
    assert [path for path in PRODUCT if "lab" in imported(path.read_text())] == []


def test_a_wheel_holds_nothing_of_the_lab(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    monkeypatch.chdir(ROOT)
    exec((ROOT / "setup.py").read_text(), {})
    assert "tinystory.rl" in given["packages"]
    assert [name for name in given["packages"] if "lab" in name.split(".")] == []
    assert "lab" not in given["package_dir"].values() and "lab" not in given["py_modules"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_has_a_line_for_each_command(name):
    assert f"python lab/{name}.py" in (ROOT / "lab" / "README.md").read_text()
    assert "python lab/" in importlib.import_module(f"lab.{name}").__doc__


def test_a_peer_says_how_it_is_used():
    """lab/track.py imports no dependency of tinystory except torch: another Python runs it."""
    command = [sys.executable, ROOT / "lab/peer.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "{nanogpt,transformers,trl}" in result.stdout, result.stderr
