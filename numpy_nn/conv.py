"""Layers with a window: convolution and pooling, each as a few operations on whole arrays.

Convolution is one matrix product. `columns` (im2col) copies, for each of the k·k places in the kernel, the pixels that
this place meets; a row of the result is one (channel, place), a column one output pixel:

    y (O, N·P) = W (O, C·k²) @ columns (C·k², N·P),        P = H'·W' output pixels

so that ∂L/∂W = dY columnsᵀ and ∂L/∂columns = Wᵀ dY, which `add_columns` (col2im) adds to where each pixel came from.
The only Python loop is over the kernel's places. Arrays are (N, C, H, W) for the reader; their memory is laid out
(C, N, H, W), as the product leaves its result, so that between convolutions and poolings nothing is transposed in
memory.

Shapes: N batch, C channels in, O channels out, H W pixels, H' W' output pixels, k kernel_size, s stride.
"""

from collections.abc import Iterator

import numpy as np

from numpy_nn.layers import Layer, check_shape, initial_weights


def output_size(layer: Layer, size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """(H', W') = (size + 2 padding − kernel) // stride + 1. Errors: `ValueError` when the window fits nowhere."""
    out = tuple((n + 2 * padding - kernel) // stride + 1 for n in size)
    if min(n + 2 * padding for n in size) < kernel:
        shape = f"{size[0]}×{size[1]}"
        raise ValueError(
            f"{layer!r}: a window of {kernel}×{kernel} (padding {padding}) leaves no output of {shape} pixels"
        )
    return out


def places(kernel: int, stride: int, out: tuple[int, int]) -> Iterator[tuple[int, int, tuple]]:
    """For each place (i, j) in the window, row by row: the strided slices of the pixels that it meets."""
    for i in range(kernel):
        for j in range(kernel):
            rows, columns = slice(i, i + stride * out[0], stride), slice(j, j + stride * out[1], stride)
            yield i, j, (..., rows, columns)


def pad(x: np.ndarray, padding: int) -> np.ndarray:
    """A frame of `padding` zeros around the last two axes."""
    if padding == 0:
        return x
    *front, height, width = x.shape
    out = np.zeros((*front, height + 2 * padding, width + 2 * padding), x.dtype)
    out[..., padding : padding + height, padding : padding + width] = x
    return out


def columns(x: np.ndarray, kernel: int, stride: int, out: tuple[int, int]) -> np.ndarray:
    """x (C, N, H, W), already padded → (C·k², N·H'·W')."""
    channels, n = x.shape[:2]
    result = np.empty((channels, kernel, kernel, n, *out), x.dtype)
    for i, j, window in places(kernel, stride, out):
        result[:, i, j] = x[window]
    return result.reshape(channels * kernel * kernel, -1)


def add_columns(
    d_columns: np.ndarray, shape: tuple[int, ...], kernel: int, stride: int, out: tuple[int, int]
) -> np.ndarray:
    """The transpose of `columns`: (C·k², N·H'·W') → (C, N, H, W), each value added to the pixel it was copied from."""
    channels, n = shape[:2]
    parts = d_columns.reshape(channels, kernel, kernel, n, *out)
    result = np.zeros(shape, d_columns.dtype)
    for i, j, window in places(kernel, stride, out):
        result[window] += parts[:, i, j]
    return result


class Conv2d(Layer):
    """Cross-correlation, as every framework's "convolution". W: (O, C, k, k), b: (O,)."""

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, init="he", rng=None, dtype=np.float32
    ):
        super().__init__()
        if min(in_channels, out_channels, kernel_size, stride) < 1 or padding < 0:
            raise ValueError("channels, kernel_size and stride must be 1 or more, padding 0 or more")
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        shape, area = (out_channels, in_channels, kernel_size, kernel_size), kernel_size**2
        W = initial_weights(shape, in_channels * area, out_channels * area, init, rng, dtype)
        self.params = {"W": W, "b": np.zeros(out_channels, dtype)}

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        W, b = self.params["W"], self.params["b"]
        check_shape(self, x, ("N", W.shape[1], "H", "W"))
        self._out = output_size(self, x.shape[2:], self.kernel_size, self.stride, self.padding)
        padded = pad(x.transpose(1, 0, 2, 3), self.padding)  # (C, N, H, W)
        self._padded_shape = padded.shape
        self._columns = columns(padded, self.kernel_size, self.stride, self._out)  # (C·k², N·H'·W')
        y = W.reshape(len(W), -1) @ self._columns + b[:, None]  # (O, N·H'·W')
        return y.reshape(len(W), len(x), *self._out).transpose(1, 0, 2, 3)  # (N, O, H', W')

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        W = self.params["W"]
        dY = dy.transpose(1, 0, 2, 3).reshape(len(W), -1)  # (O, N·H'·W')
        self.grads = {"W": (dY @ self._columns.T).reshape(W.shape), "b": dY.sum(1)}
        if not need_dx:
            return None
        d_columns = W.reshape(len(W), -1).T @ dY  # (C·k², N·H'·W')
        dx = add_columns(d_columns, self._padded_shape, self.kernel_size, self.stride, self._out)
        p, (height, width) = self.padding, dx.shape[2:]
        return dx[:, :, p : height - p, p : width - p].transpose(1, 0, 2, 3)  # (N, C, H, W)


class _Pool2d(Layer):
    """What both poolings share: a window of kernel_size, moved by stride (kernel_size by default), without padding."""

    def __init__(self, kernel_size: int, stride: int | None = None):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        if min(self.kernel_size, self.stride) < 1:
            raise ValueError("kernel_size and stride must be 1 or more")

    def _places(self, x: np.ndarray) -> Iterator[tuple[int, int, tuple]]:
        check_shape(self, x, ("N", "C", "H", "W"))
        self._shape = x.shape
        self._out = output_size(self, x.shape[2:], self.kernel_size, self.stride, 0)
        return places(self.kernel_size, self.stride, self._out)

    def _zeros(self, dy: np.ndarray) -> np.ndarray:
        n, channels, height, width = self._shape
        return np.zeros((channels, n, height, width), dy.dtype).transpose(1, 0, 2, 3)


class MaxPool2d(_Pool2d):
    """The largest value in each window: (N, C, H, W) → (N, C, H', W'). Of equal ones the first, row by row, counts."""

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        _, *others = self._places(x)
        y = x[next(self._places(x))[2]].copy(order="K")  # the window's first place
        self._winner = np.zeros_like(y, dtype=np.int16)
        for number, (_, _, window) in enumerate(others, start=1):
            candidate = x[window]
            larger = candidate.real > y.real
            np.copyto(y, candidate, where=larger)
            np.copyto(self._winner, number, where=larger)
        return y

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        if not need_dx:
            return None
        dx = self._zeros(dy)
        for number, (_, _, window) in enumerate(places(self.kernel_size, self.stride, self._out)):
            if self.stride >= self.kernel_size:  # windows do not overlap: each pixel is met once
                np.multiply(dy, self._winner == number, out=dx[window])
            else:
                dx[window] += dy * (self._winner == number)
        return dx


class AvgPool2d(_Pool2d):
    """The mean of each window: (N, C, H, W) → (N, C, H', W')."""

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        return sum(x[window] for _, _, window in self._places(x)) / self.kernel_size**2

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        if not need_dx:
            return None
        dx, share = self._zeros(dy), dy / self.kernel_size**2
        for _, _, window in places(self.kernel_size, self.stride, self._out):
            dx[window] += share
        return dx
