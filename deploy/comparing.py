"""Settings files of `headrace compare --settings`: each read as `--config` would, named, and held to one frame."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.settings import Settings, load
from embedding_store.errors import UsageError
from replay.comparison.variants import SEEDS, Variant, flattened, is_void
from replay.readers.generic import check_mapping
from streams.joiner import JoinSettings


def read_settings(
    files: Sequence[Path], environment: Mapping[str, str], flags: Mapping[str, Any], taken: Sequence[str]
) -> tuple[Settings, tuple[Variant, ...]]:
    """(settings of the first file, for all that a comparison has one of; what is compared). `taken`: names that no file
    may have.

    All of each is checked: raises UsageError at the first file that is wrong, and for fewer than two.
    """
    if len(files) < 2:
        raise UsageError("--settings: name two files or more, as --settings a.toml b.toml")
    every: list[Settings] = []
    variants = []
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such settings file; check the paths given with --settings")
        try:
            settings = load(file, environment, flags)
            settings.check()
            if not every and settings.log.format == "generic":  # the one log is read as the first file says
                check_mapping(settings.log.columns)
            variants.append((settings.join.join, settings.model))
        except UsageError as error:
            where = "" if str(file) in str(error) else f"{file}: "
            raise UsageError(f"{where}{error}") from None
        every.append(settings)
    names = unique_names(files, taken)
    return every[0], tuple(Variant(name, *of) for name, of in zip(names, variants, strict=True))


def unique_names(files: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """Each file's stem; of equal ones, and those in `taken`, with as many of their folders as tell them apart; of the
    same file given again with a number."""
    places = [file.resolve().with_suffix("").parts for file in files]
    names: list[str] = []
    for number, place in enumerate(places):
        others = {other for other in places if other != place}
        length = 1
        while length < len(place) and (
            "/".join(place[-length:]) in taken or any(other[-length:] == place[-length:] for other in others)
        ):
            length += 1
        name = "/".join(place[-length:])
        before = places[:number].count(place)
        names.append(f"{name} ({before + 1})" if before else name)
    return names


def ignored(files: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Lines for what the files set otherwise and a comparison has one of, or what changes no figure in it."""
    every = [flattened(tomllib.loads(file.read_text("utf-8"))) for file in files]
    keys = sorted({key for one in every for key in one if any(key not in other or other[key] != one[key]
                                                              for other in every)})  # fmt: skip
    join = {f"join.{field}" for field in JoinSettings.__struct_fields__}
    learned = [key for key in keys if key in join or key.startswith("model.")]
    void = [key for key in learned if is_void(key) and key not in SEEDS]
    one = [key for key in keys if key not in learned or key in SEEDS]
    lines = []
    if void:
        lines.append(f"no figure hangs on {', '.join(void)}: nothing is published or downsampled here")
    if one:
        lines.append(f"a comparison has one {', '.join(one)}: that of {names[0]}")
    return lines
