"""Kafka over TLS and with a password: who is not let in, or must not trust what answers, says why in one line, at once;
and no secret is ever shown."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import trustme

from deploy.broker import Broker
from deploy.broker_security import FOLDER, make_secure
from deploy.settings import dump, load
from embedding_store.errors import BrokerError, UsageError
from embedding_store.secret import Secret
from replay.oracle import read_topic
from replay.sinks import KafkaSink
from streams.kafka_clients import Connection, KafkaSettings, NotKafka, client_arguments, knock
from streams.outlet import Message, Outlet
from streams.topics import TopicSettings, create_topics, end_offsets, wait_for_broker

PASSWORD = "correct horse battery staple"
SECONDS = 10.0  # in which who is refused must know, on a busy machine


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"security_protocol": "SASL_SSL"}, "SASL needs a username"),
        ({"security_protocol": "SASL_SSL", "username": "u"}, "password_file or HEADRACE_KAFKA_PASSWORD"),
        ({"security_protocol": "SASL_PLAINTEXT", "username": "u", "password_file": "p", "sasl_mechanism": "PLAIN"},
         "PLAIN shows the password"),
        ({"username": "u"}, "a user is set, and security_protocol is not SASL_SSL"),
        ({"ca_file": "ca.pem"}, "nothing is encrypted"),
        ({"security_protocol": "SASL_PLAINTEXT", "username": "u", "password_file": "p", "ca_file": "c"},
         "nothing is encrypted"),
        ({"security_protocol": "SSL", "cert_file": "c"}, "go together"),
        ({"security_protocol": "SSL", "ssl_check_hostname": False}, "kafka.ssl_check_hostname is not a setting"),
        ({"sasl_jaas_config": "x"}, "is not a setting"),
        ({"security_protocol": "ssl"}, "expected PLAINTEXT or "),
    ],
)  # fmt: skip
def test_what_would_not_protect_or_is_no_setting_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _ = load(None, {}, {f"kafka.{name}": value for name, value in settings.items()}).kafka


def test_a_password_is_taken_from_the_environment_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"kafka.security_protocol": "SASL_SSL", "kafka.username": "u"}
    settings = load(None, {"HEADRACE_KAFKA_PASSWORD": PASSWORD}, flags)
    arguments = client_arguments(settings.connection)
    assert arguments["sasl_plain_password"] == PASSWORD
    assert arguments["ssl_context"].check_hostname
    assert arguments["ssl_context"].verify_mode == ssl.CERT_REQUIRED
    shown = [dump(settings), repr(settings.kafka), str(settings.connection), repr(settings.join), f"{settings.train}"]
    assert not [text for text in shown if "horse" in text]
    for source in ({"kafka.password": PASSWORD}, {}):
        Path("headrace.toml").write_text("" if source else f'[kafka]\npassword = "{PASSWORD}"\n')
        with pytest.raises(UsageError, match=r"is a secret: set HEADRACE_KAFKA_PASSWORD") as error:
            _ = load(None, {}, source).kafka
        assert "horse" not in str(error.value)


@pytest.mark.parametrize("name", ["ca_file", "cert_file", "password_file"])
def test_a_file_that_is_not_what_it_should_be_is_one_line(tmp_path: Path, name: str) -> None:
    wrong = tmp_path / "file"
    settings = {"security_protocol": "SASL_SSL", "username": "u", "password": Secret(PASSWORD), name: wrong}
    if name == "cert_file":
        settings["key_file"] = wrong
    if name == "password_file":
        settings["password"] = None
    for content in (None, "rubbish"):
        if content is not None and name != "password_file":
            wrong.write_text(content)
        with pytest.raises(UsageError) as error:
            client_arguments(Connection("127.0.0.1:1", KafkaSettings(**settings)))
        assert str(wrong) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A Kafka with TLS and SCRAM."""
    with Broker.start(tmp_path_factory.mktemp("secure"), secure=True) as broker:
        yield broker


@pytest.mark.broker
def test_clients_of_all_kinds_are_let_in(secure: Broker) -> None:
    connection, topics = secure.connection, TopicSettings(prefix="all.", partitions=1)
    assert connection.kafka.security_protocol == "SASL_SSL"
    create_topics(connection, topics)
    with KafkaSink(connection, topics.events, topics.items) as sink:
        sink.tick(1)

    async def transaction() -> None:
        outlet = Outlet(connection, "test")
        await outlet.start()
        await outlet.send([Message(topics.examples, b"x", partition=0)])
        await outlet.stop()

    asyncio.run(transaction())
    assert end_offsets(connection, topics.events) == {0: 1}
    assert [value for _, _, value, _ in read_topic(client_arguments(connection), topics.examples)] == [b"x"]


def refused(connection: Connection | str) -> str:
    """What is said of it. It must not take long."""
    began = time.monotonic()
    with pytest.raises(BrokerError) as error:
        wait_for_broker(connection)
    assert time.monotonic() - began < SECONDS
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.broker
def test_who_is_not_let_in_knows_why(secure: Broker, tmp_path: Path) -> None:
    good = secure.connection.kafka

    def with_(**changes: object) -> Connection:
        return Connection(secure.bootstrap, msgspec.structs.replace(good, **changes))

    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    (tmp_path / "password").write_text("wrong")
    assert "refused (unable to get local issuer certificate)" in refused(with_(ca_file=tmp_path / "other.pem"))
    assert "refused (unable to get local issuer certificate)" in refused(with_(ca_file=None))
    by_another_name = Connection(secure.bootstrap.replace("127.0.0.1", "localhost"), good)
    assert "connect by a name that the certificate has" in refused(by_another_name)
    assert "refuses the user 'headrace'" in refused(with_(password_file=tmp_path / "password"))
    assert "refuses the user 'stranger'" in refused(with_(username="stranger"))
    assert "does not take PLAIN" in refused(with_(sasl_mechanism="PLAIN"))
    assert "does not answer as Kafka with PLAINTEXT" in refused(secure.bootstrap)
    assert "SASL_PLAINTEXT" in refused(with_(security_protocol="SASL_PLAINTEXT", ca_file=None))
    wait_for_broker(with_(sasl_mechanism="SCRAM-SHA-256"))


@pytest.mark.broker
def test_a_client_that_wants_tls_takes_nothing_in_the_clear(broker: str, secure: Broker) -> None:
    assert "does not answer as Kafka with SASL_SSL" in refused(Connection(broker, secure.connection.kafka))


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    """Kafka does not start with one: here it is shown by a server of this test."""
    authority = trustme.CA()
    yesterday = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) - datetime.timedelta(days=1)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", not_after=yesterday).configure_cert(server)
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        pool.submit(_shake_hands, server, listening)
        address = "{}:{}".format(*listening.getsockname())
        said = refused(Connection(address, KafkaSettings(security_protocol="SSL", ca_file=tmp_path / "ca.pem")))
    assert "refused (certificate has expired): renew it on the broker" in said


def _shake_hands(server: ssl.SSLContext, listening: socket.socket) -> None:
    listening.accept()[0].close()  # `wait_for_broker` looks first whether anybody is there
    with contextlib.suppress(OSError), listening.accept()[0] as raw, server.wrap_socket(raw, server_side=True):
        pass


@pytest.mark.nightly
@pytest.mark.broker
def test_a_certificate_that_expires_while_kafka_runs_lets_nobody_in_any_more(tmp_path: Path) -> None:
    valid = datetime.timedelta(seconds=90)  # Kafka must have started by then
    expires = time.monotonic() + valid.total_seconds()
    make_secure(tmp_path / "kafka", valid)
    with Broker.start(tmp_path) as broker:
        wait_for_broker(broker.connection)
        time.sleep(max(0.0, expires - time.monotonic()) + 2)
        assert "refused (certificate has expired)" in refused(broker.connection)


@pytest.mark.broker
def test_a_certificate_of_our_own_is_shown_where_it_is_asked_for(secure: Broker, tmp_path: Path) -> None:
    """The controller asks for one that it trusts."""
    folder = secure.data_dir / "kafka" / FOLDER
    text = (secure.data_dir / "kafka" / "server.properties").read_text()
    port = int(text.split("CONTROLLER://127.0.0.1:")[1].split()[0])
    ours = KafkaSettings(security_protocol="SSL", ca_file=folder / "ca.pem")
    address = f"127.0.0.1:{port}"
    assert "kafka.cert_file" in refused(Connection(address, ours))
    ours = msgspec.structs.replace(ours, cert_file=folder / "server.pem", key_file=folder / "server.pem")
    with pytest.raises(NotKafka, match="MetadataRequest"):  # it is let in; a controller has no answer to that
        knock(Connection(address, ours), "127.0.0.1", port)


@pytest.mark.broker
def test_what_the_broker_keeps_is_for_its_owner_only(secure: Broker) -> None:
    home = secure.data_dir / "kafka"
    private = [home / FOLDER, home / "server.properties"]
    private += [home / FOLDER / name for name in ("password", "server.pem", "client.toml")]
    assert not [path for path in private if path.stat().st_mode & 0o077]
    assert not (home / "format.arguments").exists()
    password = (home / FOLDER / "password").read_text()
    assert password not in (home / "console.log").read_text() + (home / "broker.log").read_text()
    command = Path(f"/proc/{secure.pid}/cmdline").read_bytes()
    assert password.encode() not in command
    assert str(home / FOLDER) in (home / FOLDER / "client.toml").read_text()
