"""Signatures over what leaves the trainer: versions, snapshots, kept checkpoints. HMAC-SHA256 (RFC 2104), keys shared.

A signature covers the bytes and the place they claim: the topic (the scope), what they are, and of a copy its number.
So bytes that were signed for one place are refused at every other. Where no key is set nothing is signed or checked.

Files of a copy are covered by their SHA-256, which stand with the signature in a file of their own beside them
(`Seal`): the checksums of a manifest find what a disk does, not what a person does.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from embedding_store.errors import Forged, UsageError
from embedding_store.secret import Secret, read_secret_file

SEAL = "signature.json"
HEADER = "signature"  # of a Kafka record
LEAST_KEY = 32  # characters


class SigningSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Who may make versions, snapshots and checkpoints; the section [signing]."""

    key_file: Annotated[
        Path | None,
        Meta(description="a key a line: the first signs, all are accepted; none: nothing is signed or checked"),
    ] = None

    def signer(self, scope: str) -> Signer | None:
        """Of what belongs to `scope`, the name of a topic. Raises UsageError where the keys cannot be read."""
        return None if self.key_file is None else Signer(read_keys(self.key_file), scope)


def read_keys(path: Path) -> list[Secret]:
    """The keys in a file, one a line; empty lines and those that begin with # are left out. Raises UsageError."""
    lines = (line.strip() for line in read_secret_file(path, "keys of signatures").splitlines())
    keys = [Secret(line) for line in lines if line and not line.startswith("#")]
    if not keys or any(len(key.reveal()) < LEAST_KEY for key in keys):
        raise UsageError(
            f"keys of signatures: {path} needs a key a line, {LEAST_KEY} characters or more: `openssl rand -hex 32`"
        )
    return keys


class Seal(Struct, frozen=True, forbid_unknown_fields=True):
    """What vouches for the files of a copy."""

    sha256: dict[str, str]  # name of a file → of its bytes, in hex
    hmac: str  # over these and what the copy claims to be, in hex


class Signer:
    """Signs with the first of its keys, accepts them all: so that keys can be changed without a pause."""

    def __init__(self, keys: Sequence[Secret], scope: str) -> None:
        self._keys, self._scope = [key.reveal().encode() for key in keys], scope.encode()

    def sign(self, what: str, data: bytes) -> bytes:
        """32 bytes. `what`: what the data claim to be, beside what they say themselves."""
        return self._signature(self._keys[0], what, data)

    def check(self, signature: bytes | None, what: str, data: bytes) -> None:
        """Raises Forged, unless it was signed with one of the keys, in this scope, as this."""
        if signature is None:
            raise Forged(f"{what} is not signed: set [signing] key_file where it is made", "unsigned")
        # All keys, and no early way out: how long it takes says nothing of them.
        if not sum(hmac.compare_digest(self._signature(key, what, data), signature) for key in self._keys):
            raise Forged(f"{what} was not signed with a key of ours, or was changed since: it is refused", "forged")

    def seal(self, what: str, sha256: dict[str, str], claims: bytes = b"") -> bytes:
        """The file to put beside others. `claims`: what else is to be as it was."""
        return msgspec.json.encode(Seal(sha256, self.sign(what, _sealed(sha256, claims)).hex()))

    def unsealed(self, raw: bytes | None, what: str, claims: bytes = b"") -> dict[str, str]:
        """The SHA-256 of the files, from the file beside them (None: there is none). Raises Forged."""
        if raw is None:
            self.check(None, what, b"")
        try:
            seal = msgspec.json.decode(raw or b"", type=Seal)
            signature = bytes.fromhex(seal.hmac)
        except (msgspec.MsgspecError, ValueError):
            raise Forged(f"the signature of {what} is damaged: it is refused", "forged") from None
        self.check(signature, what, _sealed(seal.sha256, claims))
        return seal.sha256

    def _signature(self, key: bytes, what: str, data: bytes) -> bytes:
        made = hmac.new(key, digestmod=hashlib.sha256)
        for part in (self._scope, what.encode()):
            made.update(len(part).to_bytes(8, "little") + part)  # where one ends is signed too
        made.update(data)
        return made.digest()


def _sealed(sha256: dict[str, str], claims: bytes) -> bytes:
    return msgspec.json.encode([sorted(sha256.items()), hashlib.sha256(claims).hexdigest()])
