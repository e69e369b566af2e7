"""Keys in environment variables, which must never be written to a file."""

import json
import os
import re

# Names of variables, headers and JSON fields that hold credentials (but not prompt_cache_key,
# stop_token_ids, skip_special_tokens, tokenizer, author or GIT_AUTHOR_NAME).
SECRET_NAME = re.compile(
    r"auth(?!or(_|$))|bearer|cookie|credential|pass(p|w|$)|secret|signature|(?<!cache_)key|token(?!s|_|i)",
    re.IGNORECASE,
)
# Minimum number of characters of a key. A shorter one ("1", "none") is a dummy for a local server
# and not a secret.
SHORTEST_SECRET = 8
HEADERS = "OPENAI_CUSTOM_HEADERS"  # headers that openai sends, one per line


def environment_secrets() -> dict[str, str]:
    """Keys in the environment, by the name of the variable or of the header in HEADERS. A path is
    not a key."""
    variables = dict(os.environ)
    for line in os.environ.get(HEADERS, "").splitlines():
        name, _, value = line.partition(":")
        # the key in "Bearer KEY"
        variables[f"{HEADERS}: {name.strip()}"] = value.strip().rpartition(" ")[2]

    secrets: dict[str, str] = {}
    for name, value in variables.items():
        secret = value.strip()
        is_long = len(secret) >= SHORTEST_SECRET
        if SECRET_NAME.search(name) and is_long and not os.path.exists(secret):
            secrets[name] = secret
    return secrets


def secret_in(text: str) -> str:
    """The name of an environment variable if the text, plain or JSON, contains the variable's key;
    else ""."""
    for name, secret in environment_secrets().items():
        if secret in text or json.dumps(secret)[1:-1] in text:
            return name
    return ""


def redacted(text: str, *more: str) -> str:
    """The text, plain or JSON, without the keys in the environment and in `more`."""
    secrets = [value for value in more if len(value) >= SHORTEST_SECRET]
    secrets += environment_secrets().values()
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "[key]").replace(json.dumps(secret)[1:-1], "[key]")
    return text
