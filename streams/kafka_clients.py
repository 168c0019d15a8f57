"""How Kafka is reached: in the clear, over TLS, or as a user with a password. What every client of it is made with.

Nothing but these settings reaches a client: there is no way to hand other options through. Whoever connects says where
to as a `Bootstrap`: "HOST:PORT" (several with commas between them), in the clear, or a `Connection`.
"""

from __future__ import annotations

import asyncio
import ssl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from aiokafka.conn import create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest
from msgspec import Meta, Struct

from embedding_store.errors import BrokerError, UsageError
from embedding_store.secret import Secret, read_secret

KNOCK_SECONDS = 5.0


class KafkaSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How to reach Kafka; the section [kafka]. The names of servers in certificates are always compared.

    Raises ValueError at construction where something is missing, or set and would not be used.
    """

    security_protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"],
        Meta(description="SSL: over TLS; SASL: as a user with a password; SASL_SSL: both"),
    ] = "PLAINTEXT"
    sasl_mechanism: Annotated[
        Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"],
        Meta(description="PLAIN sends the password itself: only with SASL_SSL"),
    ] = "SCRAM-SHA-512"
    username: str = ""
    password: Annotated[Secret | None, Meta(description="from the environment only: HEADRACE_KAFKA_PASSWORD")] = None
    password_file: Annotated[Path | None, Meta(description="instead: a file with the password alone")] = None
    ca_file: Annotated[
        Path | None, Meta(description="PEM: whose certificates are trusted; none: those the system trusts")
    ] = None
    cert_file: Annotated[Path | None, Meta(description="PEM: our own certificate, where Kafka asks for one")] = None
    key_file: Annotated[Path | None, Meta(description="PEM: the key of cert_file")] = None

    def __post_init__(self) -> None:
        who = (self.username, self.password, self.password_file)
        files = (self.ca_file, self.cert_file, self.key_file)
        if not self.sasl and any(who):
            raise ValueError("a user is set, and security_protocol is not SASL_SSL: it would not be used")
        if not self.tls and any(files):
            raise ValueError("certificates are set, and security_protocol is not SSL or SASL_SSL: nothing is encrypted")
        if self.sasl and not (self.username and (self.password is None) != (self.password_file is None)):
            raise ValueError("SASL needs a username, and password_file or HEADRACE_KAFKA_PASSWORD (one of them)")
        if self.sasl and self.sasl_mechanism == "PLAIN" and not self.tls:
            raise ValueError("PLAIN shows the password to everybody on the way: use SASL_SSL, or SCRAM-SHA-512")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")

    @property
    def tls(self) -> bool:
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def sasl(self) -> bool:
        return self.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    def secret(self) -> str:
        """The password. Raises UsageError where its file cannot be read."""
        if self.password is not None:
            return self.password.reveal()
        assert self.password_file is not None
        return read_secret(self.password_file, "Kafka's password").reveal()

    def context(self) -> ssl.SSLContext:
        """For connections over TLS (1.2 or newer). Raises UsageError where a file is not what it should be."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # an SSLError is one
            raise UsageError(f"kafka.ca_file {self.ca_file}: {_reason(error)}: give certificates in PEM") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert_file is not None:
            try:
                context.load_cert_chain(self.cert_file, self.key_file, _no_password)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"kafka.cert_file {self.cert_file}, key_file {self.key_file}: {_reason(error)}: "
                    "give a certificate and its key in PEM, without a password"
                ) from None
        return context


class NotKafka(ConnectionError):
    """What answers is not Kafka, or not as it was asked."""


CLEAR = KafkaSettings()


@dataclass(frozen=True)
class Connection:
    """Where Kafka is, and how it is reached. Prints as the address."""

    bootstrap: str
    kafka: KafkaSettings = CLEAR

    def __str__(self) -> str:
        return self.bootstrap


Bootstrap: TypeAlias = str | Connection


def client_arguments(to: Bootstrap) -> dict[str, Any]:
    """What a client of aiokafka or of kafka-python, which name it alike, is made with. Raises UsageError."""
    kafka = _kafka(to)
    arguments: dict[str, Any] = {"bootstrap_servers": servers(to), "security_protocol": kafka.security_protocol}
    if kafka.tls:
        arguments["ssl_context"] = kafka.context()
    if kafka.sasl:
        arguments |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.username,
            "sasl_plain_password": kafka.secret(),
        }
    return arguments


def servers(to: Bootstrap) -> list[str]:
    """The addresses, one by one."""
    return [server.strip() for server in str(to).split(",")]


def knock(to: Bootstrap, host: str, port: int, timeout_s: float = KNOCK_SECONDS) -> None:
    """One connection, as a client makes it: certificates, password, and a question that only Kafka answers.

    The clients themselves try on for their whole timeout where they are turned away, and do not say why. Returns when
    Kafka has answered. Raises BrokerError where it turns us away, or we it; NotKafka, another OSError where nobody
    answers: that may pass. UsageError.
    """
    arguments = client_arguments(to)
    del arguments["bootstrap_servers"]
    with ThreadPoolExecutor(1) as other:  # the caller may have an event loop of its own
        other.submit(lambda: asyncio.run(_knock(to, host, port, arguments, timeout_s))).result()


async def _knock(to: Bootstrap, host: str, port: int, arguments: dict[str, Any], timeout_s: float) -> None:
    kafka, where = _kafka(to), f"{host}:{port}"
    try:
        async with asyncio.timeout(timeout_s):
            connection = await create_conn(host, port, request_timeout_ms=int(timeout_s * 1000), **arguments)
            try:
                await connection.send(MetadataRequest([]))
            finally:
                connection.close()
    except ssl.SSLCertVerificationError as error:
        why = error.verify_message.rstrip(".")
        raise BrokerError(f"the certificate of Kafka at {where} is refused ({why}): {_remedy(error)}") from None
    except ssl.SSLError as error:
        text = f"no TLS with Kafka at {where} ({_reason(error)})"
        raise BrokerError(f"{text}: does that port speak TLS, and does it ask for a kafka.cert_file?") from None
    except (ConnectionRefusedError, TimeoutError):
        raise
    except (AuthenticationFailedError, SaslAuthenticationFailed):
        raise BrokerError(
            f"Kafka at {where} refuses the user {kafka.username!r}: check kafka.username and its password"
        ) from None
    except (UnsupportedSaslMechanismError, IllegalSaslStateError):
        raise BrokerError(
            f"Kafka at {where} does not take {kafka.sasl_mechanism}: look at its listeners, and set [kafka] alike"
        ) from None
    except (OSError, KafkaError) as error:
        raise NotKafka(
            f"what listens at {where} does not answer as Kafka with {kafka.security_protocol} ({_reason(error)}): "
            "is kafka.security_protocol that of its listener?"
        ) from None


def _kafka(to: Bootstrap) -> KafkaSettings:
    return to.kafka if isinstance(to, Connection) else CLEAR


def _remedy(error: ssl.SSLCertVerificationError) -> str:
    expired, not_yet, names = 10, 9, (62, 64)  # X509_V_ERR_… of OpenSSL
    if error.verify_code in (expired, not_yet):
        return "renew it on the broker, and look at both clocks"
    if error.verify_code in names:
        return "connect by a name that the certificate has, or have one made for this name"
    return "set kafka.ca_file to the certificate of who signed it"


def _reason(error: Exception) -> str:
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _no_password() -> str:
    """OpenSSL would ask at the terminal."""
    raise ValueError("the key has a password")
