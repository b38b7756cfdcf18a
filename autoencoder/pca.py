"""Principal component analysis of images, and the angles between two subspaces.

The K directions u_1 … u_K are the eigenvectors of the covariance C = (1/N) Σ (x − μ)(x − μ)ᵀ with the largest
eigenvalues λ_1 ≥ λ_2 ≥ …; the code is z = (x − μ) U, the reconstruction μ + z Uᵀ. No other linear code of K numbers
has a smaller squared error (Eckart and Young 1936), which on the training images is λ_{K+1} + … + λ_D.
Shapes: N images, D pixels, K numbers of the code.
"""

from dataclasses import dataclass

import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from autoencoder.inputs import pixels
from shared_utils.cli import UserError

PART = 5000  # images at a time, for memory's sake


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), divided by N, of the images x, uint8 (N, D), in units of [0, 1].

    float64, on the CPU: some devices have no float64.
    """
    mean = sum(pixels(part.cpu(), torch.float64).sum(0) for part in x.split(PART)) / len(x)
    centred = (pixels(part.cpu(), torch.float64) - mean for part in x.split(PART))
    return mean, sum(part.T @ part for part in centred) / len(x)


@dataclass(frozen=True)
class PCA:
    """mean: (D,); components: (D, K), orthonormal columns; variances: (D,), all of them; largest variance first."""

    mean: Tensor
    components: Tensor
    variances: Tensor

    def first(self, k: int) -> "PCA":
        """The PCA of the first k of these components."""
        return PCA(self.mean, self.components[:, :k], self.variances)

    def project(self, x: Tensor) -> Tensor:
        """The codes, float32 (N, K), of the images x, uint8 (N, D), on x's device."""
        mean, components = (t.to(x.device, torch.float32) for t in (self.mean, self.components))
        return torch.cat([(pixels(part) - mean) @ components for part in x.split(PART)])

    def reconstruct(self, z: Tensor) -> Tensor:
        """The images (N, D) of the codes z (N, K), of z's type and device; nothing is clipped to [0, 1]."""
        return torch.addmm(self.mean.to(z), z, self.components.to(z).T)

    def errors(self, x: Tensor) -> Tensor:
        """The mean squared error of each image of x, uint8 (N, D), over its pixels in [0, 1]: (N,)."""
        parts = ((self.reconstruct(self.project(part)) - pixels(part)).square_().mean(1) for part in x.split(PART))
        return torch.cat(list(parts))

    @property
    def training_error(self) -> float:
        """The mean squared error per pixel of the images that this was fitted to."""
        return self.variances[self.components.shape[1] :].sum().item() / len(self.variances)


def fit_pca(x: Tensor, k: int) -> PCA:
    """The first k principal components of the images x, uint8 (N, D); float64, on the CPU.

    Errors: `UserError` when k is larger than the number of pixels or of images.
    """
    if not 1 <= k <= min(x.shape):
        raise UserError(f"PCA gives from 1 to {min(x.shape)} components of {len(x)} images of {x.shape[1]}, not {k}")
    return pca_of(*moments(x), k)


def pca_of(mean: Tensor, covariance: Tensor, k: int) -> PCA:
    """The first k principal components of data with this mean (D,) and covariance (D, D)."""
    variances, vectors = torch.linalg.eigh(covariance)  # rising
    return PCA(mean, vectors.flip(1)[:, :k].contiguous(), variances.flip(0).clamp(min=0))


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The angles in radians between the column spaces of a (D, K) and b (D, M), largest first: float64 (min(K, M),).

    By QR and SVD; small angles are taken from their sines, as rounding would swamp them in their cosines (Björck and
    Golub 1973).
    """
    return torch.from_numpy(subspace_angles(*(t.cpu().double().numpy() for t in (a, b))))
