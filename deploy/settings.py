"""The settings of all parts: headrace.toml, then HEADRACE_… variables, then flags; the later wins.

Each section is the Struct (or dataclass) of its owner, imported when it is first asked for: `headrace join` reads its
own sections and never loads what the trainer needs. `Settings.check` reads all that are set.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from embedding_store.errors import UsageError
from embedding_store.secret import HIDDEN, Secret

if TYPE_CHECKING:
    from embedding_store.signing import SigningSettings
    from online_model.serving.settings import HttpSettings
    from online_model.settings import TrainerSettings
    from replay.readers.settings import LogSettings
    from replay.simulator.settings import SimulatorSettings
    from streams.kafka_clients import Connection, KafkaSettings
    from streams.settings import JoinWorkerSettings, ServeWorkerSettings, TrainWorkerSettings
    from streams.topics import TopicSettings

T = TypeVar("T")

DEFAULT_FILE = "headrace.toml"
PREFIX = "HEADRACE_"
FLAG = "flag"  # the source of what stood on the command line
ABOUT = {
    "log": "a historical log: of headrace replay and log",
    "kafka": "how Kafka is reached; where it is says bootstrap, at the top",
    "signing": "who may make versions, snapshots and checkpoints",
    "topics": "names and partitions of the Kafka topics",
    "join": "the join worker; times in ms of event time",
    "train": "the train worker",
    "serve": "a serving replica",
    "http": "who may ask the replica, and /metrics of all workers",
    "demo": "headrace demo",
}
# Of the command itself, of the embedded Kafka, of tests, of deploy/compose.
NOT_SETTINGS = {
    "HEADRACE_DEBUG", "HEADRACE_CACHE", "HEADRACE_FAULT", "HEADRACE_DATA", "HEADRACE_ARTEFACTS", "HEADRACE_SECRETS",
    "HEADRACE_VERSION", "HEADRACE_EXTRA",
}  # fmt: skip


class General(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What all parts share; at the top of the file, in no section."""

    data_dir: Annotated[Path, Meta(description="stores, snapshots and the embedded Kafka")] = Path(".headrace")
    bootstrap: Annotated[str, Meta(description='Kafka as "host:port"; "": the embedded one')] = ""
    logs: Annotated[Literal["text", "json"], Meta(description="of the workers, on stderr")] = "text"


class DemoOptions(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One run of `headrace demo`."""

    log: Annotated[str | None, Meta(description="format of a historical log to play; none: the simulator")] = None
    path: Annotated[str | None, Meta(description="the log's file")] = None
    seconds: Annotated[float, Meta(ge=0, description="how long; 0: until Ctrl-C")] = 120.0
    keep: Annotated[bool, Meta(description="go on from what the last run left")] = False
    seed: Annotated[int, Meta(ge=0)] | None = None  # of the simulated users; none: that of [simulator]
    rate: Annotated[float, Meta(ge=0, description="events per second; 0: as the simulator has it")] = 1000.0
    page: Annotated[bool, Meta(description="serve the live page")] = True
    port: Annotated[int, Meta(ge=0, le=65535, description="of the live page; 0: any")] = 0


@dataclass(frozen=True)
class Layer:
    """Settings from one source. `values`: nested as in the file; `text`: each section's as {"WAIT_MS": "5"}."""

    source: str
    values: Mapping[str, Any]
    text: bool = False


class Settings:
    """All settings, checked section by section as they are asked for. Raises UsageError with one line."""

    SECTIONS = (
        "log", "kafka", "signing", "topics", "join", "model", "train", "serve", "http", "simulator", "demo"
    )  # fmt: skip

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        top = _fields(General)
        self._names = set(top) | set(self.SECTIONS)
        for layer in layers:
            _refuse_unknown(layer, (), self._names)
        general = _build(General, [_only(layer, top) for layer in layers], ())
        self.data_dir, self.bootstrap, self.logs = general.data_dir, general.bootstrap, general.logs

    @cached_property
    def log(self) -> LogSettings:
        from replay.readers.settings import ColumnMapping, LogSettings

        log = self._section("log", LogSettings)
        named = any(layer.source == FLAG and layer.values.get("log", {}).get("format") for layer in self._layers)
        if named and log.format != "generic":  # the mapping beside it is that of another log
            return msgspec.structs.replace(log, columns=ColumnMapping())
        return log

    @cached_property
    def kafka(self) -> KafkaSettings:
        from streams.kafka_clients import KafkaSettings

        return self._section("kafka", KafkaSettings)

    @cached_property
    def connection(self) -> Connection:
        """Where Kafka is, and how it is reached."""
        from streams.kafka_clients import Connection

        return Connection(self.bootstrap, self.kafka)

    @cached_property
    def signing(self) -> SigningSettings:
        from embedding_store.signing import SigningSettings

        return self._section("signing", SigningSettings)

    @cached_property
    def topics(self) -> TopicSettings:
        from streams.topics import TopicSettings

        return self._section("topics", TopicSettings)

    @cached_property
    def join(self) -> JoinWorkerSettings:
        from streams.settings import JoinWorkerSettings

        return self._section("join", JoinWorkerSettings)

    @cached_property
    def model(self) -> TrainerSettings:
        from online_model.settings import TrainerSettings

        # How purchases are learned depends on how long the joiner waits for them: that is set in [join], for both.
        wait = self.join.join.purchase_wait_ms
        joins = Layer("[join]", {"model": {"purchase_wait_ms": wait}})
        model = Settings([joins, *self._layers])._section("model", TrainerSettings)
        if model.purchase_wait_ms != wait:
            raise UsageError(
                f"model.purchase_wait_ms is {model.purchase_wait_ms}, that of [join] is {wait}: set it there only"
            )
        return model

    @cached_property
    def train(self) -> TrainWorkerSettings:
        from streams.settings import TrainWorkerSettings

        return self._section("train", TrainWorkerSettings)

    @cached_property
    def serve(self) -> ServeWorkerSettings:
        from streams.settings import ServeWorkerSettings

        # A replica puts users' actions in the order in which the joiner does: what that hangs on is set in [join].
        names = ("disorder_ms", "future_ms")
        joins = {name: getattr(self.join.join, name) for name in names}
        serve = Settings([Layer("[join]", {"serve": joins}), *self._layers])._section("serve", ServeWorkerSettings)
        for name in names:
            if getattr(serve, name) != joins[name]:
                text = f"serve.{name} is {getattr(serve, name)}, that of [join] is {joins[name]}: set it there only"
                raise UsageError(text)
        return serve

    @cached_property
    def http(self) -> HttpSettings:
        from online_model.serving.settings import HttpSettings

        return self._section("http", HttpSettings)

    @cached_property
    def simulator(self) -> SimulatorSettings:
        from replay.simulator.settings import SimulatorSettings

        return self._section("simulator", SimulatorSettings)

    @cached_property
    def demo(self) -> DemoOptions:
        return self._section("demo", DemoOptions)

    @property
    def sources(self) -> list[str]:
        """Where something was set, the later wins: the file, "environment", "flag"."""
        return [layer.source for layer in self._layers if layer.values]

    def check(self) -> None:
        """Read every section that something sets. Raises UsageError at the first thing that is wrong."""
        for name in filter(self.mentions, self.SECTIONS):
            getattr(self, name)

    def mentions(self, section: str) -> bool:
        """Whether anything of this section was set; asking costs no import."""
        return any(layer.values.get(section) for layer in self._layers)

    def with_flags(self, flags: Mapping[str, Any]) -> Settings:
        """These settings with flags on top: {"join.wait_ms": 5000}; None means the flag was not given."""
        return Settings([*self._layers, _flags(flags)])

    def _section(self, name: str, owner: type[T]) -> T:
        """The section's Struct. A field named as another section, or as a general setting, is set there; the fields of
        one that is named as this section stand in it directly (`join.wait_ms`, not `join.join.wait_ms`)."""
        fields = _fields(owner)
        elsewhere = [f for f, type_ in fields.items() if f != name and _is_elsewhere(f, type_)]
        shared = {f: getattr(self, f) for f in elsewhere}
        own = {n: f for n, f in fields.items() if n not in shared and n != name}
        inner = _fields(fields[name]) if name in fields else {}
        layers = [Layer(lay.source, lay.values[name], lay.text) for lay in self._layers if name in lay.values]
        layers = [_nested(layer, name, own | inner) for layer in layers]
        if name in fields:
            shared[name] = _build(fields[name], [_only(layer, inner) for layer in layers], (name,))
        return _build(owner, [_only(layer, own) for layer in layers], (name,), shared)


def load(
    config: Path | None = None, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of one command. `config` None: headrace.toml of the working directory, if there is one.

    `flags`: {"join.wait_ms": 5000, "data_dir": None}; None means not given. Raises UsageError with one line.
    """
    layers = []
    if config is not None or Path(DEFAULT_FILE).is_file():
        layers.append(_read(config or Path(DEFAULT_FILE)))
    layers.append(_environment(environment or {}))
    layers.append(_flags(flags or {}))
    return Settings(layers)


def dump(settings: Settings) -> str:
    """TOML text of all settings, with comments: reading it back gives the same settings."""
    general = General(data_dir=settings.data_dir.absolute(), bootstrap=settings.bootstrap, logs=settings.logs)
    lines = ["# All settings of Headrace. The environment (HEADRACE_JOIN_WAIT_MS) and flags win over this file."]
    lines += _entries(general)
    for name in Settings.SECTIONS:
        lines += _table(name, getattr(settings, name))
    return "\n".join(lines) + "\n"


def commented(heading: Sequence[str], sections: Mapping[str, Sequence[tuple[str, Any, str]]]) -> str:
    """TOML text of some settings: {section: [(name, value, why)]}, "" for the top. UsageError if `load` refuses them.

    Lines of `heading` come first, as comments.
    """
    lines = [f"# {line}".rstrip() for line in heading]
    for section, entries in sections.items():
        lines += ["", f"[{section}]"] if section else [""]
        for name, value, why in entries:
            lines.append(f"{name} = {_toml(value)}" + (f"  # {why}" if why else ""))
    text = "\n".join(lines) + "\n"
    Settings([Layer("these settings", tomllib.loads(text))]).check()
    return text


def _read(path: Path) -> Layer:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check the path given with --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    return Layer(str(path), values)


def _environment(environment: Mapping[str, str]) -> Layer:
    """HEADRACE_JOIN_WAIT_MS → {"join": {"WAIT_MS": …}}: which field that is, its section knows."""
    top = {name.upper(): name for name in _fields(General)} | {"LOG": "logs"}  # [log] is a historical one
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in NOT_SETTINGS:
            continue
        name = variable.removeprefix(PREFIX)
        section = next((s for s in Settings.SECTIONS if name.startswith(f"{s.upper()}_")), None)
        if section is not None:
            values.setdefault(section, {})[name.removeprefix(f"{section.upper()}_")] = _Text(text)
        elif name in top:
            values[top[name]] = _Text(text)
        else:
            known = [PREFIX + n for n in top] + [f"{PREFIX}{s.upper()}_…" for s in Settings.SECTIONS]
            raise UsageError(f"{variable} is not a setting{_nearest(variable, known)}")
    return Layer("environment", values, text=True)


def _flags(flags: Mapping[str, Any]) -> Layer:
    values: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None:
            *sections, field = name.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[field] = str(value) if isinstance(value, Path) else value  # as it would stand in the file
    return Layer(FLAG, values)


def _build(owner: type[T], layers: list[Layer], path: tuple[str, ...], shared: Mapping[str, Any] | None = None) -> T:
    """An `owner` from the values of the layers, each value checked by itself so that errors name their source.

    `shared`: the values of fields that are not the section's own to set.
    """
    values: dict[str, Any] = dict(shared or {})
    fields = _fields(owner)
    nested: dict[str, list[Layer]] = {}
    for layer in layers:
        _refuse_unknown(layer, path, fields)
        for name, value in layer.values.items():
            if _is_section(fields[name]):
                nested.setdefault(name, []).append(Layer(layer.source, value))
            else:
                values[name] = _value(layer, path, name, value, fields[name])
    for name, parts in nested.items():
        values[name] = _build(fields[name], parts, (*path, name))
    try:
        return owner(**values)
    except ValueError as error:
        raise UsageError(f"settings{' in [' + '.'.join(path) + ']' if path else ''}: {error}") from None


def _refuse_unknown(layer: Layer, path: tuple[str, ...], known: Collection[str]) -> None:
    if not isinstance(layer.values, Mapping):
        section = ".".join(path)
        raise UsageError(f"{layer.source}: {section} is a section: write [{section}] and its settings below")
    for name in layer.values:
        if name not in known:
            dotted = ".".join((*path, name))
            nearest = _nearest(dotted, [".".join((*path, k)) for k in known])
            raise UsageError(f"{layer.source}: {dotted} is not a setting{nearest}")


def _only(layer: Layer, names: Collection[str]) -> Layer:
    return Layer(layer.source, {k: v for k, v in layer.values.items() if k in names})


def _is_section(type_: Any) -> bool:
    return isinstance(type_, type) and (issubclass(type_, Struct) or dataclasses.is_dataclass(type_))


def _is_secret(type_: Any) -> bool:
    """Whether a field holds a Secret, alone, with a Meta, or as one of several types."""
    return type_ is Secret or any(_is_secret(part) for part in get_args(type_))


def _is_elsewhere(name: str, type_: Any) -> bool:
    """Whether a field of a section is another section, or a general setting, and so set there. (`demo.log` is neither:
    it is a text.)"""
    return name in _fields(General) or (name in Settings.SECTIONS and _is_section(type_))


def _fields(owner: type) -> dict[str, Any]:
    """name → type of the fields of a Struct or a dataclass."""
    if issubclass(owner, Struct):
        return {f.name: f.type for f in msgspec.structs.fields(owner)}
    hints = get_type_hints(owner, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(owner)}  # type: ignore[arg-type]


def _nested(layer: Layer, section: str, fields: Mapping[str, Any]) -> Layer:
    """The section's values as in a file. From the environment they come as {"WAIT_MS": "5"}."""
    if not layer.text:
        _refuse_unknown(layer, (section,), fields)
        return layer
    prefix = f"{PREFIX}{section.upper()}_"
    places = {"_".join(p).upper(): p for p in _leaves(fields)}
    values: dict[str, Any] = {}
    for name, text in layer.values.items():
        if name not in places:
            raise UsageError(f"{prefix}{name} is not a setting{_nearest(prefix + name, [prefix + p for p in places])}")
        *sections, field = places[name]
        place = values
        for part in sections:
            place = place.setdefault(part, {})
        place[field] = text
    return Layer(layer.source, values)


class _Text(str):
    """A value from the environment: text that stands for a number, a truth value or a TOML value."""


def _leaves(fields: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, type_ in fields.items():
        if _is_section(type_):
            for rest in _leaves(_fields(type_)):
                yield (name, *rest)
        else:
            yield (name,)


def _value(layer: Layer, path: tuple[str, ...], name: str, value: Any, type_: Any) -> Any:
    if _is_secret(type_):  # files are copied, and all users see the flags of a process
        if isinstance(value, _Text):
            return Secret(str(value))
        raise UsageError(
            f"{layer.source}: {'.'.join((*path, name))} is a secret: set {PREFIX}{'_'.join((*path, name)).upper()} in "
            f"the environment, or {name}_file to a file that holds it"
        )
    try:
        if not isinstance(value, _Text):
            return msgspec.convert(value, type_, dec_hook=_decode)
        return _from_text(value, type_)
    except msgspec.ValidationError as problem:
        error = str(problem).replace("`", "")
        error = error[:1].lower() + error[1:]
        if error.startswith("invalid enum value") and (choices := _choices(type_)):
            _, at, where = error.partition(" - at ")
            error = f"expected {' or '.join(map(str, choices))}{at}{where}"
    shown = HIDDEN if _is_secret(type_) else value
    if isinstance(value, _Text):
        raise UsageError(f"{PREFIX}{'_'.join((*path, name)).upper()}={shown}: {error}")
    where = "" if layer.source == FLAG else f"{layer.source}: "
    raise UsageError(f"{where}{'.'.join((*path, name))} = {shown!r}: {error}")


def _choices(type_: Any) -> tuple[Any, ...]:
    """What a value may be, where that is one of a few; () where it is not, or several parts of it are."""
    if get_origin(type_) is Literal:
        return get_args(type_)
    found = [choices for part in get_args(type_) if (choices := _choices(part))]
    return found[0] if len(found) == 1 else ()


def _decode(type_: type, value: Any) -> Any:
    if type_ is Path and isinstance(value, str):
        return Path(value).expanduser()
    if type_ is Secret and isinstance(value, str):
        return Secret(value)
    raise ValueError(f"expected {type_.__name__}, got {type(value).__name__}")


def _from_text(text: str, type_: Any) -> Any:
    try:
        return msgspec.convert(str(text), type_, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as problem:
        try:
            parsed = tomllib.loads(f"v = {text}")["v"]  # lists and tables, as in the file
        except tomllib.TOMLDecodeError:
            raise problem from None
        return msgspec.convert(parsed, type_, dec_hook=_decode)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(known))}"


def _table(path: str, section: Any) -> list[str]:
    """A section and those inside it, without what is set elsewhere; a field that is named as the section, in it."""
    about = ABOUT.get(path) or (type(section).__doc__ or "").strip().split("\n")[0]
    lines = ["", f"[{path}]  # {about}"]
    owners = [section, getattr(section, path)] if path in _fields(type(section)) else [section]
    for owner in owners:
        lines += _entries(owner)
    for owner in owners:
        for name, type_ in _fields(type(owner)).items():
            if _is_section(type_) and name != path and not _is_elsewhere(name, type_):
                lines += _table(f"{path}.{name}", getattr(owner, name))
    return lines


def _entries(section: Any) -> list[str]:
    lines = []
    for name, type_ in _fields(type(section)).items():
        if _is_section(type_) or (_is_elsewhere(name, type_) and not isinstance(section, General)):
            continue
        value, about = getattr(section, name), _about(type_)
        comment = f"  # {about}" if about else ""
        if isinstance(value, Secret):
            lines.append(f"# {name} is set, and not shown{comment}")
            continue
        lines.append(f"# {name} is not set{comment}" if value is None else f"{name} = {_toml(value)}{comment}")
    return lines


def _about(type_: Any) -> str:
    """The description and the bounds of a field, as its owner gave them."""
    metas = [m for m in getattr(type_, "__metadata__", ()) if isinstance(m, Meta)]
    said = [m.description for m in metas if m.description]
    for m in metas:
        if m.ge is not None and m.le is not None:
            said.append(f"{m.ge:,} to {m.le:,}")
        else:
            signs = {"≥": m.ge, ">": m.gt, "≤": m.le, "<": m.lt}
            said += [f"{sign} {bound:,}" for sign, bound in signs.items() if bound is not None]
    return "; ".join(said)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str() | Path():
            return _quoted(str(value))
        case Struct():
            fields = {f: v for f in _fields(type(value)) if (v := getattr(value, f)) is not None}
            return "{" + ", ".join(f"{f} = {_toml(v)}" for f, v in fields.items()) + "}"
        case Mapping():
            return "{" + ", ".join(f"{_quoted(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
        case list() | tuple() | set() | frozenset():
            return "[" + ", ".join(_toml(v) for v in value) + "]"
    raise TypeError(f"a setting of type {type(value).__name__} cannot be written as TOML")


def _quoted(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"'}
    return '"' + "".join(escapes.get(c) or (c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in text) + '"'
