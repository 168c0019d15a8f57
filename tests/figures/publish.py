"""Figures of versions on their way to replicas: what smaller rows cost in bytes, and in the quality that is served."""

from __future__ import annotations

import numpy as np

from embedding_store.columns import TableRows
from embedding_store.delta import Version, encode
from embedding_store.encoding import ENCODINGS
from tests.figures.common import Bench, Line, Row, at_most, program, public
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
            ranked = replica.rank(click.user, "shelf", items).items
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


LINES: dict[str, Line] = {"rows": rows}
