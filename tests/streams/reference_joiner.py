"""The join semantics of docs/architecture.md in dictionaries: one record at a time, everything found by brute force.

Slow and unbounded on purpose; the joiner is held to it.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np

from embedding_store.ids import combine, feature_id, hash_text
from online_model.examples import Counts
from online_model.history import history_hash
from streams.events import SCENARIOS, Click, Forget, Impression, Purchase, Refund, Rejected, Tick, Watch, decode
from tests.online_model.plain_history import plain_state


class ReferenceJoiner:
    def __init__(self, settings) -> None:
        self.s, self.counts, self.rows, self.dead = settings, Counts(), [], []
        self.top = -math.inf  # largest ts; the watermark is L below it
        self.seen, self.held, self.timers, self.windows, self.log = {}, [], [], {}, {}
        self.forgotten = {}
        self.examples = []  # the open ones, in the order of their opening

    @property
    def watermark(self):
        return self.top - self.s.disorder_ms

    def feed(self, record) -> None:
        c, before = self.counts, self.watermark
        try:
            event = decode(record.value)
            if record.timestamp_ms is not None and event.ts > record.timestamp_ms + self.s.future_ms:
                raise Rejected("from_the_future", "")
        except Rejected as error:  # rule 1
            c.events_in, c.rejected = c.events_in + 1, c.rejected + 1
            self.dead.append((record.offset, error.reason))
            return
        if not isinstance(event, Tick):
            k = len(event.items) if isinstance(event, Impression) else 1
            name = str(event.event_id)
            c.events_in += k  # rule 2
            if name in self.seen and before - self.seen[name] <= self.s.open_ms:  # rule 3
                c.duplicates += k
                return
            self.seen[name] = event.ts
            if event.ts < before:  # rules 4 and 8
                c.late += k
                if not isinstance(event, Impression):
                    self.handle(event, before, late=True)
                return
            c.open += k
            self.held.append((event.ts, name, record.offset, event))
        self.top = max(self.top, event.ts)
        if self.watermark > before:
            self.release()

    def release(self) -> None:  # rule 5
        ready = sorted(h[:3] for h in self.held if h[0] < self.watermark)
        events = {h[2]: h[3] for h in self.held}
        self.held = [h for h in self.held if h[0] >= self.watermark]
        for ts, _, offset in ready:
            self.fire(ts)
            if isinstance(events[offset], Impression):
                self.show(events[offset])
            else:
                self.counts.open -= 1
                self.handle(events[offset], ts, late=False)
        self.fire(self.watermark)

    def fire(self, limit) -> None:
        while due := sorted((t for t in self.timers if t[0] < limit), key=lambda t: t[:2]):
            timer = due[0]
            self.timers.remove(timer)
            time, what, x = timer
            if what == "1 wait" and not x["clicked"]:
                self.row(x, 0, time, click=0)
            elif what == "2 watch":
                self.row(x, 2, time, play_ms=x["play"][0], duration_ms=x["play"][1])
                x["watched"] = True
            elif what == "3 purchase wait":
                if x["due"] == time:
                    self.not_bought(x, x["item"], time)
            elif what == "4 end" and x in self.examples:
                self.examples.remove(x)

    def handle(self, event, now, late) -> None:
        user = str(event.user)
        if isinstance(event, Forget):  # rule 9
            self.forget(event, user, now, late)
        elif not late or event.ts > (at := self.forgotten.get(user, -1)) or self.watermark - at > self.s.open_ms:
            self.act(event, now, late)

    def forget(self, event, user, now, late) -> None:
        gone = [x for x in self.examples if x["place"][0] == user]
        unsaid = sum(not x["shown"] for x in gone)
        self.counts.open, self.counts.history_only = self.counts.open - unsaid, self.counts.history_only + unsaid
        self.examples = [x for x in self.examples if x not in gone]
        windows = [w for pair, w in self.windows.items() if pair[0] == user]
        self.windows = {pair: w for pair, w in self.windows.items() if pair[0] != user}
        mine = [id(x) for x in (*gone, *windows)]
        self.timers = [t for t in self.timers if id(t[2]) not in mine]
        self.log.pop(user, None)
        self.forgotten[user] = now
        self.counts.joined += not late
        x = self.example(event, f"forget:{event.event_id}", 0, plain_state([]).tolist(), 0) | {"scenario": 0}
        self.row(x, 5, now)

    def show(self, event) -> None:  # rule 6
        history = self.history(event.user, event.ts)
        if event.feature_hash is not None:
            self.counts.skew_checked += 1
            self.counts.skew_differs += event.feature_hash != history_hash(bytes(history))
        for i, item in enumerate(event.items):
            place = (str(event.user), str(event.request_id), str(item))
            if any(x["place"] == place for x in self.examples):
                self.counts.duplicates, self.counts.open = self.counts.duplicates + 1, self.counts.open - 1
                continue
            x = self.example(event, str(event.request_id), item, history, 0)
            x["place"] = place
            x["position"] = -1 if event.positions is None else max(-1, min(32_767, event.positions[i]))
            x["propensity"] = None if event.propensities is None else event.propensities[i]
            self.examples.append(x)
            self.timers.append((event.ts + self.s.wait_ms, "1 wait", x))
            self.timers.append((event.ts + self.s.open_ms, "4 end", x))

    def act(self, event, now, late) -> None:  # rule 7
        x = self.find(event, self.s.click_window_ms if isinstance(event, Click) else self.s.open_ms)
        pair = (str(event.user), str(event.item))
        window = self.windows.get(pair)
        if window is not None and now > window["ts"] + self.s.purchase_window_ms:
            window = None
        match event:
            case Click():
                joined = self.click(event, x, window, pair, now, late)
            case Watch() if x is not None:
                joined = True
                self.watch(event, x, now)
            case Purchase() if window is not None and window["ts"] <= event.ts:
                joined = True
                if not window["bought"]:
                    window["bought"], window["due"] = True, None
                    self.row(window["x"] | {"item": event.item}, 3, now, purchase=1, delay=event.ts - window["first"])
            case _:
                joined = False
        if not late:
            self.counts.joined += joined
            self.counts.history_only += not joined
        if not isinstance(event, Refund):
            action = (feature_id("item", event.item), event.ts, type(event).__name__.lower())
            self.log.setdefault(str(event.user), []).append(action)

    def find(self, event, within) -> dict | None:
        user, item, request = str(event.user), str(event.item), event.request_id
        near = [x for x in self.examples if x["ts"] <= event.ts <= x["ts"] + within]
        near = [x for x in near if x["place"][0] == user and x["place"][2] == item]
        named = [x for x in near if request is not None and x["place"][1] == str(request)]
        return max(named or near, key=lambda x: (x["ts"], x["event_id"]), default=None)

    def click(self, event, x, window, pair, now, late) -> bool:
        if x is None:
            if late or not self.s.implicit:
                return False
            history = self.history(event.user, event.ts)
            x = self.example(event, f"event:{event.event_id}", event.item, history, 1)
        wait = self.s.purchase_wait_ms
        new = {"ts": event.ts, "first": event.ts, "bought": False, "x": x, "item": event.item, "due": None}
        if not x["clicked"]:
            x["clicked"] = True
            self.row(x, 1 if x["shown"] else 0, now, click=1, purchase=-1 if wait else 0)
            new["due"] = event.ts + wait if wait else None
        if window is not None and window["x"]["name"] == x["name"]:
            window["ts"] = max(window["ts"], event.ts)
            return True
        if window is None or event.ts >= window["ts"]:
            self.windows[pair] = new
            if window is not None:
                self.not_bought(window, event.item, now)
            if new["due"] is not None and new["due"] < now:
                self.not_bought(new, event.item, now)
            elif new["due"] is not None:
                self.timers.append((new["due"], "3 purchase wait", new))
        else:
            self.not_bought(new, event.item, now)
        return True

    def not_bought(self, window, item, now) -> None:
        if window["due"] is not None:
            window["due"] = None
            self.row(window["x"] | {"item": item}, 4, now, purchase=0)

    def watch(self, event, x, now) -> None:
        if "play" not in x:
            due = max(min(event.ts + self.s.watch_wait_ms, x["ts"] + self.s.open_ms), now)
            self.timers.append((due, "2 watch", x))
        if event.play_ms > x.get("play", (-1,))[0] and "watched" not in x:
            x["play"] = (event.play_ms, event.duration_ms)

    def history(self, user, before=math.inf) -> list[int]:
        return plain_state([a for a in self.log.get(str(user), []) if a[1] < before]).tolist()

    def example(self, event, name, item, history, source) -> dict:
        return {
            "name": name, "item": item, "history": history, "source": source, "position": -1, "propensity": None,
            "ts": event.ts, "event_id": str(event.event_id), "user": event.user,
            "scenario": SCENARIOS.index(event.scenario), "clicked": False, "shown": False,
            "query": self.query(event),
        }  # fmt: skip

    @staticmethod
    def query(event) -> tuple[int, ...]:
        """The first four distinct words of the context's query."""
        text = (getattr(event, "context", None) or {}).get("query")
        words: list[str] = []
        for word in re.split(r"\W+", text.casefold()) if isinstance(text, str) else []:
            if word and word not in words:
                words.append(word)
        return tuple([feature_id("word", word) for word in words[:4]] + [0] * (4 - len(words[:4])))

    def row(self, x, part, closed, click=-1, purchase=-1, play_ms=-1, duration_ms=-1, delay=-1) -> None:
        if part == 0:
            x["shown"] = True
            if x["source"] == 0:
                self.counts.open, self.counts.joined = self.counts.open - 1, self.counts.joined + 1
        forget = part == 5
        thing = feature_id("user", x["user"]) if forget else feature_id("item", x["item"])
        example = combine(hash_text(x["name"]), thing)
        id_ = combine(example, part)
        if click == 0 and id_ % 2**64 % self.s.unclicked_of:
            return
        self.counts.rows += 1
        self.rows.append((
            id_, example, part, x["source"], x["ts"], closed,
            feature_id("user", x["user"]), 0 if forget else thing, x["scenario"], x["position"],
            x["propensity"], float(np.float32(1 / self.s.unclicked_of)) if click == 0 else 1.0,
            click, purchase, play_ms, duration_ms, delay, x["query"], tuple(x["history"]),
            "null" if forget else json.dumps(x["item"], ensure_ascii=False),
        ))  # fmt: skip
