"""The definitions of BabyLM's pipeline, on small files in the pipeline's formats, against plain
sums over logits."""

import csv
import gzip
import json
import math

import numpy as np
import pytest
import torch
from conftest import cli, fails, tiny_stories

from lab import babylm, pairs
from lab.pairs import evaluate_pairs, evaluate_wug, read_items
from lab.reading_times import (
    BASELINE,
    EYES,
    SELF_PACED,
    SPILLOVER,
    evaluate_reading_times,
    explained,
)
from lab.scoring import common_prefix, part, sum_logprobs
from tinystory.run.errors import UserError
from tinystory.student import checkpoint, hf

PAIRS = [
    ("Tom had a kite.", "Tom had a a kite."),
    ("Mia was happy.", "happy Mia was."),
    ("It is.", "It is."),
    ("The park was in the ball and in the wood.", "The ball was in the park."),
    ("Ça va?", "猫 va?"),
]
BLIMP = [
    {
        "sentence_good": good,
        "sentence_bad": bad,
        "field": "syntax_semantics" if i % 2 else "syntax",
        "linguistics_term": "order",
        "UID": "one" if i < 2 else "two",
    }
    for i, (good, bad) in enumerate(PAIRS)
]
PREFIX = "Tom had the ball, Mia had the kite. Tom had "
ENTITIES = [
    {
        "input_prefix": PREFIX,
        "options": ["the ball.", "nothing.", "the ball and the kite."],
        "numops": 1,
    }
]
WUG = [
    {"sentences": f"a noun: {a}able. {a}ability\ta noun: {a}able. {a}ableness", "ratio": i / 7}
    for i, a in enumerate(("th", "pa", "kit", "bo", "drum", "ha", "sh", "la"))
]


def write(path, records):
    text = "\n".join(map(json.dumps, records))  # with no newline at the end, as some of BabyLM's
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def logprob(student, tokens, first):
    """Sum of log p(token | those before) from `first` on, in float64, from logits."""
    with torch.no_grad():
        all_logs = student.double()(torch.tensor([list(tokens)]))[0].log_softmax(-1)
    student.float()
    return float(sum(all_logs[i - 1, tokens[i]] for i in range(max(first, 1), len(tokens))))


def test_a_text_is_scored_from_its_second_token_on(student, tokenizer):
    for good, bad in PAIRS:
        (logprobs,) = sum_logprobs(
            student, [[part(tokenizer, "", text) for text in (good, bad)]], "x"
        )
        whole = [logprob(student, tokenizer.encode(text), 1) for text in (good, bad)]
        assert float(logprobs[0] - logprobs[1]) == pytest.approx(whole[0] - whole[1], abs=1e-3)


def test_a_token_across_the_border_belongs_to_the_option(student, tokenizer):
    ids, first = part(tokenizer, "in the ", "park")
    assert tokenizer.decode(ids[first:]).endswith("park")
    assert tokenizer.decode(ids[:first]) in "in the "
    for prefix, option in ((PREFIX, "the ball."), ("猫", "猫 is"), ("", "Tom")):
        ids, first = part(tokenizer, prefix, option)
        ends = np.cumsum([len(tokenizer.token_bytes[id]) for id in ids])
        assert first == max(next(i for i, end in enumerate(ends) if end > len(prefix.encode())), 1)


def test_batches_give_what_each_text_alone_gives(student, tokenizer):
    texts = [part(tokenizer, PREFIX, option) for option in ENTITIES[0]["options"]]
    together = sum_logprobs(student, [texts, texts[:2]], "x")
    alone = torch.cat(sum_logprobs(student, [[each] for each in texts], "x"))
    # The common beginning of the names is left out in the table; the differences stay.
    torch.testing.assert_close(together[0] - together[0][0], alone - alone[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        together[1] - together[1][0], alone[:2] - alone[0], atol=1e-4, rtol=0
    )
    for value, (ids, first) in zip(alone, texts, strict=True):
        assert float(value) == pytest.approx(logprob(student, list(ids), first), abs=1e-3)


def test_a_common_prefix_is_computed_once(student, tokenizer, monkeypatch):
    texts = [part(tokenizer, PREFIX, option) for option in ENTITIES[0]["options"]]
    embedded = []
    embed = student.embed

    def counted(ids, positions):
        embedded.append(len(ids))
        return embed(ids, positions)

    monkeypatch.setattr(student, "embed", counted)
    sum_logprobs(student, [texts], "x")
    common = common_prefix(texts)
    assert common > 10
    assert embedded == [common + sum(len(text.ids) - common for text in texts)]


@pytest.mark.parametrize("name", ["blimp.jsonl", "blimp.jsonl.gz"])
def test_accuracy_is_the_mean_over_phenomena(student, tokenizer, tmp_path, name):
    folder = tmp_path / "blimp"
    folder.mkdir()
    items = []
    for item, is_right in zip(BLIMP, (True, False, True, False, True), strict=True):
        texts = [item["sentence_good"], item["sentence_bad"]]
        texts.sort(key=lambda text: logprob(student, tokenizer.encode(text), 1), reverse=is_right)
        items.append(item | {"sentence_good": texts[0], "sentence_bad": texts[1]})
    assert items[2]["sentence_good"] == items[2]["sentence_bad"]  # a tie is right
    write(folder / name, items)
    measures = evaluate_pairs(student, tokenizer, folder)
    rows = measures["phenomena"]
    assert [rows[uid]["correct"] for uid in ("one", "two")] == [1, 2]
    assert [rows[uid]["total"] for uid in ("one", "two")] == [2, 3]
    assert measures["accuracy"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert measures["items"] == 5
    assert measures["ci"][0] < measures["accuracy"] < measures["ci"][1]


def test_the_supplement_takes_its_names_from_its_files(student, tokenizer, tmp_path):
    write(tmp_path / "hypernym.jsonl.gz", [{"sentence_good": "a b", "sentence_bad": "b a"}])
    write(
        tmp_path / "turn_taking.jsonl",
        [{"sentence_good": "A: x\nB: y", "sentence_bad": "A: x\nB: x"}],
    )
    expected = {"hypernym", "turn_taking"}
    assert set(evaluate_pairs(student, tokenizer, tmp_path)["phenomena"]) == expected


def test_entities_are_averaged_within_each_file_first(student, tokenizer, tmp_path):
    flat = {"input_prefix": "Box ", "options": ["0.", "0."], "numops": 0}  # a tie: right
    wrong_first = sorted(
        ENTITIES[0]["options"], key=lambda o: logprob(student, *part(tokenizer, PREFIX, o))
    )
    never = {"input_prefix": PREFIX, "options": wrong_first, "numops": 1}
    write(tmp_path / "regular.jsonl", [flat, never, {**never, "numops": 2}])
    write(tmp_path / "ambiref.jsonl", [flat, {**flat, "options": ["0." * 200, "1."]}])
    measures = evaluate_pairs(student, tokenizer, tmp_path)
    assert measures["accuracy"] == pytest.approx((100 / 3 + 100) / 2) and measures["too_long"] == 1
    expected = {"regular_0_ops", "regular_1_ops", "regular_2_ops", "ambiref_0_ops"}
    assert set(measures["phenomena"]) == expected


def test_the_wug_test_is_a_rank_correlation(student, tokenizer, tmp_path, monkeypatch):
    def log_odds(student, groups, name):
        """Log-probabilities per item: of the first form the item's number, of the second 0."""
        return [torch.tensor([float(number), 0.0]) for number in range(len(groups))]

    monkeypatch.setattr(pairs, "sum_logprobs", log_odds)
    # The people's order is the student's, with neighbours swapped.
    ranks = (1, 0, 3, 2, 5, 4, 7, 6)
    records = [record | {"ratio": rank / 7} for record, rank in zip(WUG, ranks, strict=True)]
    measures = evaluate_wug(student, tokenizer, write(tmp_path / "wug.jsonl", records))
    assert measures["correlation"] == pytest.approx(1 - 6 * 8 / (8 * 63), abs=1e-6)
    assert measures["items"] == 8
    assert measures["ci"][0] <= measures["correlation"] <= measures["ci"][1]


BROKEN = {
    b"{": "JSONDecodeError",
    b'{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}': "KeyError: 'sentence_bad'",
    b'{"input_prefix": "a", "options": ["b"], "numops": 0}': "needs two texts",
    b'{"sentence_good": 1, "sentence_bad": "b"}': "needs two texts",
    b"\xff\xfe": "invalid start byte",
    b"[" * 100_000: "RecursionError",
}


@pytest.mark.parametrize("data", BROKEN)
def test_a_broken_file_is_named(tmp_path, data):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(
        UserError, match=rf"a\.jsonl cannot be read as BabyLM's sentence tasks \(.*{BROKEN[data]}"
    ):
        read_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError):
        read_items(tmp_path / "a.jsonl.gz")
    with pytest.raises(UserError, match="No such file"):
        read_items(tmp_path / "nothing.jsonl")


def test_a_file_of_another_task_or_of_too_few_items_is_refused(student, tokenizer, tmp_path):
    with pytest.raises(UserError, match="give wug tests to --wug"):
        evaluate_pairs(student, tokenizer, write(tmp_path / "wug.jsonl", WUG))
    with pytest.raises(UserError, match="give wug tests to --wug"):
        evaluate_wug(student, tokenizer, write(tmp_path / "blimp.jsonl", BLIMP))
    with pytest.raises(
        UserError, match=r"holds 2 items, and 2 of them fit .* with 3 items that fit"
    ):
        evaluate_wug(student, tokenizer, write(tmp_path / "wug.jsonl", WUG[:2]))
    long = ENTITIES[0] | {"input_prefix": "Tom " * 100}
    with pytest.raises(UserError, match="holds 1 items, and 0 of them fit"):
        evaluate_pairs(student, tokenizer, write(tmp_path / "long.jsonl", [long]))
    with pytest.raises(UserError, match="holds 0 items"):
        evaluate_pairs(student, tokenizer, write(tmp_path / "empty.jsonl", []))


# ---- reading times -------------------------------------------------------------------------------


def reading_rows(count=60):
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        words = tiny_stories(64)[i].split()
        at = 1 + i % 6
        row = {"item": " ".join(words[:at]), "word": words[at], "prev_word": words[at - 1]}
        row |= {
            "prev_item": " ".join(words[: at - 1]),
            "prev_length": len(words[at - 1]) if at > 1 else "",
        }
        row |= {"Subtlex_log10": rng.normal(10, 3), "length": len(words[at]), "context_length": at}
        row |= {
            name: "" if i == 7 and name == EYES[0] else rng.normal(200, 40)
            for name in (*EYES, SELF_PACED)
        }
        rows.append(row)
    return rows


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_reading_times_are_regressed_on_surprisal(student, tokenizer, tmp_path):
    rows = reading_rows()
    measures = evaluate_reading_times(
        student, tokenizer, write_csv(tmp_path / "reading_data.csv", rows)
    )

    def surprisal(text, word):
        total = 0.0
        # with no space before it; the text so far is made into tokens anew
        for id in tokenizer.encode(word):
            context = tokenizer.encode(text)
            total -= logprob(student, [*context, id], len(context))
            text += tokenizer.decode([id])
        return total

    data = {
        n: np.array([float(r[n] or "nan") for r in rows])
        for n in (*EYES, SELF_PACED, *BASELINE, "prev_length")
    }
    data["pred"] = np.array([surprisal(r["item"], r["word"]) for r in rows])
    data["prev_pred"] = np.array(
        [surprisal(r["prev_item"], r["prev_word"]) if r["prev_item"] else np.nan for r in rows]
    )
    assert measures["eye_tracking"] == pytest.approx(
        np.mean([explained(data, name, BASELINE) for name in EYES]), rel=1e-2
    )
    assert measures["self_paced"] == pytest.approx(explained(data, SELF_PACED, SPILLOVER), rel=1e-2)


def test_explained_is_the_share_of_what_the_baseline_leaves():
    rng = np.random.default_rng(1)
    data = {name: rng.normal(size=200) for name in (*BASELINE, "pred", "noise")}
    data["y"] = data["length"] * data["Subtlex_log10"] + data["pred"] + data["noise"]
    # By the normal equations, uncentred: 1 - RSS / RSS of the baseline.
    x = [data[name] for name in BASELINE]
    design = np.stack([np.ones(200), *x, x[0] * x[1], x[0] * x[2], x[1] * x[2], data["pred"]], 1)
    left = [
        data["y"] @ data["y"] - data["y"] @ d @ np.linalg.solve(d.T @ d, d.T @ data["y"])
        for d in (design, design[:, :-1])
    ]
    assert explained(data, "y", BASELINE) == pytest.approx(100 * (1 - left[0] / left[1]))
    assert 35 < explained(data, "y", BASELINE) < 65


def test_a_reading_file_of_another_kind_is_named(student, tokenizer, tmp_path):
    rows = reading_rows()
    for wrong in ([{"item": "a", "word": "b"}], [*rows, rows[0] | {SELF_PACED: "fast"}]):
        with pytest.raises(UserError, match="cannot be read as BabyLM's reading_data"):
            evaluate_reading_times(student, tokenizer, write_csv(tmp_path / "a.csv", wrong))
    with pytest.raises(UserError, match="No such file"):
        evaluate_reading_times(student, tokenizer, tmp_path / "nothing.csv")


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_compares_checkpoints(student, tokenizer, tmp_path, capsys):
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    for step, name in enumerate(("chck_1M", "chck_2M"), 1):
        history = {"words": step * 1_000_000}
        checkpoint.save(
            run / name, student, tokenizer, history=history, state={}, counters={"step": step}
        )
    hf.write(tmp_path / "<b>theirs", student, tokenizer)
    tasks = {
        "blimp": write(tmp_path / "blimp.jsonl", BLIMP),
        "wug": write(tmp_path / "wug.jsonl", WUG),
    }
    tasks |= {"entity-tracking": write(tmp_path / "regular.jsonl", ENTITIES)}
    tasks |= {"reading": write_csv(tmp_path / "reading_data.csv", reading_rows())}
    arguments = [str(run / "chck_1M"), str(run.parent), str(tmp_path / "<b>theirs")]
    arguments += [word for task, path in tasks.items() for word in (f"--{task}", str(path))]
    arguments += ["--coreference", "2", "--device", "cpu"]
    babylm.main([*arguments, "--out", str(tmp_path / "out" / "report.json")])
    records = json.loads((tmp_path / "out" / "report.json").read_text())["checkpoints"]
    expected = [("run/chck_1M", 10**6), ("run/chck_2M", 2 * 10**6), ("<b>theirs", None)]
    assert [(r["name"], r["words"]) for r in records] == expected
    assert records[0]["blimp"] == records[2]["blimp"]
    assert records[0]["coreference"] == records[2]["coreference"]
    printed = capsys.readouterr().out
    assert "BLiMP, %" in printed and "run/chck_2M" in printed


def test_a_change_is_the_mean_over_pairs_with_its_interval():
    """Differences of 1 and 3: mean 2, standard error 1, and 12.706 standard errors each way."""
    accuracies = [50.0, 51.0, 60.0, 63.0]
    records = [{"blimp": {"accuracy": accuracy}, "wug": {}} for accuracy in accuracies]
    assert babylm.changes(records) == ["change of BLiMP, %: +2.0 ± 12.7"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "nothing to evaluate"),
        (["--blimp", "pairs.jsonl"], "neither a checkpoint nor a run"),
        (["--blimp", "pairs.jsonl", "--ewok", "missing"], "there is no missing, from which ewok"),
        (["one", "--blimp", "pairs.jsonl", "--changes"], "needs two pairs of checkpoints"),
    ],
)
def test_what_the_command_says_of_a_wrong_call(tmp_path, capsys, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", BLIMP)
    with pytest.raises(SystemExit, match="2"):
        babylm.main(["nothing", *arguments, "--device", "cpu"])
    assert complaint in capsys.readouterr().err


EWOK = [
    {
        "Domain": "space",
        "Context1": "Tom is in the wood.",
        "Context2": "Mia is in the wood.",
        "Target1": "Tom ran.",
        "Target2": "Mia ran.",
        "ContextType": "direct",
        "ContextDiff": "a",
        "TargetDiff": "b",
    }
] * 2
COMPS = [
    {
        "prefix_acceptable": "A kite",
        "prefix_unacceptable": "The drum",
        "property_phrase": "can fly.",
    }
]
PAST = [
    {"sentences": "Today I gling. I glinged.\tToday I gling. I glang.\tI glung.", "ratio": i / 3}
    for i in range(3)
]
AOA = {
    "ball": [{"context": " Tom had the"}, {"context": ""}, {"context": "a " * 100}],
    "a": [{"context": "Once"}],
}


def babylm_data(folder, fast):
    """Small files in the formats and under the names of BabyLM's full_eval or fast_eval."""
    kind = "fast" if fast else "filtered"
    files = {
        f"blimp_{kind}/one.jsonl": BLIMP,
        f"supplement_{kind}/turn.jsonl": [
            {k: BLIMP[0][k] for k in ("sentence_good", "sentence_bad")}
        ],
        f"ewok_{kind}/space.jsonl": EWOK,
        f"entity_tracking{'_fast' * fast}/regular.jsonl": ENTITIES,
        "wug_past_tense/wug_past_tense.jsonl": PAST,
        "wug_adj_nominalization/wug_adj_nominalization.jsonl": WUG,
    }
    files |= (
        {}
        if fast
        else {"comps/comps_base.jsonl": COMPS, "comps/comps_wugs_dist-in-between.jsonl": COMPS}
    )
    for name, records in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, records)
    (folder / "reading").mkdir()
    write_csv(folder / "reading" / "reading_data.csv", reading_rows())
    (folder / "cdi_childes.json").write_text(json.dumps(AOA))
    return folder


@pytest.mark.parametrize("name", ["reading_data.csv", "reading_data.csv.gz"])
def test_reading_times_are_found_gzipped_or_not(tmp_path, name):
    (tmp_path / "reading").mkdir()
    (tmp_path / "reading" / name).touch()
    tasks = babylm.submission.find_tasks(tmp_path)
    assert tasks == {"reading": str(tmp_path / "reading" / name)}


def test_predictions_are_the_files_that_babylm_collates(student, tokenizer, tmp_path):
    """Names, keys and ids are those of BabyLM's pipeline; other tests compare the choices."""
    for step, name in enumerate(("chck_1M", "chck_100M"), 1):
        history = {"words": step * 1_000_000}
        checkpoint.save(
            tmp_path / name, student, tokenizer, history=history, state={}, counters={"step": step}
        )
    fast, full = (
        babylm_data(tmp_path / "fast_eval", True),
        babylm_data(tmp_path / "full_eval", False),
    )
    common = ["--predictions", str(tmp_path / "results" / "toy"), "--device", "cpu"]
    checkpoints = [str(tmp_path / name) for name in ("chck_1M", "chck_100M")]
    babylm.main(
        [*checkpoints, *cli("--babylm {} --aoa {}", fast, fast / "cdi_childes.json"), *common]
    )
    babylm.main([checkpoints[1], "--babylm", str(full), *common])
    tasks = "entity_tracking/entity_tracking{} blimp/blimp{} blimp/supplement{} ewok/ewok{} reading"
    tasks += " wug_adj/wug_adj_nominalization wug_past/wug_past_tense"
    expected = {
        f"{name}/{task.format('_fast')}"
        for name in ("chck_1M", "chck_100M")
        for task in tasks.split()
    }
    expected |= {
        "main/" + task.format("_filtered" * ("entity" not in task))
        for task in [*tasks.split(), "comps/comps"]
    }
    root = tmp_path / "results" / "toy"
    files = {
        str(path.parent.relative_to(root)).replace("/zero_shot/causal", ""): path
        for path in root.rglob("*.json")
    }
    surprisal = json.loads(files.pop("main/AoA_word").read_text())["results"]
    assert files.keys() == expected
    read = {name: json.loads(path.read_text()) for name, path in files.items()}
    assert [row["id"] for row in read["main/blimp/blimp_filtered"]["two"]["predictions"]] == [
        "two_0",
        "two_1",
        "two_2",
    ]
    assert read["main/blimp/blimp_filtered"]["two"]["predictions"][0]["pred"] == "It is."
    assert read["chck_1M/ewok/ewok_fast"]["space"]["predictions"][0]["pred"] in (
        " Tom ran.",
        " Mia ran.",
    )
    assert read["main/comps/comps"].keys() == {"base", "wugs_dist_in_between"}
    assert read["main/comps/comps"]["base"]["predictions"][0]["pred"] in (
        "A kite can fly.",
        "The drum can fly.",
    )
    assert read["main/entity_tracking/entity_tracking"].keys() == {"regular_1_ops"}
    past = read["main/wug_past/wug_past_tense"]["wug_past"]["predictions"]
    assert len(past) == 3
    assert past[0].keys() == {"id", "pred", "prob"}
    assert read["main/wug_adj/wug_adj_nominalization"]["wug_adj"]
    reading = read["main/reading"]["reading"]["predictions"]
    assert [row["id"] for row in reading] == [*range(len(reading_rows()))]
    assert reading[0].keys() == {"id", "pred", "prev_pred"}
    assert [(r["step"], r["target_word"], r["context_id"]) for r in surprisal[:3]] == [
        ("chck_1M", "ball", i) for i in range(3)
    ]
    text = "Tom had the ball"
    expected = -logprob(student, tokenizer.encode(text), len(tokenizer.encode("Tom had the")))
    assert surprisal[0]["surprisal"] == pytest.approx(expected, abs=1e-3)
    assert math.isnan(surprisal[2]["surprisal"])
    assert len(surprisal) == 6 and surprisal[3]["word_count"] == 2_000_000


def test_what_is_wrong_with_a_submission_is_said(student, tokenizer, tmp_path, capsys):
    checkpoint.save(
        tmp_path / "chck_1M", student, tokenizer, history={}, state={}, counters={"step": 1}
    )
    data = babylm_data(tmp_path / "fast_eval", True)
    write(
        data / "entity_tracking_fast" / "regular.jsonl",
        [ENTITIES[0] | {"input_prefix": "Tom " * 100}, *ENTITIES],
    )
    common = cli(
        "{} --device cpu --predictions {}", tmp_path / "chck_1M", tmp_path / "results" / "toy"
    )
    assert "1 items of" in fails(babylm.main, [*common, "--babylm", str(data)], capsys)
    assert "is not BabyLM's full_eval" in fails(
        babylm.main, [*common, "--babylm", str(tmp_path / "no")], capsys
    )
    assert "give --babylm FOLDER" in fails(
        babylm.main, [*common, "--blimp", str(data / "blimp_fast")], capsys
    )
    write(tmp_path / "aoa.json", [{"ball": [1]}])
    assert "cannot be read as BabyLM's cdi_childes.json" in fails(
        babylm.main, [*common, "--aoa", str(tmp_path / "aoa.json")], capsys
    )
