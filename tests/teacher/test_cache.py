"""The cache of replies: no reply is paid for twice, whatever happens to the file."""

import contextlib
import resource

import pytest
from fault_server import FaultServer, graded

from tinystory.run.errors import UserError
from tinystory.teacher.api import Reply
from tinystory.teacher.cache import Cache
from tinystory.teacher.client import Teacher

pytestmark = pytest.mark.usefixtures("short_pauses")
NOTHING = (0, 0, 0)  # charged


def test_no_reply_is_paid_for_twice(tmp_path):
    kept = tmp_path / "run" / "replies.jsonl"
    stories = [f"Dog {i} ran." for i in range(30)]
    script = lambda story, n: "hm" if "1" in story and n == 0 else f"{n} 1 1"  # noqa: E731
    with FaultServer(script) as server:
        with Teacher([server.url], cache=kept) as teacher:
            before = graded(teacher, "Once", stories[:20])
            paid = dict(server.seen)
        lines = kept.read_bytes()
        kept.write_bytes(lines + b'{"key": "torn')  # killed while writing
        with Teacher([server.url], cache=kept) as teacher:
            # other indices: the fence is not part of the key
            after = graded(teacher, "Once", stories[::-1])[::-1]
            assert teacher.ledger.total["cached"] == sum(paid[story] for story in stories[:20])
        assert kept.read_bytes().startswith(lines + b"{") and b"torn" not in kept.read_bytes()
        paid = {story: server.seen[story] for story in stories}
        assert paid == {story: 2 if "1" in story else 1 for story in stories}
        for old, new in zip(before, after, strict=False):
            assert old.scores == new.scores
            assert old.reply == new.reply
            assert old.reply_words == new.reply_words
        for other in ({"seed": 9}, {"temperature": 0.9}, {"max_tokens": 9}, {"models": ["second"]}):
            with Teacher([server.url], cache=kept, **other) as teacher:
                graded(teacher, "Once", stories[:1])
                assert teacher.ledger.total["cached"] == 0
        with Teacher([server.url], cache=kept) as teacher:
            graded(teacher, "Twice", stories[:1])
            assert teacher.ledger.total["cached"] == 0


def test_the_first_reply_to_a_question_is_kept(tmp_path):
    cache = Cache(tmp_path / "replies.jsonl")
    assert (
        cache.put("question", Reply("1 1 1"), NOTHING)
        == cache.put("question", Reply("2 2 2"), NOTHING)
        == cache.get("question")
        == Reply("1 1 1")
    )
    cache.close()
    with contextlib.closing(Cache(tmp_path / "replies.jsonl")) as cache:
        assert cache.get("question") == Reply("1 1 1")
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_cache_cut_anywhere_keeps_its_whole_lines(tmp_path, cut):
    path = tmp_path / "replies.jsonl"
    with contextlib.closing(Cache(path)) as cache:
        for i in range(5):
            cache.put(str(i), Reply("\u2028 1 1\n" * i), NOTHING)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with contextlib.closing(Cache(path)) as cache:
        left = whole[: len(whole) - cut].count(b"\n")
        kept = [cache.get(str(i)) for i in range(left)]
        assert kept == [Reply("\u2028 1 1\n" * i) for i in range(left)]
        assert cache.get(str(left)) is None
        for i in range(5):
            cache.put(str(i), Reply("\u2028 1 1\n" * i), NOTHING)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line", [b"hello\n", b"[]\n", b'{"key": 1, "reply": "1 1 1"}\n', b"\xff\n"]
)
def test_another_file_is_not_a_cache(tmp_path, line):
    path = tmp_path / "notes.txt"
    path.write_bytes(line)
    with pytest.raises(UserError, match=r"line 1 of .*notes\.txt"):
        Cache(path)
    assert path.read_bytes() == line
    with pytest.raises(UserError, match=r"cannot write .*: (Not a directory|File exists)"):
        Cache(path / "replies.jsonl").put("question", Reply("1 1 1"), NOTHING)


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "replies.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.closing(Cache(path)) as cache:
        cache.put("question", Reply("1 1 1"), NOTHING)
        whole = path.read_bytes()
        try:
            for room in (10, 0):  # a line that is written in part, and one that is not written
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
                with pytest.raises(UserError, match="cannot write"):
                    cache.put("another", Reply("2 2 2"), NOTHING)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == whole and cache.get("another") is None
        cache.put("another", Reply("2 2 2"), NOTHING)
    with contextlib.closing(Cache(path)) as cache:
        assert cache.get("question") == Reply("1 1 1")
        assert cache.get("another") == Reply("2 2 2")
