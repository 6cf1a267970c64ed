"""Probes: what can be read from features, on episodes that the probe has not seen.

Frames of one episode are alike, so a probe that is tested on other frames of the episodes it was
trained on would tell them apart by anything at all. Every split is by episode.
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
    """A probe's score on held-out episodes: the mean over splits, and their spread."""

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
    """How often the class of held-out episodes is read from the features.

    Args:
        features: ``[N, F]``.
        labels: The class of each row ``[N]``.
        episodes: The episode of each row ``[N]``.
        seeds: Each splits the episodes into 4 folds anew; every fold is held out once.
        probes: ``linear`` (ridge), ``neighbours`` (5 nearest), ``mlp`` (one layer of 64).

    Returns:
        The accuracy of each probe; ``chance``, that of always naming the most frequent class of the
        training episodes; and ``shuffled``, that of the linear probe when the training episodes
        have swapped their classes, which is what chance comes to with so few episodes.

    Raises:
        ValueError: If there is only one class, or a class has fewer episodes than there are folds.
    """
    classes = {int(label): set(episodes[labels == label]) for label in np.unique(labels)}
    if len(classes) < 2:
        raise ValueError(f"a probe for classes needs two or more, got {sorted(classes)}.")
    if (fewest := min(map(len, classes.values()))) < FOLDS:
        raise ValueError(f"each class needs {FOLDS} episodes or more, one has {fewest}.")
    scores: dict[str, list[float]] = {name: [] for name in (*probes, "chance", "shuffled")}
    for seed in seeds:
        splits = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        for train, test in splits.split(features, labels, episodes):
            swapped = _swap(labels[train], episodes[train], seed)
            for name, taught in (
                *((name, labels[train]) for name in probes),
                ("chance", labels[train]),
                ("shuffled", swapped),
            ):
                with warnings.catch_warnings():
                    # The network's budget is fixed; that it would go on is no news.
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    model = _CLASSIFIERS[name](seed).fit(features[train], taught)
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
    """How well values of held-out episodes are read from the features by a ridge regression.

    Args:
        features: ``[N, F]``.
        values: ``[N, K]``. Columns that are constant are left out.
        episodes: The episode of each row ``[N]``.
        seeds: Each splits the episodes into 4 folds anew.

    Returns:
        ``linear``, the coefficient of determination R2 of the held-out predictions of all folds, a
        mean over the columns (1 is all of it; 0 is no better than the mean, and a probe that is
        misled is below), and ``chance``, that of the training episodes' mean.

    Raises:
        ValueError: If every column is constant.
    """
    values = values[:, values.std(0) > 1e-9]
    if not values.shape[1]:
        raise ValueError("a probe for values needs some that vary.")
    scores: dict[str, list[float]] = {"linear": [], "chance": []}
    for seed in seeds:
        found = {name: np.zeros_like(values) for name in scores}
        for train, test in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(
            features, values, episodes
        ):
            # The penalty is chosen by episodes as well: by frames it would come out too small.
            inner = list(
                GroupKFold(FOLDS - 1, shuffle=True, random_state=seed).split(
                    features[train], groups=episodes[train]
                )
            )
            ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 4, 4), cv=inner))
            for name, model in (("linear", ridge), ("chance", DummyRegressor())):
                model.fit(features[train], values[train])
                found[name][test] = model.predict(features[test]).reshape(values[test].shape)
        # Over all episodes at once: those of one fold may be much alike.
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
    taught: npt.NDArray[Any] = swapped[np.searchsorted(names, episodes)]
    return taught


def _summary(values: list[float]) -> Score:
    return Score(float(np.mean(values)), float(np.std(values)))
