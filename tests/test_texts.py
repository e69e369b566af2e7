"""A figure that two pages show is the same on both, and figures of the code are the code's."""

import re

from conftest import ROOT

from scripts.teach import LESSON
from tinystory.config import InteractConfig, PretrainConfig
from tinystory.data.openings import BUILTIN
from tinystory.evaluate import calibration
from tinystory.evaluate.forecast import stories_to_grade
from tinystory.human.progress import COMPARED
from tinystory.rl.policy import RunState

PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("lab/**/*.md")]
WORDS = {"two": 2, "three": 3, "four": 4}


def text_of(path: str) -> str:
    return " ".join((ROOT / path).read_text().split())


def cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def row(path: str, *words: str) -> list[str]:
    """The cells of the page's first table row with all the words in the first cell."""
    for line in (ROOT / path).read_text().splitlines():
        if line.startswith("|") and all(word in cells(line)[0] for word in words):
            return cells(line)
    raise AssertionError(f"{path} has no row {words}")


def test_the_readmes_first_table_has_the_figures_of_the_results():
    """In the order of README's rows: the results' rows with these words."""
    results = {
        "before interaction": "none: before interaction",
        "best temperature": "none: the best temperature",
        "in random order": "the 64 answers, shuffled",
        "every score equal": "a constant score",
        "make demo": "the demo: ridge regression",
    }
    for words, result in results.items():
        score = float(row("lab/results/demo.md", result)[2])
        assert row("README.md", words)[1] == f"{score:.1f}"
    answers = float(row("lab/results/demo.md", "Qwen 1.5B, 64 answers")[2])
    assert row("README.md", "64 answers of Qwen 1.5B, 8 steps")[1] == f"{answers:.1f}"


def test_the_readmes_minutes_are_those_of_the_records():
    figures = re.search(
        r"record 4, .* (\d+) for the corpus, (\d+) to pretrain and (\d+) to interact \(.*"
        r"float32, .* pretrains in (\d+) s and interacts in (\d+) s",
        text_of("lab/speedrun.md"),
    )
    corpus, pretraining, interaction, pretraining_avx2, interaction_avx2 = map(
        float, figures.groups()
    )
    seconds = [
        corpus + pretraining + interaction,
        corpus + pretraining_avx2 + interaction_avx2,
    ]
    said = re.findall(r"(\w+) and a half", text_of("README.md"))
    minutes = [WORDS[word] + 0.5 for word in said]
    assert minutes
    for said_minutes, measured in zip(minutes, seconds, strict=False):
        assert abs(60 * said_minutes - measured) < 15


def test_a_figure_that_is_a_link_stands_on_the_page_that_it_links():
    linked = 0
    for page in PAGES:
        for figure, target in re.findall(r"\[(\d[\d. ]*)\]\(([^)#]+\.md)", page.read_text()):
            assert figure in (page.parent / target).read_text(), (page, figure, target)
            linked += 1
    assert linked >= 2


def test_the_pages_count_the_grades_that_the_code_asks_for():
    config = InteractConfig()
    count = f"{stories_to_grade(config, RunState(kl_coef=config.kl_coef)):,}".replace(",", " ")
    assert f"{count} grades" in text_of("README.md") or f"{count} scores" in text_of("README.md")
    assert f"the demo's {count}" in text_of("docs/teachers.md")
    answers = int(re.search(r"--grades (\d+)", LESSON)[1]) + COMPARED
    assert f"{answers} answers" in text_of("docs/teachers.md")
    assert f"{COMPARED} pairs" in text_of("docs/teachers.md")
    texts = (len(calibration.CHEAP_KINDS) + 1) * calibration.CHEAP
    assert f"{texts} texts" in text_of("docs/teachers.md")


def test_the_pages_describe_the_demo_by_its_options():
    interact, pretrain = InteractConfig(), PretrainConfig()
    million_words = f"{pretrain.words / 1e6:.1f} M words"
    stories = f"{interact.steps} of {interact.stories_per_step} stories"
    assert million_words in row("lab/paper.md", "pretraining")[2]
    assert stories in row("lab/paper.md", "steps")[2]
    assert str(BUILTIN) in row("lab/paper.md", "opening")[2]
    demo = text_of("lab/results/demo.md")
    assert f"on {million_words}." in demo
    assert f"runs {interact.steps} PPO steps of {interact.stories_per_step} stories" in demo
    notebook = (ROOT / "examples" / "tinystory.ipynb").read_text()
    assert r"PRETRAIN, INTERACT = \"\", \"\"" in notebook and "sizes are those of" in notebook
