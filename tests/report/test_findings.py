"""Findings of other programs are shown as text, whoever wrote them."""

import json

import pytest
from conftest import story_record

from tinystory.report.findings import read_findings
from tinystory.report.run import write_report
from tinystory.run.errors import UserError
from tinystory.run.log import RunLog
from tinystory.run.records import FINDINGS, STORIES

FOUND = {
    "title": "A <b>judge</b>",
    "step": 1,
    "sentences": ["It saw <script>more</script> in it.\x1b[31m"],
    "table": [["Stories", "<i>Sense"], ["after", "-0.9"]],
}


def write(run, *records):
    with RunLog(run, resume_step=None) as log:
        log.config({"device": "cpu"})
        log.metrics(step=1, reward_mean=0.5)
        log.append(STORIES, [story_record(1)])
    (run / FINDINGS).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_report_shows_sentences_and_table_as_text(tmp_path):
    write(tmp_path, FOUND)
    page = write_report(tmp_path).read_text()
    assert "<h2>A &lt;b&gt;judge&lt;/b&gt;</h2>" in page and "After step 1." in page
    assert "It saw &lt;script&gt;more&lt;/script&gt; in it." in page and "\x1b" not in page
    assert "<th>&lt;i&gt;Sense</th>" in page and "<td>-0.9</td>" in page


def test_a_later_finding_replaces_one_of_the_same_title(tmp_path):
    write(tmp_path, FOUND, FOUND | {"title": "Other"}, FOUND | {"step": 3, "table": []})
    expected = [(FOUND["title"], 3), ("Other", 1)]
    assert [(each["title"], each["step"]) for each in read_findings(tmp_path)] == expected
    page = write_report(tmp_path).read_text()
    assert "After step 3." in page and page.count("<td>-0.9</td>") == 1


def test_a_run_without_findings_shows_none(tmp_path):
    write(tmp_path)
    assert read_findings(tmp_path) == [] and "After step" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    "harm",
    [
        {"sentences": [1]},
        {"sentences": "text"},
        {"table": [[]]},
        {"table": ["text"]},
        {"table": [["a", None]]},
        {"step": -1},
        {"title": None},
    ],
)
def test_a_finding_that_is_not_of_text_is_refused_by_its_file(tmp_path, harm):
    write(tmp_path, FOUND | harm)
    with pytest.raises(UserError, match=FINDINGS):
        write_report(tmp_path)
