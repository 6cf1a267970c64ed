"""Measure how well a model filters: what its latents contain of the agent and of the scenery.

The probes need scikit-learn: ``pip install "w2f_torchrl[analysis]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.evaluation.divergence import latent_divergence
    from w2f_torchrl.evaluation.episodes import (
        Episode,
        record_episodes,
        replace_backgrounds,
        replay_in,
    )
    from w2f_torchrl.evaluation.filtering import flat_metrics, measure_filtering
    from w2f_torchrl.evaluation.probes import Score, probe_class, probe_values
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "divergence": ("latent_divergence",),
            "episodes": ("Episode", "record_episodes", "replace_backgrounds", "replay_in"),
            "filtering": ("flat_metrics", "measure_filtering"),
            "probes": ("Score", "probe_class", "probe_values"),
        },
    )

__all__ = [
    "Episode",
    "Score",
    "flat_metrics",
    "latent_divergence",
    "measure_filtering",
    "probe_class",
    "probe_values",
    "record_episodes",
    "replace_backgrounds",
    "replay_in",
]
