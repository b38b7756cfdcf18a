"""MNIST: a support vector machine on raw pixels against one on Gabor features."""
