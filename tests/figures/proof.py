"""Figures of the whole: from Kafka to a replica beside plain Faust, and what hours of it do to memory and disk."""

from __future__ import annotations

from tests.figures.common import Bench, Line, Row, at_least, equal, headrace
from tests.figures.soak import soak
from tests.figures.torture import torture

RUNS = 3
KILLS, SEEDS = 200, (1, 2, 3)


def end_to_end(bench: Bench) -> list[Row]:
    """The standard mix from Kafka to a replica on two cores, to plain Faust, and to joiner and bare TorchRec there"""
    found = headrace(bench.empty("end_to_end"), "bench", "end_to_end", "--runs", RUNS)
    rates = {name: f"{found[name]:,.0f} events/s" for name in found if name.endswith("per_s")}
    each = {
        name: ", ".join(f"{part} {seconds:.1f}" for part, seconds in used.items())
        for name, used in found["cpu_s"].items()
    }
    cpu = found["ratios_cpu"]
    return [
        *(Row(name, seen, "for the ratios", True) for name, seen in rates.items()),
        Row("joiner alone, bare TorchRec alone", f"{found['joiner_us']:.1f}, {found['bare_us']:.1f} µs an event",
            "for the ratio", True),
        at_least("to plain Faust, an event at a time", found["ratio_to_faust"], 5, " ×"),
        at_least("to joiner and bare TorchRec on the same cores", found["ratio_to_reference"], 0.4, " ×"),
        Row("to plain Faust with batches at the trainer", f"{found['ratio_to_faust_batches']:.2f} ×", "", True),
        Row("the same three by processor time",
            f"{cpu['to_faust']:.2f}, {cpu['to_reference']:.2f}, {cpu['to_faust_batches']:.2f} ×", "", True),
        Row("the trainer's thread, µs an event by the clock",
            ", ".join(f"{stage} {us:.1f}" for stage, us in found["trainer_us"].items()), "where it goes", True),
        *(Row(f"processor seconds, {name}", said, "where it goes", True) for name, said in each.items()),
        equal("events handled", found["handled"], found["sent"]),
        equal("lost, duplicated", (found["lost"], found["duplicated"]), (0, 0)),
    ]  # fmt: skip


LINES: dict[str, Line] = {
    "end_to_end": end_to_end, "soak": soak, **{f"torture.{seed}": torture(KILLS, seed) for seed in SEEDS},
}  # fmt: skip
