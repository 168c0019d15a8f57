"""The digest of a multiset of rows."""

from __future__ import annotations

import numpy as np
import pytest

from online_model.examples import COLUMNS, Examples, ExamplesDigest
from tests.online_model.logs import make_rows


def _digest(*parts: Examples) -> str:
    digest = ExamplesDigest()
    for part in parts:
        digest.add(part)
    return digest.hexdigest()


def test_order_and_blocks_do_not_matter():
    rows = make_rows(500, seed=1)
    mixed = rows.take(np.random.default_rng(1).permutation(500))
    assert _digest(rows) == _digest(mixed.take(slice(0, 100)), Examples.empty(), mixed.take(slice(100, None)))


def test_a_row_more_or_less_or_twice_matters():
    rows = make_rows(50, seed=1)
    assert len({_digest(rows), _digest(rows, rows), _digest(rows.take(slice(1, None))), _digest()}) == 4


@pytest.mark.parametrize("column", COLUMNS)
def test_each_column_matters(column: str):
    rows = make_rows(50, seed=1)
    changed = rows.take(slice(None))
    values = getattr(changed, column).copy()
    values[7] = values[7] + "x" if column == "item_raw" else values[7] + 1 if column != "propensity" else 0.25
    setattr(changed, column, values)
    assert _digest(changed) != _digest(rows)
