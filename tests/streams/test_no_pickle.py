"""Faust would unpickle records if it was asked to: it cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from faust.serializers import codecs

from embedding_store.errors import UsageError
from streams.batches import BatchApp, Intake


@pytest.fixture(autouse=True)
def as_faust_has_them() -> Iterator[None]:
    codecs.get_codec("raw")
    before = dict(codecs.codecs)
    codecs.codecs.update(pickle=codecs.pickle(), pickle_restricted=codecs.pickle_restricted())
    yield
    codecs.codecs.clear()
    codecs.codecs.update(before)


def made() -> BatchApp:
    return BatchApp(Intake("127.0.0.1:1", "events", "group"), None)  # type: ignore[arg-type]  # it is never started


def test_no_codec_that_unpickles_is_left() -> None:
    async def run() -> None:
        made()

    asyncio.run(run())
    for name in ("pickle", "pickle_restricted", "pickle_fickling", "json|pickle"):
        with pytest.raises(KeyError):
            codecs.loads(name, b"gASVAAAAAAAAAA==")
    assert codecs.loads("json", b"1") == 1


@pytest.mark.parametrize("codec", ["pickle", "binary|pickle", codecs.pickle(), codecs.raw_pickle() | codecs.binary()])
@pytest.mark.parametrize("which", ["key_serializer", "value_serializer"])
def test_a_topic_whose_records_would_be_unpickled_is_refused(which: str, codec: Any) -> None:
    async def run() -> None:
        app = made()
        with pytest.raises(UsageError, match=f"{which} of events is pickle"):
            app.topic("events", **{which: codec})

    asyncio.run(run())


def test_a_codec_that_unpickles_under_another_name_is_refused_at_start() -> None:
    codecs.register("harmless", codecs.pickle())

    async def run() -> None:
        with pytest.raises(UsageError, match="harmless is pickle"):
            made()

    asyncio.run(run())
