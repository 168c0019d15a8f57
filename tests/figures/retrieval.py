"""Figures of retrieval: the index against the scan of all items."""

from __future__ import annotations

from tests.figures.common import Bench, Line, Row, at_least, program

SIZES = (20_000, 200_000, 1_000_000)

# Made items, 2 × 32 numbers and a prior: rows around 64 topics, categories, sellers and words as a catalogue has them,
# clicks by a power law; users between three topics. As the serve worker does, one thread; the rebuild has another.
_MEASURED = """
import json, sys, time
import numpy as np
import torch
from embedding_store.columns import TableRows
from online_model.features import CATEGORY, EXTRAS, ITEM, SELLER, TITLE_WORDS, WORD
from online_model.history import HISTORY
from online_model.serving.approximate import Index
from online_model.serving.candidates import Query
from online_model.serving.settings import ReplicaSettings
from online_model.serving.state import AVAILABLE, CATEGORY_ROW, SELLER_ROW, STAMP, WORD_ROWS, State
from online_model.settings import FeatureSettings, RankerSettings

N, D, NOW = int(sys.argv[1]), 32, 1_700_000_000_000
torch.set_num_threads(1)
dice = np.random.default_rng(0)
topics = dice.normal(0, 0.3, (64, D))
state = State(FeatureSettings(dim=D, items=N), RankerSettings())

def put(table, n, own, noise, **columns):
    weights = own * topics[dice.integers(64, size=n)] + dice.normal(0, noise, (n, D))
    zero = {c: np.zeros((n, *shape), dtype) for c, (dtype, shape) in EXTRAS[table].items()}
    rows = TableRows(np.arange(1, n + 1), {"weights": weights.astype(np.float32), **zero, **columns})
    return state.tables[table].put(rows)

linked = {CATEGORY_ROW: put(CATEGORY, 200, 1, 0.2), SELLER_ROW: put(SELLER, 2_000, 1, 0.1)}
words = put(WORD, 5_000, 1, 0.1)
shown = (dice.pareto(1, N) * 20).astype(np.int64)
items = put(ITEM, N, 0.7, 0.15, impressions=shown, clicks=(shown * dice.random(N) / 10).astype(np.int64))
columns, state.changes = state.items.columns, 1
for column, rows in linked.items():
    columns[column][items] = rows[dice.integers(len(rows), size=N)]
columns[WORD_ROWS][items] = words[dice.integers(len(words), size=(N, TITLE_WORDS))]
columns[AVAILABLE][items], columns[STAMP][items] = True, 1
weights = state.ranker.weights()
weights["tower_numbers"] = dice.normal(0, 0.1, weights["tower_numbers"].shape).astype(np.float32)
state.ranker.load_weights(weights)

def queries(n):
    users = 1.5 * topics[dice.integers(64, size=(n, 3))].mean(1)
    past = np.zeros((1, HISTORY), np.int64)
    return [Query(*(user + dice.normal(0, 0.2, (2, D))).astype(np.float32), past, NOW) for user in users]

def timed(index, asked):
    took, found = [], []
    for query in asked:
        start = time.perf_counter()
        found.append(index.candidates(query))
        took.append(1e6 * (time.perf_counter() - start))
    return took, found

def recall(best, found):
    return float(np.mean([np.isin(b, f).mean() for b, f in zip(best, found)]))

def moved(table, share):
    column = state.tables[table].columns["weights"]
    column[1:] += share * column[1:].std() * dice.normal(size=column[1:].shape)

with torch.inference_mode():
    rare = dict(probe_every=10**9, rebuild_s=1e9)
    exact = Index(state, ReplicaSettings(exact_up_to=10**9))
    index = Index(state, ReplicaSettings(exact_up_to=0, **rare))
    asked = queries(100)
    for _ in range(N // 4_096 + 1):
        exact.candidates(asked[0])
    scan, best = timed(exact, asked)
    begun = time.perf_counter()
    while not index.approximate:
        index.candidates(queries(1)[0])
    rebuild_s = time.perf_counter() - begun
    timed(index, asked)
    took, found = timed(index, asked)
    out = {"exact_us": np.median(scan), "index_us": np.median(took), "recall": recall(best, found),
           "rebuild_s": rebuild_s}
    for table in (ITEM, CATEGORY, SELLER, WORD):
        moved(table, 0.2)
    out["stale"] = recall(timed(exact, asked)[1], timed(index, asked)[1])
    for table in (ITEM, CATEGORY, SELLER, WORD):
        moved(table, 1.0)
    out["very_stale"] = recall(timed(exact, asked)[1], timed(index, asked)[1])
print(json.dumps(out))
"""


def index(bench: Bench) -> list[Row]:
    """Candidates by the exact scan and by the index, 65 numbers an item, recall of the best 200"""
    rows = []
    for n in SIZES:
        found = program(_MEASURED, n)
        rows += [
            Row(f"{n:,} items, exact scan", f"{found['exact_us']:,.0f} µs", "", True),
            Row(f"{n:,} items, index", f"{found['index_us']:,.0f} µs", "", True),
            at_least(f"{n:,} items, recall of the index when it is made", found["recall"], 0.9),
            Row(f"{n:,} items, recall when all vectors have moved by 0.2 of their spread", f"{found['stale']:.3f}", "",
                True),
            Row(f"{n:,} items, recall when they have moved by all of it", f"{found['very_stale']:.3f}", "", True),
            Row(f"{n:,} items, until the first index serves", f"{found['rebuild_s']:.1f} s", "", True),
        ]  # fmt: skip
    return rows


LINES: dict[str, Line] = {"index": index}
