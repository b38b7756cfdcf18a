"""Are the gradients right? Central differences in float64 against the analytic gradient.

    (f(x + h e_i) − f(x − h e_i)) / 2h  =  ∂f/∂x_i + O(h²) + O(ε/h),    f = ⟨dy, forward(x)⟩

h = 1e-5 balances truncation against float64's round-off ε = 2.2e-16. The upstream gradient dy is random: with
all ones BatchNorm's and softmax's true gradient is zero, which many a wrong backward pass returns as well.
Source: CS231n notes, "Gradient checks".
"""

from collections.abc import Callable, Mapping

import numpy as np

ZERO = 1e-10  # central differences cannot tell a gradient that is below this everywhere from zero


def numerical_gradient(f: Callable[[], float], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of `f()` with respect to each element of `x`, which `f` reads and which is restored.

    x: any shape, float64 (`ValueError` otherwise: float32's round-off would drown the difference).
    """
    if x.dtype != np.float64:
        raise ValueError(f"gradient checks need float64, got {x.dtype}")
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + h
        above = f()
        x[index] = kept - h
        below = f()
        x[index] = kept
        gradient[index] = (above - below) / (2 * h)
    return gradient


def relative_error(a: np.ndarray, n: np.ndarray) -> float:
    """max |a − n| / (max |a| + max |n|) over the arrays. `ValueError` when both are all zero, or shapes differ."""
    a, n = np.asarray(a), np.asarray(n)
    if a.shape != n.shape:
        raise ValueError(f"gradient has shape {a.shape}, its array {n.shape}")
    scale = np.abs(a).max(initial=0.0) + np.abs(n).max(initial=0.0)
    if not np.isfinite(scale):
        raise ValueError("a gradient is not finite")
    if scale == 0:
        raise ValueError("both gradients are all zero, which proves nothing: choose another input")
    return float(np.abs(a - n).max() / scale)


def check_gradients(
    forward: Callable[[], np.ndarray],
    backward: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    arrays: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    h: float = 1e-5,
) -> dict[str, float]:
    """The relative error of each analytic gradient.

    forward: computes the output from `arrays` as they are at the call (a layer's input and its parameters).
    backward: takes dy, shaped like the output, returns a gradient for each name in `arrays`; called after `forward`.
    arrays: float64, writable, keyed by name. A PyTorch layer passes `tensor.numpy()`, which shares its memory.
    rng: draws dy. A stochastic layer must use the same mask in each forward.
    Errors: `ValueError` for other dtypes, shapes that differ, and a gradient that is zero throughout.
    """
    dy = rng.standard_normal(np.shape(forward()))
    analytic = {name: np.array(gradient) for name, gradient in backward(dy).items()}
    if missing := set(arrays) - set(analytic):
        raise ValueError(f"no gradient for {', '.join(sorted(missing))}")
    if zero := [name for name in arrays if np.abs(analytic[name]).max(initial=0.0) < ZERO]:
        raise ValueError(f"the gradient of {', '.join(zero)} is all zero, which proves nothing: choose another input")

    def objective() -> float:
        return float(np.sum(dy * np.asarray(forward())))

    return {
        name: relative_error(analytic[name], numerical_gradient(objective, array, h)) for name, array in arrays.items()
    }
