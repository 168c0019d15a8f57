"""What all tests share: one real Kafka for the whole session, and names of topics that no other test uses."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from deploy.broker import Broker
from streams.topics import TopicSettings, create_topics

# What the helpers assert says what it saw, too.
pytest.register_assert_rewrite(*(f"tests.{part}" for part in (
    "deploy", "embedding_store", "end_to_end", "figures", "online_model", "replay", "streams")))  # fmt: skip


@pytest.fixture(scope="session")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """An embedded Kafka that ends with the test session. Do not stop it: the other tests use it too."""
    with Broker.start(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="session")
def broker(running_broker: Broker) -> str:
    """HOST:PORT of the session's Kafka."""
    return running_broker.bootstrap


@pytest.fixture
def topic_prefix() -> str:
    """A prefix of topic names (and good for groups and transactional ids) that only this test has."""
    return f"test-{uuid.uuid4().hex[:12]}."


@pytest.fixture
def topics(request: pytest.FixtureRequest, broker: str, topic_prefix: str) -> TopicSettings:
    """Topics that only this test has, of one partition or of as many as its mark `partitions` says."""
    mark = request.node.get_closest_marker("partitions")
    settings = TopicSettings(prefix=topic_prefix, partitions=mark.args[0] if mark else 1)
    create_topics(broker, settings)
    return settings


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: the last bits of the results depend on how many there are."""
    import torch  # not for the many tests that do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the broker is marked so: `-m "not broker"` leaves it out."""
    for item in items:
        if "running_broker" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.broker)
