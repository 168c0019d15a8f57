"""Dead letters: the records of `events` that were refused, whole and unchanged, in the topic `events.dead`.

The value is the record's own. Why it was refused and where it stood is in the headers, as text: `reason` (one of
streams.events.REASONS), `detail`, `partition`, `offset`, and `timestamp_ms` where Kafka stamped one.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct


class DeadLetter(Struct, frozen=True, array_like=True, gc=False):
    """A refused record of `partition`. `value` None: it had none."""

    reason: str
    detail: str
    partition: int
    offset: int
    timestamp_ms: int | None
    value: bytes | None

    def key(self) -> bytes:
        """Where it stood: Kafka's clients take no record that has neither key nor value."""
        return b"%d-%d" % (self.partition, self.offset)

    def headers(self) -> list[tuple[str, bytes]]:
        """All but the value, as headers of a Kafka record."""
        texts = {"reason": self.reason, "detail": self.detail, "partition": self.partition, "offset": self.offset}
        if self.timestamp_ms is not None:
            texts["timestamp_ms"] = self.timestamp_ms
        return [(name, str(text).encode("utf-8", "replace")) for name, text in texts.items()]

    @classmethod
    def of(cls, headers: Iterable[tuple[str, bytes]], value: bytes | None) -> DeadLetter:
        """The letter in a record of `events.dead`. Raises ValueError if its headers are not those of a letter."""
        texts = {name: text.decode("utf-8", "replace") for name, text in headers}
        try:
            stamped = texts.get("timestamp_ms")
            return cls(
                texts["reason"], texts["detail"], int(texts["partition"]), int(texts["offset"]),
                None if stamped is None else int(stamped), value,
            )  # fmt: skip
        except KeyError as missing:
            raise ValueError(f"no header {missing}") from None
