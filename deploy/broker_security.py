"""The embedded Kafka behind TLS and a password: its certificates, its one user, and the settings of its clients.

Everything is under DATA_DIR/kafka/secure, made once, before Kafka's data are formatted, and for its owner only:

    ca.pem         the certificate authority of this data directory alone; its key is thrown away
    server.pem     Kafka's key and certificate, for 127.0.0.1
    password       of the user "headrace", drawn at random
    client.toml    settings for `headrace … --config`; kept up to date with the port
"""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.processes import write_atomically
from embedding_store.errors import BrokerError

if TYPE_CHECKING:
    import trustme

USER, FOLDER = "headrace", "secure"
VALID = datetime.timedelta(days=3650)

# Kafka talks to itself too: as the user through the listener, and to its controller with its own certificate.
_PROPERTIES = """\
sasl.enabled.mechanisms=SCRAM-SHA-512,SCRAM-SHA-256
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config={login} required;
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={login} required username="{user}" password="{password}";
ssl.enabled.protocols=TLSv1.3,TLSv1.2
ssl.keystore.type=PEM
ssl.keystore.location={folder}/server.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/ca.pem
listener.name.controller.ssl.client.auth=required
"""


def is_secure(home: Path) -> bool:
    """Whether the Kafka in `home` was made so: it stays so."""
    return (home / FOLDER).is_dir()


def make_secure(home: Path, valid: datetime.timedelta = VALID) -> None:
    """Certificates, `valid` for so long, and a password for a Kafka that has no data yet. Raises BrokerError."""
    if is_secure(home):
        return
    if (home / "data").exists():
        raise BrokerError(f"the Kafka in {home} was made without --secure: choose another --data-dir")
    partial = home / f"{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    _write_certificates(partial, valid)
    _write_private(partial / "password", secrets.token_urlsafe(32).encode())
    partial.rename(home / FOLDER)


def properties(home: Path) -> str:
    """The lines that server.properties has beside the listeners'. They hold the password."""
    login = "org.apache.kafka.common.security.scram.ScramLoginModule"
    return _PROPERTIES.format(login=login, user=USER, password=_password(home), folder=FOLDER)


def credentials(home: Path) -> list[str]:
    """Arguments of Kafka's `format`: the user. They hold the password: not for a command line."""
    user = f"name={USER},password={_password(home)}"
    return [part for name in ("SCRAM-SHA-512", "SCRAM-SHA-256") for part in ("--add-scram", f"{name}=[{user}]")]


def write_client(home: Path, data_dir: Path, bootstrap: str) -> Path:
    """Settings for clients of the Kafka in `home`; returns their file."""
    from deploy.settings import commented

    folder = home / FOLDER
    text = commented(
        ["How to reach the embedded Kafka of this data directory: headrace … --config this file"],
        {
            "": [("data_dir", str(data_dir.absolute()), ""), ("bootstrap", bootstrap, "")],
            "kafka": [
                ("security_protocol", "SASL_SSL", ""),
                ("sasl_mechanism", "SCRAM-SHA-512", ""),
                ("username", USER, ""),
                ("password_file", str(folder / "password"), ""),
                ("ca_file", str(folder / "ca.pem"), ""),
            ],
        },
    )
    path = client_file(home)
    write_atomically(path, text, private=True)
    return path


def client_file(home: Path) -> Path:
    return home / FOLDER / "client.toml"


def _password(home: Path) -> str:
    return (home / FOLDER / "password").read_text("utf-8").strip()


def _write_certificates(folder: Path, valid: datetime.timedelta) -> None:
    try:
        import trustme
    except ImportError:
        raise BrokerError("certificates need the package trustme: pip install trustme") from None
    until = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) + valid
    authority = trustme.CA(organization_name="Headrace", organization_unit_name="embedded Kafka")
    _write_server(folder / "server.pem", authority.issue_cert("127.0.0.1", not_after=until))
    authority.cert_pem.write_to_path(folder / "ca.pem")


def _write_server(path: Path, certificate: trustme.LeafCert) -> None:
    """Key and certificates as Kafka reads them: the key as PKCS 8."""
    from cryptography.hazmat.primitives import serialization as pem

    key = pem.load_pem_private_key(certificate.private_key_pem.bytes(), None)
    raw = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    _write_private(path, raw + b"".join(blob.bytes() for blob in certificate.cert_chain_pems))


def _write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
