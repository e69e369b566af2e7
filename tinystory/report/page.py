"""Building blocks of HTML pages: fragments, the template and the style sheet. Text from models is
escaped here."""

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from tinystory.report import charts
from tinystory.report.before_after import grade_line, was_asked
from tinystory.report.charts import number
from tinystory.run.files import atomic_write
from tinystory.run.records import Record
from tinystory.run.text import printable

LONGEST = 3000  # characters of a story that are shown


def write(
    path: Path, title: str, subtitle: str, sections: Sequence[str], reload_s: int = 0
) -> Path:
    """The path of the self-contained page that is written from the non-empty sections. All text
    arguments are HTML. reload_s: seconds after which the page reloads itself; 0: never."""
    reload = f'<meta http-equiv="refresh" content="{reload_s}">\n' if reload_s else ""
    text = PAGE.format(
        name=title,
        style=charts.palette() + charts.STYLE + STYLE,
        subtitle=subtitle,
        sections="\n".join(filter(None, sections)),
        reload=reload,
    )
    atomic_write(path, text.encode("utf-8", "replace"))  # text of a model may hold lone surrogates
    return path


def note(*sentences: str) -> str:
    """A paragraph of the sentences that are not empty, which are HTML; "" if all are empty."""
    text = " ".join(filter(None, sentences))
    return f'<p class="note">{text}</p>' if text else ""


def section(title: str, remark: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{note(remark)}{body}</section>" if body else ""


def details(title: str, remark: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{note(remark)}{body}</details>" if body else ""


def block(style: str, body: str) -> str:
    return f'<div class="{style}">{body}</div>' if body else ""


def grid(drawings: Iterable[str]) -> str:
    return block("grid", "".join(f"<figure>{drawing}</figure>" for drawing in drawings if drawing))


def count(n: int, one: str, many: str = "") -> str:
    name = one if n == 1 else many or f"{one}s"
    return f"{number(n)} {name}"


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """An HTML list of names and values. Text is shown unchanged, an empty value as a dash, and any
    other value as JSON."""
    cells = []
    for name, value in rows:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        cells.append((name, number(None) if text in ("", "null", "[]") else clip(text)))
    return definitions(cells)


def definitions(cells: Iterable[tuple[str, str]]) -> str:
    """An HTML list of names and HTML values."""
    entries = ""
    for name, cell in cells:
        entries += f"<div><dt>{escape(name)}</dt><dd>{cell}</dd></div>"
    return f'<dl class="facts">{entries}</dl>'


def command(text: str) -> str:
    """A command as HTML. Lines break between words only, as far as a word fits a line."""
    words = " ".join(f"<span>{clip(word)}</span>" for word in text.split(" "))
    return f"<code>{words}</code>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain text, which is escaped here. The first column holds the row
    headers."""
    if not rows:
        return ""
    head = "".join(f"<th>{clip(name)}</th>" for name in header)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{clip(cell)}</td>" for cell in rest)
        body += f"<tr><th>{clip(first)}</th>{cells}</tr>"
    return block("wide", f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def story_card(record: Record, title: str) -> str:
    """An HTML card of a story with its opening and grades. record: a line of stories.jsonl."""
    opening, story = record["opening"], record["story"]
    gap = "" if re.match(r"[\s.,!?;:]", story) else " "
    text = gap + (clip(story) if story.strip() else "<i>nothing</i>")
    notes = [grade_line(record)] if "reward" in record else []
    notes.append(f"{number(record['words'])} words")
    if record["ended"] == "length":
        notes.append("cut off at the length limit")
    if record["reply"] and record.get("reward") is None and was_asked(record):
        notes.append(f"the teacher’s reply: “{record['reply'][:300]}”")
    return (
        f"<article><header><strong>{escape(title)}</strong> {clip(' · '.join(notes))}</header>"
        f'<p class="story"><em>{clip(opening)}</em>{text}</p></article>'
    )


def clip(text: str) -> str:
    """Foreign text as HTML: escaped, without invisible characters, cut to LONGEST characters."""
    return escape(printable(text[:LONGEST])) + (" …" if len(text) > LONGEST else "")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{reload}<title>{name} · tinystory</title>
<style>{style}</style>
</head>
<body>
<h1>{name}</h1>
<p class="note">{subtitle}</p>
{sections}
</body>
</html>
"""

STYLE = """
:root { --serif: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "Noto Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.6rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 var(--sans); font-variant-numeric: tabular-nums; }
h1, h2, summary { font-family: var(--serif); font-weight: 600; line-height: 1.2; margin: 0; text-wrap: balance;
  overflow-wrap: anywhere; }
h1 { font-size: clamp(1.4rem, 3vw, 2rem); text-wrap: pretty; }
h2, summary { font-size: 1.35rem; }
p { overflow-wrap: break-word; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; color: var(--ink); }
code span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
section, details { margin-top: 3rem; }
details + details { margin-top: 1rem; }
.note { margin: .3rem 0 .6rem; color: var(--muted); max-width: 44rem; text-wrap: pretty; }
.warning { margin: 1.2rem 0 0; padding-left: .9rem; border-left: 3px solid var(--coherence); max-width: 44rem; }
.hero { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 1rem 3rem; margin-top: 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 2.2rem; }
figure { margin: 0; }
.clusters { margin-bottom: 1.2rem; }
.clusters + .grid { margin-top: 2.4rem; }
.clusters small { font-size: .85rem; color: var(--muted); }
.parts { display: flex; height: 1.4rem; }
.parts i { flex-basis: 0; background: var(--reward); }
.parts i:nth-child(even) { opacity: .55; }
.pair, .cards { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 3rem; }
.hero .pair, .hero .cards { grid-template-columns: minmax(0, 1fr); }
.hero article { padding: .4rem 0; }
.hero .story { font-size: .98rem; line-height: 1.42; max-width: none; }
.hero details { margin-top: 1rem; }
.hero summary { font-size: 1rem; }
.pair + .pair, article + article { border-top: 1px solid var(--rule); }
.pair > article, .cards > article { border-top: 0; }
article { padding: 1.2rem 0; min-width: 0; }
article header { font-size: .8rem; color: var(--muted); overflow-wrap: anywhere; unicode-bidi: isolate; }
article strong { color: var(--ink); margin-right: .8rem; }
.story { margin: .5rem 0; max-width: 36rem; font: 1.08rem/1.6 var(--serif); white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.story em { font-style: normal; color: var(--reward); }
.story i { color: var(--muted); }
summary { cursor: pointer; }
summary + * { margin-top: 1.4rem; }
.facts { columns: 24rem; column-gap: 3rem; font-size: .85rem; margin-bottom: 0; }
.facts div { display: flex; gap: 1rem; break-inside: avoid; padding: .16rem 0; }
/* a shadow at each end that hides columns, covered where the table ends */
.wide { overflow-x: auto; background:
  linear-gradient(90deg, var(--paper) 1rem, transparent 3rem) local,
  linear-gradient(270deg, var(--paper) 1rem, transparent 3rem) local,
  linear-gradient(90deg, var(--grey), transparent 1rem), linear-gradient(270deg, var(--grey), transparent 1rem); }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; vertical-align: bottom; white-space: nowrap; }
th { font-weight: 600; }
thead th { color: var(--muted); white-space: normal; }
th:first-child { text-align: left; }
.hero th, .hero td { padding-right: 0; }
.hero th { white-space: normal; }
.hero td, .hero th + th { padding-left: .7rem; }
tr { border-bottom: 1px solid var(--rule); }
dt { flex: 0 0 10rem; color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 50rem) { .hero, .pair, .cards { grid-template-columns: minmax(0, 1fr); }
  .pair > article + article { padding-top: 0; }
  .hero svg.chart text { font-size: 15px; } .hero td { white-space: normal; } }
@media (max-width: 30rem) { .hero svg.chart text { font-size: 16px; } .hero svg.chart text.title { font-size: 20px; } }
@media print { details:not([open]) { display: none; } }
"""
