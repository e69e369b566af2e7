"""--teacher-extra: fields of a user's own in each request, such as a service tier, provider routing or headers."""

import json
import re
from typing import Any

from tinystory.run.errors import UserError

# Fields of a request that options of their own, or the client, set.
OWN_FIELDS = {"model", "messages", "stream", "n", "temperature", "seed", "max_tokens", "max_completion_tokens"}
OWN_FIELDS |= {"logprobs", "top_logprobs", "extra_body", "extra_query"}
# Credentials in JSON, by name (not prompt_cache_key, stop_token_ids, skip_special_tokens or tokenizer) and by how any
# text in it begins.
SECRET_NAME = re.compile(
    r"auth(?!or$)|bearer|cookie|credential|pass(p|w|$)|secret|signature|(?<!cache_)key|token(?!s|_|i)", re.IGNORECASE
)
SECRET_TEXT = re.compile(
    r'"(\s|\\[nrt])*((bearer|basic) |-----begin |(sk|rk|gsk|csk|hf|gh[opsur]|github_pat|glpat|xai|nvapi|pplx|tvly|npm|'
    r'pypi)[-_]|r8_|xox[a-z]-|xapp-|(AKIA|ASIA)[0-9A-Z]{16}"|AIza|ya29\.|eyJ|SG\.)',
    re.IGNORECASE,
)


def load_extra(text: str) -> dict[str, Any]:
    """The fields of the JSON object; "extra_headers" in it are headers. Raises UserError for anything else, and for
    what looks like a secret at any depth, since options are recorded."""
    try:
        fields = json.loads(text or "{}", parse_constant=float, object_pairs_hook=_without_secrets)
        json.dumps(fields, allow_nan=False)
        if not isinstance(fields, dict):
            raise ValueError("this is none")
        if taken := sorted(OWN_FIELDS & fields.keys()):
            raise ValueError(f"it cannot set {taken[0]}, which has an option of its own, or which the client needs")
        headers = fields.get("extra_headers", {})
        if not isinstance(headers, dict) or not all(_is_header(*item) for item in headers.items()):
            raise ValueError("its extra_headers must be an object whose values are one line of text each")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'--teacher-extra must be a JSON object such as \'{{"service_tier": "flex"}}\': {error}'
        ) from None
    return fields


def _without_secrets(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, value in pairs:
        if SECRET_NAME.search(name) or SECRET_TEXT.search(json.dumps([name, value])):
            shown = "a field's name" if SECRET_TEXT.search(json.dumps(name)) else name
            raise ValueError(f"it is recorded, so it must hold no secret such as {shown}; use OPENAI_API_KEY")
    return dict(pairs)


def _is_header(name: str, value: object) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9-]+", name)) and isinstance(value, str) and bool(re.fullmatch("[ -~]*", value))
