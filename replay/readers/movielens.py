"""MovieLens ratings (Harper and Konstan 2015): u.data, ratings.csv, ratings.dat, and RecBole's .inter files.

A rating is explicit feedback on something that was already chosen, so neither "the user clicked" nor "the user was
not interested" is in the log. What it can teach is which of the films that somebody rates they like. So, as KuaiRand
tells a view with its click, a rating is an impression of the film at the time of the rating, and a click 1 ms later if
it is 4 or more (the usual threshold of a like: 55 % of MovieLens 100K). The click rate is then the share of likes, and
the AUC of test-then-train says how well liked films are ranked above other rated ones, before their ratings are known.
It says nothing about which films somebody would come to rate. Ratings of one second are one request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from replay.readers.base import Layout, Record, TableReader, shown
from replay.readers.values import millis, number, whole

LIKE_FROM = 4.0
MOST = 5.0


class MovieLens(TableReader):
    name = "movielens"
    about = "MovieLens ratings: each is an impression of the film, and a click if it is 4 or more"
    has_impressions = True
    columns = ("user_id", "item_id", "rating", "timestamp")
    layouts = (
        Layout(columns, delimiters=("\t", "::")),  # u.data, ratings.dat; with names, as user_id:token, .inter
        Layout(("userId", "movieId", "rating", "timestamp"), delimiters=(",", "\t"), header=True),
    )

    def convert(self, row: Sequence[str], number_: int) -> Iterable[Record]:
        user, film, rating, seconds = row
        ts, stars = millis(seconds, "s"), number(rating, "rating", 0.0, MOST)
        rater, item, key = whole(user, "id"), whole(film, "id"), self.row_key(row)
        return shown(key, ts, rater, item, f"movielens-{user}-{ts}", stars >= LIKE_FROM)
