"""Autoencoders on tensors whose every backward pass is written out, and what their codes are good for."""
