"""What Synaptic Intelligence costs."""
