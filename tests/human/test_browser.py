"""A person teaches a student: in a real browser, by keys alone, through a whole run and the
comparisons at the end, while servers die. The report of a running run reloads itself.

The tests need playwright (a test extra) and a Chromium on the machine (Debian: apt install
chromium)."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, cli, metrics, read_lines
from fault_server import closed_port
from test_lesson import Run

from tinystory.data.corpus import open_corpus
from tinystory.human.progress import COMPARED, read_progress
from tinystory.report.findings import read_findings
from tinystory.report.run import live_report, write_report
from tinystory.rubric.rubric import Rubric
from tinystory.run.log import RunLog
from tinystory.run.records import PAIRS, read_stories
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Submission
from tinystory.teacher.prompt import CRITERIA, clean

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'tinystory[test]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no Chromium (Debian: apt install chromium)"
    ),
]
EVIL = "&lt;b&gt;<img src=x onerror=\"document.title='caught'\"><script>document.title='caught'</script>"
PATIENCE_MS = 600_000  # of a busy machine
# Minimum contrast of the border of a button with the page, by WCAG 2.2:
# https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
CONTRAST = """(() => {
  const luminance = colour => colour.match(/[0-9]+/g).slice(0, 3).map(value => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  }).reduce((sum, share, i) => sum + share * [0.2126, 0.7152, 0.0722][i], 0);
  const border = getComputedStyle(document.querySelector("nav button")).borderTopColor;
  const both = [border, getComputedStyle(document.body).backgroundColor].map(luminance).sort();
  return (both[1] + 0.05) / (both[0] + 0.05);
})()"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    errors = []
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def start(folder: Path, port: str, *argv: str) -> subprocess.Popen:
    """teach.py, listening."""
    command = [sys.executable, str(ROOT / "scripts" / "teach.py"), "--port", port, *argv]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("open http://127.0.0.1:")
    return process


def command_of(server: subprocess.Popen) -> list[str]:
    """The command that teach.py prints, for a small student."""
    line = server.stdout.readline()
    assert line.startswith("and start: ")
    return shlex.split(line.removeprefix("and start: "))


def train(command: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def screenshot(page, name: str) -> None:
    """Set SCREENSHOTS to a folder to look at the pages."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def read(page, trainer: subprocess.Popen) -> str:
    """The story that the page shows, once it shows one; "" if the trainer has ended without an
    error."""
    while True:
        try:
            page.wait_for_selector("#story:not([hidden])", timeout=5000)
            return page.text_content("#tale")
        except sync_api.TimeoutError:  # the machine is busy, or there is nothing to wait for
            assert trainer.poll() in (None, 0), trainer.stdout and trainer.stdout.read()
            if trainer.poll() == 0:
                return ""


def press(page, keys: str, before: str) -> None:
    """Press keys, and wait until the page shows something else."""
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_function(
        "before => document.getElementById('story').hidden || "
        "document.getElementById('tale').textContent !== before",
        arg=before,
    )


def test_all_criteria_are_on_the_first_screen_beside_a_story_of_90_words_and_the_first_page_says_what_it_is(
    page, tmp_path
):
    port = closed_port().rpartition(":")[2]
    server = start(tmp_path, port)
    page.set_viewport_size({"width": 1280, "height": 800})
    try:
        page.goto(f"http://127.0.0.1:{port}")
        assert "a small language model" in page.inner_text("#who").lower()
        page.get_by_label("Your name").fill("ada")
        page.keyboard.press("Enter")
        with Teacher([f"http://127.0.0.1:{port}/v1"]) as teacher:
            teacher.submit(
                Submission("Once upon a time,", "a little girl went to the park. " * 13, 0)
            )
            page.wait_for_selector("#story:not([hidden])")
            bottoms = page.evaluate(
                "[...document.querySelectorAll('fieldset, #tale, #story nav')].map("
                "each => each.getBoundingClientRect().bottom)"
            )
        assert len(bottoms) == len(CRITERIA) + 2 and max(bottoms) <= 800
    finally:
        server.kill()
        server.wait()


def test_a_whole_run_is_taught_by_keys_while_the_pages_server_is_killed(page, place, tmp_path):
    port = closed_port().rpartition(":")[2]
    url, kept = f"http://127.0.0.1:{port}", tmp_path / "runs" / "teach" / "grades.jsonl"
    server = start(tmp_path, port)
    command = cli(
        "{} {} --init {} --out runs/interact --teacher-url {}/v1 --stories-per-step 8 --steps 2 "
        "--eval-every 0 --eval-stories 2 --max-new-tokens 16 --max-unscored 0.5 --opening Once "
        "--device cpu",
        sys.executable,
        ROOT / "train_interact.py",
        place / "p",
        url,
    )
    trainer = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        page.goto(url)
        page.fill("#name", "ada")
        page.keyboard.press("Enter")
        seen = []
        # 2 evaluations of 2 stories, and 2 steps of 8. The last evaluation repeats a story that has
        # not changed since the first: nobody is asked about it.
        for number in range(20):
            story = read(page, trainer)
            if not story:
                break
            assert story not in seen
            seen.append(story)
            if number == 4:  # a slip of the finger, and the way back
                press(page, "000", story)
                page.keyboard.press("b")
                page.wait_for_function(
                    "before => document.getElementById('tale').textContent === before", arg=story
                )
                press(page, "321", story)
            elif number == 7:
                press(page, "s", story)
            elif number == 9:  # the server dies in the middle of a step, with a story half graded
                page.keyboard.press("2")
                before = kept.read_bytes()
                server.send_signal(signal.SIGKILL)
                server.wait()
                page.wait_for_function(
                    "() => document.getElementById('message').textContent.includes('does not answer')"
                )
                assert kept.read_bytes() == before
                server = start(tmp_path, port)
                press(page, "21", story)  # before the trainer has noticed
            elif number == 12:  # a closed page
                page.goto("about:blank")
                page.goto(url)
                assert read(page, trainer) == story
                press(page, "111", story)
            else:
                press(page, f"{number % 4}{number // 4 % 4}2", story)
        assert trainer.wait(600) == 0, trainer.stdout.read()
    finally:
        for process in (trainer, server):
            process.kill()
            process.wait()
    grades = read_lines(kept)
    by_story: dict[str, list] = {}
    for grade in grades:
        by_story.setdefault(grade["story"], []).append(grade)
    assert len(seen) >= 16 and len(grades) == len(seen) + 1
    # only the story of the slip was shown twice
    assert sorted(map(len, by_story.values())) == [1] * (len(seen) - 1) + [2]
    run = tmp_path / "runs" / "interact"
    stories = list(read_stories(run))
    assert len(stories) == 16
    assert [record["unscored"] for record in metrics(run)] in (
        [1, 0],
        [0, 1],
    )
    for story in stories:  # the last grades count; no grade of an empty story
        grade = by_story.get(clean(story["story"]))
        assert story["scores"] == (grade[-1]["scores"] if grade else dict.fromkeys(CRITERIA, 0))
        assert grade or not story["story"].strip()
    assert json.loads((run / "config.json").read_text())["options"]["teacher"]["model"] == "human"


def test_a_page_for_keyboards_and_screen_readers(page, tmp_path):
    """The focus stays where it was, a new story is announced, each group has a name, and Back is
    offered if it can do something."""
    port = closed_port().rpartition(":")[2]
    server = start(tmp_path, port)
    asker = "import sys; from tinystory.teacher.client import Teacher\n"
    asker += "with Teacher([sys.argv[1]]) as t:\n t.grade_each([('Once', 'A fox ran.'), ('Once', 'A cow ran.')])"
    url = f"http://127.0.0.1:{port}"
    client = subprocess.Popen([sys.executable, "-c", asker, f"{url}/v1"], cwd=ROOT)
    focus = "document.activeElement.closest('fieldset')?.getAttribute('aria-label')"
    try:
        page.goto(f"{url}/?who=ada")
        first = read(page, client)
        assert page.get_attribute("#tale", "aria-live") == "polite"
        assert page.is_hidden("#story [data-do=back]")
        page.focus("#criteria button")
        page.keyboard.press("Space")
        assert page.evaluate(focus).startswith("Readability: Can the sentences")
        assert page.locator("#criteria button[aria-pressed=true]").count() == 1
        assert page.is_visible("#story [data-do=back]")  # to the criterion before
        press(page, "11", first)
        second = read(page, client)
        assert second != first and page.evaluate(focus).startswith("Readability")
        assert page.is_visible("#story [data-do=back]")
        press(page, "111", second)
        page.wait_for_function("() => document.getElementById('said').textContent !== ''")
        ratio = page.evaluate(CONTRAST)
        assert ratio >= 3
    finally:
        for process in (client, server):
            process.kill()
            process.wait()


def grade_by(rubric: Rubric, page) -> str:
    """Grade the story on the page; returns it."""
    tale = page.text_content("#tale")
    opening = page.text_content("#tale em")
    scores = rubric.score(opening, tale.removeprefix(opening).strip())
    press(page, "".join(str(scores[name]) for name in CRITERIA), tale)
    return tale


def compare_by(rubric: Rubric, page) -> tuple[str, ...]:
    """Prefer a story of the pair on the page, or none. Returns the position of the preferred story,
    and the texts."""
    texts = [page.text_content(f"#{name}") for name in ("opening", "left-story", "right-story")]
    opening, *stories = texts
    left, right = (sum(rubric.score(opening, story).values()) for story in stories)
    key = "0"
    if left != right:
        key = "1" if left > right else "2"
    place = page.text_content("#place")
    page.keyboard.press(key)
    page.wait_for_function(
        "place => document.getElementById('pair').hidden || "
        "document.getElementById('place').textContent !== place",
        arg=place,
    )
    return (place, *texts)


def test_a_persons_half_hour_survives_closed_pages_and_killed_programs(page, place, tmp_path):
    """The rubric gives the answers of the person."""
    rubric = Rubric(open_corpus(["builtin"]).mixed())
    port = closed_port().rpartition(":")[2]
    url, run = f"http://127.0.0.1:{port}", tmp_path / "runs" / "teach" / "interact"
    server = start(tmp_path, port)
    command = command_of(server)
    command += ["--init", str(place / "p"), "--device", "cpu", "--opening", "Once"]
    command += "--grades 16 --steps 2 --stories-per-step 24 --max-new-tokens 24".split()
    command += "--save-every 1".split()
    page.goto(url)
    page.fill("#name", "ada")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Start the trainer in another terminal")
    screenshot(page, "lesson_0_start")
    trainer = train(command, tmp_path)
    graded: list[str] = []
    compared: list[tuple[str, ...]] = []
    try:
        while read(page, trainer):
            if len(graded) == 3:
                page.goto("about:blank")
                page.goto(url)
                page.wait_for_selector("#story:not([hidden])")
            elif len(graded) == 5:
                server.kill()
                server.wait()
                page.wait_for_selector("text=does not answer")
                server = start(tmp_path, port)
                assert command_of(server)[2:] == [
                    *("--out", "runs/teach/interact", "--resume"),
                    *("--teacher-url", f"{url}/v1"),
                ]
                # the trainer has asked again
                page.wait_for_selector("#message:empty", state="attached")
                page.wait_for_selector("#story:not([hidden])")
            elif len(graded) == 10:
                screenshot(page, "lesson_1_middle")
                trainer.kill()
                trainer.wait()
                page.wait_for_selector("text=The trainer stopped after step 1.")
                trainer = train(shlex.split(page.text_content("#command")), tmp_path)
                page.wait_for_selector("#story:not([hidden])")
            graded.append(grade_by(rubric, page))
        assert len(graded) == len(set(graded)) <= 16

        progress = read_progress(run)
        assert len(progress.pairs) + progress.left_out == COMPARED and progress.graded <= 16
        while not page.query_selector("text=Taught by a person"):
            page.wait_for_selector("#pair:not([hidden]), #report:not(:empty)")
            if page.is_hidden("#pair"):
                break
            if len(compared) == 2:
                screenshot(page, "lesson_2_pair")
            if len(compared) == COMPARED // 2:
                page.goto("about:blank")
                server.kill()
                server.wait()
                server = start(tmp_path, port)
                assert "compare the stories of runs/teach/interact" in server.stdout.readline()
                page.goto(url)
                page.wait_for_selector("#pair:not([hidden])")
            compared.append(compare_by(rubric, page))
        assert len(compared) == len(set(compared)) == len(progress.pairs)
        page.wait_for_selector("#report:not(:empty)")
        result = page.text_content("#resting")
        screenshot(page, "lesson_3_end")
        assert str(run / "report.html") in page.text_content("#report")
        page.wait_for_function("() => document.getElementById('left').textContent === 'Thank you'")
    finally:
        for process in (trainer, server):
            process.kill()
            process.wait()
    assert result.startswith("A person gave ")
    (finding,) = read_findings(run)
    assert finding["sentences"] == [result] and result in (run / "report.html").read_text()
    lines = (run / PAIRS).read_text().splitlines() if compared else []
    assert len(lines) == len(compared)


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_pair_fits_and_is_text(browser, tmp_path, width, scheme):
    before = [EVIL + f"There was a fox {i}. " * 9 for i in range(COMPARED + 2)]
    after = [f"One night a fox {i} wanted the moon. " * 9 + "W" * 200 for i in range(COMPARED + 2)]
    run = Run(tmp_path / "runs" / "teach" / "interact")
    run.end_step(1)
    run.evaluate(0, before)
    run.finish(before, after)
    port = closed_port().rpartition(":")[2]
    server = start(tmp_path, port)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MS)
    try:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}/?who=ada")
        page.wait_for_selector("#pair:not([hidden])")
        stories = page.text_content("#left-story") + page.text_content("#right-story")
        assert EVIL in stories and page.title() != "caught"
        cut = page.locator("#pair .cut")  # the text that does not end with its sentence
        assert cut.count() == 1 and cut.text_content().endswith("W")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        screenshot(page, f"pair_{width}_{scheme}")
        page.keyboard.press("2")
        page.locator("#place", has_text="Pair 2").wait_for()
        page.click("[data-side=neither]")
        page.locator("#place", has_text="Pair 3").wait_for()
        page.keyboard.press("p")
        page.locator("#resting", has_text="Paused").wait_for(state="visible")
    finally:
        context.close()
        server.kill()
        server.wait()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_run_that_goes_on_reloads_itself(browser, tmp_path, monkeypatch, scheme):
    monkeypatch.setattr("tinystory.report.run.RELOAD_S", 1)
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    try:
        with RunLog(tmp_path, resume_step=None) as log, live_report(tmp_path, True):
            log.config({"steps": 9})
            log.metrics(step=1, reward_mean=0.5, rollout_s=30.0)
            write_report(tmp_path, live=True)
            page.goto((tmp_path / "report.html").as_uri())
            assert "1 step" in page.text_content("p.note")
            log.metrics(step=2, reward_mean=0.6, rollout_s=30.0)
            write_report(tmp_path, live=True)
            page.wait_for_selector("text=2 steps")
        page.wait_for_selector("text=running", state="detached")
        page.evaluate("window.seen = true")  # no script of the page's, which allows none
        page.wait_for_timeout(2500)
        assert page.evaluate("window.seen")  # it reloads no more
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(","))) > 384) == (scheme == "light")
    finally:
        context.close()
