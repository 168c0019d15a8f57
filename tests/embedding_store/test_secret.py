"""No log, error, settings file or traceback shows a secret."""

import logging
from pathlib import Path

import msgspec
import pytest

from embedding_store.errors import UsageError
from embedding_store.secret import Secret, read_secret, read_secret_file

TEXT = "correct horse battery staple"


class Holder(msgspec.Struct):
    password: Secret


def test_a_secret_prints_as_stars(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(TEXT)
    logging.getLogger("headrace").error("it was %s, %r", secret, Holder(secret))
    shown = [str(secret), repr(secret), f"{secret}", f"{secret!r:>9}", f"{secret:>9}", f"{secret}", repr([secret])]
    shown += [repr(Holder(secret)), str(vars(type(secret))), caplog.text]
    assert not [text for text in shown if "horse" in text]
    assert secret.reveal() == TEXT


def test_a_secret_is_never_written_as_json() -> None:
    with pytest.raises(TypeError, match="Secret"):
        msgspec.json.encode(Holder(Secret(TEXT)))


def test_a_secret_equals_no_plain_text() -> None:
    assert Secret(TEXT) == Secret(TEXT)
    assert Secret(TEXT) != Secret("other")
    assert Secret(TEXT) != TEXT
    assert not Secret("")


def test_a_secret_is_the_one_line_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(f"{TEXT}\n")
    assert read_secret(path, "Kafka's password") == Secret(TEXT)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0o600, "No such file"),
        (b"", 0o600, "is empty"),
        (b" \n", 0o600, "is empty"),
        (b"\xff\xfe", 0o600, "not text in UTF-8"),
        (b"horse\nbattery\n", 0o600, "more than one line"),
        (b"horse", 0o622, "every user may write"),
        (b"horse" * 300_000, 0o600, "larger than 1,048,576 bytes"),
    ],
)
def test_errors_name_the_file_and_show_nothing_of_it(
    tmp_path: Path, content: bytes | None, mode: int, said: str
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(UsageError, match=said) as error:
        read_secret(path, "Kafka's password")
    assert str(path) in str(error.value)
    assert "horse" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_folder_is_no_secret(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Kafka's password"):
        read_secret_file(tmp_path, "Kafka's password")
