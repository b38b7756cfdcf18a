"""Convolutional networks on CIFAR-10: trained fast, attacked, taken apart, and their features moved elsewhere."""
