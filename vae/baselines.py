"""Three models of binary images whose likelihood is exact, fitted in closed form or by EM: what a VAE has to beat.

    IndependentBernoulli    p(x) = Π_i p(x_i)                            pixels are independent
    ChowLiuTree             p(x) = p(x_r) Π_{i≠r} p(x_i | x_parent(i))   the best tree: each pixel depends on one other
    BernoulliMixture        p(x) = Σ_k π_k Π_i p(x_i | k)                a discrete latent with K values

Each has `fit(x)`, `log_likelihood(x)` in nats per image, float64 (N,), and `sample(n, rng)`, uint8 (n, D) of 0 and 1.
Images are (N, D), of 0 and 1 in any dtype; others are refused with `ValueError`. A count of zero must not become a
probability of zero, under which some images would be impossible: all counts are smoothed, each class says how.
Shapes: N images, D pixels, K components.
"""

import numpy as np

from shared_utils.cli import UserError


class IndependentBernoulli:
    """Each pixel is 1 with its own probability p_i: (D,) after `fit`."""

    def fit(self, x: np.ndarray) -> "IndependentBernoulli":
        """p_i = (n_i + 1) / (N + 2), n_i of N images having a 1 there: Laplace's rule. Returns itself."""
        x = _checked(x)
        self.p = _smoothed_mean(x)
        return self

    @property
    def parameters(self) -> int:
        """Number of free parameters: a probability for each pixel."""
        return len(self.p)

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        """log p(x) = Σ_i x_i log p_i + (1 − x_i) log(1 − p_i), in nats: (N, D) → (N,)."""
        x = _checked(x, len(self.p))
        return x @ np.log(self.p) + (1 - x) @ np.log1p(-self.p)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """n images, uint8 (n, D)."""
        return (rng.random((n, len(self.p))) < self.p).astype(np.uint8)


class ChowLiuTree:
    """The tree, each pixel given its parent, under which the training images are more probable than under any other.

    With the mutual information of two pixels under the smoothed frequencies P,

        I_ij = Σ_{u,v} P(x_i = u, x_j = v) log [ P(x_i = u, x_j = v) / P(x_i = u) P(x_j = v) ],

    and each conditional taken from P, the mean log-likelihood of a tree under P is

        Σ_i E log P(x_i | x_parent(i)) = −Σ_i H(x_i) + Σ_{i≠r} I_{i parent(i)}.

    The entropies H are the same for every tree, so the best is the spanning tree with the largest sum of I_ij, and the
    choice of its root r changes nothing. Source: Chow and Liu 1968.
    Half an image is added to each of the four counts of a pair: one image of 0 and one of 1 to each pixel, as in
    `IndependentBernoulli`, whose p_i are this model's marginals.

    After `fit`: `order` (D,), each parent before its children; `parent` (D,), the root being its own; `log_conditional`
    (D, 2, 2), log P(x_i = v | x_parent(i) = u) at [i, u, v]; `edges` (D − 1, 2), parent and child.
    """

    def fit(self, x: np.ndarray) -> "ChowLiuTree":
        """Count all pairs with one matrix product, span the tree, keep its conditionals. Returns itself."""
        x = _checked(x)
        ones, both = x.sum(0), x.T @ x  # (D,) and (D, D): images with a 1 at i, at i and j
        only_i, only_j = ones[:, None] - both, ones - both
        neither = len(x) - ones[:, None] - only_j
        counts = np.array([[neither, only_j], [only_i, both]])  # (2, 2, D, D): x_i = u, x_j = v
        joint = (counts + 0.5) / (len(x) + 2)
        marginal_i, marginal_j = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
        information = (joint * np.log(joint / (marginal_i * marginal_j))).sum((0, 1))  # (D, D), nats

        self.order, self.parent = maximum_spanning_tree(information)
        child = np.arange(len(ones))
        given_parent = np.log(joint / marginal_i)[:, :, self.parent, child]  # (2, 2, D): log P(x_j = v | x_i = u)
        self.log_conditional = given_parent.transpose(2, 0, 1).copy()  # (D, 2, 2)
        root = self.order[0]
        self.log_conditional[root] = np.log(marginal_j[0, :, 0, root])  # whatever "its parent" is
        self.edges = np.stack([self.parent[self.order[1:]], self.order[1:]], axis=1)  # (D − 1, 2)
        return self

    @property
    def parameters(self) -> int:
        """Number of free parameters: one probability for the root, two for each other pixel."""
        return 2 * len(self.parent) - 1

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        """log p(x) = Σ_i log P(x_i | x_parent(i)), in nats: (N, D) → (N,)."""
        x = _checked(x, len(self.parent)).astype(np.intp)
        return self.log_conditional[np.arange(len(self.parent)), x[:, self.parent], x].sum(1)  # (N, D) → (N,)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """n images, uint8 (n, D): each pixel is drawn given its parent, from the root outwards."""
        x = np.zeros((n, len(self.parent)), dtype=np.uint8)
        uniform = rng.random(x.shape)
        p_one = np.exp(self.log_conditional[:, :, 1])  # (D, 2): given the parent's value
        for i in self.order:
            x[:, i] = uniform[:, i] < p_one[i][x[:, self.parent[i]]]
        return x


def maximum_spanning_tree(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prim's algorithm on the complete graph with symmetric weights (D, D): (order (D,), parent (D,)), rooted at 0.

    The tree grows by the heaviest edge that leaves it. That edge is in some maximum spanning tree: adding it to one
    that lacks it closes a cycle, which leaves the grown part by another edge, no heavier, that it can replace.
    O(D²). Sources: Jarník 1930; Prim 1957.
    """
    order, parent = [0], np.zeros(len(weights), dtype=np.intp)
    outside = np.arange(len(weights)) > 0
    heaviest = weights[0].astype(np.float64)  # (D,): the best edge from each vertex outside to the tree, at `parent`
    for _ in range(len(weights) - 1):
        new = int(np.where(outside, heaviest, -np.inf).argmax())
        order.append(new)
        outside[new] = False
        better = outside & (weights[new] > heaviest)
        heaviest[better], parent[better] = weights[new, better], new
    return np.array(order), parent


class BernoulliMixture:
    """K components, each with its own probability of a 1 at every pixel, fitted by expectation-maximisation (EM).

    An image is drawn from component k with probability π_k, then each pixel on its own: p_ki. EM repeats

        E   r_nk = π_k p(x_n|k) / Σ_j π_j p(x_n|j)                      responsibilities: p(k|x_n)
        M   N_k = Σ_n r_nk,   π_k = (N_k + 1) / (N + K),   p_ki = (Σ_n r_nk x_ni + a m_i) / (N_k + a)

    with log p(x_n|k) = Σ_i x_ni log p_ki + (1 − x_ni) log(1 − p_ki), and each sum over components by log-sum-exp.
    The M-step is the exact maximum over π and p of the expected log-likelihood plus a log prior, so that no iteration
    lowers (Dempster, Laird and Rubin 1977)

        objective = Σ_n log p(x_n) + Σ_k log π_k + a Σ_ki [m_i log p_ki + (1 − m_i) log(1 − p_ki)].

    The prior is Dirichlet(2, …, 2) on π, one image added to each component, and Beta(1 + a m_i, 1 + a (1 − m_i)) on
    p_ki: a (`pseudo_count`) average images added to each, m being the p of `IndependentBernoulli`. A prior centred on
    the average costs less than one that adds as many ones as zeros: a pixel at the border is 0 in all components.
    Source: Bishop 2006, section 9.3.3.

    After `fit`: `log_weights` (K,), log π; `p` (K, D); `log_likelihoods` and `objectives`, one number for each
    iteration, of the parameters it began with, in nats per training image.
    """

    def __init__(self, components: int, pseudo_count: float = 2.0, tolerance: float = 0.003, max_iterations: int = 200):
        if components < 1 or max_iterations < 1 or not pseudo_count > 0 or not tolerance >= 0:
            raise UserError(
                "a mixture needs components and iterations of at least 1, a pseudo-count above 0 and a tolerance of at "
                f"least 0, got {components}, {max_iterations}, {pseudo_count:g} and {tolerance:g}"
            )
        self.components, self.pseudo_count = components, pseudo_count
        self.tolerance, self.max_iterations = tolerance, max_iterations

    def fit(self, x: np.ndarray, rng: np.random.Generator) -> "BernoulliMixture":
        """EM until an iteration raises the objective by less than `tolerance` nats per image. Returns itself.

        Each component starts about halfway between an image of its own, drawn by rng, and the average one; not
        exactly halfway, as two components that start from equal images would then stay equal for ever.
        Errors: `UserError` when there are fewer images than components.
        """
        x = _checked(x)
        if self.components > len(x):
            raise UserError(f"a mixture of {self.components} components needs as many images, got {len(x)}")
        mean = _smoothed_mean(x)  # (D,)
        images = x[rng.permutation(len(x))[: self.components]]  # (K, D)
        self.p = mean + rng.uniform(0.25, 0.75, images.shape) * (images - mean)  # (K, D)
        self.log_weights = np.full(self.components, -np.log(self.components))
        self.log_likelihoods, self.objectives = [], []
        for _ in range(self.max_iterations):
            log_likelihood, responsibilities = self._expect(x)  # (N,), (N, K)
            log_prior = (
                self.log_weights.sum()
                + self.pseudo_count * (np.log(self.p) @ mean + np.log1p(-self.p) @ (1 - mean)).sum()
            )
            self.log_likelihoods.append(float(log_likelihood.mean()))
            self.objectives.append(float(log_likelihood.mean() + log_prior / len(x)))
            if len(self.objectives) > 1 and self.objectives[-1] - self.objectives[-2] < self.tolerance:
                break
            counts = responsibilities.sum(0)  # (K,)
            self.log_weights = np.log((counts + 1) / (len(x) + self.components))
            ones = responsibilities.T @ x + self.pseudo_count * mean  # (K, D)
            self.p = ones / (counts + self.pseudo_count)[:, None]
        return self

    @property
    def parameters(self) -> int:
        """Number of free parameters: K D probabilities and K weights that sum to 1."""
        return self.p.size + self.components - 1

    def _expect(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The E-step: x float64 (N, D) → log p(x) (N,) and the responsibilities (N, K), whose rows sum to 1."""
        log_zero = np.log1p(-self.p)  # (K, D)
        joint = x @ (np.log(self.p) - log_zero).T + (log_zero.sum(1) + self.log_weights)  # (N, K): log π_k p(x|k)
        largest = joint.max(1, keepdims=True)  # subtracted before exp, which could else be 0 for every component
        joint = np.exp(joint - largest)
        total = joint.sum(1, keepdims=True)
        return (largest + np.log(total))[:, 0], joint / total

    def log_likelihood(self, x: np.ndarray) -> np.ndarray:
        """log p(x) = log Σ_k π_k p(x|k), in nats: (N, D) → (N,)."""
        return self._expect(_checked(x, self.p.shape[1]))[0]

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """n images, uint8 (n, D): a component by its weight, then its pixels."""
        weights = np.exp(self.log_weights)
        component = rng.choice(self.components, size=n, p=weights / weights.sum())
        return (rng.random((n, self.p.shape[1])) < self.p[component]).astype(np.uint8)


def _smoothed_mean(x: np.ndarray) -> np.ndarray:
    """The frequency of a 1 at each pixel, one image of 0 and one of 1 added: (N, D) → (D,), never 0 or 1."""
    return (x.sum(0) + 1) / (len(x) + 2)


def _checked(x: np.ndarray, width: int | None = None) -> np.ndarray:
    """x as float64 (N, D). Errors: `ValueError` when it is not of that shape, of another width, or not binary."""
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape or (width is not None and x.shape[1] != width):
        raise ValueError(f"the images must be of shape (N, {width or 'D'}), at least one, got {x.shape}")
    if not ((x == 0) | (x == 1)).all():
        raise ValueError(
            "the images must be binary (0 or 1): the Bernoulli formula gives no likelihood of a grey pixel"
        )
    return x.astype(np.float64)
