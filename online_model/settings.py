"""What can be set about the model. Free of torch, so that commands can read their settings at once."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from embedding_store.encoding import Encoding
from embedding_store.specs import Optimizer, RowRules
from online_model.guard_settings import GuardSettings

Feedback = Literal["none", "calibrated", "weighted", "elapsed"]  # see feedback.py


class FeatureSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Sizes and optimizer of the tables. Capacities are rows in memory; more live in the store."""

    dim: Annotated[int, Meta(ge=4, le=1024, multiple_of=4)] = 32
    users: Annotated[int, Meta(ge=1, le=1 << 30)] = 1 << 18
    items: Annotated[int, Meta(ge=1, le=1 << 30)] = 1 << 18
    categories: Annotated[int, Meta(ge=1, le=1 << 30)] = 1 << 14
    sellers: Annotated[int, Meta(ge=1, le=1 << 30)] = 1 << 14
    words: Annotated[int, Meta(ge=1, le=1 << 30)] = 1 << 16  # of titles and queries
    learning_rate: Annotated[float, Meta(gt=0)] = 0.4  # of items; the other tables' are parts of it (RATE_SHARE)
    eps: Annotated[float, Meta(gt=0)] = 1.0  # a row's first steps are then as small as their gradients, not full ones
    optimizer: Optimizer = "row_wise_adagrad"  # of the tables; it decides what else a row holds in the store
    user_rules: RowRules = RowRules()
    item_rules: RowRules = RowRules()
    category_rules: RowRules = RowRules()
    seller_rules: RowRules = RowRules()
    word_rules: RowRules = RowRules()

    def __post_init__(self) -> None:
        if self.item_rules.expire_after_ms:
            raise ValueError("items do not expire, their rows hold what the catalogue says: leave expire_after_ms at 0")


WIDTHS = {"small": (256, 256, 128), "base": (832, 640, 320)}


class RankerSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Size and parts of the ranker (ranker.py). Each part can be left out; attention, gates and experts are, as they
    bring nothing on the logs they were measured on (`make figures ONLY=ablation`)."""

    size: Annotated[
        Literal["small", "base"], Meta(description="small: dense layers of 256, 256, 128; base: a million weights")
    ] = "small"
    hidden: Annotated[int, Meta(ge=0, le=4096)] = 0  # widths of the three layers; 0: as `size` says
    second: Annotated[int, Meta(ge=0, le=4096)] = 0
    third: Annotated[int, Meta(ge=0, le=4096)] = 0
    attention: bool = False  # of the candidate over the history
    gates: bool = False  # of scenario, moment and user on the first layer
    experts: Annotated[int, Meta(ge=1, le=16)] = 1  # third layers that the tasks mix; 1: one for all
    entire_space: bool = True  # purchases are learned from all impressions (ESMM), not from clicks alone
    watch_quantiles: bool = True  # watch time is learned as its quantile among plays of a like duration (D2Q)
    matches: bool = True  # what candidate and history have in common, counted
    neighbours: bool = True  # what is clicked after the history's items
    seed: Annotated[int, Meta(ge=0)] = 0

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the three layers."""
        own = (self.hidden, self.second, self.third)
        first, second, third = (width or default for width, default in zip(own, WIDTHS[self.size], strict=True))
        return first, second, third


class TrainerSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How the model learns. A change raises the epoch at the next start."""

    batch_size: Annotated[
        int, Meta(ge=1, le=1 << 16, description="rows a step at most: the next one knows what this one has learned")
    ] = 128
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-3  # of the ranker (Adam)
    wide_rate: Annotated[float, Meta(gt=0)] = 2e-2  # of its wide part
    retrieval: Annotated[float, Meta(ge=0, description="weight of the two towers' loss; 0: not learned")] = 1.0
    clip: Annotated[
        float, Meta(ge=0, description="largest norm of the ranker's gradient; the tables' shrink with it; 0: any")
    ] = 10.0
    exploding: Annotated[
        float, Meta(ge=0, description="a batch whose loss is so many times the usual one is left out; 0: none")
    ] = 20.0
    bf16: bool = False  # the dense layers compute in bfloat16
    negatives: Annotated[int, Meta(ge=1, le=100)] = 4  # for each positive of a log without impressions
    recent_items: Annotated[int, Meta(ge=2, le=1 << 22)] = 1 << 14  # that negatives are drawn from
    window: Annotated[int, Meta(ge=1, le=1 << 20)] = 20_000  # scores in the recent figures, and whose label may change
    ranked_of: Annotated[
        int, Meta(ge=0, description="one of so many positives is ranked among others before it is learned; 0: none")
    ] = 0
    ranked_among: Annotated[int, Meta(ge=1, le=1000, description="active items, drawn, that it is ranked among")] = 100
    seed: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    feedback: Feedback = "calibrated"  # how purchases that come late are learned
    purchase_wait_ms: Annotated[int, Meta(ge=0)] = 0  # that of [join]: set it there
    sampling_correction: Literal["loss", "logit"] = "loss"  # of unclicked impressions of which a part is kept
    encoding: Annotated[
        Encoding, Meta(description="of rows in versions: fp16, int8 are smaller and a little off; snapshots are fp32")
    ] = "fp32"
    row_bytes_per_s: Annotated[
        int, Meta(ge=0, description="of rows in versions: what moved most goes first, the rest later; 0: all at once")
    ] = 0
    refresh_s: Annotated[
        float, Meta(gt=0, description="once a row has waited so long for row_bytes_per_s, all that wait go")
    ] = 60.0
    features: FeatureSettings = FeatureSettings()
    ranker: RankerSettings = RankerSettings()
    guard: GuardSettings = GuardSettings()

    def __post_init__(self) -> None:
        if self.guard.examples > self.window:
            raise ValueError(f"guard.examples is {self.guard.examples}, of {self.window} scores in window: lower it")
        wait = self.purchase_wait_ms
        if self.feedback == "elapsed" and wait == 0:
            raise ValueError('feedback = "elapsed" needs a join.purchase_wait_ms: set that, or feedback = "calibrated"')
        if self.feedback in ("calibrated", "weighted") and wait > 0:
            raise ValueError(
                f'feedback = "{self.feedback}" needs join.purchase_wait_ms = 0, it is {wait}: set that, or feedback = '
                '"elapsed" ("none" where it is the whole purchase window)'
            )
