"""The best denoiser of the training set, in closed form: what a network that fitted it perfectly would become.

If the images were the N training images x_i alone, the expected image behind x_t would be their mean, weighted by how
likely each of them is to have given x_t:

    E[x_0 | x_t] = Σ_i w_i x_i,    w = softmax_i(−|x_t − √ᾱ_t x_i|² / 2(1 − ᾱ_t))

No model has a smaller loss on noisy training images. Sampling with it gives nothing but these; on others it fails.
Source: Karras et al. 2022, arXiv 2206.00364, appendix B.3. Shapes: N images uint8 (N, C, H, W), D = C H W pixels.
"""

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion, Model
from ddpm.inputs import scaled


def memoriser(diffusion: GaussianDiffusion, x: np.ndarray, device: torch.device | str = "cpu") -> Model:
    """(x_t, t) → what a model that knows these images, and no others, predicts: ε or v, as the diffusion asks."""
    known = scaled(torch.from_numpy(x).to(device)).flatten(1)  # (N, D)
    squares = known.square().sum(1)  # (N,)

    def call(x_t: Tensor, t: Tensor) -> Tensor:
        signal, sigma = (each.flatten(1) for each in diffusion.signal_and_noise(t, x_t))  # (B, 1) each
        # |x_t|² is the same for all of them, and left out.
        logits = (signal * (x_t.flatten(1) @ known.T) - signal**2 * squares / 2) / sigma**2  # (B, N)
        x0 = (logits.softmax(1) @ known).view_as(x_t)
        signal, sigma = diffusion.signal_and_noise(t, x_t)
        eps = (x_t - signal * x0) / sigma
        return eps if diffusion.prediction == "eps" else signal * eps - sigma * x0

    return call
