"""Public differentiable operations. Models call these and never know which implementation runs."""

# isort: off
# In the order that `OPERATIONS` has.
from fastmmkd.ops.cross_attention import cross_attention
from fastmmkd.ops.residual_layer_norm import residual_layer_norm
from fastmmkd.ops.gaussian_mmd import gaussian_mmd
from fastmmkd.ops.js_divergence import js_divergence
from fastmmkd.ops.pairwise_contrastive import pairwise_contrastive
from fastmmkd.ops.prototype_similarity import prototype_similarity
from fastmmkd.ops.jsd_mutual_information import jsd_mutual_information
from fastmmkd.ops.missing_draw import missing_draw

# isort: on
from fastmmkd.ops.dispatch import explain
from fastmmkd.ops.operation import OPERATIONS, operation
from fastmmkd.ops.providers import PROVIDERS, use_provider

__all__ = [
    "OPERATIONS",
    "PROVIDERS",
    "cross_attention",
    "explain",
    "gaussian_mmd",
    "js_divergence",
    "jsd_mutual_information",
    "missing_draw",
    "operation",
    "pairwise_contrastive",
    "prototype_similarity",
    "residual_layer_norm",
    "use_provider",
]
