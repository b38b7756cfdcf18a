"""A decoder-only Transformer language model, from bytes to text."""
