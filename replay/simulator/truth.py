"""What a simulated world knows and a real one does not: a side file, one line for each page that was shown."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

import msgspec

from embedding_store.errors import LogError


class Truth(msgspec.Struct, kw_only=True):
    """The truth about one impression; lists are as `items`.

    `click`: probability of a click, `purchase`: of a purchase if clicked. A delay is there where the thing was drawn:
    `click_ms` from the impression, `purchase_ms` from the click, `refund_ms` from the purchase. A purchase that was
    drawn still fails if the item is sold out when it comes due.
    """

    request_id: str
    ts: int
    user: str
    bot: bool
    items: list[str | int]
    click: list[float]
    purchase: list[float]
    click_ms: list[int | None]
    purchase_ms: list[int | None]
    refund_ms: list[int | None]


class TruthFile:
    """Writes a `.jsonl` or `.jsonl.gz`, the same bytes for the same truths; for use with `with`.

    LogError if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._encoder = path, msgspec.json.Encoder()
        with self._explained():
            self._raw = path.open("wb")
        self._file: IO[bytes] | gzip.GzipFile = self._raw
        if path.suffix == ".gz":
            self._file = gzip.GzipFile(filename="", fileobj=self._raw, mode="wb", compresslevel=6, mtime=0)

    def write(self, truths: Iterable[Truth]) -> None:
        with self._explained():
            for truth in truths:
                self._file.write(self._encoder.encode(truth) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._explained():
            self._file.close()
            self._raw.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(f"{self.path}: {error.strerror}; choose a place that can be written") from None


def read_truth(path: Path) -> Iterator[Truth]:
    """The lines of a truth file. LogError if it is not one."""
    decoder = msgspec.json.Decoder(Truth)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield decoder.decode(line)
                except msgspec.DecodeError as error:
                    raise LogError(f"{path}: line {number} is not a truth ({error}); name a file of --truth") from None
    except (OSError, EOFError) as error:
        raise LogError(f"{path}: {error}; name a file that `headrace simulate --truth` wrote") from None
