"""The doctor's report on this machine and on a teacher, and the errors that it prints."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, cli
from fault_server import FaultServer

from scripts import doctor
from tinystory.ops import build


def told(capsys, *argv: str) -> dict[str, str]:
    """Each line by its first word."""
    doctor.main(list(argv))
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_it_says_what_there_is(capsys):
    lines = told(capsys)
    assert list(lines) == "python packages torch cpu compiler kernels gpu nvcc cache".split()
    for optional in ("huggingface_hub", "transformers"):
        lines["packages"] = lines["packages"].replace(f"{optional} missing", "")
    assert "missing" not in lines["packages"]
    assert "GiB free" in lines["cache"]


def test_its_first_lines_are_there_before_torch_is_imported():
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            os._exit(7)  # what is not flushed is lost
sys.meta_path.insert(0, Finder())
from scripts import doctor
doctor.main([])
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 7
    assert process.stdout.startswith("python     3.")


def test_a_calibration_begins_with_a_forecast(capsys):
    score = lambda asked: "0 1 2" if "grammar" in asked else "A fox."  # noqa: E731
    with FaultServer(other=score) as server:
        doctor.main(
            cli("--teacher-url {} --calibrate --per-kind 2 --teacher-prompt grades", server.url)
        )
    lines = capsys.readouterr().out.splitlines()
    (forecast,) = [line for line in lines if line.startswith("forecast")]
    assert re.search(r"forecast +\d+ stories, .* (about|at most) \d+ min of grading", forecast)
    (verdict,) = [line for line in lines if line.startswith("verdict")]
    (asking,) = [line for line in lines if line.startswith("asking")]
    assert lines.index(asking) < lines.index(forecast) < lines.index(verdict)


def test_the_built_in_teacher_is_announced_before_it_is_fitted(capsys):
    doctor.main(["--calibrate", "--per-kind", "2"])
    printed = capsys.readouterr().out
    assert printed.index("\nfitting") < printed.index("\nforecast") < printed.index("\nverdict")


def test_it_says_why_there_are_no_kernels(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "cache"))
    assert "not built yet" in told(capsys)["kernels"] and not (tmp_path / "cache").exists()
    library = build.library_folder("tinystory_cpu", build.cpu_sources()) / "tinystory_cpu.so"
    assert tmp_path in library.parents
    library.parent.mkdir(parents=True)
    library.write_text("no machine code")
    assert "damaged" in told(capsys)["kernels"]
    library.with_name("built").write_text(build.file_hash(library))
    assert f"delete {library.parent}" in told(capsys)["kernels"]
    monkeypatch.setenv("TINYSTORY_KERNELS", "reference")
    assert "reference: plain PyTorch runs" in told(capsys)["kernels"]
    monkeypatch.delenv("TINYSTORY_KERNELS")
    monkeypatch.setenv("CXX", "no-such-compiler")
    lines = told(capsys)
    assert "no-such-compiler" in lines["compiler"] and "no-such-compiler" in lines["kernels"]
    monkeypatch.setenv("TINYSTORY_CACHE", str(Path(doctor.__file__) / "cache"))
    assert "set TINYSTORY_CACHE" in told(capsys)["cache"]


def test_it_shows_what_a_teacher_obeys(capsys):
    with FaultServer(other=lambda asked: "0 1 2" if "grammar" in asked else "A fox.") as server:
        line = told(capsys, "--teacher-url", server.url, "--teacher-model", "second")["teacher:"]
    assert line.startswith(
        f"second at {server.url}: scored a story, max_tokens, reply constraint: grammar"
    )


def test_it_says_what_the_demo_would_cost(capsys):
    with FaultServer() as server:
        prices = ("--price-in", "1", "--price-out", "0.5")
        line = told(capsys, "--teacher-url", server.url, *prices)["the"]
    assert line.startswith("demo") and "1,800 stories" in line and ", cost " in line
