"""Networks of the layers in layers.py: a multi-layer perceptron with two kinds of head, and the autoencoder.

Each keeps the `config` that it was built with, so that a checkpoint of `config` and `state_dict()` is the whole model.
Shapes: N images, D features in, K numbers of the code.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from autoencoder.layers import ACTIVATIONS, BatchNorm1d, Dropout, GaussianNoise, Layer, Linear, Sigmoid
from autoencoder.losses import mean_squared_error, softmax_cross_entropy
from shared_utils.cli import UserError

PART = 5000  # images of a forward pass in evaluation


class Network:
    """The composition of `layers`, first to last."""

    def __init__(self, layers: Sequence[Layer], config: dict):
        self.layers, self.config = list(layers), config

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        """x: (N, D); returns what the last layer gives."""
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, dy: Tensor, need_dx: bool = False) -> Tensor | None:
        """Fill every layer's `grads`; dy is the loss's gradient. Returns dx (N, D) with need_dx, else None."""
        first = next((i for i, layer in enumerate(self.layers) if layer.params), 0)
        for i in range(len(self.layers) - 1, -1, -1):
            if i < first and not need_dx:
                return None  # nothing further down has a gradient to fill
            dy = self.layers[i].backward(dy, need_dx or i > first)
        return dy

    def predict(self, x: Tensor) -> Tensor:
        """`forward` in evaluation, in parts of 5,000 rows: any N."""
        return torch.cat([self.forward(part) for part in x.split(PART)])

    def parameters(self) -> dict[str, Tensor]:
        """Name (`0.W`: the layer's number and the parameter's key) → tensor."""
        return {f"{i}.{name}": value for i, layer in enumerate(self.layers) for name, value in layer.params.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by name: all that makes up the trained network. The tensors are the network's own."""
        buffers = {f"{i}.{name}": value for i, layer in enumerate(self.layers) for name, value in layer.buffers.items()}
        return {**self.parameters(), **buffers}

    def load_state_dict(self, state: dict[str, Tensor], source="the state") -> None:
        """Copy in the tensors of a network of this shape. `UserError` names what differs, before anything changes."""
        own = self.state_dict()
        theirs, ours = ({name: tuple(value.shape) for name, value in found.items()} for found in (state, own))
        if theirs != ours:
            odd = min(set(theirs.items()) ^ set(ours.items()))[0]
            raise UserError(f"{source} is of another network: {odd} is {theirs.get(odd)} there, {ours.get(odd)} here")
        if bad := [name for name, value in state.items() if not value.isfinite().all()]:
            raise UserError(f"{source}: {bad[0]} has NaN or infinity in it")
        for name, value in own.items():
            value.copy_(state[name])

    def to(self, *args) -> "Network":
        """Move to a device or a dtype, in place; returns the network."""
        for layer in self.layers:
            layer.to(*args)
        return self


def block(n_in: int, n_out: int, activation: str, init: str, use_batchnorm: bool, dropout: float = 0.0) -> list[Layer]:
    """The layers of one hidden layer: Linear → BatchNorm → activation → dropout, the last three optional."""
    if activation not in ACTIVATIONS:
        raise UserError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    layers = [Linear(n_in, n_out, init)]
    if use_batchnorm:
        layers.append(BatchNorm1d(n_out))
    if ACTIVATIONS[activation]:
        layers.append(ACTIVATIONS[activation]())
    return [*layers, Dropout(dropout)] if dropout else layers


class ManualMLP(Network):
    """D → hidden layers (usually one or two) → outputs, without an activation at the end."""

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: str = "relu",
        init: str = "he",
        use_batchnorm: bool = False,
        dropout: float = 0.0,
    ):
        config = {"in_features": in_features, "hidden": list(hidden), "out_features": out_features}
        config |= {"activation": activation, "init": init, "use_batchnorm": use_batchnorm, "dropout": dropout}
        sizes, layers = [in_features, *hidden], []
        for n_in, n_out in pairwise(sizes):
            layers += block(n_in, n_out, activation, init, use_batchnorm, dropout)
        super().__init__([*layers, Linear(sizes[-1], out_features, init)], config)


class Classifier(ManualMLP):
    """The outputs are logits (N, classes), trained with softmax cross-entropy."""

    loss = staticmethod(softmax_cross_entropy)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of the rows of x (N, D) whose largest logit is that of their label in y (N,)."""
        return (self.predict(x).argmax(1) == y).sum().item() / len(y)


class Regressor(ManualMLP):
    """The outputs are the values themselves (N, outputs), trained with the mean squared error."""

    loss = staticmethod(mean_squared_error)


class Autoencoder(Network):
    """x (N, D) → code z (N, K) → reconstruction (N, D) in [0, 1].

    enc_dims: the encoder's layers, the last of which is the code; dec_dims: the decoder's hidden layers, by default
    the encoder's reversed. Hidden layers are Linear → BatchNorm → activation, the code is Linear alone, the output
    Linear → sigmoid. With activation="linear" there is nothing but Linear layers: such a network can at best find the
    subspace of PCA (Baldi and Hornik 1989) and may leave [0, 1]; it needs use_batchnorm=False to be linear in training.
    noise: standard deviation of Gaussian noise on the input in training (Vincent et al. 2008). code_noise: the same on
    the code, which a BatchNorm without γ and β normalises first: else larger codes would drown the noise.
    Errors: `UserError` for a code of more numbers than the input has: it could copy the input.
    """

    loss = staticmethod(mean_squared_error)

    def __init__(
        self,
        enc_dims: Sequence[int] = (256, 128),
        dec_dims: Sequence[int] | None = None,
        activation: str = "relu",
        init: str = "he",
        use_batchnorm: bool = True,
        noise: float = 0.0,
        code_noise: float = 0.0,
        in_features: int = 784,
    ):
        if not enc_dims:
            raise UserError("enc_dims needs at least one number, the size of the code")
        dec_dims = list(reversed(enc_dims[:-1])) if dec_dims is None else list(dec_dims)
        if enc_dims[-1] > in_features:
            raise UserError(f"a code of K = {enc_dims[-1]} numbers is larger than the input of {in_features}")
        config = {"enc_dims": list(enc_dims), "dec_dims": dec_dims, "activation": activation, "init": init}
        config |= {"use_batchnorm": use_batchnorm, "noise": noise, "code_noise": code_noise, "in_features": in_features}
        encoder, decoder = [GaussianNoise(noise)] if noise else [], []
        for layers, sizes in ((encoder, [in_features, *enc_dims]), (decoder, [enc_dims[-1], *dec_dims, in_features])):
            for n_in, n_out in pairwise(sizes[:-1]):
                layers += block(n_in, n_out, activation, init, use_batchnorm)
            layers.append(Linear(sizes[-2], sizes[-1], init))
        if code_noise:
            encoder += [BatchNorm1d(enc_dims[-1], affine=False), GaussianNoise(code_noise)]
        if activation != "linear":
            decoder.append(Sigmoid())
        self.encoder, self.decoder = Network(encoder, {}), Network(decoder, {})
        super().__init__([*encoder, *decoder], config)

    @property
    def latent(self) -> int:
        """K, the size of the code."""
        return self.config["enc_dims"][-1]

    def encode(self, x: Tensor) -> Tensor:
        """The codes (N, K) of the images x (N, D), in evaluation."""
        return self.encoder.predict(x)

    def decode(self, z: Tensor) -> Tensor:
        """The images (N, D) of the codes z (N, K), in evaluation."""
        return self.decoder.predict(z)

    def effective_weights(self) -> list[Tensor]:
        """The encoder's weight matrices (D, M), columns scaled by γ/√(σ² + ε) where BatchNorm follows."""
        weights = []
        for layer, after in zip(self.encoder.layers, [*self.encoder.layers[1:], None], strict=True):
            if isinstance(layer, Linear):
                scale = after.scale() if isinstance(after, BatchNorm1d) else 1
                weights.append(layer.params["W"] * scale)
        return weights
