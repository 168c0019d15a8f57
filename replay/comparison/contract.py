"""What a system must do to be compared: as little as river asks of its models, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from online_model.batch import Candidates
from online_model.catalogue import CatalogueItem
from replay.comparison.stream import Batch


class System(Protocol):
    """Something that scores candidates and learns from batches. tests/replay/test_comparison_contract.py holds all to:

    `score` changes nothing: neither a later score nor what is learned later; it allocates nothing for an unknown id.
    The same batches and the same seed give the same scores. What it is given is left as it was.
    """

    probabilistic: bool  # scores are probabilities of a click: entropy and calibration can be claimed

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        """What is known of items from now on. Before the first batch that may have them."""

    def score(self, candidates: Candidates) -> np.ndarray:
        """float64 [N], higher is likelier; before the batch that they come from is learned."""

    def learn(self, batch: Batch) -> None:
        """Once for each batch, in order, after it was scored."""


@runtime_checkable
class Orders(System, Protocol):
    """A system that orders a next item's candidates by something else than the probability of a click on each."""

    def order(self, candidates: Candidates) -> np.ndarray:
        """float64 [N], higher is likelier to be next; as `score` otherwise."""
