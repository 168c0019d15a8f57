"""Figures of versions on their way to replicas: what smaller and fewer rows save, and cost in quality."""

from __future__ import annotations

import numpy as np

from embedding_store.columns import TableRows
from embedding_store.delta import Version, encode
from embedding_store.encoding import ENCODINGS
from tests.figures.common import Bench, Line, Row, at_most, equal, program, public
from tests.figures.replay import TAOBAO_BY_TIME

# A deterministic replay; before each slice of the log is learned, every fourth of its clicks is ranked by a replica of
# each encoding, among items that were clicked before. Replicas have what the trainer committed, encoded and decoded.
_SERVED = """
import json, sys
from pathlib import Path
from tempfile import TemporaryDirectory
import numpy as np
from embedding_store.delta import Assembler, encode
from embedding_store.encoding import ENCODINGS
from online_model.serving.api import RankRequest
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, TrainerSettings
from replay.direct import DirectReplay, DirectSettings
from replay.readers import in_time_order, open_log
from streams.events import Click
from streams.joiner import JoinSettings

def _auc(p, positive):  # by ranks, ties counted half
    values, at, count = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[at]
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(p) - n)))

path, dim = sys.argv[1], int(sys.argv[2])
model = TrainerSettings(features=FeatureSettings(dim=dim))

class Served(DirectReplay):
    now_ms, dice, seen = 0, np.random.default_rng(1), []
    p, label = {e: [] for e in ENCODINGS}, {e: [] for e in ENCODINGS}
    replicas = {e: Replica(ReplicaSettings(), model.features, model.ranker, clock=lambda: Served.now_ms)
                for e in ENCODINGS}
    assemblers = {e: Assembler() for e in ("trainer", *ENCODINGS)}
    size = dict.fromkeys(ENCODINGS, 0)

    def _slice(self, records):
        clicks = [r for r in records if isinstance(r, Click)]
        if len(self.seen) > 1000:
            for click in clicks[::4]:
                self._score(click)
        self.seen.extend(c.item for c in clicks)
        super()._slice(records)
        self._commit()

    def _score(self, click):
        Served.now_ms = click.ts
        others = [self.seen[i] for i in self.dice.integers(len(self.seen), size=4)]
        items = [click.item, *(o for o in others if o != click.item)]
        for encoding, replica in self.replicas.items():
            ranked = replica.rank(RankRequest(click.user, list(items))).items
            self.p[encoding] += [r.click for r in ranked]
            self.label[encoding] += [r.item == click.item for r in ranked]

    def _commit(self):
        for part in self._trainer.commit() or []:
            version = self.assemblers["trainer"].add(part)
            if version is None:
                continue
            for encoding, replica in self.replicas.items():
                for sent in encode(version, rows=encoding):
                    self.size[encoding] += len(sent)
                    if (out := self.assemblers[encoding].add(sent)) is not None:
                        replica.apply(out)
        self._trainer.store.acknowledge(self._trainer.sequence)

with TemporaryDirectory() as folder:
    join = JoinSettings(implicit=True)
    replay = Served(DirectSettings(Path(folder) / "s", join, model, deterministic=True))
    replay.run(in_time_order(open_log("taobao", path), directory=Path(folder)))
auc = {e: _auc(np.array(p), np.array(Served.label[e])) for e, p in Served.p.items()}
print(json.dumps({"auc": auc, "bytes": Served.size, "scored": len(Served.p["fp32"])}))
"""

# A made stream, 1,000 rows a second for a minute, five commits a second by its own clock: some items come often, most
# seldom, users stay for a while. Before every tenth block users of it are ranked by a replica that has what came.
# Each budget is a run of its own; all of them learn the same, which the digests say.
_BUDGET = """
import json, sys
from pathlib import Path
from tempfile import TemporaryDirectory
import numpy as np
import torch
from embedding_store.delta import Assembler, row_bytes
from embedding_store.ids import feature_id
from online_model.serving.api import RankRequest
from online_model.serving.replica import Replica
from online_model.serving.settings import ReplicaSettings
from online_model.settings import TrainerSettings
from online_model.trainer import open_trainer
from tests.online_model.logs import START, make_blocks, make_rows

SECONDS, RATE, COMMITS, USERS, ITEMS, REFRESH_S = 60, 1000, 5, 10_000, 10_000, 20
torch.set_num_threads(1)

def some_items(dice, n):
    return np.minimum(dice.pareto(1.0, n) * 20, ITEMS - 1).astype(np.int64)

def stream():
    dice, rows = np.random.default_rng(0), make_rows(SECONDS * RATE, items=ITEMS)
    request = np.arange(len(rows)) // 4
    user = (request // 20 + dice.integers(500, size=request[-1] + 1)[request]) % USERS
    item = some_items(dice, len(rows))
    rows.user = np.array([feature_id("user", i) for i in range(USERS)], np.int64)[user]
    rows.item = np.array([feature_id("item", i) for i in range(ITEMS)], np.int64)[item]
    rows.item_raw = np.array([str(i) for i in item], object)
    rows.click = (dice.random(len(rows)) < 0.4 * dice.random(ITEMS)[item]).astype(np.int8)
    rows.purchase = np.where(rows.click == 1, 0, -1).astype(np.int8)
    return make_blocks(rows, RATE // COMMITS), user

def run(folder, rate, blocks, users):
    now = START
    model = TrainerSettings(row_bytes_per_s=rate, refresh_s=REFRESH_S)
    trainer = open_trainer(model, Path(folder) / str(rate), lambda: now)
    size_of = {table: row_bytes(layout, "fp32") for table, layout in trainer.store.layouts.items()}
    replica = Replica(ReplicaSettings(), model.features, model.ranker, clock=lambda: now)
    assembler, dice, p, sent, size, owed = Assembler(), np.random.default_rng(1), [], [], 0, 0
    for number, block in enumerate(blocks):
        if number >= len(blocks) // 3 and number % 10 == 0:
            for i in dice.integers(len(block.examples), size=20):
                user = int(users[number * RATE // COMMITS + i])
                items = np.unique(some_items(dice, 20)).tolist()
                ranked = {r.item: r.click for r in replica.rank(RankRequest(user, list(items))).items}
                p += [ranked[i] for i in items]
        now += 1000 // COMMITS
        trainer.offer(block, number)
        while trainer.step():
            pass
        for part in trainer.commit():
            size += len(part)
            if (version := assembler.add(part)) is not None:
                sent.append(sum(size_of[t] * len(r) for t, r in version.tables.items()))
                owed = max(owed, version.info["owed"]["rows"])
                replica.apply(version)
        trainer.store.acknowledge(trainer.sequence)
    digest = trainer.digest()
    trainer.store.close()
    held = sum(s <= rate / COMMITS for s in sent)
    return {"digest": digest, "p": np.array(p), "rows": sum(sent) / SECONDS, "bytes": size / SECONDS, "owed": owed,
            "over": len(sent) - held}

with TemporaryDirectory() as folder:
    blocks, users = stream()
    whole = run(folder, 0, blocks, users)
    told = {"rows": whole["rows"], "bytes": whole["bytes"], "budgets": {}}
    for share in map(int, sys.argv[1:]):
        seen = run(folder, int(whole["rows"] * share / 100), blocks, users)
        seen["same"] = seen.pop("digest") == whole["digest"]
        seen["off"] = float(np.abs(seen.pop("p") - whole["p"]).mean() / whole["p"].mean())
        told["budgets"][share] = seen
print(json.dumps(told))
"""
_OFF = {100: 0.005, 50: 0.05, 25: 0.2}  # budget in percent → how far scores may be off


def budget(bench: Bench) -> list[Row]:
    """a budget of bytes per second for rows: bytes, and how far replicas' scores are from the trainer's"""
    found = program(_BUDGET, *_OFF)
    out = []
    for share, most in _OFF.items():
        seen = found["budgets"][str(share)]
        what = f"{share} % of {found['rows'] / 1000:.0f} kB/s of rows: {seen['rows'] / 1000:.0f} kB/s with refreshes, "
        what += f"{seen['bytes'] / 1000:.0f} of {found['bytes'] / 1000:.0f} kB/s in all, at most {seen['owed']:,} owed"
        out += [
            at_most(f"{what}; mean difference of a click's score over its mean", seen["off"], most),
            at_most(f"{share} %: versions past the budget (the first, and refreshes every 20 s)", seen["over"], 4),
            equal(f"{share} %: the model is the same", seen["same"], True),
        ]
    return out


def rows(bench: Bench) -> list[Row]:
    """rows as fp32, fp16 and int8: bytes, and AUC of what replicas serve"""
    table = TableRows(np.arange(100_000))
    table.columns["weights"] = np.random.default_rng(0).normal(size=(len(table), 64)).astype(np.float32)
    size = {e: sum(map(len, encode(Version(1, 1, tables={"item": table}), rows=e))) for e in ENCODINGS}
    found = program(_SERVED, public(TAOBAO_BY_TIME), 32)
    out = [at_most("bytes of a row at dim 64, int8 to fp32", size["int8"] / size["fp32"], 0.32),
           at_most("bytes of a row at dim 64, fp16 to fp32", size["fp16"] / size["fp32"], 0.52)]  # fmt: skip
    for encoding in ENCODINGS[1:]:
        ratio, auc = found["bytes"][encoding] / found["bytes"]["fp32"], found["auc"]
        what = f"taobao, {found['scored']:,} scores: AUC {auc[encoding]:.5f} of {encoding}, {auc['fp32']:.5f} of fp32"
        difference = abs(auc[encoding] - auc["fp32"])
        out.append(at_most(f"{what}, {ratio:.2f} of its bytes in all; difference", difference, 0.001))
    return out


LINES: dict[str, Line] = {"rows": rows, "budget": budget}
