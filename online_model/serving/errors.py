"""What a replica refuses, and why."""

from embedding_store.errors import HeadraceError, PositionError


class NotReady(HeadraceError):
    """There is no model, or no item, to answer with yet."""


class UnknownItem(HeadraceError):
    """An item that was asked about is neither in the catalogue nor known to the model."""


class VersionGap(PositionError):
    """A version goes on from one that this replica does not hold: the newest snapshot has to be loaded."""
