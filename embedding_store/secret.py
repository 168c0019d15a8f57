"""Passwords, tokens and keys: text that no log, error, settings file or traceback shows."""

from __future__ import annotations

import hmac
from pathlib import Path

from embedding_store.errors import UsageError

HIDDEN = "***"
MAX_FILE_BYTES = 1 << 20


class Secret:
    """A text that prints as "***" wherever it is printed; `reveal` gives it to who has to send or compare it.

    Equal to another Secret of the same text, compared in constant time; never to a str, so that a `==` with what a
    stranger sent cannot be written by mistake.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return HIDDEN

    def __format__(self, spec: str) -> str:
        return format(HIDDEN, spec)

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)


def read_secret_file(path: Path, what: str) -> str:
    """The text of a file of secrets. `what` names them in errors, which show the path and nothing from inside it.

    Raises UsageError: not there, not readable, larger than 1 MB, not UTF-8, empty, or writable by every user of the
    machine, who could put a secret of their own there.
    """
    try:
        with path.open("rb") as file:
            mode, raw = path.stat().st_mode, file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{what}: {path}: {error.strerror}; check the path") from None
    if mode & 0o002:
        raise UsageError(f"{what}: every user may write {path}: chmod o-w {path}")
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError(f"{what}: {path} is larger than {MAX_FILE_BYTES:,} bytes: check the path")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{what}: {path} is not text in UTF-8: check the path") from None
    if not text.strip():
        raise UsageError(f"{what}: {path} is empty: write it there")
    return text


def read_secret(path: Path, what: str) -> Secret:
    """The one secret in a file, without the line end after it. Raises UsageError, as `read_secret_file` does."""
    text = read_secret_file(path, what).strip()
    if "\n" in text:
        raise UsageError(f"{what}: {path} has more than one line: one secret stands there alone")
    return Secret(text)
