"""What can be set about a replica. Free of torch, so that commands can read their settings at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from embedding_store.secret import Secret


class Scoring(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How the tasks make one score: click · (click_p + watch · watch_p + purchase · purchase_p · price^price_power),
    watch_p and purchase_p given a click; an item without a price counts as one of price 1."""

    click: Annotated[float, Meta(ge=0)] = 1.0
    watch: Annotated[float, Meta(ge=0)] = 0.5
    purchase: Annotated[float, Meta(ge=0)] = 2.0
    price_power: Annotated[
        float, Meta(ge=0, le=1, description="1: what a purchase brings counts, 0: that there is one")
    ] = 0.0


class Reranking(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a page may look like, as far as there are candidates for it."""

    category_gap: Annotated[
        int, Meta(ge=0, le=100, description="so many other items between two of one category; 0: any")
    ] = 0
    seller_cap: Annotated[int, Meta(ge=0, le=100, description="items of one seller on a page; 0: any")] = 0


class Exploration(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which items get a place that are not the best; each place says its propensity."""

    policy: Literal["epsilon", "softmax", "thompson"] = "epsilon"
    epsilon: Annotated[float, Meta(ge=0, le=1, description="of the places go to a candidate drawn uniformly")] = 0.1
    temperature: Annotated[float, Meta(gt=0, description="of softmax, over the logarithm of the score")] = 0.2
    doubt: Annotated[
        float, Meta(gt=0, description="of thompson: standard deviation of a head's logit for an item that is new")
    ] = 0.5
    seed: Annotated[int, Meta(ge=0)] | None = None  # of the draws; none: another one in each process


class Policy(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """From scores to a page. It may be changed while the replica runs: SIGHUP reads the settings again."""

    live: Scoring = Scoring()
    video: Scoring = Scoring()
    search: Scoring = Scoring()
    shelf: Scoring = Scoring()
    reranking: Reranking = Reranking()
    exploration: Exploration = Exploration()


class Arm(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A part of the users, by a hash of (name of the experiment, user); what is not said is as in [serve.policy]."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    share: Annotated[float, Meta(ge=0, le=1)]
    scoring: Scoring | None = None  # of all scenarios
    reranking: Reranking | None = None
    exploration: Exploration | None = None


class Limits(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a replica takes on. Past it requests are refused, with a Retry-After where that helps (429, 503)."""

    waiting: Annotated[int, Meta(ge=1, description="requests that wait for their turn; more are refused (429)")] = 64
    deadline_ms: Annotated[
        int, Meta(ge=1, description="after the request's end; an answer that would take longer is cut short: degraded")
    ] = 250
    give_up_ms: Annotated[int, Meta(ge=1, description="a request that waited so long is refused (503)")] = 1_000
    body_ms: Annotated[int, Meta(ge=1, description="a body that is not there by then is refused (408)")] = 5_000


class ReplicaSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How candidates are found, scored and explored."""

    nearest: Annotated[int, Meta(ge=1, le=10_000)] = 80  # candidates whose vector matches the user's best
    # Items that are scanned; past that they are indexed. A scan of 30,000 at dim 32 takes 2 ms (an AMD EPYC core).
    exact_up_to: Annotated[int, Meta(ge=0)] = 30_000
    rebuild_s: Annotated[float, Meta(gt=0)] = 60.0  # between two rebuilds of the index: versions move all vectors
    probe_every: Annotated[int, Meta(ge=1)] = 1_000  # of so many requests one scans all items too, for the recall
    least_recall: Annotated[float, Meta(ge=0, le=1)] = 0.9  # of the index; below it, it is rebuilt at once …
    exact_below_recall: Annotated[float, Meta(ge=0, le=1)] = 0.7  # … and here all items are scanned until it is
    neighbours: Annotated[int, Meta(ge=0, le=1000)] = 40  # that are clicked after the user's last items
    newest: Annotated[int, Meta(ge=0, le=1000)] = 20
    popular: Annotated[int, Meta(ge=0, le=1000)] = 20
    max_age_ms: Annotated[int, Meta(ge=1)] = 60_000  # without a new version for so long, `/readyz` says no
    rows: Annotated[
        Literal["fp32", "fp16", "int8"], Meta(description="of embeddings in memory: 4, 2 or 1 byte a number")
    ] = "fp32"
    log_impressions: Annotated[
        bool, Meta(description="what was recommended goes into the topic of events as an impression")
    ] = True
    experiment: Annotated[
        str, Meta(max_length=64, description="name of the experiment: users are dealt out anew with it")
    ] = ""
    arms: list[Arm] = []  # shares of users; who is in none gets [serve.policy]
    warm_up: Annotated[
        int, Meta(ge=0, description="requests of late that are answered before /readyz says yes; 0: none")
    ] = 50
    policy: Policy = Policy()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        total = sum(arm.share for arm in self.arms)
        if total > 1 + 1e-9:
            raise ValueError(f"the shares of the arms are {total:g} together, more than 1")
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"two arms have one name: {', '.join(names)}")


class HttpSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Who may ask a replica, and /metrics of all workers; the section [http]. access.py makes it hold."""

    host: Annotated[
        str, Meta(description="a replica listens here: a name or an address; beyond the loopback only with tokens")
    ] = "127.0.0.1"
    admin_host: Annotated[str, Meta(description="/metrics and what else is not scoring: the same")] = "127.0.0.1"
    tokens_file: Annotated[
        Path | None, Meta(description="a line each: TOKEN [EXPIRES] [score,admin]; read again when it changes")
    ] = None
    token: Annotated[
        Secret | None, Meta(description="one for all routes; from the environment: HEADRACE_HTTP_TOKEN")
    ] = None
    open_scoring: Annotated[
        bool, Meta(description="on the loopback scoring asks for no token, though there are some")
    ] = False
    tls_cert: Annotated[Path | None, Meta(description="PEM, with what is between it and the root")] = None
    tls_key: Annotated[Path | None, Meta(description="PEM, without a passphrase")] = None
    connections: Annotated[int, Meta(ge=1, description="of each listener at once; more are refused (503)")] = 2_000
