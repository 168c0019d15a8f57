"""Other online learners: river's logistic regression, factorization machine and biased matrix factorization; Vowpal
Wabbit. They learn example by example, each positive with its negatives behind it.

river's models make a random vector for whatever they are asked to predict, so that predicting would change what is
learned later: where that is so, predictions are made here from the model's own weights, and an unknown id is a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import numpy as np
from river import facto, linear_model, optim, reco
from vowpalwabbit import Workspace

from online_model.batch import Candidates
from online_model.catalogue import CatalogueItem
from replay.comparison.sparse import Fields, hashed
from replay.comparison.stream import Batch

Lesson: TypeAlias = tuple[dict[int, float], bool]  # river's: feature → 1, and whether it was clicked


class RiverLogistic:
    """`river.linear_model.LogisticRegression` over plain and crossed features, AdaGrad."""

    probabilistic = True
    RATE = 0.1

    def __init__(self) -> None:
        self._fields = Fields()
        self._model = linear_model.LogisticRegression(optim.AdaGrad(self.RATE), intercept_lr=0.02)

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        self._fields.catalogue(items)

    def score(self, candidates: Candidates) -> np.ndarray:
        predict = self._model.predict_proba_one
        rows = hashed(self._fields.of(candidates), crossed=True)
        return np.array([predict(dict.fromkeys(row, 1.0))[True] for row in rows])

    def learn(self, batch: Batch) -> None:
        self.learn_ready(self.ready(batch))

    def ready(self, batch: Batch) -> list[Lesson]:
        """The lessons of a batch, by what was known before it; its clicks are known from now on."""
        return _lessons(self._fields, batch, crossed=True)

    def learn_ready(self, lessons: Sequence[Lesson]) -> None:
        """One by one."""
        learn = self._model.learn_one
        for row, clicked in lessons:
            learn(row, clicked)


class _Fm(facto.FMClassifier):
    """river's, with the sums over factors and pairs of features done by numpy: the same model, four times as fast.

    Of features whose value is 1, and without penalties.
    """

    def _calculate_interactions(self, x: dict) -> float:
        vectors = np.array([self.latents[j] for j in x])
        total = vectors.sum(0)
        return float(total @ total - (vectors * vectors).sum()) / 2

    def _update_latents(self, x: dict, g_loss: float) -> None:
        latents = [self.latents[j] for j in x]
        vectors = np.array(latents)
        step = (self.latent_optimizer.learning_rate * g_loss) * (vectors.sum(0) - vectors)
        for vector, change in zip(latents, step, strict=True):
            vector -= change
        self.latent_optimizer.n_iterations += len(x)


class RiverFm:
    """`river.facto.FMClassifier` over the plain features: it makes the crosses."""

    probabilistic = True
    FACTORS, RATE, SIGMA = 8, 0.03, 0.05

    def __init__(self, seed: int) -> None:
        self._fields = Fields()
        self._model = _Fm(
            n_factors=self.FACTORS, weight_optimizer=optim.AdaGrad(0.1), latent_optimizer=optim.SGD(self.RATE),
            intercept_lr=0.02, latent_initializer=optim.initializers.Normal(sigma=self.SIGMA, seed=seed), seed=seed,
        )  # fmt: skip

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        self._fields.catalogue(items)

    def score(self, candidates: Candidates) -> np.ndarray:
        rows = hashed(self._fields.of(candidates), crossed=False)
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        features, at = np.unique(np.concatenate(rows), return_inverse=True) if rows else (np.empty(0, np.int64),) * 2
        weights, latents, zero = self._model.weights, self._model.latents, np.zeros(self.FACTORS)
        names = features.tolist()
        linear = np.array([weights.get(j, 0.0) for j in names])[at]
        vectors = np.array([latents.get(j, zero) for j in names]).reshape(-1, self.FACTORS)[at]
        pairs = np.add.reduceat(vectors, starts) ** 2 - np.add.reduceat(vectors**2, starts)
        return _sigmoid(self._model.intercept + np.add.reduceat(linear, starts) + pairs.sum(1) / 2)

    def learn(self, batch: Batch) -> None:
        self.learn_ready(self.ready(batch))

    def ready(self, batch: Batch) -> list[Lesson]:
        """As RiverLogistic's, without crosses."""
        return _lessons(self._fields, batch, crossed=False)

    def learn_ready(self, lessons: Sequence[Lesson]) -> None:
        """One by one."""
        learn = self._model.learn_one
        for row, clicked in lessons:
            learn(row, clicked)


class RiverBiasedMf:
    """`river.reco.BiasedMF`: users and items, and nothing else. It regresses on the label: no probability."""

    probabilistic = False
    FACTORS, RATE = 10, 0.05

    def __init__(self, seed: int) -> None:
        self._model = reco.BiasedMF(
            n_factors=self.FACTORS, bias_optimizer=optim.SGD(self.RATE), latent_optimizer=optim.SGD(self.RATE),
            latent_initializer=optim.initializers.Normal(sigma=0.1, seed=seed), seed=seed,
        )  # fmt: skip

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        """Nothing of it is used."""

    def score(self, candidates: Candidates) -> np.ndarray:
        model, c = self._model, candidates
        user_bias, user = self._read(c.user, model.u_biases, model.u_latents)
        items, at = np.unique(c.item, return_inverse=True)
        item_bias, item = self._read(items, model.i_biases, model.i_latents)
        match = (user[c.ctx] * item[at]).sum(1)
        return model.global_mean.get() + user_bias[c.ctx] + item_bias[at] + match

    def learn(self, batch: Batch) -> None:
        c, learn = batch.lessons.candidates, self._model.learn_one
        for user, item, label in zip(
            c.user[c.ctx].tolist(), c.item.tolist(), batch.lessons.label.tolist(), strict=True
        ):
            learn(user, item, label)

    def _read(self, ids: np.ndarray, biases: dict, latents: dict) -> tuple[np.ndarray, np.ndarray]:
        zero, names = np.zeros(self.FACTORS), ids.tolist()
        return (
            np.array([biases.get(name, 0.0) for name in names]),
            np.array([latents.get(name, zero) for name in names]).reshape(-1, self.FACTORS),
        )


class VowpalWabbit:
    """Vowpal Wabbit, logistic, with the quadratic features of user, item, category and last items."""

    probabilistic = True
    OPTIONS = "--loss_function logistic --link logistic -l 0.3 -b 22 --quiet --no_stdin"
    PAIRS = ("ui", "uc", "ue", "uo", "il", "is", "io", "iq", "cm", "cq")  # of namespaces
    SPACES: ClassVar[dict[str, tuple[str, ...]]] = {  # namespace → fields
        "u": ("user",), "i": ("item",), "c": ("category",), "e": ("seller",), "s": ("scenario",), "q": ("query",),
        "l": ("last0", "last1", "last2"),
        "m": ("last_category",), "o": ("hour", "position", "clicks", "repeats"),
    }  # fmt: skip

    def __init__(self, seed: int) -> None:
        self._fields = Fields()
        pairs = " ".join(f"-q {pair}" for pair in self.PAIRS)
        self._model = Workspace(f"{self.OPTIONS} {pairs} --random_seed {seed}")

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        self._fields.catalogue(items)

    def score(self, candidates: Candidates) -> np.ndarray:
        predict = self._model.predict
        return np.array([predict(line) for line in self._lines(candidates)], np.float64)

    def learn(self, batch: Batch) -> None:
        self.learn_ready(self.ready(batch))

    def ready(self, batch: Batch) -> list[str]:
        """The lessons of a batch as text, by what was known before it; its clicks are known from now on."""
        lines = zip(self._lines(batch.lessons.candidates), batch.lessons.label.tolist(), strict=True)
        lessons = [f"1{line}" if clicked else f"-1{line}" for line, clicked in lines]
        self._fields.learn(batch)
        return lessons

    def learn_ready(self, lessons: Sequence[str]) -> None:
        """One by one."""
        learn = self._model.learn
        for line in lessons:
            learn(line)

    def _lines(self, candidates: Candidates) -> list[str]:
        """Vowpal Wabbit's text, without a label."""
        fields = self._fields.of(candidates)
        plain = [[str(value) for value in column.view(np.uint64).tolist()] for column in fields.values()]
        form = "".join(
            f" |{space}" + "".join(f" {place}_%s" for place, field in enumerate(names))
            for space, names in self.SPACES.items()
        )
        order = [list(fields).index(field) for names in self.SPACES.values() for field in names]
        return [form % values for values in zip(*(plain[place] for place in order), strict=True)]


def _lessons(fields: Fields, batch: Batch, crossed: bool) -> list[Lesson]:
    """What river's models learn of a batch; then `fields` learn it."""
    rows = hashed(fields.of(batch.lessons.candidates), crossed)
    lessons = [
        (dict.fromkeys(row, 1.0), label == 1) for row, label in zip(rows, batch.lessons.label.tolist(), strict=True)
    ]
    fields.learn(batch)
    return lessons


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
