"""The cards by slot hold what a dictionary of cards would, whatever comes and goes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from online_model.features import CATEGORY, ITEM, SELLER
from online_model.serving.catalogue import NO_PRICE, Card, Catalogue
from tests.online_model.serving.world import ids

items = st.integers(0, 30)
card = st.builds(
    Card,
    item=items,
    stock=st.none() | st.integers(-1, 2),
    created=st.none() | st.integers(0, 5),
    category=st.sampled_from([None, 1, "1", 2, "two"]),
    seller=st.sampled_from([None, "a", "b"]),
    price=st.none() | st.sampled_from([0.0, 1.5, 1e12]),
    regions=st.none() | st.lists(st.sampled_from("nesw"), max_size=4),
)
change = st.tuples(st.lists(card, max_size=8), st.lists(items, max_size=4))


@given(st.lists(change, max_size=12))
@settings(deadline=None)
def test_it_is_a_dictionary_of_cards(changes):
    catalogue, plain = Catalogue(2), dict[int, Card]()  # it has to grow
    for put, gone in changes:
        catalogue.remove(ids(ITEM, gone))
        catalogue.put({int(ids(ITEM, [one.item])[0]): one for one in put})
        plain = {item: one for item, one in plain.items() if item not in gone} | {one.item: one for one in put}
        slots = catalogue.find(ids(ITEM, range(31)))
        assert set(np.flatnonzero(slots)) == plain.keys()
        assert len(catalogue) == len(plain) == catalogue.listed.sum()
        for item, one in plain.items():
            at = slots[item : item + 1]
            assert catalogue.raw[at[0]] == item
            assert catalogue.available[at[0]] == (one.stock is None or one.stock > 0)
            assert catalogue.created[at[0]] == (one.created or 0)
            assert catalogue.price[at[0]] == np.float32(NO_PRICE if one.price is None else one.price)
            of = [(catalogue.categories, CATEGORY, one.category), (catalogue.sellers, SELLER, one.seller)]
            for (group, feature, raw), codes in zip(of, (catalogue.category, catalogue.seller), strict=True):
                assert group.ids(codes[at])[0] == (0 if raw is None else ids(feature, [raw])[0])
                assert group.among(["1", "a", "never"])[codes[at[0]]] == (str(raw) in "1a")
            for region in "nx":
                sold = catalogue.places.sold_in(region)[catalogue.regions[at[0]]]
                assert sold == (not one.regions or region in one.regions)
        for name in ("listed", "available", "category", "seller", "regions"):
            assert not getattr(catalogue, name)[0], "no card is in no group"
        assert catalogue.price[0] == NO_PRICE
