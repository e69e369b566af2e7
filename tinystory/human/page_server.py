"""Server for a human teacher: a page for the human, and OpenAI's chat completions API for the
trainer. Stories are shown as text, not as markup. Requests with a foreign Host or Origin are
refused, because any other page in the human's browser could send them."""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from tinystory.human.grading_queue import GradingQueue
from tinystory.human.lesson import Lesson
from tinystory.teacher.chat_server import HOST, Refused, application, listening, parse_body
from tinystory.teacher.endpoint import HUMAN
from tinystory.teacher.grades import read_back
from tinystory.teacher.probe import FIRST_STORY
from tinystory.teacher.prompt import TOP

DESCRIPTION = "A human who grades stories on a page. This server answers no other requests."
NO_STORY = "This server has a human grade stories. The request holds no story, so nobody was asked."
SKIPPED = "The human skipped this story."
# every score of the client's test story, which only checks whether replies can be read
EXAMPLE = "1"
NAMES = (HOST, "localhost", "[::1]")  # accepted host names
TICK_S = 0.25
LONGEST_NAME = 40  # characters of a human's name


@contextlib.asynccontextmanager
async def serve(lesson: Lesson, port: int = 0, *, style: str = "") -> AsyncIterator[str]:
    """Yields the URL of the page and of /v1, served during the block. style: the page's CSS. See
    `listening`."""
    queue = lesson.queue
    html = page(style)
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    # the browser runs no other script
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

    routes = application(HUMAN, DESCRIPTION, lambda messages: _respond(queue, messages))
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


async def _respond(queue: GradingQueue, messages: list[dict]) -> str:
    """The reply to one request of a trainer. The human is asked only if the request holds a
    story."""
    question = read_back(messages)
    if question is None:
        return NO_STORY
    if messages[0]["content"] != queue.protocol.instructions:
        raise Refused(
            f"The human grades {', '.join(queue.protocol.names)}, by other criteria or instructions than "
            "the request's: give the same --teacher-prompt to train_interact.py and to teach.py.",
            "messages",
        )
    if question == FIRST_STORY:
        return " ".join([EXAMPLE] * len(queue.protocol.names))
    opening, story = question
    scores = await queue.ask(opening, story)
    if scores is None:
        return SKIPPED
    return " ".join(str(scores[name]) for name in queue.protocol.names)


@web.middleware
async def _from_this_machine(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler's response. Raises Refused for requests of foreign pages: a foreign Host (DNS
    rebinding) or a foreign Origin."""
    own = f"http://{request.host}"
    origin = request.headers.get("Origin", own)
    name = re.sub(r":[0-9]+$", "", request.host)
    if name not in NAMES or origin != own:
        raise Refused(f"This server answers only requests for {', '.join(NAMES)}.", status=403)
    return await handler(request)


def _name(who: object) -> str:
    if isinstance(who, str) and who.strip() and who.isprintable() and len(who) <= LONGEST_NAME:
        return who.strip()
    raise Refused(f"The name must have 1 to {LONGEST_NAME} printable characters.", "who")


def page(style: str) -> str:
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return text.replace("/* style */", style, 1).replace("TOP_SCORE", str(TOP), 1)
