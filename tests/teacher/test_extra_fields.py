"""--teacher-extra: fields of the request, but no secrets."""

import json

import pytest
from fault_server import FaultServer, assert_one_clean_sentence, scored

from tinystory.config import InteractConfig
from tinystory.evaluate.open_grader import load_extra, open_grader
from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_extra_fields_are_merged_into_each_request(tmp_path, monkeypatch):
    headers = []

    class Heard(FaultServer):
        async def _chat(self, request):
            headers.append(request.headers.get("anthropic-version"))
            return await super()._chat(request)

    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "anthropic-version: 1")
    extra = load_extra('{"provider": {"order": ["a"]}, "grammar": "mine"}')
    with Heard() as server:
        for more in (extra, {}):
            with Teacher([server.url], extra=more, cache=tmp_path / "replies.jsonl") as teacher:
                assert scored(teacher)
        with_extra, without = server.requests[1], server.requests[3]
    # and other questions are others
    assert with_extra == {**without, "provider": {"order": ["a"]}, "grammar": "mine"}
    assert set(headers) == {"1"}


SECRETS = (
    "github_pat_ ghp_ gho_ xoxb- xoxp- glpat- hf_ gsk_ AKIA ya29. eyJ npm_ SG. sk_live_".split()
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("service_tier=flex", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"a": NaN}', "must be a JSON object"),
        ('{"max_tokens": 99}', "cannot set max_tokens"),
        ('{"metadata": {"Authorization": "Bearer x"}}', "OPENAI_API_KEY"),
        ('{"metadata": {"X-Api-Password": "x"}}', "must hold no secret"),
        ('{"metadata": {"X-Team": "sk-planted-0123456789"}}', "must hold no secret"),
        ('{"api_key": "x"}', "must hold no secret"),
        ('{"query": {"access_token": "x"}}', "must hold no secret"),
        ('{"extra_query": {"version": "1"}}', "cannot set extra_query"),
        ('{"body": {"a": [{"client_secret": "x"}]}}', "must hold no secret"),
        ('{"metadata": ["a", ["sk-planted-0123456789"]]}', "must hold no secret"),
        ('{"metadata": [{"a": ["Bearer x"]}]}', "must hold no secret"),
        ('{"note": "x sk-planted-0123456789"}', "must hold no secret"),
        ('{"note": "key:hf_0123456789abcdef"}', "must hold no secret"),
        ('{"note": "\\nsk-planted-0123456789"}', "must hold no secret"),
        ('{"note": "my Bearer x"}', "must hold no secret"),
        ('{"sk-planted-0123456789": 1}', "must hold no secret"),
        ('{"a": "sk-planted-0123456789", "a": 1}', "must hold no secret"),
        ('{"\\u0061pi_key": 1}', "must hold no secret"),
        *(
            (json.dumps({"x": f"{prefix}0123456789abcdef"}), "must hold no secret")
            for prefix in SECRETS
        ),
        ('{"extra_headers": {"a": "b"}}', "for headers, set OPENAI_CUSTOM_HEADERS"),
    ],
)
def test_extra_fields_that_cannot_be_used_are_one_sentence(text, words):
    with pytest.raises(UserError) as caught:
        load_extra(text)
    assert_one_clean_sentence(caught, "--teacher-extra", words)


@pytest.mark.parametrize("value", ["%s", "x %s y", "\\u0070%s"])
def test_the_keys_own_value_is_no_extra_field(value, monkeypatch):
    """In any form, and in any spelling of JSON."""
    monkeypatch.setenv("OPENAI_API_KEY", "planted0123")
    spelled = value % ("lanted0123" if value.startswith("\\") else "planted0123")
    for text in (f'{{"note": ["{spelled}"]}}', f'{{"{spelled}": 1}}'):
        with pytest.raises(UserError) as caught:
            load_extra(text)
        assert_one_clean_sentence(caught, "must hold no secret")
        assert "planted0123" not in str(caught.value)


def test_fields_that_only_sound_like_secrets_are_extra_fields():
    text = '{"prompt_cache_key": "a", "stop_token_ids": [1], "max_output_tokens": 9, "metadata": {"author": "me"}, '
    text += '"note": "a basic task-force, risk_free, use_hf_tokenizers, hf-hub"}'
    assert load_extra(text) == json.loads(text)
    opened = open_grader(
        InteractConfig(reward="random", teacher_extra='{"api_key": "x"}'), corpus=None
    )
    # nothing is asked, but it would be recorded
    with pytest.raises(UserError, match="no secret"), opened:
        pass
