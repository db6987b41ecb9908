"""The methods by name, and how one is built from a config.

What is trained is a module with `versions` (missing versions of a sample that it trains on), `losses(features, masks,
targets)` returning its `Losses`, `forward` returning the scalar to minimise and the parts of the loss, and `network`,
the part that is evaluated and exported. A network has `predict(features, masks)` returning logits and joint
representations. A network that can be a teacher has `represent(features, masks)`, and its student's `losses` and
`forward` take what that returned as a fourth argument.
"""

from __future__ import annotations

import torch

from fastmmkd.config import Config, CorrkdConfig, HrlfConfig, UmdfConfig
from fastmmkd.methods.corrkd import CorrKD, CorrkdNetwork
from fastmmkd.methods.hrlf import HRLF, HrlfNetwork
from fastmmkd.methods.umdf import UMDF

Network = UMDF | CorrkdNetwork | HrlfNetwork
Teacher = CorrkdNetwork | HrlfNetwork
Trainable = Network | CorrKD | HRLF


def build_network(config: Config, feature_dims: tuple[int, ...], seed: int) -> Network:
    """A freshly initialised network; its weights depend on the seed alone.

    Args:
        config: the run.
        feature_dims: d_m of language, audio, visual, from the data file.
        seed: of the initialisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _network(config, feature_dims)


def build_teacher(config: Config, feature_dims: tuple[int, ...], seed: int) -> Teacher:
    """The same, of a method that has a teacher."""
    network = build_network(config, feature_dims, seed)
    if isinstance(network, UMDF):
        raise TypeError(f"{config.method} has no teacher")
    return network


def build_student(config: Config, feature_dims: tuple[int, ...], seed: int) -> CorrKD | HRLF:
    """A freshly initialised student with its distillation losses; the same network as `build_network` makes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(config, feature_dims)
        if isinstance(config, CorrkdConfig) and isinstance(network, CorrkdNetwork):
            return CorrKD(network, config.loss)
        if isinstance(config, HrlfConfig) and isinstance(network, HrlfNetwork):
            return HRLF(network, config.loss, config.model.width)
    raise TypeError(f"{config.method} has no teacher")


def _network(config: Config, feature_dims: tuple[int, ...]) -> Network:
    if isinstance(config, UmdfConfig):
        return UMDF(config.model, config.loss, config.task, feature_dims)
    if isinstance(config, CorrkdConfig):
        return CorrkdNetwork(config.model, config.task, feature_dims)
    if isinstance(config, HrlfConfig):
        return HrlfNetwork(config.model, config.loss, config.task, feature_dims)
    raise TypeError(f"no method of a {type(config).__name__}")
