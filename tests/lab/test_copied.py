"""The fraction of stories that is copied from a corpus."""

import json

from lab import copied
from lab.copied import copied_fraction, longest_shared
from tinystory.data.corpus import open_corpus


def test_the_longest_phrase_shared_with_the_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("One two three four five.\n\nSix seven two three.")
    corpus = open_corpus([str(tmp_path / "a.txt")])
    texts = [
        "so two three four again",
        "five. Six",
        "nothing",
        "",
        "Six seven two three. four",
        "three three two three",
    ]
    assert longest_shared(texts, corpus) == [3, 1, 0, 0, 4, 2]


def test_the_command_prints_the_mean_fraction_of_each_file(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One two three four.\n\nFive six.")
    stories = [("One", "two three four."), ("One", "two seven eight nine"), ("One", "")]
    path = tmp_path / "ours.jsonl"
    lines = [json.dumps({"opening": opening, "story": story}) for opening, story in stories]
    path.write_text("\n".join(lines) + "\n")
    copied.main([str(path), "--corpus", str(tmp_path / "a.txt")])
    assert capsys.readouterr().out == f"{path}: copied fraction {(1 + 1 / 4) / 3:.3f}\n"
    corpus = open_corpus([str(tmp_path / "a.txt")])
    assert copied_fraction(["Five six."], corpus) == 1
