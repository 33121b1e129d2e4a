"""arvision: fast, exact sampling for autoregressive image models."""
