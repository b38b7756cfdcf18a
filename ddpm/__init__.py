"""Denoising diffusion on MNIST: trained, sampled by three solvers, and measured."""
