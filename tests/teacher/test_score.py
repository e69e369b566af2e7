"""Replies are read exactly or not at all."""

import itertools
import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinystory.teacher.grades import parse_scores
from tinystory.teacher.prompt import CRITERIA

space = st.text(" \t\r\n", max_size=4)
between = st.one_of(
    st.text(" \t\r\n", min_size=1, max_size=3), st.tuples(space, space).map(",".join)
)
scores = st.lists(st.integers(0, 3), min_size=3, max_size=3)


@given(scores, between, between, space, space, st.sampled_from(["", "."]))
def test_three_numbers_are_read_in_the_order_asked(values, a, b, before, after, stop):
    reply = f"{before}{values[0]}{a}{values[1]}{b}{values[2]}{stop}{after}"
    assert parse_scores(reply, CRITERIA) == dict(zip(CRITERIA, values, strict=True))


@given(
    scores,
    st.permutations(CRITERIA),
    st.sampled_from(["{}", "```json\n{}\n```", "```\n{}```", " {}\n"]),
)
def test_json_and_labels_are_read_in_any_order(values, names, wrap):
    wanted = dict(zip(names, values, strict=True))
    read = parse_scores(wrap.replace("{}", json.dumps(wanted)), CRITERIA)
    assert read == wanted and tuple(read) == CRITERIA
    assert (
        parse_scores(", ".join(f"{name}: {value}" for name, value in wanted.items()), CRITERIA)
        == wanted
    )


@given(st.text('0123459 \n,.:-+/{}[]"`e', max_size=24) | st.text(max_size=40))
@example("1 2 3\n\n3 2 1")
@example('{"readability": 1, "coherence": 2}')
def test_no_digit_of_an_accepted_reply_is_ignored(reply):
    read = parse_scores(reply, CRITERIA)
    if read is not None:
        assert [int(digit) for digit in re.findall(r"\d", reply)] == list(read.values())


NO_SCORES = (
    "|2 2|2 2 2 2|222|2.5 1 1|2. 1. 1.|4 0 0|-1 1 1|+1 1 1|01 1 1|1e0 1 1|3/3 2/3 1/3|3; 3; 3|3 3 3!|3 3 3.."
    "|3,,3,3|**3 3 3**|٣ ٣ ٣|\uff13 \uff13 \uff13|² ² ²|3\u00a03\u00a03|three three three|[3, 3, 3]"
    "|readability: 3, coherence: 3|readability: 3, coherence: 3, readability: 3"
    "|Grammar: 3, coherence: 3, creativity: 3|readability: 3, coherence: 3, creativity: 4"
    '|{"readability": 3, "coherence": 3}'
).split("|")
NO_SCORES += [
    "Scores from 0 to 3: 3 3 3",
    '{"readability": 3, "coherence": 3, "creativity": 3, "humour": 3}',
    '{"readability": 1, "readability": 3, "coherence": 3, "creativity": 3}',
    '{"scores": {"readability": 3, "coherence": 3, "creativity": 3}}',
    '[{"readability": 3, "coherence": 3, "creativity": 3}]',
    '{"readability": 3, "coherence": 3, "creativity": 3} and that is kind',
    '{"readability": ' + "[" * 900,
    "3 " * 2_500_000,
    " " * 5_000_000 + "3 3 3",
]
for value in 'true 2.0 NaN Infinity "3" null [3] 4'.split():
    NO_SCORES.append(f'{{"readability": {value}, "coherence": 3, "creativity": 3}}')


@pytest.mark.parametrize("reply", NO_SCORES)
def test_anything_else_is_no_score(reply):
    assert parse_scores(reply, CRITERIA) is None


def test_other_criteria_are_read_as_well():
    assert parse_scores("1 2", ["humour", "suspense"]) == {"humour": 1, "suspense": 2}
    assert parse_scores("1 2 3", ["humour", "suspense"]) is None
    for values in itertools.product(range(4), repeat=2):
        assert parse_scores(",".join(map(str, values)), ["a", "b"]) == dict(
            zip("ab", values, strict=True)
        )
