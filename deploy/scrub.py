"""Secrets out of what is shown to others: by the names of settings, the shape of URLs and keys, and what they are.

A text is scrubbed line by line and may lose more than a secret: what stands behind `token=` goes whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 6  # characters of a known secret that is looked for everywhere: shorter ones would take words apart

# `key` only as a word of its own or of a name (api_key, key_file, sslKey): a KeyError or a monkey is none.
_NAME = (
    r"[\w.\-]*(?:passw(?:or)?d|passphrase|secret|token|credential|authorization|cookie|signature)[\w.\-]*"
    r"|(?:[\w.\-]*[_.\-])?(?:api|private|access|ssl|tls)?[_.\-]?key(?:[_.\-][\w.\-]*)?"
    r"|(?-i:[a-z]+Key)|sig"
)
SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_QUOTED = r"\"{3}.*?(?:\"{3}|$)|\"(?:\\.|[^\"\\])*\"?|'(?:\\.|[^'\\])*'?"
_AFTER_NAME = re.compile(
    rf"(?P<name>(?<![\w.\-])(?:{_NAME}))(?P<middle>\\?[\"']?\s*[=:]\s*)(?:{_QUOTED}|(?:Bearer|Basic)\s+\S+|[^\s,;&}}\]]+)",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"([a-z][a-z0-9+.\-]*://)[^/\s@\"']*@", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=\-]+", re.IGNORECASE)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_PEM_END = re.compile(r"\A(?:[A-Za-z0-9+/=]*\s+)*-----END [A-Z ]*PRIVATE KEY-----")  # the tail of a log begins in one


def is_secret(name: str) -> bool:
    """Whether what has this name may not be shown.

    >>> [is_secret(name) for name in ("HEADRACE_KAFKA_PASSWORD", "tls_key", "token_file", "monkey", "KeyError")]
    [True, True, True, False, False]
    """
    return SECRET_NAME.fullmatch(name) is not None


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without secrets. `secrets`: those that are known, which go wherever they stand.

    >>> scrub('password = "a b" s3://me:pw@host/x Authorization: Bearer abc.def')
    'password = *** s3://***@host/x Authorization: ***'
    """
    text = _PEM.sub(f"{HIDDEN} (a private key)", _PEM_END.sub(HIDDEN, text))
    text = _AFTER_NAME.sub(lambda found: f"{found['name']}{found['middle']}{HIDDEN}", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", _USERINFO.sub(rf"\1{HIDDEN}@", text))
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def known_secrets(environment: Mapping[str, str], files: Iterable[str] = ()) -> set[str]:
    """What must be found nowhere: values of variables with such a name, userinfo in URLs, first words of secret files.

    `files`: their texts. Nothing shorter than SHORTEST.
    """
    found = {value.strip() for name, value in environment.items() if is_secret(name)}
    for value in environment.values():
        found |= {part for userinfo in re.findall(r"://([^/\s@]+)@", value) for part in userinfo.split(":")}
    for text in files:
        found |= {line.split()[0] for line in text.splitlines() if line.strip()}
    return {secret for secret in found if len(secret) >= SHORTEST}


def scrubbed(value: Any, name: str = "") -> Any:
    """The same of what JSON can say: by the names of fields, then text by text."""
    if name and is_secret(name) and value not in (None, "", [], {}):
        return HIDDEN
    match value:
        case Mapping():
            return {key: scrubbed(inner, str(key)) for key, inner in value.items()}
        case list() | tuple():
            return [scrubbed(inner) for inner in value]
        case str():
            return scrub(value)
    return value
