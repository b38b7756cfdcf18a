"""Gabor features: oriented filters, rectification (or quadrature energy), pooling.

A Gabor kernel is a plane wave under a Gaussian envelope. With x' = x cos θ + y sin θ, y downwards as in an image,

    g(x, y) = exp(−(x² + y²) / 2σ²) cos(2π f x' + φ)

f: nominal frequency in cycles per pixel, θ: the direction in which the wave varies, σ: the envelope's width in pixels.
Simple cells of the visual cortex respond like this (Daugman 1985, J. Opt. Soc. Am. A 2; Jones and Palmer 1987). σ is a
fixed fraction of the wavelength 1/f, so that a kernel of half the frequency is the same one enlarged, as far as
kernel_size lets it. φ is 0 (even: it answers to lines); the odd partner of a quadrature pair has φ = −π/2 (edges).

Shapes: N images, H W pixels, K kernels, M maps (2K rectified, K energies), P pooling windows a side.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 1000  # images filtered at once: bounds the memory, whatever N


@dataclass(frozen=True)
class GaborBank:
    """A bank of `orientations` × `frequencies` real kernels and what is computed from their responses.

    orientations: how many θ, evenly spaced in [0, π).
    frequencies: how many f, from `highest` downwards, each `ratio` times the one before.
    kernel_size: odd, in pixels.
    highest: in cycles per pixel, at most 0.5 (Nyquist); ratio: above 0, at most 1.
    envelope: σ in wavelengths.
    energy: False takes both rectified signs, max(r, 0) and max(−r, 0). True takes the modulus of a quadrature pair,
        sqrt(r_even² + r_odd²): how much wave there is, not where its crests are (Adelson and Bergen 1985).
    pooling: P; each map is averaged under Gaussian windows at P × P evenly spaced centres.
    window: σ of those windows in units of their spacing; 0 takes the pixel at the centre instead, without pooling.
    power: each pooled value v becomes v^power. Below 1 it keeps a strong stroke from drowning a faint one.
    Errors: `ValueError` for a value out of its range.
    """

    orientations: int = 4
    frequencies: int = 3
    kernel_size: int = 7
    highest: float = 0.4
    ratio: float = 0.75
    envelope: float = 0.45
    energy: bool = False
    pooling: int = 6
    window: float = 0.6
    power: float = 1 / 3

    def __post_init__(self):
        for name in ("orientations", "frequencies", "pooling"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.kernel_size % 2 == 0 or self.kernel_size < 3:
            raise ValueError(f"kernel_size must be odd and at least 3, got {self.kernel_size}")
        if not 0 < self.highest <= 0.5:
            raise ValueError(f"highest must be in (0, 0.5] cycles per pixel, got {self.highest}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")
        if not (self.envelope > 0 and self.power > 0 and self.window >= 0):
            raise ValueError(f"envelope and power must be above 0, window 0 or more, got {self}")

    @property
    def angles(self) -> np.ndarray:
        """θ of each orientation in radians, (orientations,)."""
        return np.arange(self.orientations) * np.pi / self.orientations

    @property
    def cycles(self) -> np.ndarray:
        """f of each frequency in cycles per pixel, highest first, (frequencies,)."""
        return self.highest * self.ratio ** np.arange(self.frequencies)

    @property
    def kernels(self) -> np.ndarray:
        """The real kernels (K, size, size), float64, zero mean and unit norm; orientation varies fastest."""
        return self._kernels(phase=0.0)

    @property
    def n_maps(self) -> int:
        """M: maps per image."""
        return self.orientations * self.frequencies * (1 if self.energy else 2)

    @property
    def n_features(self) -> int:
        """Length of an image's feature vector, M · P²."""
        return self.n_maps * self.pooling**2

    def _kernels(self, phase: float) -> np.ndarray:
        half = self.kernel_size // 2
        y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float64)  # (size, size)
        kernels = []
        for f in self.cycles:
            sigma = self.envelope / f
            for theta in self.angles:
                along = x * np.cos(theta) + y * np.sin(theta)
                envelope = np.exp(-(x**2 + y**2) / (2 * sigma**2))
                kernel = envelope * np.cos(2 * np.pi * f * along + phase)
                # Without its mean a kernel is blind to brightness; taken off under the envelope it adds no step.
                kernel -= envelope * (kernel.sum() / envelope.sum())
                kernels.append(kernel / np.linalg.norm(kernel))
        return np.stack(kernels)  # (K, size, size)

    def maps(self, images: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Rectified (or energy) responses (N, M, H, W), float32, at every pixel; zeros beyond the edge.

        images: (N, H, W) or (N, 1, H, W), in units of [0, 1]. Rectified maps: K positive parts, then K negative ones.
        """
        x = _batched(images).to(device)  # (N, 1, H, W)
        pad = self.kernel_size // 2
        even = F.conv2d(x, self._weight(0.0, device), padding=pad)  # (N, K, H, W)
        if not self.energy:
            return torch.cat([even, -even], dim=1).relu_()  # (N, 2K, H, W)
        odd = F.conv2d(x, self._weight(-np.pi / 2, device), padding=pad)  # (N, K, H, W)
        return torch.hypot(even, odd)

    def features(self, images: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> np.ndarray:
        """Feature vectors (N, M · P²), float32: maps, pooled, compressed; by chunks, so that memory stays bounded.

        images: (N, H, W) or (N, 1, H, W), in units of [0, 1].
        """
        images = _batched(images)
        out = np.empty((len(images), self.n_features), dtype=np.float32)
        for start in range(0, len(images), CHUNK):
            maps = self.maps(images[start : start + CHUNK], device)  # (n, M, H, W)
            out[start : start + CHUNK] = self.pooled(maps).flatten(1).cpu().numpy()
        return out

    def pooled(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (N, M, H, W), averaged under the windows and raised to `power`: (N, M, P, P)."""
        down, across = (
            torch.from_numpy(pooling_windows(n, self.pooling, self.window)).to(maps.device) for n in maps.shape[2:]
        )
        means = torch.einsum("nmhw,hp->nmpw", maps, down) @ across  # (N, M, P, P)
        return means.clamp_(min=0).pow_(self.power)

    def _weight(self, phase: float, device: torch.device | str) -> torch.Tensor:
        return torch.from_numpy(self._kernels(phase)).float()[:, None].to(device)  # (K, 1, size, size)


def pooling_windows(size: int, windows: int, sigma: float) -> np.ndarray:
    """Gaussian windows along an axis of `size` pixels: float32 (size, windows), each column sums to 1.

    The centres lie in the middle of `windows` equal parts of the axis; sigma is in parts, 0 for a single pixel.
    """
    if windows > size:
        raise ValueError(f"{windows} pooling windows do not fit into {size} pixels")
    spacing = size / windows
    centres = (np.arange(windows) + 0.5) * spacing - 0.5
    distance = np.arange(size)[:, None] - centres  # (size, windows)
    if sigma == 0:
        return np.eye(size, dtype=np.float32)[:, np.abs(distance).argmin(0)]
    weights = np.exp(-(distance**2) / (2 * (sigma * spacing) ** 2))
    return (weights / weights.sum(0)).astype(np.float32)


def _batched(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    x = torch.as_tensor(images, dtype=torch.float32)
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or x.shape[1] != 1:
        raise ValueError(f"needs images (N, H, W) or (N, 1, H, W), got {tuple(x.shape)}")
    return x
