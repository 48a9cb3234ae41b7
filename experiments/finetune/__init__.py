"""Fine-tuning a language model without forgetting."""
