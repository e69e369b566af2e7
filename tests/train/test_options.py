"""What no option may be: out of range, not a number, too large for memory, or against another
option."""

import dataclasses
import json
import re
import shlex
from dataclasses import asdict
from html import escape

import pytest
from conftest import SHORT, SMALL, cli, fails, metrics
from hypothesis import given
from hypothesis import strategies as st

import train_interact as interact
import train_pretrain as pretrain
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.config.command_line import FIRST, parse
from tinystory.config.record import KEPT_ON_RESUME
from tinystory.data.openings import builtin_openings
from tinystory.rl import learners
from tinystory.run.errors import UserError
from tinystory.run.options import Interval, flag_of
from tinystory.student import checkpoint, memory
from tinystory.student.generate import encode_opening

COMMANDS = (PretrainConfig, InteractConfig)


def options(config_class):
    return [f for f in dataclasses.fields(config_class) if f.init]


def test_every_number_has_a_range_that_holds_every_preset():
    for config_class in COMMANDS:
        for f in options(config_class):
            assert isinstance(f.metadata["allowed"], Interval) == (f.type in (int, float)), f.name
        for preset in config_class.presets:
            parse(config_class, ["--preset", preset])


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf"), -1, 10**300, 2**63, 2.5, True, "1", None]
)
def test_no_number_may_be_any_of_these(value):
    for config_class in COMMANDS:
        for f in options(config_class):
            if isinstance(f.metadata["allowed"], Interval) and (f.type is int or value != 2.5):
                config = dataclasses.replace(config_class(), **{f.name: value})
                with pytest.raises(UserError, match=rf"{f.name.replace('_', '[-_]')} must be "):
                    config.check()


@pytest.mark.parametrize(
    "argv", [["--seed", "9" * 5000], ["--out", "a" * 100_000], ["--" + "a" * 10_000]]
)
def test_an_endless_value_is_not_shown_whole(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    line = fails(pretrain.main, argv, capsys)
    assert argv[0][:20] in line or "cannot write" in line
    assert len(line) < 600


def test_a_word_that_is_no_number_is_one_sentence_about_the_flag(capsys):
    assert fails(pretrain.main, ["--words", "200q"], capsys) == (
        "error: --words must be a whole number, such as 20000, 20k or 2M, not '200q'"
    )
    assert fails(pretrain.main, ["--words"], capsys).startswith("error: --words: expected one")


@pytest.mark.parametrize("flag", ["--seed", "--learning-rate"])
@pytest.mark.parametrize("text", ["nan", "inf", "1e400", "-1", "9223372036854775808", "x", ""])
def test_what_is_no_number_is_told_without_a_traceback(flag, text, capsys):
    line = capture(lambda: pretrain.main([f"{flag}={text}"]), capsys)
    assert "error: " in line and flag in line


def capture(command, capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        command()
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


REFUSED = """--temperature 1e-9|--temperature 1e9|--seed 4294967296|--teacher-timeout 0|--n-embd 20
--n-embd 130|--n-head 5|--n-embd 2048 --n-head 4|--val-fraction 0|--val-fraction 1|--vocab-size 1e9|--vocab-size 260
--teacher-max-tokens 0|--teacher-max-tokens -5|--kl-coef -5|--clip-ratio -1|--gamma 5|--warmup 1|--dropout 1
--optimizer sgd|--weights-init zero|--dtype float16|--max-unscored 1|--diversity 1.1|--context 1|--learner head
--judge likelihood|--judge random|--reward random --teacher-url http://127.0.0.1:9
--stories-per-step 1|--budget-cost 1|--learner gae --value-coef 0|--value-coef 1|--preset paper --value-coef 0
--learner rloo --stories-per-opening 1|--learner dr_grpo --stories-per-opening 7
--kl-in both|--learner sft|--learner sft-best --gamma 0.9|--learner sft-best --clip-ratio 0.1
--learner grpo --stories-per-opening 2 --lam 1
--learner dpo --stories-per-opening 1|--learner dpo --stories-per-opening 7|--learner dpo --kl-coef 0
--learner dpo --stories-per-opening 2 --kl-in loss|--learner dpo --stories-per-opening 2 --clip-ratio 0.1
--learner dpo --stories-per-opening 2 --minibatch-size 3|--learner dpo --stories-per-opening 2 --micro-batch-size 1
--grades 7|--grades 1537|--stories-per-step 8 --grades 9
--logit-scale-lr 100|--stories-per-step 1e7 --kl-horizon 1e9|--eval-stories 1e7|--kl-horizon 1e-300|--kl-horizon 50"""


@pytest.mark.parametrize("argv", REFUSED.replace("\n", "|").split("|"))
def test_senseless_options_are_refused(argv):
    argv = argv.split()
    config_class = next(
        c for c in COMMANDS if {f.name for f in options(c)} >= {argv[-2][2:].replace("-", "_")}
    )
    with pytest.raises(UserError, match="--"):
        config = parse(config_class, argv)
        learners.check(config)


@pytest.mark.parametrize(
    "argv, flag",
    [
        ("--optimizer adamw --muon-learning-rate 0.1", "--muon-learning-rate"),
        ("--teacher-model x", "--teacher-model"),
        ("--price-in 1", "--price-in"),
        ("--teacher-temperature 1", "--teacher-temperature"),
        ("--judge-model x", "--judge-model"),
        ("--judge rubric --judge-prompt event", "--judge-prompt"),
        ("--judge judge.py --judge-model x", "--judge-model"),
        ("--kl-coef 0 --kl-target 3", "--kl-target"),
        ("--kl-coef 0 --kl-horizon 9000", "--kl-horizon"),
        ("--teacher-url http://a --no-calibrate --min-auc 0.8", "--min-auc"),
    ],
)
def test_an_option_that_another_leaves_without_effect_is_refused(argv, flag):
    config_class = PretrainConfig if "--optimizer" in argv else InteractConfig
    with pytest.raises(
        UserError, match=f"^{flag} has no effect (with|without|on) .*, or leave {flag} out"
    ):
        parse(config_class, argv.split())


@pytest.mark.parametrize("preset", InteractConfig.presets)
def test_an_options_value_of_a_preset_may_be_without_effect(preset):
    parse(InteractConfig, ["--preset", preset, "--kl-coef", "0"])
    parse(InteractConfig, ["--preset", preset, "--judge", "HTTP://127.0.0.1:9"])


@pytest.mark.parametrize("flag", ["--out", "--openings", "--device", "--teacher-url"])
def test_an_empty_value_as_of_an_unset_variable_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag} must be given: it is empty"):
        parse(InteractConfig, [flag, ""])


@pytest.mark.parametrize(
    "word, words",
    [
        *(
            ("--batch_size", "did you mean --batch-size"),
            ("--lr=1", "option --lr: did you mean --learning-rate"),
        ),
        ("--block-size", r"option --block-size: did you mean --context\?"),
        ("--max-iters", r"option --max-iters: did you mean --words\?"),
        ("--batch-size", r"mean --stories-per-step \(.* in a step.*\) or --minibatch-size \(.*\)"),
        *(("--epoch", "did you mean --epochs"), ("-x", "--help-all"), ("runs/a", "--help-all")),
    ],
)
def test_an_unknown_option_is_told_with_the_one_that_was_meant(word, words):
    config_class = PretrainConfig
    if word in ("--epoch", "--batch-size"):
        config_class = InteractConfig
    with pytest.raises(UserError, match=words):
        parse(config_class, [word, "3"])


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--preset dmeo", r"--preset must be demo, english, .* \(did you mean demo\?\)"),
        ("--preset x", "--preset must be demo, english, .*, not 'x'$"),
        ("--learner rigde", r"--learner must be ridge, .* \(did you mean ridge\?\)"),
        ("--optimizer mun", r"--optimizer must be muon or adamw, .* \(did you mean muon\?\)"),
    ],
)
def test_a_value_that_does_not_exist_is_told_with_the_one_that_was_meant(argv, words):
    config_class = InteractConfig if "--learner" in argv else PretrainConfig
    with pytest.raises(UserError, match=words):
        parse(config_class, argv.split())


def test_another_prompt_needs_an_llm(tmp_path):
    argv = ["--teacher-prompt", str(tmp_path / "p.json")]
    with pytest.raises(UserError, match=r"--teacher-prompt has no effect on .*--teacher-url"):
        parse(InteractConfig, argv)
    parse(InteractConfig, [*argv, "--teacher-url", "http://127.0.0.1:9"])


@pytest.mark.parametrize("config_class", COMMANDS)
def test_help_lists_what_people_use_first_and_the_rest_on_request(config_class, capsys):
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse(config_class, [flag])
        texts[flag] = " ".join(capsys.readouterr().out.split())
        assert "(default: )" not in texts[flag]
        assert "1000000000" not in texts[flag]
        assert "[]" not in texts[flag]
    names = {f.name: f"--{f.name.replace('_', '-')} " for f in options(config_class)}
    first = {name for name, flag in names.items() if flag in texts["--help"].replace(",", " ")}
    assert 12 <= len(first) <= 30 and first == names.keys() & FIRST
    assert all(flag in texts["--help-all"].replace(",", " ") for flag in names.values())
    for f in options(config_class):
        if isinstance(f.metadata["allowed"], tuple):
            assert "{" + ",".join(f.metadata["allowed"]) + "}" in texts["--help-all"]


def test_the_learning_rate_of_adamw_follows_the_optimizer():
    for optimizer, rate in (("muon", 0.024), ("adamw", 0.0024)):
        assert parse(PretrainConfig, ["--optimizer", optimizer]).learning_rate == rate


def test_whole_numbers_are_exact():
    def seed(text):
        return parse(PretrainConfig, ["--words", text]).words

    expected = [10**6, 1000, 2 * 10**6, 1500, 10**15 - 1]
    assert [seed(text) for text in ("1e6", "1_000", "2M", "1.5k", "999999999999999")] == expected


JUNK = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.text() | st.none())
    | st.just({})
)


def recorded(folder, options) -> list[str]:
    """Flags that resume a run with these options. The run's folder has only config.json."""
    run = {
        "options": options,
        "started": "2026-01-01T00:00:00+00:00",
        "device": "cpu",
        "resumed": [],
    }
    (folder / "config.json").write_text(json.dumps(run))
    return ["--resume", "--out", str(folder)]


@given(st.data())
def test_a_resumed_run_checks_what_its_config_says(tmp_path_factory, data):
    """Any value for any option: a config that may be run, or a sentence that names the file and the
    option."""
    out = tmp_path_factory.mktemp("run")
    config_class = data.draw(st.sampled_from([*COMMANDS]))
    record = asdict(config_class())
    name = data.draw(st.sampled_from(sorted(record)))
    record[name] = data.draw(JUNK | st.sampled_from(["\0", "\ud800", 2**70, -1]))
    try:
        config = parse(config_class, recorded(out, record))
    except UserError as error:
        assert str(out) in str(error)
        # JSON with Infinity
        assert name in str(error).replace("-", "_") or "cannot be read" in str(error)
    else:
        assert config.out == str(out) and config.resume
        taken, said = getattr(config, name), record[name]
        assert (
            name in ("out", "resume", "init", "any_model")  # of the command line alone
            or taken == said
            or said is None
            or not (taken or said)
            or (
                name in ("n_head", "learning_rate") and said == 0  # chosen by other options
            )
        )


@pytest.mark.parametrize("config_class", COMMANDS)
@pytest.mark.parametrize("preset", ["paper", "babylm-2026-strict"])
def test_another_preset_is_not_recorded_for_a_resumed_run_that_has_nothing_of_it(
    config_class, preset, tmp_path
):
    resume = recorded(tmp_path, asdict(config_class()))
    with pytest.raises(
        UserError, match=rf"--preset {preset} does not go with --resume: .* begun with 'demo'"
    ):
        parse(config_class, [*resume, "--preset", preset])
    assert parse(config_class, [*resume, "--preset", "demo"]).preset == "demo"


# Per option that a resumed run keeps: a value that is not the default.
OTHERWISE: dict[str, object] = {
    "preset": "paper",
    "init": "runs/b",
    "openings": "Once",
    "weights_init": "gpt2",
    "packing": "stream",
    "optimizer": "adamw",
    "val_fraction": 0.5,
    "temperature": 0.2,
    "kl_coef": 0.5,
}


@pytest.mark.parametrize("config_class", COMMANDS)
def test_an_option_that_a_resumed_run_keeps_is_refused_and_its_recorded_value_is_not(
    config_class, tmp_path
):
    """Otherwise config.json would record a value that the run does not use."""
    begun = asdict(config_class()) | ({"init": "runs/a"} if config_class is InteractConfig else {})
    resume = recorded(tmp_path, begun)
    kept = [f for f in options(config_class) if f.name in KEPT_ON_RESUME]
    assert len(kept) > 5
    for f in kept:
        flag, value = flag_of(f), OTHERWISE.get(f.name, 320)
        with pytest.raises(UserError) as caught:
            parse(config_class, [*resume, flag, str(value)])
        said = f"{flag} {value} does not go with --resume: "
        assert str(caught.value).startswith(said), f.name
        assert f"begun with {begun[f.name]!r}; leave it out" in str(caught.value)
        same = parse(config_class, [*resume, flag, str(begun[f.name])])
        assert getattr(same, f.name) == begun[f.name]


def test_a_resumed_run_may_be_given_again_the_zeros_that_stood_for_a_choice(tmp_path):
    resume = recorded(tmp_path, asdict(PretrainConfig()))
    assert parse(PretrainConfig, [*resume, "--n-head", "0"]).n_head == 3
    begun = asdict(InteractConfig(temperature=0.5))
    zero = ["--temperature", "0"]
    resume = recorded(tmp_path, begun | {"tried_temperatures": {"0.5": 0.4}})
    assert parse(InteractConfig, [*resume, *zero]).temperature == 0.5
    with pytest.raises(UserError, match=r"--temperature 0\.0 does not go with --resume"):
        parse(InteractConfig, [*recorded(tmp_path, begun), *zero])


@pytest.mark.parametrize(
    "config_class, other", [(PretrainConfig, InteractConfig), (InteractConfig, PretrainConfig)]
)
def test_the_folder_of_the_other_command_is_told_as_such(config_class, other, tmp_path):
    with pytest.raises(UserError, match="the run was begun by another command"):
        parse(config_class, recorded(tmp_path, asdict(other())))


@pytest.mark.parametrize("config_class", COMMANDS)
def test_a_run_of_a_version_without_an_option_is_not_guessed_at(config_class, tmp_path):
    record = asdict(config_class())
    del record["seed"]
    for more in ([], ["--seed", "7"]):
        with pytest.raises(
            UserError, match=r"config\.json has no seed: the run was begun by another"
        ):
            parse(config_class, [*recorded(tmp_path, record), *more])


def test_likelihood_needs_a_temperature(place, tmp_path, capsys):
    flags = ["--init", str(place / "p"), "--out", str(tmp_path / "i"), "--reward", "likelihood"]
    line = fails(interact.main, [*flags, "--temperature", "0"], capsys)
    assert "--temperature 0" in line and "--reward likelihood" in line
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_memory_is_refused_before_it_is_allocated(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "total", lambda device: 64 << 30)
    corpus = ["--corpus", str(place / "corpus.txt"), *SMALL, "--out", str(tmp_path / "p")]
    for flag in (
        "--batch-size 1e9",
        "--n-embd 65536 --n-head 512",
        "--context 1e6 --batch-size 1e5",
    ):
        line = fails(pretrain.main, [*corpus, *flag.split()], capsys)
        assert "GB of memory" in line and "lower --batch-size" in line
    assert not list(tmp_path.iterdir())


def test_a_budget_that_holds_no_step_is_refused_at_once(place, tmp_path, capsys):
    init = SHORT + cli(
        "--init {} --reward random --out {}", checkpoint.newest(place / "p"), tmp_path / "i"
    )
    # 224 are a step of 6 stories and two evaluations of 4, of 16 words each
    for words in ("50", "223"):
        line = fails(interact.main, [*init, "--budget-words-out", words], capsys)
        assert "does not suffice for one step" in line and not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "one two three " * 9 + " " * 100_000 + "four " * 9,
        "ab1 " * 30_000 + "\n\nEnd.",
    ],
)
def test_a_corpus_of_one_endless_line_is_read(tmp_path, text, monkeypatch):
    """Also one letter, or one gap: the time to learn a vocabulary grows with the square of the
    longest word."""
    monkeypatch.setenv("TINYSTORY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text(text)
    pretrain.main(
        SMALL
        + cli(
            "--corpus {} --words 20 --context 16 --out {}", tmp_path / "corpus.txt", tmp_path / "p"
        )
    )
    assert metrics(tmp_path / "p")


def test_a_context_too_short_for_the_closing_story_ends_well(place, tmp_path):
    corpus = SMALL + cli("--corpus {} --words 40 --out {}", place / "corpus.txt", tmp_path / "p")
    pretrain.main([*corpus, "--context", "4"])
    assert (tmp_path / "p" / "report.html").exists()


@pytest.mark.parametrize(
    "context, preset", [("16", "demo"), ("64", "demo"), ("128", "demo"), ("128", "english")]
)
def test_the_next_command_that_is_printed_works_or_there_is_none(
    place, tmp_path, capsys, monkeypatch, context, preset
):
    monkeypatch.setattr("tinystory.data.shards.cache_dir", lambda: place / "cache")
    run = tmp_path / "p"
    corpus = ["--corpus", str(place / "corpus.txt"), "--words", "50", "--out", str(run)]
    pretrain.main([*corpus, *SMALL, "--context", context, "--preset", preset])
    (following,) = re.findall(r"^next: +(.*)$", capsys.readouterr().out, re.M)
    report = re.sub("</?span>", "", (run / "report.html").read_text())
    assert escape(following) in report
    _, tokenizer, _ = checkpoint.load(checkpoint.newest(run))
    room = int(context) - max(
        len(encode_opening(tokenizer, opening)) for opening in builtin_openings()
    )
    if room < 1:
        assert f"a longer --context than {context}" in following
        return
    words = shlex.split(following)
    arguments = words[next(i for i, word in enumerate(words) if word.startswith("--")) :]
    kept = [] if preset == "demo" else ["--preset", preset]
    assert arguments == [
        *("--init", str(run), *kept, *corpus[:2], "--max-new-tokens", str(room)),
    ]
    small = "--steps 1 --stories-per-step 2 --eval-stories 2 --device cpu --reward constant".split()
    # --corpus is for the built-in teacher; a constant is faster
    arguments.remove("--corpus")
    arguments.remove(corpus[1])
    interact.main([*arguments, *small, "--out", str(tmp_path / "i")])
    assert "pretrained with --preset" not in capsys.readouterr().out


KEY = "planted-0123456789"


@pytest.mark.parametrize(
    "variable", ["OPENAI_API_KEY", "OPENAI_API_KEY_2", "HF_TOKEN", "OPENAI_CUSTOM_HEADERS"]
)
@pytest.mark.parametrize(
    "flag, text",
    [
        ("--teacher-extra", '{"user": "%s"}'),
        ("--teacher-extra", "%s"),
        ("--openings", "Once %s"),
        ("--teacher-model", "%s"),
        ("--out", "runs/%s"),
    ],
)
def test_a_key_of_the_environment_is_no_option(variable, flag, text, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, f"X-Api-Key: {KEY}" if "HEADERS" in variable else KEY)
    with pytest.raises(UserError, match=rf"{flag} holds the value of {variable}") as caught:
        parse(InteractConfig, [flag, text % KEY])
    assert KEY not in str(caught.value)


def test_a_key_that_a_run_recorded_before_is_not_shown_on_resume_and_a_flag_replaces_it(
    monkeypatch, tmp_path
):
    url = "http://127.0.0.1:9"
    begun = InteractConfig(teacher_url=[url], teacher_extra=f'{{"user": "{KEY}"}}')
    resume = [*recorded(tmp_path, asdict(begun)), "--teacher-url", url]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=r"records --teacher-extra") as error:
        parse(InteractConfig, resume)
    assert KEY not in str(error.value)
    config = parse(InteractConfig, [*resume, "--teacher-extra", "{}"])
    assert config.teacher_extra == "{}"


@pytest.mark.parametrize(
    "name, value", [("OPENAI_API_KEY", "none"), ("GIT_AUTHOR_NAME", "Jane Roe")]
)
def test_a_dummy_key_and_what_is_no_key_may_be_in_options(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert parse(InteractConfig, ["--opening", f"{value} ran."]).openings


def test_a_path_is_no_key(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPLOY_KEY", str(tmp_path))
    assert parse(InteractConfig, ["--out", f"{tmp_path}/run"]).out
