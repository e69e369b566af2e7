"""Redraw .github/teach*.png: a run of the demo's student that is taught on the page for a human
grader, by the rubric in a person's place.

    python tests/human/pictures.py     three minutes on two cores, after make demo and make test; needs a Chromium"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import ROOT
from fault_server import closed_port
from PIL import Image
from playwright import sync_api
from test_browser import CHROMIUM, command_of, compare_by, grade_by, read, start, train

from tinystory.data.corpus import open_corpus
from tinystory.rubric.rubric import Rubric

PICTURES = ROOT / ".github"
GRADED = 46  # when the middle of the run is drawn
WIDTH = 1000
COLOURS = 64


def main() -> None:
    rubric = Rubric(open_corpus(["builtin"]).mixed())
    with tempfile.TemporaryDirectory() as scratch, sync_api.sync_playwright() as playwright:
        folder = Path(scratch)
        port = closed_port().rpartition(":")[2]
        server = start(folder, port)
        command = [*command_of(server), "--init", str(ROOT / "runs" / "demo" / "pretrain")]
        trainer = train(command, folder)
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": WIDTH, "height": 380})
        page.set_default_timeout(600_000)

        def draw(name: str) -> None:
            path = PICTURES / f"{name}.png"
            page.screenshot(path=path, full_page=True)
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)

        try:
            page.goto(f"http://127.0.0.1:{port}")
            draw("teach-start")
            page.fill("#name", "ada")
            page.keyboard.press("Enter")
            graded = 0
            while read(page, trainer):
                if graded == GRADED:
                    draw("teach")
                grade_by(rubric, page)
                graded += 1
            while True:
                page.wait_for_selector("#pair:not([hidden]), #report:not(:empty)")
                if page.is_hidden("#pair"):
                    break
                compare_by(rubric, page)
            page.evaluate(  # without this machine's path
                "folder => { const line = document.getElementById('report');"
                " line.textContent = line.textContent.replace(folder + '/', ''); }",
                scratch,
            )
            draw("teach-end")
        finally:
            chromium.close()
            for process in (trainer, server):
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
