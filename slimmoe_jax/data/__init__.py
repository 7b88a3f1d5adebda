"""Text in, records of tokens out. Nothing in this package imports JAX."""
