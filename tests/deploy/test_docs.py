"""Every command line in README.md and docs/ is one that the real command line takes.

`headrace` lines are parsed by the command itself (nothing is run), `make` lines are held to the Makefile and to the
figures there are, `curl` lines to the replica's routes and what they take. A block with a command of ours in it may
have others, of OTHERS; what is neither fails. Blocks marked `<!-- run: NAME -->` are run as they stand: those of
operations.md in test_operations.py, the others in test_docs_run.py.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
import typer
from starlette.routing import Match
from typer.exceptions import TyperException

from deploy.cli import app
from online_model.serving.api import RankRequest, RecommendRequest
from online_model.serving.app import ROUTES
from tests.deploy.test_cli import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ("headrace", "make", "curl")
# What else may stand in a block with commands of ours: tests of the deployment files, the procedures of operations.md
# and the installation itself are where they are seen to work.
OTHERS = {
    ".", "export", "kill", "wait", "cp", "rm", "mkdir", "sed", "tr", "for", "do", "done", "chown", "chmod", "openssl",
    "docker", "tar", "pip", "python", ".venv/bin/python", "torchrun",
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    \S.*\n)+", re.MULTILINE)
SPAN = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:headrace|make|curl) [^`]*)`")
# In the words of a text, what stands for a value: one that is like it.
STANDS_FOR = {"N": "1", "S": "1", "X": "1", "E.S": "1.1", "SPLIT": "alternate"}
BODIES = {"/v1/rank": RankRequest, "/v1/recommend": RecommendRequest}


@dataclass(frozen=True)
class Command:
    """One of a doc: `whole` in a block, to be typed as it is; else in a text, which may leave arguments out."""

    doc: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.doc}: {shlex.join(self.words)}"


def simple_commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without assignments before it and redirections."""
    block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
    block = re.sub(r"(?<=\s)\d?>>?\s*(?:&\d|\S+)", "", block)
    block = re.sub(r"(?<=\s)#.*|^#.*", "", block, flags=re.MULTILINE)
    lexer = shlex.shlex(block, posix=True, punctuation_chars=";&|()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    for ends, some in itertools.groupby(lexer, lambda token: set(token) <= set(";&|()\n")):
        words = list(some)
        while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0]):
            del words[0]
        if words and not ends:
            yield words


def in_words(text: str) -> Iterator[list[str]]:
    """The commands that a span of a text is about: `headrace broker start|stop [--json] …` are two."""
    words = shlex.split(text) if text.startswith("curl") else re.sub(r"[\[\]…]", " ", text).split()
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    alternatives = [word.split("|") for word in words]
    yield from (list(one) for one in itertools.product(*alternatives))


def commands(path: Path) -> tuple[list[Command], set[str]]:
    """(our commands of a doc, the other programs in blocks that have one of ours)."""
    text, found, others = path.read_text(), [], set()
    fenced = FENCE.findall(text)
    blocks = [block for language, block in fenced if language in ("", "sh")]
    rest = FENCE.sub("", text)
    blocks += INDENTED.findall(rest)
    for block in blocks:
        if not re.search(rf"^\s*(?:[A-Z_]+=\S+ )*(?:{'|'.join(OURS)}) ", block, re.MULTILINE):
            continue
        for words in simple_commands(block):
            if words[0] in OURS:
                found.append(Command(path.name, tuple(words), True))
            else:
                others.add(words[0])
    for span in SPAN.findall(INDENTED.sub("", rest)):
        found += [Command(path.name, tuple(words), False) for words in in_words(" ".join(span.split()))]
    return found, others


ALL = list(dict.fromkeys(command for path in DOCS for command in commands(path)[0]))


def taken(words: list[str], whole: bool) -> None:
    """Raises TyperException where the command line would not take these words."""
    command, context, name = typer.main.get_command(app), None, "headrace"
    args = [STANDS_FOR.get(word, word) if not whole else word for word in words if word != "--debug"]
    while hasattr(command, "commands"):
        if not args:
            assert not whole, "a command is missing"
            return
        name, *args = args
        if not whole and name == "NAME":
            return
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    try:
        with command.make_context(name, args, parent=context):
            pass
    except TyperException as error:
        left_out = type(error).__name__ == "MissingParameter" or "requires an argument" in error.format_message()
        if whole or not left_out:
            raise


def made(words: list[str]) -> None:
    """A target of the Makefile, with variables that it reads."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable, _, value = word.partition("=")
        if variable == word:
            assert re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), f"no target {word}"
            continue
        assert re.search(rf"\$[({{]{variable}\b|^{variable}\s*\??=", makefile, re.MULTILINE), f"{variable} is not read"
        if variable == "ONLY":
            from tests.figures.__main__ import MODULES, _is_of

            lines = [f"{module}.{name}" for module, some in MODULES.items() for name in some]
            assert any(_is_of(line, value) or line.startswith(value) for line in lines), f"no figures are named {value}"


def asked(words: list[str]) -> None:
    """A route of the replica, and a body that it takes."""
    (url,) = (word for word in words if re.search(r"127\.0\.0\.1:", word))
    path = urlsplit(url if "//" in url else f"//{url}".replace("${HEADRACE_SERVE_PORT:-8080}", "8080")).path
    body = words[words.index("-d") + 1].encode() if "-d" in words else None
    scope = {"type": "http", "path": path, "method": "POST" if body is not None else "GET", "headers": []}
    assert any(route.matches(scope)[0] is Match.FULL for route, _ in ROUTES), f"the replica has no {path}"
    if body is not None:
        msgspec.json.decode(body, type=BODIES[path])


@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_command_of_the_docs_is_one_that_there_is(command: Command) -> None:
    program, *words = command.words
    if program == "headrace":
        taken(words, command.whole)
    elif program == "make":
        made(words)
    else:
        asked(words)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_else_is_in_a_block_is_known(path: Path) -> None:
    assert commands(path)[1] <= OTHERS


def test_none_is_overlooked() -> None:
    """Each line of a block that begins with a command of ours is among them."""
    for path in DOCS:
        text = path.read_text()
        blocks = [block for _, block in FENCE.findall(text)] + INDENTED.findall(FENCE.sub("", text))
        lines = re.findall(rf"^ *(?:[A-Z_]+=\S+ )*(?:{'|'.join(OURS)}) .*", "\n".join(blocks), re.MULTILINE)
        found = [command for command in commands(path)[0] if command.whole]
        assert len(found) >= len(lines), path.name
    assert len({command.words[1] for command in ALL if command.words[0] == "headrace"}) > 15


@pytest.mark.parametrize(
    "text",
    [
        "headrace demo --secnds 3", "headrace demo --seconds soon", "headrace dmo", "headrace log inspect",
        "headrace broker", "headrace simulate --events 20 out.jsonl a world",
        "make demos", "make demo SECOND=3", "make figures ONLY=nothing",
        "curl -s 127.0.0.1:8080/v1/models", "curl -s 127.0.0.1:8080/v1/rank",
        "curl -s 127.0.0.1:8080/v1/rank -d '{\"user\": 1}'",
        "curl -s 127.0.0.1:8080/v1/recommend -d '{\"user\": \"u\", \"kk\": 5}'",
    ],
)  # fmt: skip
def test_what_is_wrong_would_be_found(text: str) -> None:
    ((program, *words),) = simple_commands(text)
    with pytest.raises((TyperException, AssertionError, msgspec.ValidationError)):
        {"headrace": lambda it: taken(it, True), "make": made, "curl": asked}[program](words)
