"""Server for a human teacher: a page for the human, OpenAI's chat completions for the trainer.
Stories are shown as text, not markup. A foreign Host or Origin, which any page in the human's
browser can send, is refused."""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from tinystory.human.desk import Desk
from tinystory.human.lesson import Lesson
from tinystory.teacher.chat_server import HOST, Refused, application, listening, parse_body
from tinystory.teacher.probe import FIRST_STORY, HUMAN
from tinystory.teacher.prompt import TOP, instructions, read_back

DESCRIPTION = "A human who reads stories on a page and grades them. Nothing else is answered."
NO_STORY = "A human grades stories here, and this is no story, so nobody was asked."
SKIPPED = "The human skipped this story."
# each score of the client's first story, which only tests whether replies can be read
EXAMPLE = "1"
NAMES = (HOST, "localhost", "[::1]")  # accepted host names
TICK_S = 0.25
LONGEST_NAME = 40  # characters of a human's name


@contextlib.asynccontextmanager
async def serve(lesson: Lesson, port: int = 0, *, style: str = "") -> AsyncIterator[str]:
    """Serve the page, with this CSS, and /v1 during the block; yields the URL. See `listening`."""
    desk = lesson.desk
    html = page(style)
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    # no other script runs
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    async def get_page(request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return web.Response(text=html, content_type="text/html", headers=headers)

    async def get_state(request: web.Request) -> web.Response:
        _name(request.query.get("who"))
        state = lesson.state(f"http://{request.host}")
        return web.json_response(state, headers={"Cache-Control": "no-store"})

    async def post_action(request: web.Request) -> web.Response:
        body = parse_body(await request.read())
        lesson.do(_name(body.get("who")), str(body.get("action")), body)
        return web.json_response({})

    routes = application(HUMAN, DESCRIPTION, lambda messages: _respond(desk, messages))
    routes.middlewares.append(_from_this_machine)
    routes.router.add_get("/", get_page)
    routes.router.add_get("/state", get_state)
    routes.router.add_post("/do", post_action)

    async def tick() -> None:
        while True:
            await lesson.tick()
            await asyncio.sleep(TICK_S)

    async with listening(routes, port) as address:
        ticking = asyncio.create_task(tick())
        try:
            yield address
        finally:
            ticking.cancel()


async def _respond(desk: Desk, messages: list[dict]) -> str:
    """Reply to one request of a trainer; the human is asked only about a story."""
    question = read_back(messages)
    if question is None:
        return NO_STORY
    if messages[0]["content"] != instructions(desk.template):
        raise Refused(
            f"The human here grades {', '.join(desk.template.names)} in other words than these: "
            "give the same --teacher-prompt to the trainer and to teach.py.",
            "messages",
        )
    if question == FIRST_STORY:
        return " ".join([EXAMPLE] * len(desk.template.names))
    opening, story = question
    scores = await desk.ask(opening, story)
    if scores is None:
        return SKIPPED
    return " ".join(str(scores[name]) for name in desk.template.names)


@web.middleware
async def _from_this_machine(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests of foreign pages: DNS rebinding (their own Host name) and other origins."""
    own = f"http://{request.host}"
    origin = request.headers.get("Origin", own)
    name = re.sub(r":[0-9]+$", "", request.host)
    if name not in NAMES or origin != own:
        raise Refused("This server answers only to this machine.", status=403)
    return await handler(request)


def _name(who: object) -> str:
    if isinstance(who, str) and who.strip() and who.isprintable() and len(who) <= LONGEST_NAME:
        return who.strip()
    raise Refused(f"A name has 1 to {LONGEST_NAME} printable characters.", "who")


def page(style: str) -> str:
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return text.replace("/* style */", style, 1).replace("TOP_SCORE", str(TOP), 1)
