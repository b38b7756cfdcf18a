"""Neural networks in NumPy alone: every forward and backward pass written out, every gradient checked."""
