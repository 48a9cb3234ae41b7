"""Synaptic Intelligence (Zenke, Poole & Ganguli, 2017) for JAX."""

from si_jax.transform import (
    Synapses,
    SynapticIntelligenceState,
    WithSynapticIntelligenceState,
    consolidate,
    reset_optimizer,
    surrogate_loss,
    synapses,
    synaptic_intelligence,
    with_synaptic_intelligence,
)

__version__ = "0.1.0"

__all__ = [
    "Synapses",
    "SynapticIntelligenceState",
    "WithSynapticIntelligenceState",
    "consolidate",
    "reset_optimizer",
    "surrogate_loss",
    "synapses",
    "synaptic_intelligence",
    "with_synaptic_intelligence",
]
