"""The bytes of a log, wherever it lies and however it is packed, and the rows of a Parquet file. Nothing is read whole.

A path is a local one or a URL of any file system that fsspec knows (`s3://`, `https://`, `memory://`, …).
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa

from embedding_store.errors import LogError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MAX_LINE = 1_000_000  # characters; a longer "line" means that the file is not made of lines
PARQUET_ROWS = 4_096  # rows taken from a Parquet file at a time
BUFFER = 1 << 18  # bytes
HEAD = 8  # bytes that tell what a file is
SILENCE_S = 60.0  # a server that sends nothing for so long is given up
PARQUET = b"PAR1"

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
SUFFIXES = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}


def check_file(path: str) -> None:
    """LogError if there is no file at `path`, or an empty one, or no way to it."""
    if "://" not in path:
        try:
            size = Path(path).stat().st_size
        except OSError as error:
            raise LogError(f"{path}: {error.strerror}; check the path of the log") from None
        if not Path(path).is_file():
            raise LogError(f"{path}: not a file; name the log file itself")
    else:
        system, inner = _remote(path)
        try:
            told = system.info(inner)
        except remote_errors() as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise LogError(f"{path}: {text}; check the address and your rights to it") from None
        if told.get("type") == "directory":
            raise LogError(f"{path}: not a file; name the log file itself")
        size = told.get("size")  # None where the server does not say
    if size == 0:
        raise LogError(f"{path}: the file is empty; copy or download it again")


def remote_errors() -> tuple[type[Exception], ...]:
    """What a file system may raise: OSError, and that of the HTTP client where it is in use."""
    client = sys.modules.get("aiohttp")
    return (OSError, client.ClientError) if client else (OSError,)


def _remote(path: str) -> tuple[Any, str]:
    """The file system of a URL, and where in it the file is."""
    import fsspec.core  # only here: commands that read nothing remote start without it

    options = {}
    try:
        if is_web(path):
            import aiohttp  # what fsspec uses; its own default ends a download after five minutes

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, connect=30, sock_read=SILENCE_S)}
        return fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        raise LogError(f"{path}: {error}") from None  # it names the package to install
    except (ValueError, OSError) as error:
        raise LogError(f"{path}: {error}; check the address of the log") from None


def identity(path: str) -> list[Any]:
    """What tells this file from another one, or from itself when it was changed: path, size, and time or tag."""
    if "://" not in path:
        about = Path(path).stat()
        return [str(Path(path).absolute()), about.st_size, about.st_mtime_ns]
    system, inner = _remote(path)
    info = system.info(inner)
    return [path, info.get("size"), str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")]


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


@contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedReader]:
    """The bytes of the file as they lie there; `peek` works. Raises what the file system raises."""
    if "://" not in path:
        with Path(path).open("rb") as file:
            yield file
        return
    system, inner = _remote(path)
    # From its start to its end, which every web server can send; a part from the middle is not for all.
    options = {"block_size": 0} if is_web(path) else {}
    with system.open(inner, "rb", **options) as remote:
        raw = _Download(remote) if is_web(path) else remote
        with io.BufferedReader(raw, BUFFER) as file:
            yield file


def fraction_read(file: io.BufferedReader) -> Callable[[], float | None]:
    """A function that says how much of `file` has been read, 0 to 1, while it is open; None where it has no end yet."""
    if not file.seekable():
        return lambda: None
    size = file.seek(0, io.SEEK_END)
    file.seek(0)

    def fraction() -> float | None:
        return 1.0 if file.closed else min(1.0, file.tell() / max(1, size))

    return fraction


class _Download(io.RawIOBase):
    """A file that comes from a web server. Once it has ended it is not asked again (aiohttp warns of that)."""

    def __init__(self, remote: Any) -> None:
        self._remote, self._at, self._ended = remote, 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = 0
        while not self._ended and (got == 0 or self._at + got < HEAD):  # the first bytes come together, for `peek`
            data = self._remote.read(len(buffer) - got)
            buffer[got : got + len(data)] = data
            got += len(data)
            self._ended = not data
        self._at += got
        return got


@contextmanager
def open_text(file: io.BufferedReader, path: str, errors: str = "strict") -> Iterator[TextIO]:
    """The UTF-8 text in `file`, unpacked if it is gzip, bz2, zstd or lz4 by its first bytes, else by its name."""
    head = file.peek(HEAD)[:HEAD]
    if head.startswith(b"PK\x03\x04"):
        raise LogError(f"{path}: a zip archive; unpack it and name the log file in it")
    packing = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if packing is None:
        packing = SUFFIXES.get(Path(path.partition("?")[0]).suffix.lower())
    with ExitStack() as stack:
        bytes_: Any = file
        match packing:
            case "gzip":
                bytes_ = stack.enter_context(gzip.GzipFile(fileobj=file))
            case "bz2":
                bytes_ = stack.enter_context(bz2.BZ2File(file))
            case str():
                source = stack.enter_context(pa.PythonFile(file, "r"))
                unpacked = stack.enter_context(pa.CompressedInputStream(source, packing))
                bytes_ = stack.enter_context(io.BufferedReader(unpacked, BUFFER))
        if bytes_ is not file and bytes_.peek(4)[:4] == PARQUET:
            raise LogError(f"{path}: Parquet inside another packing; unpack it first")
        # newline="": only csv may read a line end inside quotes, and it wants to see which one
        yield stack.enter_context(io.TextIOWrapper(bytes_, encoding="utf-8-sig", errors=errors, newline=""))


def lines(file: TextIO, path: str) -> Iterator[tuple[int, str]]:
    """The lines with their ends, and their numbers from 1; blank ones too."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise LogError(f"{path}: line {number:,} is longer than {MAX_LINE:,} characters; is this the log file?")
        yield number, line


def is_parquet(file: io.BufferedReader) -> bool:
    return file.peek(4)[:4] == PARQUET


def open_parquet(file: io.BufferedReader, path: str) -> pq.ParquetFile:
    """LogError where only the whole file can be had: Parquet is read in parts, and first its end."""
    import pyarrow.parquet as pq

    whole: Any = file
    if not file.seekable():  # of a web server
        system, inner = _remote(path)
        whole = system.open(inner, "rb")
    try:
        return pq.ParquetFile(whole, pre_buffer=False, buffer_size=BUFFER)
    except ValueError as error:
        if isinstance(error, pa.ArrowException):
            raise
        raise LogError(f"{path}: the server sends no parts of a file, Parquet needs them; download it first") from None


def parquet_rows(table: pq.ParquetFile, names: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(number from 1, the texts of the columns `names`) of each row; a few thousand rows are held."""
    number = 0
    # One thread: each would keep buffers of its own, and making texts of the values is what takes the time.
    for batch in table.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(names)), use_threads=False):
        columns = {name: _texts(batch.column(name)) for name in batch.schema.names}
        for row in zip(*[columns[name] for name in names], strict=True):
            number += 1
            yield number, row


def _texts(column: pa.Array) -> list[str]:
    kind = column.type
    if pa.types.is_timestamp(kind):  # of ns Python has no time; one with a zone is UTC inside
        column = column.cast(pa.timestamp("us", kind.tz), safe=False).cast(pa.timestamp("us"))
    return [as_text(value) for value in column.to_pylist()]


def as_text(value: object) -> str:
    """How a value of JSON or Parquet stands in a text file, so that a log means the same in every kind of file:
    whole numbers without a point, null and NaN as nothing, times in ISO 8601, true and false as 1 and 0."""
    match value:
        case str():
            return value
        case None:
            return ""
        case bool():
            return "1" if value else "0"
        case int():
            return str(value)
        case float():
            if math.isnan(value):
                return ""
            return str(int(value)) if value.is_integer() and abs(value) < 1 << 53 else repr(value)
        case bytes():
            return value.decode()
        case datetime() | date():
            return value.isoformat()
        case _:
            return str(value)


UNPACKING_ERRORS = (OSError, zlib.error, pa.ArrowException)  # besides EOFError and UnicodeDecodeError
