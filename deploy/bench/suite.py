"""All benchmarks, for `headrace bench all` and `headrace bench check`: how each is run, and what its figures say.

A new `headrace bench NAME` gets an entry here; its block in docs/benchmarks.md then comes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """What is wanted of a figure."""

    bound: float
    most: bool = False  # at most, else at least
    of_value: bool = False  # of the value itself, where there is a reference; else of the ratio to it

    def holds(self, seen: float) -> bool:
        return seen <= self.bound if self.most else seen >= self.bound


@dataclass(frozen=True)
class Figure:
    """A row of a table: a figure beside its reference of the same run. Keys may have dots: `ranks.2`."""

    what: str  # with its unit
    key: str  # of the result; where that is a dict, a row for each of its keys, which stand for {} in `what`
    reference: str = ""  # its name
    reference_key: str = ""
    ratio_key: str = ""  # where the result has the ratio: a median of ratios, say. Without it: value by reference
    wanted: Limit | None = None
    # `bench check` fails where the ratio (without a reference: the value) is worse than the kept one by more than this
    # share of it; None: it is not looked at.
    tolerance: float | None = None
    less_is_better: bool = False


@dataclass(frozen=True)
class Bench:
    """How one is run, and its figures."""

    name: str  # of its block
    command: str  # headrace bench …
    figures: tuple[Figure, ...]
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = None  # None: it is not among the quick ones
    check: tuple[str, ...] | None = None  # for `bench check`; None: it is not among the checked ones
    broker: bool = False  # it takes --bootstrap

    def arguments(self, quick: bool, bootstrap: str | None = None) -> list[str]:
        """What follows `headrace bench`."""
        sizes = self.quick if quick else self.full
        assert sizes is not None
        return [self.command, *sizes, *(["--bootstrap", bootstrap] if self.broker and bootstrap else [])]


# The tolerances. What is counted in processor time moves by a few percent from run to run on a quiet machine, and by a
# tenth where caches are shared with others; what the clock says moves by much more, but it alone sees what waits. Where
# the two sides wait for different things (ours for memory, the reference for the interpreter or the other way round),
# machines of one kind differ by a third: admissions 0.062 to 0.095 of a gather, 0.28 to 0.39 of Vowpal Wabbit.
CPU, CLOCK, UNLIKE = 0.25, 0.5, 0.5


def _freshness(p50: float | None, p99: float) -> tuple[Figure, ...]:
    return (
        Figure("probes", "probes"),
        Figure("p50, ms", "p50_ms", wanted=None if p50 is None else Limit(p50, most=True)),
        Figure("p95, ms", "p95_ms"),
        Figure("p99, ms", "p99_ms", wanted=Limit(p99, most=True)),
        Figure("events/s that the replica moved past", "handled_per_s", "events/s sent", "rate"),
        Figure("stage {}, p50, ms", "stages"),
        Figure("cores used by {}", "cores"),
    )


_SERVE = (
    Figure("p50, ms", "p50_ms", "bare forward of the same batches, ms", "bare_forward_ms"),
    Figure("p99, ms", "p99_ms", "bare forward of the same batches, ms", "bare_forward_ms", "ratio",
           Limit(3.0, most=True)),
    Figure("p99 alone, ms", "p99_ms", wanted=Limit(25, most=True)),
    Figure("a bare sleeper beside it, p99, ms", "stall_p99_ms"),
    Figure("requests/s", "rps", "at the knee", "knee_rps"),
    Figure("processor time of a request, ms", "cpu_ms_a_request"),
    Figure("errors", "errors", wanted=Limit(0, most=True)),
    Figure("versions that came meanwhile", "versions"),
    Figure("applying one, p99, ms", "apply_p99_ms"),
)  # fmt: skip

INTAKE = Bench(
    "intake", "intake",
    (
        Figure("events/s", "headrace_per_s", "stock Faust, an event at a time", "faust_per_event_per_s",
               "ratio_to_faust", Limit(20)),
        Figure("events/s", "headrace_per_s", "bare client, the limit", "client_limit_per_s", "ratio_to_limit",
               Limit(0.5)),
    ),
    quick=("--events", "50000", "--faust-events", "3000", "--runs", "1"), broker=True,
)  # fmt: skip
JOIN = Bench(
    "join", "join",
    (
        Figure("events/s", "events_per_s", "plain dictionaries, no store, no features", "reference_per_s", "ratio",
               Limit(60_000, of_value=True), tolerance=CLOCK),
        Figure("events by second of processor time", "events_per_cpu_s", "the same", "reference_per_cpu_s",
               "ratio_cpu", tolerance=CPU),
        Figure("events/s with ten times the open windows", "events_per_s_10x_open", "with one time", "events_per_s"),
        Figure("memory with ten times the open windows, MB", "rss_growth_mb_10x_open", "with one time",
               "rss_growth_mb", wanted=Limit(1.2, most=True), less_is_better=True),
    ),
    quick=("--events", "50000"), check=("--events", "50000"),
)  # fmt: skip
STORE = Bench(
    "store", "store",
    (
        Figure("look-ups/s", "lookup_per_s", "a dict", "dict_lookup_per_s", wanted=Limit(30e6, of_value=True)),
        Figure("look-ups by second of processor time", "lookup_per_cpu_s", "a dict", "dict_lookup_per_cpu_s"),
        Figure("look-ups by second of processor time", "lookup_per_cpu_s", "a bare gather, the limit",
               "gather_lookup_per_cpu_s", tolerance=CPU),
        Figure("admissions/s", "admit_per_s", "a dict", "dict_admit_per_s", wanted=Limit(3e6, of_value=True)),
        Figure("admissions by second of processor time", "admit_per_cpu_s", "a dict", "dict_admit_per_cpu_s"),
        Figure("admissions by second of processor time", "admit_per_cpu_s", "look-ups by a bare gather",
               "gather_lookup_per_cpu_s", tolerance=UNLIKE),
        Figure("commit with {} rows in the table, ms", "checkpoint_ms"),
        Figure("the same, processor time with {}, ms", "checkpoint_cpu_ms"),
        Figure("largest of these to smallest", "checkpoint_flatness", wanted=Limit(1.5, most=True)),
        Figure("rows restored/s", "restore_rows_per_s", wanted=Limit(500_000)),
        Figure("an event when memory is full, µs: last tenth", "tier_us_last_tenth", "first tenth",
               "tier_us_first_tenth"),
        Figure("the same, processor time, µs", "tier_cpu_us_last_tenth", "first tenth", "tier_cpu_us_first_tenth"),
        Figure("cold rows read/s", "tier_read_rows_per_s"),
    ),
    quick=("--rows", "200000", "--largest", "1000000", "--ids", "1000000", "--memory", "100000"),
    check=("--rows", "500000", "--map-only"),
)  # fmt: skip
TRAIN = Bench(
    "train", "train",
    (
        Figure("examples/s", "headrace_per_s", "bare TorchRec, fbgemm's kernel", "bare_torchrec_per_s", "ratio",
               Limit(1.3), tolerance=CLOCK),
        Figure("examples by second of processor time", "headrace_per_cpu_s", "bare TorchRec",
               "bare_torchrec_per_cpu_s", "ratio_cpu", tolerance=CPU),
        Figure("examples/s", "headrace_per_s", "torch by hand, the limit", "pure_torch_per_s", "ratio_to_limit",
               Limit(0.5), tolerance=CLOCK),
        Figure("examples by second of processor time", "headrace_per_cpu_s", "torch by hand", "pure_torch_per_cpu_s",
               "ratio_to_limit_cpu", tolerance=CPU),
        Figure("share of {} in a step", "share"),
    ),
    full=("--runs", "3"), quick=("--ids", "20000", "--steps", "20", "--runs", "1"),
    check=("--ids", "20000", "--steps", "20", "--runs", "1"),
)  # fmt: skip
PUBLISH = Bench(
    "publish", "publish",
    (
        Figure("rows/s, as fp32", "rows_per_s", "safetensors alone", "bare_rows_per_s", "ratio", tolerance=CLOCK),
        Figure("rows by second of processor time", "rows_per_cpu_s", "safetensors alone", "bare_rows_per_cpu_s",
               "ratio_cpu", tolerance=0.3),
        Figure("rows/s as {}", "rows_per_s_by_encoding"),
        Figure("bytes of a row, fp32", "bytes_per_row.fp32", "safetensors alone", "bare_bytes_per_row",
               tolerance=0.01, less_is_better=True),
        Figure("bytes of a row, fp16", "bytes_per_row.fp16", "fp32", "bytes_per_row.fp32",
               wanted=Limit(0.52, most=True), tolerance=0.01, less_is_better=True),
        Figure("bytes of a row, int8", "bytes_per_row.int8", "fp32", "bytes_per_row.fp32",
               wanted=Limit(0.32, most=True), tolerance=0.01, less_is_better=True),
    ),
    full=("--runs", "3"), quick=("--rows", "50000"), check=("--rows", "50000"),
)  # fmt: skip
LEARNERS = Bench(
    "learners", "learners",
    (
        Figure("examples/s", "headrace_per_s", "river, logistic regression", "river_logistic_per_s",
               "ratio_to_river_logistic"),
        Figure("examples/s", "headrace_per_s", "river, factorization machine", "river_fm_per_s", "ratio_to_river_fm"),
        Figure("examples/s", "headrace_per_s", "Vowpal Wabbit", "vw_per_s", "ratio_to_vw", tolerance=CLOCK),
        Figure("examples by second of processor time", "headrace_per_cpu_s", "river, logistic regression",
               "river_logistic_per_cpu_s", "ratio_to_river_logistic_cpu", tolerance=UNLIKE),
        Figure("examples by second of processor time", "headrace_per_cpu_s", "river, factorization machine",
               "river_fm_per_cpu_s", "ratio_to_river_fm_cpu", tolerance=UNLIKE),
        Figure("examples by second of processor time", "headrace_per_cpu_s", "Vowpal Wabbit", "vw_per_cpu_s",
               "ratio_to_vw_cpu", tolerance=UNLIKE),
    ),
    full=("--runs", "3"), quick=("--events", "15000"), check=("--events", "15000"),
)  # fmt: skip
SCALE = Bench(
    "scale", "scale",
    (
        Figure("rows/s on two ranks", "ranks.2", "on one", "ranks.1"),
        Figure("difference of the mean losses", "loss_difference", wanted=Limit(1e-5, most=True)),
        Figure("largest difference of a step's", "largest_difference"),
    ),
    full=("--runs", "3"), quick=("--steps", "30"),
)  # fmt: skip
SERVE = Bench(
    "serve", "serve", _SERVE, full=("--runs", "3"),
    quick=("--items", "5000", "--users", "5000", "--rate", "20", "--seconds", "6", "--runs", "1"), broker=True,
)  # fmt: skip
SOAK = Bench(
    "serve-soak", "serve",
    (*_SERVE, Figure("memory at the end, MB", "rss_mb"), Figure("its growth after the first minute, MB",
                                                              "rss_growth_mb")),
    full=("--share", "0.8", "--seconds", "1000", "--runs", "1"), broker=True,
)  # fmt: skip
FRESHNESS = Bench(
    "freshness", "freshness", _freshness(600, 1_000), full=("--rate", "5000", "--runs", "3"),
    quick=("--rate", "1000", "--seconds", "8", "--warm-up", "4"), broker=True,
)  # fmt: skip
FRESHNESS_SLOW = Bench(
    "freshness-100", "freshness",
    _freshness(None, 700),
    full=("--rate", "100", "--runs", "3"), broker=True,
)  # fmt: skip
END_TO_END = Bench(
    "end_to_end", "end_to_end",
    (
        Figure("events/s", "events_per_s", "plain Faust, an event at a time", "faust_per_event_per_s",
               "ratio_to_faust", Limit(5)),
        Figure("events/s", "events_per_s", "plain Faust, batches of 256", "faust_batches_per_s",
               "ratio_to_faust_batches"),
        Figure("events/s", "events_per_s", "joiner and bare TorchRec on the same cores", "reference_per_s",
               "ratio_to_reference", Limit(0.4)),
        Figure("the same three ratios by processor time: {}", "ratios_cpu"),
        Figure("joiner alone, µs an event", "joiner_us"),
        Figure("bare TorchRec, µs an event", "bare_us"),
        Figure("processor time of {}, s", "cpu_s.headrace"),
        Figure("the trainer's thread, µs an event by the clock: {}", "trainer_us"),
        Figure("lost", "lost", wanted=Limit(0, most=True)),
        Figure("duplicated", "duplicated", wanted=Limit(0, most=True)),
    ),
    full=("--runs", "3"), quick=("--events", "60000", "--faust-events", "5000"), broker=True,
)  # fmt: skip

BENCHES = {
    bench.name: bench
    for bench in (
        INTAKE, JOIN, STORE, TRAIN, PUBLISH, LEARNERS, SCALE, SERVE, SOAK, FRESHNESS, FRESHNESS_SLOW, END_TO_END,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A figure as it was seen."""

    what: str
    pattern: str  # `what` of the figure: alike for all keys of a dict
    value: float
    reference: str
    reference_value: float | None
    ratio: float | None
    wanted: Limit | None
    tolerance: float | None
    less_is_better: bool

    @property
    def seen(self) -> float:
        """What is held to `wanted`."""
        of_value = self.ratio is None or (self.wanted is not None and self.wanted.of_value)
        return self.value if of_value or self.ratio is None else self.ratio

    @property
    def compared(self) -> float:
        """What `bench check` compares."""
        return self.value if self.ratio is None else self.ratio

    @property
    def name(self) -> str:
        """Of the ratio, in a list of all."""
        return f"{self.what} to {self.reference}" if self.reference else self.what


def rows_of(bench: Bench, result: dict[str, Any]) -> list[Row]:
    """The figures that a result has; those whose key or reference is null or not there are left out."""
    rows = []
    for figure in bench.figures:
        value = _at(result, figure.key)
        many = value if isinstance(value, dict) else {"": value}
        reference = _at(result, figure.reference_key) if figure.reference else None
        for part, number in many.items():
            if number is None:
                continue
            ratio = _at(result, figure.ratio_key) if figure.ratio_key else None
            if ratio is None and reference:
                ratio = number / reference
            named = figure.reference if reference is not None else ""
            row = Row(
                figure.what.format(part), figure.what, number, named, reference, ratio if named else None,
                figure.wanted, figure.tolerance, figure.less_is_better,
            )  # fmt: skip
            rows.append(row)
    return rows


def _at(result: dict[str, Any], key: str) -> Any:
    """What is at a key with dots; None where there is nothing."""
    found: Any = result
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
