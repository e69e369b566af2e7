"""Bits per byte, and scripts/evaluate.py."""

import contextlib
import json
import math
import re

import pytest
import torch
from conftest import fails, tiny_stories

from scripts import evaluate
from tinystory.data.corpus import open_corpus
from tinystory.evaluate.validation import bits_per_byte
from tinystory.student import checkpoint
from tinystory.teacher.grade import Grade, Grader


def test_bits_a_byte_of_a_uniform_student(student, tokenizer, tmp_path):
    with torch.no_grad():
        student.unembedding.zero_()  # every token as likely
    (tmp_path / "a.txt").write_text("\n\n".join(tiny_stories(8)))
    measures = bits_per_byte(student, tokenizer, open_corpus([str(tmp_path / "a.txt")]).documents())
    ids = [[*tokenizer.encode(story), tokenizer.eos] for story in tiny_stories(8)]
    counted = [id for each in ids for id in each][1:]  # every token once but the very first
    assert len(counted) > student.config.context
    bits = (
        len(counted)
        * math.log2(tokenizer.vocab_size)
        / sum(len(tokenizer.token_bytes[id]) for id in counted)
    )
    assert measures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert measures["tokens"] == len(counted) + 1


class Amused(Grader):
    def grades(self, questions, stop=None):
        return [Grade({"humour": 2}, 2 / 3)] * len(questions)


@pytest.fixture
def amused(monkeypatch):
    monkeypatch.setattr(
        evaluate, "open_grader", lambda *_, **__: contextlib.nullcontext(Amused({}))
    )


def test_checkpoints_are_measured_side_by_side(student, tokenizer, tmp_path, capsys, amused):
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    for step, name in enumerate(("chck_1M", "chck_2M"), 1):
        history = {"words": step * 1_000_000}
        checkpoint.save(
            run / name, student, tokenizer, history=history, state={}, counters={"step": step}
        )
    (tmp_path / "a.txt").write_text("\n\n".join(tiny_stories(8)))
    argv = [str(run / "chck_1M"), str(run.parent), "--corpus", str(tmp_path / "a.txt")]
    argv += ["--stories", "8", "--max-new-tokens", "8", "--device", "cpu"]
    evaluate.main([*argv, "--out", str(tmp_path / "out" / "report.json")])
    first, second = json.loads((tmp_path / "out" / "report.json").read_text())["checkpoints"]
    assert (first["name"], first["words"]) == ("run/chck_1M", 10**6)
    assert (second["name"], second["words"]) == ("run/chck_2M", 2 * 10**6)
    assert first["stories"] == second["stories"] and first["corpus"] == second["corpus"]
    printed = capsys.readouterr().out
    assert "run/chck_2M" in printed
    assert "bits per byte" in printed and "words per story" in printed


def test_anybodys_stories_stand_beside_a_students(student, tokenizer, tmp_path, capsys, amused):
    ours = checkpoint.save(
        tmp_path / "ours", student, tokenizer, history={}, state={}, counters={"step": 1}
    )
    samples = {
        name: [{"opening": "Tom", "story": f"{name} ran {i}. " * 9} for i in range(12)]
        for name in ("gpt", "people")
    }
    files = [tmp_path / f"{name}.jsonl" for name in samples]
    for file, stories in zip(files, samples.values(), strict=True):
        file.write_text("".join(json.dumps(story) + "\n" for story in stories))
    arguments = ["--device", "cpu", "--out", str(tmp_path / "report.json")]
    evaluate.main(
        [str(ours), *map(str, files), *"--stories 10 --max-new-tokens 40".split(), *arguments]
    )
    records = json.loads((tmp_path / "report.json").read_text())["checkpoints"]
    expected = [("ours", 10), ("gpt.jsonl", 10), ("people.jsonl", 10)]
    assert [(r["name"], r["stories"]["stories"]) for r in records] == expected
    assert all(r["stories"]["score_mean"] == 2 for r in records)
    assert records[1]["stories"]["story_clusters"] == 10
    printed = capsys.readouterr().out
    assert "people.jsonl" in printed and re.search(r"^stories +10 +10 +10$", printed, re.M)

    files[1].write_text("".join(files[1].read_text().splitlines(keepends=True)[:5]))
    evaluate.main([*map(str, files), "--stories", "10"])
    printed = " ".join(capsys.readouterr().out.split())
    assert " stories 10 5 " in printed
    assert "at equal numbers, with --stories 5" in printed
    evaluate.main([*map(str, files), "--stories", "5"])
    assert "at equal numbers" not in capsys.readouterr().out

    evaluate.main([str(files[0]), "--out", str(tmp_path / "report.json")])
    (record,) = json.loads((tmp_path / "report.json").read_text())["checkpoints"]
    assert record["stories"]["stories"] == 12


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["p"], "nothing to evaluate"),
        (["nothing"], "neither a checkpoint nor a run"),
        (["p", "--stories", "4", "--openings", "missing.txt"], "cannot be read"),
        (["nothing", "--stories", "4"], "neither a checkpoint nor a run"),
    ],
)
def test_a_wrong_call_is_one_sentence_before_a_teacher_is_fitted(
    place, capsys, monkeypatch, arguments, complaint
):
    monkeypatch.chdir(place)
    monkeypatch.setattr(evaluate, "open_grader", lambda *_, **__: pytest.fail("fitted"))
    assert complaint in fails(evaluate.main, [*arguments, "--device", "cpu"], capsys)
