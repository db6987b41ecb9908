"""The methods by name, and how one is built from a config.

A method is a module with `versions` (missing versions of a sample that it trains on), `forward(features, masks,
targets)` returning the loss and its parts, and `predict(features, masks)` returning logits and joint representations.
"""

from __future__ import annotations

import torch

from fastmmkd.config import Config
from fastmmkd.methods.umdf import UMDF


def build_method(config: Config, feature_dims: tuple[int, ...], seed: int) -> UMDF:
    """A freshly initialised method; its weights depend on the seed alone.

    Args:
        config: the run.
        feature_dims: d_m of language, audio, visual, from the data file.
        seed: of the initialisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMDF(config.model, config.loss, config.task, feature_dims)
