"""From images to the vectors an SVM sees: deskewing, pixels or Gabor features, scaling fitted on training images.

Shapes: N images, H W pixels, D features of an image, P principal components.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mnist_svm_gabor.gabor import CHUNK, GaborBank
from shared_utils.data import downsample

# The banks of train.py, chosen on validation images (README, "Choosing the banks"). 28 × 28 shows finer strokes: more
# orientations, larger kernels, quadrature pairs.
BANKS = {
    14: GaborBank(),
    28: GaborBank(orientations=8, kernel_size=13, highest=0.38, ratio=0.6, envelope=0.5, energy=True),
}


@dataclass(frozen=True)
class Preparation:
    """What happens to an image before anything is fitted. bank: None means raw pixels; resolution: 14 or 28."""

    resolution: int = 14
    deskewed: bool = False
    bank: GaborBank | None = None

    def __call__(self, x: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
        """Images uint8 (N, 1, 28, 28) → vectors float32 (N, D), by chunks, so that memory stays bounded."""
        n_features = self.bank.n_features if self.bank else self.resolution**2
        out = np.empty((len(x), n_features), dtype=np.float32)
        for start in range(0, len(x), CHUNK):
            images = self.images(x[start : start + CHUNK])  # (n, 1, H, W)
            vectors = self.bank.features(images, device) if self.bank else images.reshape(len(images), -1)
            out[start : start + CHUNK] = vectors
        return out

    def images(self, x: np.ndarray) -> np.ndarray:
        """What the features are computed from: float32 (N, 1, H, W) in [0, 1]; all at once."""
        if self.deskewed:
            x = deskew(x)
        return (downsample(x) if self.resolution == 14 else x.astype(np.float32)) / 255

    def arrays(self) -> dict:
        """What is stored on disk; `from_arrays` reads it."""
        bank = {f"bank_{name}": value for name, value in asdict(self.bank).items()} if self.bank else {}
        return {"resolution": self.resolution, "deskewed": self.deskewed, **bank}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Preparation":
        """The preparation that `arrays` describes."""
        bank = {name[5:]: value.item() for name, value in arrays.items() if name.startswith("bank_")}
        return cls(int(arrays["resolution"]), bool(arrays["deskewed"]), GaborBank(**bank) if bank else None)


def deskew(x: np.ndarray) -> np.ndarray:
    """Upright and centred images: float32 (N, 1, H, W) in x's units, from x (N, 1, H, W).

    With the centre of mass (m_x, m_y) and second moments of an image taken as a mass distribution, its slant is
    a = cov(x, y) / var(y): the shear x → x + a (y − m_y) that would have produced it from an upright one. Each output
    pixel reads the input where that shear puts it, bilinearly; the centre of mass moves to the middle of the image.
    An empty image stays as it is. All N are held at once. Source: LeCun et al. 1998, its "deskewing" entries.
    """
    x = torch.from_numpy(x.astype(np.float32))
    height, width = x.shape[2:]
    rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    mass = x.sum((1, 2, 3))  # (N,)
    empty = mass == 0
    total = mass.clamp(min=1e-12)
    by_row, by_column = x.sum(3)[:, 0], x.sum(2)[:, 0]  # (N, H), (N, W)
    mean_y = torch.where(empty, torch.tensor(middle_y), by_row @ rows / total)
    mean_x = torch.where(empty, torch.tensor(middle_x), by_column @ columns / total)
    off_y, off_x = rows - mean_y[:, None], columns - mean_x[:, None]  # (N, H), (N, W)
    var_y = (by_row * off_y**2).sum(1) / total
    cov = torch.einsum("nhw,nh,nw->n", x[:, 0], off_y, off_x) / total
    slant = cov / var_y.clamp(min=1e-3)  # a digit of one row has no slant
    from_middle = (rows - middle_y)[None, :, None]  # (1, H, 1)
    read_y = (mean_y[:, None, None] + from_middle).expand(-1, height, width)  # (N, H, W)
    read_x = mean_x[:, None, None] + slant[:, None, None] * from_middle + (columns - middle_x)  # (N, H, W)
    # grid_sample counts from −1 at one edge of the image to 1 at the other.
    grid = torch.stack([(read_x - middle_x) / (width / 2), (read_y - middle_y) / (height / 2)], dim=-1)  # (N, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False).numpy()


@dataclass(frozen=True)
class Projection:
    """Centring, rotation onto principal components and (partial) whitening: z = (x − mean) @ matrix.

    mean: (D,), matrix: (D, P), both float32.
    """

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Vectors (N, D) → float32 (N, P)."""
        return (x - self.mean) @ self.matrix


@dataclass(frozen=True)
class PrincipalAxes:
    """Mean (D,), variances (R,) falling, and axes (D, R) of vectors; R counts the directions that have variance."""

    mean: np.ndarray
    variances: np.ndarray
    axes: np.ndarray

    def projection(self, components: int, whitening: float) -> Projection:
        """The projection onto the first `components` axes (or all R), each divided by variance^(whitening / 2).

        whitening: 0 is plain PCA, which keeps distances (an RBF kernel sees what it saw before); 1 is full whitening,
        in which noise counts as much as strokes; ½ lies between.
        """
        scale = self.variances[:components] ** (whitening / 2)
        return Projection(self.mean.astype(np.float32), (self.axes[:, :components] / scale).astype(np.float32))


def principal_axes(x: np.ndarray) -> PrincipalAxes:
    """The principal axes of training vectors x (N, D); R is at most N − 1 and D."""
    mean = x.mean(0, dtype=np.float64)
    covariance = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), 10 * CHUNK):
        part = x[start : start + 10 * CHUNK] - mean  # float64: float32 would lend variance to directions without any
        covariance += part.T @ part
    variances, axes = np.linalg.eigh(covariance / len(x))  # ascending
    rank = np.count_nonzero(variances > 1e-9 * variances.max())
    return PrincipalAxes(mean, variances[::-1][:rank], axes[:, ::-1][:, :rank])
