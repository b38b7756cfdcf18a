"""The variational autoencoder of Kingma and Welling, and two bounds on the likelihood that it gives an image.

A latent z ~ N(0, I) is drawn, then each pixel x_i ~ Bernoulli(sigmoid(logits_i(z))). The likelihood of an image,

    p(x) = ∫ p(x|z) p(z) dz,

has no closed form. With any q(z|x), here N(mu(x), diag exp(log_var(x))), Jensen's inequality gives a bound that has:

    log p(x) = log E_q [p(x|z) p(z) / q(z|x)]
             ≥ E_q [log p(x|z)]  −  KL(q(z|x) ‖ p(z))                          the ELBO
                 reconstruction

The difference is KL(q(z|x) ‖ p(z|x)): raising the ELBO teaches the encoder the posterior as well. The mean of k weights
w_j = p(x|z_j) p(z_j) / q(z_j|x) in place of one gives a bound that grows with k, towards log p(x) (IWAE):

    log p(x) ≥ E log (1/k) Σ_j w_j ≥ ELBO

Gradients pass through the draw as z = mu + exp(log_var / 2) ε with ε ~ N(0, I) (`reparameterize`).

Everything is in nats per image: summed over its pixels and latents, never a mean over them (`kl_scaling.py` shows why).
Sources: Kingma and Welling 2014; Burda, Grosse and Salakhutdinov 2016.
Shapes: B images, S or k samples of the latent for each, d latents, D pixels.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils import checkpoint
from shared_utils.cli import ExperimentParser, UserError
from shared_utils.runs import find_output
from vae.inputs import SIDE

ROWS = 2000  # decoded at once by `iwae_bound`: their logits stay in the processor's cache


def kl_to_prior(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, diag exp log_var) ‖ N(0, I)) in nats: (…, d) twice → (…,).

    For one latent, with v = exp(log_var) and both logarithms written out,

        KL = E_q [log q(z) − log p(z)] = E_q [−½ log v − (z − mu)² / 2v + z² / 2]
           = −½ log v − ½ + (v + mu²) / 2,      as E_q (z − mu)² = v and E_q z² = v + mu².
    """
    return 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(-1)


def log_normal(z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """log N(z; mu, diag exp log_var) in nats: (…, d) → (…,)."""
    return -0.5 * (math.log(2 * math.pi) + log_var + (z - mu) ** 2 / log_var.exp()).sum(-1)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x|z) = Σ_i x_i l_i − log(1 + exp l_i) in nats: x (B, D) of 0 and 1, logits (…, B, D) → (…, B)."""
    return (x * logits - F.softplus(logits)).sum(-1)


class VAE(nn.Module):
    """x_dim → hidden (tanh) → mean and log-variance of z_dim latents; z_dim → hidden (tanh) → x_dim logits."""

    def __init__(self, x_dim: int = 196, hidden: int = 128, z_dim: int = 8):
        super().__init__()
        self.config = {"x_dim": x_dim, "hidden": hidden, "z_dim": z_dim}
        self.trained_on = ""  # a data set's title, for figures
        self.x_dim, self.z_dim = x_dim, z_dim
        self.encoder = nn.Sequential(nn.Linear(x_dim, hidden), nn.Tanh(), nn.Linear(hidden, 2 * z_dim))
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.Tanh(), nn.Linear(hidden, x_dim))

    @property
    def size(self) -> str:
        """`8 latents`, for figures."""
        return f"{self.z_dim} latent{'s' if self.z_dim > 1 else ''}"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) → mean and log-variance of q(z|x), (B, d) each."""
        mu, log_var = self.encoder(x).chunk(2, dim=-1)
        return mu, log_var

    def decode(self, z: Tensor) -> Tensor:
        """z (…, d) → logits of the pixels (…, D); their sigmoid is the probability of a 1."""
        return self.decoder(z)

    def reparameterize(self, mu: Tensor, log_var: Tensor, n_samples: int) -> Tensor:
        """n_samples draws z ~ q(z|x) as a differentiable function of mu and log_var: (B, d) → (S, B, d)."""
        epsilon = torch.randn(n_samples, *mu.shape, dtype=mu.dtype, device=mu.device)
        return mu + (0.5 * log_var).exp() * epsilon

    def elbo_terms(self, x: Tensor, n_samples: int = 2) -> tuple[Tensor, Tensor]:
        """The two terms of the bound, in nats per image: (reconstruction (B,), kl (B,)); ELBO = reconstruction − kl.

        x: (B, D) of 0 and 1. The reconstruction E_q log p(x|z) is a mean over n_samples draws, the KL is exact.
        Errors: `ValueError` when x is not binary or has another number of pixels.
        """
        self._check_images(x)
        mu, log_var = self.encode(x)
        z = self.reparameterize(mu, log_var, n_samples)  # (S, B, d)
        reconstruction = log_bernoulli(x, self.decode(z)).mean(0)  # (S, B) → (B,)
        return reconstruction, kl_to_prior(mu, log_var)

    def log_weights(self, x: Tensor, k: int) -> Tensor:
        """log w = log p(x|z) + log p(z) − log q(z|x) for k draws z ~ q(z|x): (k, B), in nats.

        Their mean over k estimates the ELBO, logsumexp − log k the bound of `iwae_bound`. Errors: as `elbo_terms`.
        """
        self._check_images(x)
        return self._log_weights(x, *self.encode(x), k)

    def _log_weights(self, x: Tensor, mu: Tensor, log_var: Tensor, k: int) -> Tensor:
        z = self.reparameterize(mu, log_var, k)  # (k, B, d)
        prior = log_normal(z, torch.zeros_like(mu), torch.zeros_like(mu))
        return log_bernoulli(x, self.decode(z)) + prior - log_normal(z, mu, log_var)

    def iwae_bound(self, x: Tensor, k: int, q: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """log (1/k) Σ_j w_j, in nats per image (B,): a lower bound on log p(x) in expectation, tighter for larger k.

        q: mean and log-variance (B, d) to draw from in place of the encoder's. The samples are decoded `ROWS` at a
        time, so that memory does not grow with k. Errors: as `elbo_terms`.
        """
        self._check_images(x)
        if k < 1:
            raise UserError(f"the bound needs at least one sample, got k = {k}")
        mu, log_var = self.encode(x) if q is None else q
        at_once = max(1, ROWS // len(x))
        total = torch.full_like(mu[:, 0], -torch.inf)  # log Σ w so far
        for done in range(0, k, at_once):
            weights = self._log_weights(x, mu, log_var, min(at_once, k - done))  # (≤ at_once, B)
            total = torch.logaddexp(total, weights.logsumexp(0))
        return total - math.log(k)

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.x_dim:
            raise ValueError(f"the images must be of shape (B, {self.x_dim}), got {tuple(x.shape)}")
        if not ((x == 0) | (x == 1)).all():
            raise ValueError(
                "the images must be binary (0 or 1): the Bernoulli formula gives no likelihood of a grey pixel"
            )


@torch.no_grad()
def mean_terms(model: VAE, x: Tensor, n_samples: int) -> tuple[float, float]:
    """Reconstruction and KL, in nats per image, as means over all images x (N, D); 1,000 of them at a time."""
    parts = [model.elbo_terms(part, n_samples) for part in x.split(1000)]
    reconstruction, kl = (torch.cat(terms).cpu().double().mean().item() for terms in zip(*parts, strict=True))
    return reconstruction, kl


def add_ckpt_flag(parser: ExperimentParser) -> None:
    """`--ckpt`, which `load_model` reads."""
    parser.add_argument("--ckpt", metavar="FILE", help="a model that train.py wrote (default: its best.pth)")


def load_model(args: argparse.Namespace, device: torch.device) -> VAE:
    """The model in `--ckpt`, by default train.py's best, in evaluation mode.

    Errors: `UserError` in one line when the file is missing, damaged, of another image size or not train.py's, and when
    `args` ask for other images than it was trained on.
    """
    path = Path(args.ckpt) if args.ckpt else find_output(args, "train", "best.pth")
    state = checkpoint.load(path, device=device, expect={"x_dim": SIDE * SIDE})
    try:
        model = VAE(**state["config"])
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} holds no VAE that train.py wrote: {reason}") from None
    model.trained_on = state.get("title", "")
    checkpoint.refuse_other_data(path, state.get("data", {}), vars(args))
    return model.to(device).eval()
