"""Servers that behave as those of late 2026 are documented to: docs/teachers.md, "Servers". Each has
a model that answers yes with a probability that depends on the story."""

import asyncio
import hashlib
import json
import math
import random
import threading

from aiohttp import web

THOUGHTS = 300  # tokens that a model spends on reasoning


class TodaysServer:
    """A server on a free port. `answer(body, path)` is the JSON of a response, or an aiohttp
    response, or None to close the connection without one."""

    def __init__(self, answer):
        self.answer = answer
        self.requests: list[dict] = []
        self.reply_tokens = 0

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _start(self):
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{path:.*}", self._post)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/v1"

    async def _models(self, request):
        return web.json_response({"data": [{"id": "model"}]})

    async def _post(self, request):
        body = await request.json()
        self.requests.append(body)
        answer = self.answer(body, request.match_info["path"])
        if answer is None:
            request.transport.abort()
            return web.Response()
        if isinstance(answer, web.Response):
            return answer
        usage = answer.get("usage", {})
        self.reply_tokens += usage.get("completion_tokens", 0) + usage.get("output_tokens", 0)
        return web.json_response(answer)


def refusal(message, status=400):
    return web.json_response({"error": {"message": message}}, status=status)


def chance_of_yes(body):
    """Between .1 and .9, by the last message without its fence."""
    last = (body.get("messages") or body["input"])[-1]["content"]
    told = [line for line in last.splitlines() if not line.startswith("===")]
    return 0.1 + 0.8 * hashlib.sha256("".join(told).encode()).digest()[0] / 255


def cap_of(body):
    return body.get("max_completion_tokens") or body.get("max_tokens") or 10**6


def choices_of(body, words, logprobs=True, most_logprobs=20):
    """A chat completion whose choices are drawn by `words(is_yes)`, a list of tokens."""
    yes = chance_of_yes(body)
    dice = random.Random(f"{json.dumps(body['messages'])} {body.get('seed')}")
    choices = []
    tokens = 0
    for index in range(body.get("n", 1)):
        drawn = words(dice.random() < yes)[: cap_of(body)]
        tokens += len(drawn)
        choice = {"index": index, "message": {"content": "".join(drawn)}, "finish_reason": "length"}
        if logprobs and body.get("logprobs"):
            content = []
            for token in drawn:
                entries = [("Yes", yes * 0.98), ("No", 0.98 - yes * 0.98), ("The", 0.02)]
                if not token.strip():
                    entries = [(token, 1.0)]
                top = [{"token": word, "logprob": math.log(p)} for word, p in entries]
                content.append(
                    {"token": token, "logprob": 0.0, "top_logprobs": top[: body["top_logprobs"]]}
                )
            choice["logprobs"] = {"content": content}
        choices.append(choice)
    return {"choices": choices, "usage": {"prompt_tokens": 400, "completion_tokens": tokens}}


def thoughts_of(body, words):
    """A chat completion of a model that reasons first: empty if its token limit is too low."""
    cap = cap_of(body)
    if cap <= THOUGHTS:
        message = {"content": "", "reasoning_content": "Hm."}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        usage = {"prompt_tokens": 400, "completion_tokens": cap}
        return {"choices": [choice], "usage": usage}
    whole = choices_of(body, words, logprobs=False)
    whole["usage"]["completion_tokens"] += THOUGHTS
    for choice in whole["choices"]:
        choice["message"]["reasoning_content"] = "Hm."
    return whole


def plain(is_yes):
    return ["Yes" if is_yes else "No"]


def spaced(is_yes):
    return ["\n", *plain(is_yes)]


def wordy(is_yes):
    return ["Yes", ",", " it", " does", "."] if is_yes else ["No", ",", " it", " does", " not", "."]


def openai_reasons(body, path):
    """GPT-5.1 and later: reasons unless the effort is none, and until then refuses log-probabilities
    and a temperature."""
    if path != "chat/completions":
        return refusal("Not found", 404)
    for name in ("max_tokens", "chat_template_kwargs", "thinking"):
        if name in body:
            hint = ": use 'max_completion_tokens'" if name == "max_tokens" else ""
            return refusal(f"Unsupported parameter: '{name}'{hint}")
    effort = body.get("reasoning_effort", "medium")
    if effort == "minimal":
        return refusal("Unsupported value: 'reasoning_effort' does not support 'minimal'")
    if effort == "none":
        return choices_of(body, plain)
    for name in ("temperature", "logprobs", "top_logprobs"):
        if name in body:
            return refusal(f"Unsupported parameter: '{name}' is not supported with this model.")
    return thoughts_of(body, plain)


def deepseek_hosted(body, path):
    """DeepSeek, Kimi and GLM, hosted: one field turns reasoning off; the others are ignored."""
    if path != "chat/completions":
        return refusal("Not found", 404)
    if body.get("thinking") == {"type": "disabled"}:
        return choices_of(body, plain)
    if "logprobs" in body:
        return refusal("logprobs is not supported in thinking mode")
    return thoughts_of(body, plain)


def deepseek_on_vllm(body, path):
    """The template's argument is `thinking`, and `enable_thinking` is ignored."""
    if path != "chat/completions":
        return refusal("Not found", 404)
    if body.get("chat_template_kwargs", {}).get("thinking") is False:
        return choices_of(body, plain)
    return thoughts_of(body, plain)


def mlx(body, path):
    """mlx_lm.server: more than 11 log-probabilities close the connection."""
    if path != "chat/completions":
        return refusal("Not found", 404)
    return None if body.get("top_logprobs", 0) > 11 else choices_of(body, plain)


def most_logprobs(message):
    def answer(body, path):
        if path != "chat/completions":
            return refusal("Not found", 404)
        asked = body.get("top_logprobs", 0)
        return refusal(message.format(asked)) if asked > 5 else choices_of(body, plain)

    return answer


def begins_with_a_newline(body, path):
    return refusal("Not found", 404) if path != "chat/completions" else choices_of(body, spaced)


def lm_studio(body, path):
    """Log-probabilities in responses alone; `n` is ignored."""
    if path == "chat/completions":
        return choices_of({**body, "n": 1}, plain, logprobs=False)
    listed = []
    if "message.output_text.logprobs" in body.get("include", []):
        yes = chance_of_yes(body)
        entries = [("Yes", yes * 0.98), ("No", 0.98 - yes * 0.98), ("The", 0.02)]
        top = [{"token": word, "logprob": math.log(p)} for word, p in entries]
        listed = [{"token": "Yes", "logprob": 0.0, "top_logprobs": top}]
    text = {"type": "output_text", "text": "Yes", "logprobs": listed}
    message = {"type": "message", "role": "assistant", "content": [text]}
    return {"output": [message], "usage": {"input_tokens": 400, "output_tokens": 1}}


def without_logprobs(obeys=(), words=wordy, takes_n=False):
    """A server without log-probabilities. obeys: the fields of constraints that it obeys."""

    def answer(body, path):
        if path != "chat/completions":
            return refusal("Not found", 404)
        if body.get("n", 1) > 1 and takes_n is None:
            return refusal("n must be 1")
        is_story = "story" in body["messages"][-1]["content"]
        said = words if is_story else lambda is_yes: ["No", " problem", ":", " fox"]
        if "structured_outputs" in obeys and "structured_outputs" in body:
            said = plain
        if "response_format" in obeys and "response_format" in body:
            said = lambda is_yes: ['{"', "answer", '":"', "yes" if is_yes else "no", '"}']  # noqa: E731
        return choices_of(body if takes_n else {**body, "n": 1}, said, logprobs=False)

    return answer


SERVERS = {
    "1 GPT-5.1 and later": openai_reasons,
    "2 DeepSeek, Kimi, GLM, hosted": deepseek_hosted,
    "2 DeepSeek, Kimi behind vLLM": deepseek_on_vllm,
    "3 mlx_lm.server": mlx,
    "4 vLLM --max-logprobs 5": most_logprobs(
        "Requested sample logprobs of {}, which is greater than max allowed: 5"
    ),
    "4 top_logprobs in range [0, 5]": most_logprobs(
        "Invalid value for 'top_logprobs': must be in range [0, 5], got {}"
    ),
    "5 a newline before the answer": begins_with_a_newline,
    "6 LM Studio": lm_studio,
    "7 wordy, obeys structured_outputs": without_logprobs(["structured_outputs"]),
    "7 wordy, obeys a JSON schema": without_logprobs(["response_format"]),
    "7 wordy, obeys nothing": without_logprobs(),
    "8 n choices": without_logprobs(words=plain, takes_n=True),
    "8 refuses n": without_logprobs(words=plain, takes_n=None),
}
