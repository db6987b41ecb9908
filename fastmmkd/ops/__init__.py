"""Public differentiable operations. Models call these and never know which implementation runs.

An operation is a file of this folder that has an `OP`, see `fastmmkd.ops.operation`; all of them are here under their
names. Those that are imported by name are the ones that a type checker sees here too.
"""

from importlib import import_module
from pkgutil import iter_modules

from fastmmkd.ops.cross_attention import cross_attention
from fastmmkd.ops.crossmodal_layer import crossmodal_layer
from fastmmkd.ops.dispatch import explain
from fastmmkd.ops.encoder_layer import encoder_layer
from fastmmkd.ops.gaussian_mmd import gaussian_mmd
from fastmmkd.ops.grouped_linear import grouped_linear
from fastmmkd.ops.js_divergence import js_divergence
from fastmmkd.ops.jsd_mutual_information import jsd_mutual_information
from fastmmkd.ops.missing_draw import missing_draw
from fastmmkd.ops.operation import OPERATIONS, in_order, operation
from fastmmkd.ops.pairwise_contrastive import pairwise_contrastive
from fastmmkd.ops.prototype_similarity import prototype_similarity
from fastmmkd.ops.providers import PROVIDERS, use_provider
from fastmmkd.ops.residual_layer_norm import residual_layer_norm
from fastmmkd.ops.temporal_convolution import temporal_convolution

__all__ = [
    "OPERATIONS",
    "PROVIDERS",
    "cross_attention",
    "crossmodal_layer",
    "encoder_layer",
    "explain",
    "gaussian_mmd",
    "grouped_linear",
    "js_divergence",
    "jsd_mutual_information",
    "missing_draw",
    "operation",
    "pairwise_contrastive",
    "prototype_similarity",
    "residual_layer_norm",
    "temporal_convolution",
    "use_provider",
]


def _collect() -> None:
    for file in iter_modules(__path__):
        module = import_module(f"{__name__}.{file.name}")
        if hasattr(module, "OP"):
            globals()[file.name] = getattr(module, file.name)
    in_order()


_collect()
