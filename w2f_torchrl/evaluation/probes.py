"""Probes of the information in features, tested on episodes that the probe has not seen.

Frames of an episode resemble each other, so a probe tested on other frames of its training episodes
could recognise the episode by any detail. Every split is therefore by episode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifier, RidgeCV
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Array = npt.NDArray[np.float64]

FOLDS = 4
PROBES = ("linear", "neighbours", "mlp")


class Score(NamedTuple):
    """A probe's score on held-out episodes: mean and spread over splits."""

    mean: float
    std: float


def probe_class(
    features: Array,
    labels: npt.NDArray[np.int64],
    episodes: npt.NDArray[np.int64],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    probes: Sequence[str] = PROBES,
) -> dict[str, Score]:
    """Return how often the class of held-out episodes is predicted from the features.

    Args:
        features: ``[N, F]``.
        labels: The class of each row ``[N]``.
        episodes: The episode of each row ``[N]``.
        seeds: Each makes another split into 4 folds; every fold is held out once.
        probes: ``linear`` (ridge), ``neighbours`` (5 nearest), ``mlp`` (one layer of 64).

    Returns:
        The accuracy of each probe; ``chance``, the accuracy of always predicting the most frequent
        class of the training episodes; and ``shuffled``, that of the linear probe after the
        training episodes have swapped their classes, the level of chance with so few episodes.

    Raises:
        ValueError: If there is only one class, or a class has fewer episodes than folds.
    """
    classes = {int(label): set(episodes[labels == label]) for label in np.unique(labels)}
    if len(classes) < 2:
        raise ValueError(f"a probe for classes needs at least two, got {sorted(classes)}.")
    if (fewest := min(map(len, classes.values()))) < FOLDS:
        raise ValueError(f"each class needs at least {FOLDS} episodes, one has {fewest}.")
    scores: dict[str, list[float]] = {name: [] for name in (*probes, "chance", "shuffled")}
    for seed in seeds:
        splits = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        for train, test in splits.split(features, labels, episodes):
            swapped = _swap(labels[train], episodes[train], seed)
            for name, labels_used in (
                *((name, labels[train]) for name in probes),
                ("chance", labels[train]),
                ("shuffled", swapped),
            ):
                with warnings.catch_warnings():
                    # The network's budget is fixed, so its convergence warnings are ignored.
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model = _CLASSIFIERS[name](seed).fit(features[train], labels_used)
                found = model.predict(features[test])
                scores[name].append(float(accuracy_score(labels[test], found)))
    return {name: _summary(values) for name, values in scores.items()}


def probe_values(
    features: Array,
    values: Array,
    episodes: npt.NDArray[np.int64],
    *,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Score]:
    """Return how well a ridge regression predicts values of held-out episodes from the features.

    Args:
        features: ``[N, F]``.
        values: ``[N, K]``. Constant columns are skipped.
        episodes: The episode of each row ``[N]``.
        seeds: Each makes another split into 4 folds.

    Returns:
        ``linear``, the coefficient of determination R2 of the held-out predictions of all folds,
        averaged over columns (1 is perfect, 0 no better than the mean, below 0 misled), and
        ``chance``, that of predicting the training episodes' mean.

    Raises:
        ValueError: If every column is constant.
    """
    values = values[:, values.std(0) > 1e-9]
    if not values.shape[1]:
        raise ValueError("a probe for values needs at least one column that varies.")
    scores: dict[str, list[float]] = {"linear": [], "chance": []}
    for seed in seeds:
        found = {name: np.zeros_like(values) for name in scores}
        for train, test in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(
            features, values, episodes
        ):
            # The penalty is also chosen by episodes; chosen by frames, it would be too small.
            inner = list(
                GroupKFold(FOLDS - 1, shuffle=True, random_state=seed).split(
                    features[train], groups=episodes[train]
                )
            )
            ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 4, 4), cv=inner))
            for name, model in (("linear", ridge), ("chance", DummyRegressor())):
                model.fit(features[train], values[train])
                found[name][test] = model.predict(features[test]).reshape(values[test].shape)
        # Over all episodes at once, since those of a single fold may be very similar.
        for name, predicted in found.items():
            scores[name].append(float(r2_score(values, predicted)))
    return {name: _summary(each) for name, each in scores.items()}


_CLASSIFIERS: dict[str, Callable[[int], BaseEstimator]] = {
    "linear": lambda seed: make_pipeline(StandardScaler(), RidgeClassifier(alpha=10.0)),
    "neighbours": lambda seed: make_pipeline(StandardScaler(), KNeighborsClassifier(5)),
    "mlp": lambda seed: make_pipeline(
        StandardScaler(),
        MLPClassifier(
            (64,), alpha=1e-2, learning_rate_init=1e-2, max_iter=60, tol=1e-3, random_state=seed
        ),
    ),
    "chance": lambda seed: DummyClassifier(strategy="most_frequent"),
    "shuffled": lambda seed: make_pipeline(StandardScaler(), RidgeClassifier(alpha=10.0)),
}


def _swap(labels: npt.NDArray[Any], episodes: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
    """Give each episode the class of another."""
    names, first = np.unique(episodes, return_index=True)
    swapped = np.random.default_rng(seed).permutation(labels[first])
    labels_swapped: npt.NDArray[Any] = swapped[np.searchsorted(names, episodes)]
    return labels_swapped


def _summary(values: list[float]) -> Score:
    return Score(float(np.mean(values)), float(np.std(values)))
