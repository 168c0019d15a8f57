"""Secrets are taken out of texts; what only looks like one to a careless eye stays readable."""

from __future__ import annotations

import doctest

import pytest

from deploy import scrub as module
from deploy.scrub import known_secrets, scrub, scrubbed

HUSH = "Xq7-tellnobody"


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted >= 2


@pytest.mark.parametrize(
    "line",
    [
        f"password={HUSH}", f'password = "{HUSH} {HUSH}"', f"'sasl_plain_password': '{HUSH}',",
        f'{{"password": "{HUSH}", "b": 1}}', f'{{\\"api_key\\": \\"{HUSH}\\"}}', f"HEADRACE_HTTP_TOKEN={HUSH}",
        f"access-token: {HUSH}", f"sslKey={HUSH}", f"tls_key = {HUSH}", f"client_secret:{HUSH}",
        f"s3://user:{HUSH}@bucket/a", f"https://{HUSH}@host/", f"redis://:{HUSH}@host",
        f"Authorization: Bearer {HUSH}", f"Authorization: Basic {HUSH}==", f"sent Bearer {HUSH}, refused",
        f"GET /x?access_token={HUSH}&k=5", f"GET /x?sig={HUSH} 200", f"X-Amz-Signature={HUSH}",
        f"-----BEGIN PRIVATE KEY-----\n{HUSH}\n-----END PRIVATE KEY-----",
        f"-----BEGIN RSA PRIVATE KEY-----\n{HUSH}",
        f'org.apache…ScramLoginModule required username="a" password="{HUSH}";', f"set-cookie: {HUSH}",
        f"passphrase='{HUSH}", f'token = """{HUSH}"""', f"key={HUSH}", f"credentials: {HUSH}",
    ],
)  # fmt: skip
def test_no_secret_stays(line: str) -> None:
    assert HUSH not in scrub(line)


@pytest.mark.parametrize(
    "line",
    [
        "KeyError: 'partition'", "monkey: 3", "12:30:01 I joining partitions 0, 1", "keyed by user: ok",
        "http://127.0.0.1:8080/v1/model", "mail me@example.org", "purchase_window_ms = 259200000", "design: signed",
    ],
)  # fmt: skip
def test_what_is_none_stays(line: str) -> None:
    assert scrub(line) == line


def test_known_secrets_go_wherever_they_stand() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": HUSH, "HEADRACE_JOIN_SNAPSHOTS": "s3://me:userinfo-1@b", "A_TOKEN": "abc"}
    secrets = known_secrets(environment, ["t0ken-of-file 2030-01-01 score\n\n# comment\n"])
    assert {HUSH, "userinfo-1", "t0ken-of-file"} <= secrets
    assert "abc" not in secrets, "too short to be told from a word"
    assert scrub(f"a {HUSH}. t0ken-of-file", secrets) == "a ***. ***"


def test_json_is_scrubbed_by_the_names_of_its_fields() -> None:
    value = {"password": {"deep": HUSH}, "list": [f"Bearer {HUSH}", 3], "token": None, "at": {"ssl_key": HUSH}}
    assert scrubbed(value) == {
        "password": "***", "list": ["Bearer ***", 3], "token": None, "at": {"ssl_key": "***"},
    }  # fmt: skip
