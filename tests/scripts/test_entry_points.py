"""The console entry points of a wheel: each is there, and in a wheel the commands that we print are entry points."""

import importlib
import re

import pytest
from conftest import ROOT

from tinystory.run import paths

ENTRY_POINTS = dict(re.findall(r'^(tinystory-[\w-]+) = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), re.M))


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_it_exists_and_its_help_says_what_to_type(name, monkeypatch, capsys):
    module = importlib.import_module(ENTRY_POINTS[name].replace("tinystory_scripts.", "scripts."))
    script = f"python {module.__name__.replace('.', '/')}.py"
    assert paths.usage(f"{script} --out x") == f"{script} --out x"
    assert paths.usage(script, "--out", "my runs/a") == f"{script} --out 'my runs/a'"
    monkeypatch.setattr(paths, "ROOT", ROOT / "tests")  # a folder without pyproject.toml, as site-packages is
    assert paths.usage(f"{script} --out x") == f"{name} --out x"
    with pytest.raises(SystemExit):
        module.main(["--help"])
    printed = capsys.readouterr().out
    assert "python " not in printed and set(re.findall(r"\btinystory-[\w-]+", printed)) <= set(ENTRY_POINTS)
