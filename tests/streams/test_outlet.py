"""What is sent together is there together, once, whatever its size; and only the newest owner of an id sends."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import TopicPartition

from embedding_store.errors import BrokerError, FencedError
from streams.outlet import Message, Outlet
from streams.topics import TopicSettings
from tests.streams.children import group_offsets, read_all

pytestmark = [pytest.mark.broker, pytest.mark.partitions(2)]


def test_a_transaction_may_be_larger_than_a_record(broker: str, topics: TopicSettings) -> None:
    """Parts of a version, each below the limit of the topic, all of them far above it; many small dead letters too."""
    large = [b"%d" % i * 900_000 for i in range(5)]
    small = [b"%04d" % i * 400 for i in range(2_000)]

    async def send() -> None:
        outlet = Outlet(broker, f"{topics.prefix}a")
        await outlet.start()
        messages = [Message(topics.parameters, value, partition=0) for value in large]
        messages += [Message(topics.events_dead, value) for value in small]
        await outlet.send(messages, {TopicPartition(topics.events, 1): 42}, f"{topics.prefix}group")
        await outlet.stop()

    asyncio.run(send())
    same = [record.value for record in read_all(broker, topics.parameters)[0]] == large  # not to be printed
    assert same
    same = [record.value for record in read_all(broker, topics.events_dead)[0]] == small
    assert same
    assert group_offsets(broker, f"{topics.prefix}group", topics.events, 2) == [None, 42]


def test_the_old_owner_of_an_id_is_fenced(broker: str, topics: TopicSettings) -> None:
    async def send() -> None:
        # aiokafka leaves futures of its own behind that nobody asks for their error
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        old, new = Outlet(broker, f"{topics.prefix}b"), Outlet(broker, f"{topics.prefix}b")
        await old.start()
        await old.send([Message(topics.parameters, b"old", partition=0)])
        await new.start()
        with pytest.raises(FencedError, match="another worker took over"):
            await old.send([Message(topics.parameters, b"too late", partition=0)])
        await new.send([Message(topics.parameters, b"new", partition=0)])
        for outlet in (old, new):
            await outlet.stop()

    asyncio.run(send())
    assert [record.value for record in read_all(broker, topics.parameters)[0]] == [b"old", b"new"]


def test_what_kafka_refuses_leaves_nothing_behind(broker: str, topics: TopicSettings) -> None:
    async def send(*sizes: int) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        outlet = Outlet(broker, f"{topics.prefix}c")
        await outlet.start()
        try:
            await outlet.send([Message(topics.parameters, b"x" * n, partition=0) for n in sizes])
        finally:
            await outlet.stop()

    with pytest.raises(BrokerError, match="Kafka did not take"):
        asyncio.run(send(10, 3_000_000))
    asyncio.run(send(5))
    assert [record.value for record in read_all(broker, topics.parameters)[0]] == [b"xxxxx"]
