"""Headrace and its peers on one stream, test-then-train: the same batches, the same candidates, the same negatives.

Reading order: `stream.py` (what all are shown), `contract.py` (what each must do), `peers.py`, `counting.py` and
`ours.py` (the systems), `metrics.py` and `bootstrap.py` (the figures), `harness.py` (the run), `report.py`;
`variants.py` and `alignment.py` (several settings side by side).
docs/compare.md says how to read the result.
"""
