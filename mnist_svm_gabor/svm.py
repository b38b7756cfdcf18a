"""A support vector machine as a handful of arrays: fitted by scikit-learn, used and stored without it.

With support vectors s_i, one decision function per pair of classes (a, b) is

    d_ab(x) = Σ_i α_i^{ab} k(x, s_i) + β_ab,        d_ab > 0 votes for a, otherwise for b

(one against one; Hsu and Lin 2002). Kernels: linear ⟨x, s⟩, rbf exp(−γ |x − s|²), poly (γ ⟨x, s⟩ + 1)³.
`linear` means one function per class instead, the largest wins (one against the rest; scikit-learn's LinearSVC).

Shapes: N vectors of D features, S support vectors, K classes, J functions (K, or K(K − 1)/2).
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from joblib import Parallel, delayed
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

KERNELS = ("linear", "linear-ovo", "rbf", "poly")
DEGREE = 3
CHUNK = 2000  # vectors whose kernel with all support vectors is held at once


@dataclass(frozen=True)
class SVM:
    """A fitted machine. support: (S, D), None where weights are explicit; weights: (S, J) or (D, J); bias: (J,)."""

    kernel: str
    gamma: float
    support: np.ndarray | None
    weights: np.ndarray
    bias: np.ndarray
    n_classes: int

    def decide(self, x: np.ndarray) -> np.ndarray:
        """The decision functions (N, J), float32, of vectors x (N, D), as matrix products."""
        parts = [self._kernel(x[i : i + CHUNK]) @ self.weights for i in range(0, len(x), CHUNK)]
        return np.concatenate(parts) + self.bias

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The label, int64 (N,), of vectors x (N, D)."""
        return self.scores(x).argmax(1)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """A score per class (N, K): the function itself (one against the rest) or the votes (one against one).

        Votes are whole numbers; the summed margins, squeezed to less than half a vote, are added to them, so that they
        only rank classes with equally many votes. scikit-learn's SVC gives such a tie to the lower label.
        """
        decisions = self.decide(x)
        if self.kernel == "linear":
            return decisions
        votes = np.zeros((len(x), self.n_classes), dtype=np.float32)
        margins = np.zeros_like(votes)
        for j, (a, b) in enumerate(combinations(range(self.n_classes), 2)):
            for_a = decisions[:, j] > 0
            votes[:, a] += for_a
            votes[:, b] += ~for_a
            margins[:, a] += decisions[:, j]
            margins[:, b] -= decisions[:, j]
        return votes + margins / (3 * (np.abs(margins) + 1))

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, dtype=np.float32)
        if self.support is None:
            return x  # (n, D)
        k = x @ self.support.T  # (n, S)
        if self.kernel == "poly":
            return (self.gamma * k + 1) ** DEGREE
        if self.kernel == "rbf":
            # |x − s|² = |x|² − 2⟨x, s⟩ + |s|², all in place
            k *= -2
            k += (x**2).sum(1)[:, None]
            k += (self.support**2).sum(1)
            np.exp(np.multiply(k, -self.gamma, out=k), out=k)
        return k

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored on disk; `from_arrays` reads it."""
        found = {"kernel": self.kernel, "gamma": self.gamma, "weights": self.weights, "bias": self.bias}
        found["n_classes"] = self.n_classes
        return found if self.support is None else {**found, "support": self.support}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "SVM":
        """The machine that `arrays` describes."""
        kernel, gamma, n_classes = str(arrays["kernel"]), float(arrays["gamma"]), int(arrays["n_classes"])
        return cls(kernel, gamma, arrays.get("support"), arrays["weights"], arrays["bias"], n_classes)


def fit_svm(x: np.ndarray, y: np.ndarray, kernel: str, C: float, gamma: float = 1.0) -> SVM:
    """Fit an SVM to x (N, D) float32 and labels y (N,) in 0 … K − 1, all of which occur.

    C: cost of a violated margin. gamma: γ of the kernel in units of 1 / (total variance of x), so that it does not
    depend on the features' scale (for centred x, scikit-learn's gamma="scale" is 1).
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    n_classes = int(y.max()) + 1
    if len(np.unique(y)) != n_classes or n_classes < 2:
        raise ValueError(f"labels must be 0 … K − 1 with every class present, K at least 2; got {np.unique(y)}")
    if kernel == "linear":
        machine = LinearSVC(C=C, dual=False, tol=1e-3, max_iter=2000).fit(x, y)
        weights, bias = machine.coef_.T, machine.intercept_  # (D, K or 1)
        if n_classes == 2:
            weights, bias = np.hstack([-weights, weights]), np.concatenate([-bias, bias])
        return SVM(kernel, 1.0, None, weights.astype(np.float32), bias.astype(np.float32), n_classes)
    gamma = gamma / float(x.var(0, dtype=np.float64).sum())
    name = kernel.removesuffix("-ovo")
    svc = SVC(C=C, kernel=name, gamma=gamma, degree=DEGREE, coef0=1.0, cache_size=500).fit(x, y)
    # libsvm keeps, for a support vector of class a, its coefficients against the K − 1 other classes in order.
    ends = np.cumsum(svc.n_support_)
    rows = [slice(end - n, end) for end, n in zip(ends, svc.n_support_, strict=True)]
    coefficients = np.zeros((len(svc.support_), n_classes * (n_classes - 1) // 2), dtype=np.float32)  # (S, J)
    for j, (a, b) in enumerate(combinations(range(n_classes), 2)):
        coefficients[rows[a], j] = svc.dual_coef_[b - 1, rows[a]]
        coefficients[rows[b], j] = svc.dual_coef_[a, rows[b]]
    support, bias = svc.support_vectors_.astype(np.float32), svc.intercept_.astype(np.float32)
    if n_classes == 2:  # scikit-learn flips the sign for two classes: positive means the second
        coefficients, bias = -coefficients, -bias
    if kernel == "linear-ovo":
        return SVM(kernel, 1.0, None, support.T @ coefficients, bias, n_classes)  # weights (D, J)
    return SVM(kernel, gamma, support, coefficients, bias, n_classes)


def choose_svm(
    x: np.ndarray,
    y: np.ndarray,
    x_val: np.ndarray,
    y_val: np.ndarray,
    kernel: str,
    Cs: Sequence[float],
    gammas: Sequence[float],
) -> list[dict]:
    """Fit every (C, gamma) to x, y and count its errors on x_val, y_val; one row each, the best first.

    Among equals the smaller C comes first, then the smaller gamma: the smoother machine. A linear kernel has no gamma.
    scikit-learn's solver releases Python's lock (GIL), so that the SVMs are fitted on all cores at once.
    """
    grid = [(C, gamma) for C in Cs for gamma in (gammas if kernel in ("rbf", "poly") else [1.0])]

    def trial(C: float, gamma: float) -> dict:
        started = time.perf_counter()
        wrong = int((fit_svm(x, y, kernel, C, gamma).predict(x_val) != y_val).sum())
        return {
            "C": C,
            "gamma": gamma,
            "val_errors": wrong,
            "val_accuracy": 1 - wrong / len(y_val),
            "seconds": round(time.perf_counter() - started, 2),
        }

    workers = Parallel(n_jobs=min(os.cpu_count() or 1, len(grid)), prefer="threads")
    with threadpool_limits(1, user_api="blas"):  # a core per machine: their matrix products must not fight for all
        rows = workers(delayed(trial)(*one) for one in grid)
    return sorted(rows, key=lambda row: (row["val_errors"], row["C"], row["gamma"]))
