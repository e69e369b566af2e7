"""The console entry points of a wheel: each is there, and in a wheel the commands that we print are
entry points. No script's name hides a package."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tinystory.run import paths

ENTRY_POINTS = dict(
    re.findall(
        r'^(tinystory-[\w-]+) = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.M
    )
)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_it_exists_and_its_help_says_what_to_type(name, monkeypatch, capsys):
    module = importlib.import_module(ENTRY_POINTS[name].replace("tinystory_scripts.", "scripts."))
    script = f"python {module.__name__.replace('.', '/')}.py"
    assert paths.usage(f"{script} --out x") == f"{script} --out x"
    # a folder without pyproject.toml, as site-packages is
    monkeypatch.setattr(paths, "ROOT", ROOT / "tests")
    assert paths.usage(f"{script} --out x") == f"{name} --out x"
    assert (
        paths.hint(script.removeprefix("python "), "--out", "my runs/a")
        == f"{name} --out 'my runs/a'"
    )
    with pytest.raises(SystemExit):
        module.main(["--help"])
    printed = capsys.readouterr().out
    assert "python " not in printed
    assert set(re.findall(r"\btinystory-[\w-]+", printed)) <= set(ENTRY_POINTS)


@pytest.mark.parametrize("where", [".", ".."])
def test_a_hint_runs_with_the_interpreter_that_printed_it(where, monkeypatch):
    monkeypatch.chdir(ROOT / where)
    # as in a shell that has not activated the environment
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    done = subprocess.run(
        ["bash", "-c", paths.hint("scripts/sample.py", "--help")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--top-k" in done.stdout, done.stderr
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert paths.hint("scripts/sample.py").startswith(f"{Path(sys.executable).name} ")


def test_no_script_hides_a_package():
    # a script's folder comes first on Python's path; transformers needs a package `kernels`
    packages = {"kernels", *sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    ours = {path.stem for folder in ("lab", "scripts") for path in (ROOT / folder).glob("*.py")}
    assert not ours & packages


IMPORTS = """
import contextlib, importlib, os, sys
class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            raise ImportError
sys.meta_path.insert(0, Torch())
for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):  # of whoever runs the tests
    os.environ.pop(name, None)
before = dict(os.environ)
for variables in eval(sys.argv[1]):
    for name in sys.argv[2:]:
        os.environ.update(variables)
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
        os.environ.clear()
        os.environ.update(before)
        ours = ("tinystory", "scripts", "lab", "train_")
        for module in [module for module in sys.modules if module.startswith(ours)]:
            del sys.modules[module]
    print("next")
"""


def test_openmps_threads_spin_little_unless_the_user_says_how():
    """Settings are made before torch is imported, because torch reads them at import."""
    users = {"10000": {}, "7": {"GOMP_SPINCOUNT": "7"}, "None": {"OMP_WAIT_POLICY": "active"}}
    names = ["train_pretrain", "train_interact"]
    for folder in ("scripts", "lab"):
        for path in (ROOT / folder).glob("*.py"):
            if "parents[1]" in path.read_text():  # a command of ours
                names.append(f"{folder}.{path.stem}")
    command = [sys.executable, "-c", IMPORTS, repr([*users.values()]), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for spins, printed in zip(users, done.stdout.split("next"), strict=False):
        # doctor.py imports torch only when it runs
        assert len(printed.split()) >= 12 and set(printed.split()) == {spins}, done.stderr
