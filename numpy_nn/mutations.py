"""Classic bugs, to be planted one at a time: does any check notice?

    for mutation in build_mutations():
        with planted(mutation):
            ...  # the library has this bug here, and nowhere else

A bug is a function that takes the true function first and then its arguments; `planted` puts it in the true
one's place and takes it out again, also after an exception. `subject` names the layer whose checks are to be asked.
Many are consistent: forward and backward agree on the wrong thing, so that no gradient check can see them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np

from numpy_nn import conv, layers, losses
from numpy_nn.activations import ReLU, Sigmoid, Tanh
from numpy_nn.conv import AvgPool2d, Conv2d, MaxPool2d, places
from numpy_nn.layers import BatchNorm1d, Dropout, Linear, PatchEmbedding
from numpy_nn.losses import MSE, SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from numpy_nn.optimizers import SGD, Adam, Optimizer, RMSprop

BatchNorm = BatchNorm1d.__base__  # what BatchNorm1d and BatchNorm2d share


@dataclass(frozen=True)
class Mutation:
    """A bug: its name, whose checks are asked, and what is replaced: (owner, attribute, bug) each."""

    name: str
    subject: str
    patches: tuple[tuple[object, str, Callable], ...]


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The library with this bug in it, for the length of a `with` block."""
    with ExitStack() as stack:
        for owner, attribute, bug in mutation.patches:
            true = getattr(owner, attribute)
            stack.enter_context(mock.patch.object(owner, attribute, _bound(bug, true)))
        yield


def _bound(bug: Callable, true: Callable) -> Callable:
    def replacement(*args, **kwargs):
        return bug(true, *args, **kwargs)

    return replacement


@contextmanager
def _changed(thing, **attributes) -> Iterator[None]:
    """`thing` with other attributes for the length of one call."""
    kept = {name: getattr(thing, name) for name in attributes}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        vars(thing).update(kept)


def _dW_negated(true, layer, dy, need_dx=True):
    dx = true(layer, dy, need_dx)
    layer.grads["W"] = -layer.grads["W"]
    return dx


def _W_not_transposed(true, layer, dy, need_dx=True):
    dx, W = true(layer, dy, need_dx), layer.params["W"]
    return dy @ W if need_dx and W.shape[0] == W.shape[1] else dx  # in square layers no shape gives it away


def _db_not_summed(true, layer, dy, need_dx=True):
    dx = true(layer, dy, need_dx)
    layer.grads["b"] = dy[0]
    return dx


def _second_1_over_N(true, layer, dy, need_dx=True):
    dx = true(layer, dy, need_dx)
    layer.grads = {name: g / len(dy) for name, g in layer.grads.items()}
    return dx


def _gradients_pile_up(true, layer, dy, need_dx=True):
    before = layer.grads
    dx = true(layer, dy, need_dx)
    layer.grads = {name: g + before.get(name, 0) for name, g in layer.grads.items()}
    return dx


def _float32_backward(true, layer, dy, need_dx=True):
    return true(layer, dy.astype(np.float32).astype(np.float64), need_dx)


def _mix_patches(x, p, back=False):
    """Takes pixels patch after patch for pixels row after row, as a forgotten transpose does; or the way back."""
    n, _, height, width = x.shape
    cut = (n, height // p, p, width // p, p) if back else (n, height // p, width // p, p, p)
    return x.reshape(cut).transpose(0, 1, 3, 2, 4).reshape(x.shape)


def _patches_mixed(true, layer, x, training=False):
    return true(layer, _mix_patches(x, layer.patch_size), training)


def _patches_mixed_back(true, layer, dy, need_dx=True):
    dx = true(layer, dy, need_dx)
    return _mix_patches(dx, layer.patch_size, back=True) if need_dx else None


def _relu_wrong_side(true, layer, dy, need_dx=True):
    return dy * ~layer._positive


def _relu_stale_mask(true, layer, x, training=False):
    stale = vars(layer).get("_positive")
    y = true(layer, x, training)
    if stale is not None and stale.shape == x.shape:
        layer._positive = stale
    return y


def _sigmoid_y(true, layer, dy, need_dx=True):
    return dy * layer._y


def _tanh_not_squared(true, layer, dy, need_dx=True):
    return dy * (1 - layer._y)


def _im2col_j_i(true, x, kernel, stride, out):
    rows = true(x, kernel, stride, out)
    return rows.reshape(len(x), kernel, kernel, -1).swapaxes(1, 2).reshape(rows.shape)


def _col2im_j_i(true, d_columns, shape, kernel, stride, out):
    swapped = d_columns.reshape(shape[0], kernel, kernel, -1).swapaxes(1, 2)
    return true(swapped.reshape(d_columns.shape), shape, kernel, stride, out)


def _col2im_overwrites(true, d_columns, shape, kernel, stride, out):
    parts, result = d_columns.reshape(shape[0], kernel, kernel, shape[1], *out), np.zeros(shape)
    for i, j, window in places(kernel, stride, out):
        result[window] = parts[:, i, j]
    return result


def _stride_ignored(true, d_columns, shape, kernel, stride, out):
    return true(d_columns, shape, kernel, 1, out)


def _padding_cut_on_one_side(true, layer, dy, need_dx=True):
    p = layer.padding
    with _changed(layer, padding=0):
        dx = true(layer, dy, need_dx)  # (N, C, H + 2p, W + 2p)
    return dx[..., : dx.shape[2] - 2 * p, : dx.shape[3] - 2 * p] if need_dx else None


def _max_remembers(true, layer, x, training=False):
    y = true(layer, x, training)
    layer._seen = x, y
    return y


def _max_to_all(true, layer, dy, need_dx=True):
    x, y = layer._seen
    dx = np.zeros(x.shape)
    for _, _, window in places(layer.kernel_size, layer.stride, layer._out):
        dx[window] += dy * (x[window] == y)
    return dx


def _max_to_last(true, layer, x, training=False):
    y = true(layer, x, training)
    for number, (_, _, window) in enumerate(places(layer.kernel_size, layer.stride, layer._out)):
        layer._winner[x[window] == y] = number
    return y


def _avg_not_divided(true, layer, dy, need_dx=True):
    return true(layer, dy * layer.kernel_size**2, need_dx)


def _bn_scale(layer):
    return layer._wide(layer.params["gamma"]) * layer._inverse


def _bn_no_mean_term(true, layer, dy, need_dx=True):
    dx = true(layer, dy, need_dx)
    if dx is None or layer._batch is None:
        return dx
    return dx + _bn_scale(layer) * layer._wide(dy.mean(layer.axes))


def _bn_no_variance_term(true, layer, dy, need_dx=True):
    dx = true(layer, dy, need_dx)
    if dx is None or layer._batch is None:
        return dx
    return dx + _bn_scale(layer) * layer._x_hat * layer._wide((dy * layer._x_hat).mean(layer.axes))


def _always_training(true, layer, x, training=False):
    return true(layer, x, True)


def _never_training(true, layer, x, training=False):
    return true(layer, x, False)


def _bn_batch_backward_in_evaluation(true, layer, dy, need_dx=True):
    with _changed(layer, _batch=layer._batch or dy.size // len(layer.params["gamma"])):
        return true(layer, dy, need_dx)


def _bn_biased_running_variance(true, layer, x, training=False):
    before, n = layer.buffers["var"] * (1 - layer.momentum), x.size // len(layer.params["gamma"])
    y = true(layer, x, training)
    if training:
        layer.buffers["var"] = before + (layer.buffers["var"] - before) * (n - 1) / n
    return y


def _bn_eps_outside_root(true, x, gamma, beta, mean, var, eps):
    inverse = 1 / (np.sqrt(var) + eps)
    x_hat = (x - mean) * inverse
    return gamma * x_hat + beta, x_hat, inverse


def _dropout_unscaled(true, layer, x, training=False):
    y = true(layer, x, training)
    if layer._mask is None:
        return y
    layer._mask = layer._mask * (1 - layer.p)
    return x * layer._mask


def _dropout_new_mask(true, layer, dy, need_dx=True):
    if layer._mask is None:
        return dy
    return dy * (np.random.default_rng(1).random(dy.shape) >= layer.p) / (1 - layer.p)


def _not_divided(true, loss):
    d = true(loss)
    return d * len(d)


def _summed(true, loss, logits, labels):
    return true(loss, logits, labels) * len(logits)


def _no_one_hot(true, loss):
    return loss._p / len(loss._p)


def _softmax_over_batch(true, logits):
    return true(logits.T).T


def _softmax_overflows(true, logits):
    with np.errstate(all="ignore"):
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _twice(true, loss, logits, labels):
    loss._first = np.exp(losses.log_softmax(logits))
    return true(loss, loss._first, labels)


def _twice_backward(true, loss):
    g, p = true(loss), loss._first
    return p * (g - (g * p).sum(-1, keepdims=True))


def _mse_without_2(true, loss):
    return true(loss) / 2


def _relu_logits(true, network, x, training=False):
    y = true(network, x, training)
    network._positive = y.real > 0
    return y * network._positive


def _relu_logits_backward(true, network, dy, need_dx=False):
    return true(network, dy * network._positive, need_dx)


def _uphill(true, optimizer, w, g, state):
    true(optimizer, w, -g, state)


def _update_lost(true, optimizer, w, g, state):
    true(optimizer, w.copy(), g, state)  # w = w - lr * g, which rebinds a name and leaves the parameter as it was


def _no_look_ahead(true, optimizer, w, g, state):
    with _changed(optimizer, nesterov=False):
        true(optimizer, w, g, state)


def _momentum_averages(true, optimizer, w, g, state):
    true(optimizer, w, g * (1 - optimizer.momentum), state)


def _rmsprop_eps_inside(true, optimizer, w, g, state):
    state["s"] = optimizer.alpha * state.get("s", 0) + (1 - optimizer.alpha) * g**2
    w -= optimizer.lr * g / np.sqrt(state["s"] + optimizer.eps)


def _adam_uncorrected(true, optimizer, w, g, state):
    with _changed(optimizer, t=10**9):
        true(optimizer, w, g, state)


def _decay_negated(true, optimizer):
    with _changed(optimizer, weight_decay=-optimizer.weight_decay):
        true(optimizer)


def _std_is_variance(true, shape, fan_in, fan_out, init, rng, dtype):
    std = {"he": 2 / fan_in, "xavier": 2 / (fan_in + fan_out)}[init] ** 0.5
    return true(shape, fan_in, fan_out, init, rng, dtype) * dtype(std)


def _fan_out_for_fan_in(true, shape, fan_in, fan_out, init, rng, dtype):
    return true(shape, fan_out, fan_in, init, rng, dtype)


def _all_weights_equal(true, shape, fan_in, fan_out, init, rng, dtype):
    return np.full(shape, np.abs(true(shape, fan_in, fan_out, init, rng, dtype)).mean(), dtype)


def build_mutations() -> list[Mutation]:
    """All of them, in the order of the figure."""
    he = [(owner, "initial_weights") for owner in (layers, conv)]  # both modules hold the name
    ce, mp, pe, net = SoftmaxCrossEntropy, MaxPool2d, PatchEmbedding, Sequential
    table = [
        ("dW with the wrong sign", "Linear", (Linear, "backward", _dW_negated)),
        ("dx = dy W, W square, not transposed", "Linear", (Linear, "backward", _W_not_transposed)),
        ("db not summed over the batch", "Linear", (Linear, "backward", _db_not_summed)),
        ("1/N once more in the layer", "Linear", (Linear, "backward", _second_1_over_N)),
        ("gradients pile up over calls", "Linear", (Linear, "backward", _gradients_pile_up)),
        ("backward pass in float32", "Linear", (Linear, "backward", _float32_backward)),
        ("patches mixed up in dx", "PatchEmbedding", (pe, "backward", _patches_mixed_back)),
        (
            "patches mixed up, both ways",
            "PatchEmbedding",
            (pe, "forward", _patches_mixed),
            (pe, "backward", _patches_mixed_back),
        ),
        ("mask of the wrong side", "ReLU", (ReLU, "backward", _relu_wrong_side)),
        ("mask of the batch before", "ReLU", (ReLU, "forward", _relu_stale_mask)),
        ("derivative y, not y(1 − y)", "Sigmoid", (Sigmoid, "backward", _sigmoid_y)),
        ("derivative 1 − y, not 1 − y²", "Tanh", (Tanh, "backward", _tanh_not_squared)),
        ("i and j swapped in im2col", "Conv2d", (conv, "columns", _im2col_j_i)),
        ("i and j swapped, both ways", "Conv2d", (conv, "columns", _im2col_j_i), (conv, "add_columns", _col2im_j_i)),
        ("col2im overwrites, not adds", "Conv2d", (conv, "add_columns", _col2im_overwrites)),
        ("stride ignored in dx", "Conv2d", (conv, "add_columns", _stride_ignored)),
        ("padding cut off on one side of dx", "Conv2d", (Conv2d, "backward", _padding_cut_on_one_side)),
        ("gradient to all maxima", "MaxPool2d", (mp, "forward", _max_remembers), (mp, "backward", _max_to_all)),
        ("gradient to the last maximum", "MaxPool2d", (mp, "forward", _max_to_last)),
        ("gradient without 1/k²", "AvgPool2d", (AvgPool2d, "backward", _avg_not_divided)),
        ("dx without its mean term", "BatchNorm", (BatchNorm, "backward", _bn_no_mean_term)),
        ("dx without its variance term", "BatchNorm", (BatchNorm, "backward", _bn_no_variance_term)),
        ("batch statistics in evaluation", "BatchNorm", (BatchNorm, "forward", _always_training)),
        ("training's dx in evaluation", "BatchNorm", (BatchNorm, "backward", _bn_batch_backward_in_evaluation)),
        ("running variance biased", "BatchNorm", (BatchNorm, "forward", _bn_biased_running_variance)),
        ("eps outside the root", "BatchNorm", (layers, "batch_norm", _bn_eps_outside_root)),
        ("without 1/(1 − p)", "Dropout", (Dropout, "forward", _dropout_unscaled)),
        ("another mask in backward", "Dropout", (Dropout, "backward", _dropout_new_mask)),
        ("drops in evaluation too", "Dropout", (Dropout, "forward", _always_training)),
        ("gradient without 1/N", "SoftmaxCrossEntropy", (ce, "backward", _not_divided)),
        ("sum for mean, both ways", "SoftmaxCrossEntropy", (ce, "forward", _summed), (ce, "backward", _not_divided)),
        ("gradient without minus one-hot", "SoftmaxCrossEntropy", (ce, "backward", _no_one_hot)),
        ("softmax over the batch", "SoftmaxCrossEntropy", (losses, "log_softmax", _softmax_over_batch)),
        ("maximum not taken off", "SoftmaxCrossEntropy", (losses, "log_softmax", _softmax_overflows)),
        ("softmax twice, both ways", "SoftmaxCrossEntropy", (ce, "forward", _twice), (ce, "backward", _twice_backward)),
        ("gradient without its 2", "MSE", (MSE, "backward", _mse_without_2)),
        ("ReLU on the logits", "Sequential", (net, "forward", _relu_logits), (net, "backward", _relu_logits_backward)),
        ("always in evaluation mode", "Sequential", (net, "forward", _never_training)),
        ("step uphill", "SGD", (SGD, "update", _uphill)),
        ("w rebound, not changed in place", "SGD", (SGD, "update", _update_lost)),
        ("momentum scales g by 1 − μ", "SGD", (SGD, "update", _momentum_averages)),
        ("Nesterov without look-ahead", "SGD", (SGD, "update", _no_look_ahead)),
        ("weight decay with the wrong sign", "SGD", (Optimizer, "step", _decay_negated)),
        ("eps inside the root", "RMSprop", (RMSprop, "update", _rmsprop_eps_inside)),
        ("no bias correction", "Adam", (Adam, "update", _adam_uncorrected)),
        ("variance for standard deviation", "He", *((*place, _std_is_variance) for place in he)),
        ("fan-out for fan-in", "He", *((*place, _fan_out_for_fan_in) for place in he)),
        ("all weights equal", "He", *((*place, _all_weights_equal) for place in he)),
    ]
    return [Mutation(name, subject, tuple(patches)) for name, subject, *patches in table]
