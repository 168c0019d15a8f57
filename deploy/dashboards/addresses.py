"""Addresses of servers, as users give them."""

from __future__ import annotations

from urllib.parse import urlsplit

from embedding_store.errors import UsageError


def checked(url: str) -> str:
    """The address, if it is one of an HTTP server. Raises UsageError.

    >>> checked("http://127.0.0.1:9090")
    'http://127.0.0.1:9090'
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large; brackets that nothing closes
        sound = False
    if not sound:
        raise UsageError(f"{url!r} is not the address of a server: give it as http://HOST:PORT")
    return url
