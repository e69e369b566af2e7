"""The notebook runs top to bottom, on students of a few seconds."""

import pytest
from conftest import ROOT

from tinystory.run.records import read_metrics

nbclient = pytest.importorskip("nbclient", reason="pip install 'tinystory[test]'")
nbformat = pytest.importorskip("nbformat", reason="pip install 'tinystory[test]'")


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYSTORY_NOTEBOOK", str(tmp_path / "runs"))
    monkeypatch.delenv("TEACHER_URL", raising=False)
    path = ROOT / "examples" / "tinystory.ipynb"
    notebook = nbformat.read(path, as_version=4)
    # no output is kept: it would be of an older version
    assert all(not cell.get("outputs") for cell in notebook.cells)
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    printed = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text" in output
    ]
    assert sum(text.count("before interaction") for text in printed) >= 3
    assert [
        len(read_metrics(tmp_path / "runs" / name)) for name in ("interact", "own", "endpoint")
    ] == [4, 2, 1]
