"""Synaptic Intelligence (Zenke, Poole & Ganguli, 2017) for JAX."""

from contextlib import suppress

from jax import export

from si_jax import ewc, importance, kronecker, lora
from si_jax.carry import carry_over, reset_optimizer
from si_jax.diagnosis import Diagnosis, diagnose
from si_jax.merging import merge
from si_jax.persistence import PersistentState, persistent
from si_jax.state import add_importance, surrogate_loss
from si_jax.transform import (
    Synapses,
    SynapticIntelligenceState,
    WithSynapticIntelligenceState,
    consolidate,
    synapses,
    synaptic_intelligence,
    with_synaptic_intelligence,
)

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "PersistentState",
    "Synapses",
    "SynapticIntelligenceState",
    "WithSynapticIntelligenceState",
    "add_importance",
    "carry_over",
    "consolidate",
    "diagnose",
    "ewc",
    "importance",
    "kronecker",
    "lora",
    "merge",
    "persistent",
    "reset_optimizer",
    "surrogate_loss",
    "synapses",
    "synaptic_intelligence",
    "with_synaptic_intelligence",
]

# What was made by jax.export names the states of its arguments.
for _state in (
    Synapses,
    SynapticIntelligenceState,
    WithSynapticIntelligenceState,
    ewc.ElasticWeightConsolidationState,
    kronecker.KroneckerConsolidationState,
    kronecker.Factors,
    kronecker.Layer,
    lora.ProductConsolidationState,
    lora.Pair,
    Diagnosis,
):
    with suppress(ValueError):  # reloaded, and registered already
        export.register_namedtuple_serialization(
            _state, serialized_name=f"si_jax.{_state.__name__}"
        )
