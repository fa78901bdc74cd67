"""The optimizers by their formulas, in NumPy: what a linear network comes to, which both frameworks have to."""

import numpy as np

from normswap.finetune.run.batches import batch_indices
from normswap.finetune.run.rate import Rate
from normswap.finetune.run.training import Training

RULES = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.5},
    {"optimizer": "sgd", "momentum": 0.0},
    {"optimizer": "adam"},
    {"optimizer": "adam", "weight_decay": 0.5},
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "weight_decay": 0.5},
    {"optimizer": "amsgrad"},
    {"optimizer": "amsgrad", "weight_decay": 0.5},
]


def training(**options):
    """Return a training whose steps differ: batches, rates and gradients that shrink."""
    return Training(**{"steps": 8, "batch_size": 16, "lr": 0.05, **options})


def agree(found, expected):
    """Whether two arrays are equal but for rounding, and a few weights whose gradients are hardly more than that."""
    return np.quantile(np.abs(found - expected), 0.99) < 2e-5


def trained(images, labels, weight, bias, how, *, rate_first=False):
    """Return weight (features, classes) and bias of a linear network after a training of flat ``images``.

    With ``rate_first`` SGD's momentum is of gradients times the rate of their step, as in Keras.
    """
    parameters = [np.array(weight, np.float64), np.array(bias, np.float64)]
    moments = [[np.zeros_like(each) for each in parameters] for _ in range(3)]
    rate = Rate(how, len(images))
    for step in range(how.steps):
        chosen = batch_indices(len(images), how.batch_size, step, how.seed)
        x, y = images[chosen].astype(np.float64), labels[chosen]
        scores = x @ parameters[0] + parameters[1]
        shares = np.exp(scores - scores.max(1, keepdims=True))
        error = (shares / shares.sum(1, keepdims=True) - np.eye(len(bias))[y]) / len(y)
        gradients = [x.T @ error, error.sum(0)]
        norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients))
        for place, gradient in enumerate(gradients):
            decay = how.weight_decay if place == 0 else 0.0
            state = [moment[place] for moment in moments]
            gradient, now = gradient * min(1, 1 / norm), rate.at(step, how.lr)
            if rate_first and how.optimizer == "sgd":
                gradient, now = now * gradient, 1.0
            move(parameters[place], gradient, state, how, decay, now, step + 1)
    return parameters


def move(parameter, gradient, state, how, decay, rate, step):
    """Move a parameter in place by SGD with momentum, Adam (Kingma and Ba), AMSGrad (Reddi), or AdamW (Loshchilov)."""
    first, second, largest = state
    if how.optimizer == "sgd":
        first[:] = how.setting("momentum") * first + gradient
        parameter -= rate * first
        return
    if how.optimizer == "adamw":
        parameter -= rate * decay * parameter
    else:
        gradient = gradient + decay * parameter
    first[:] = 0.9 * first + 0.1 * gradient
    second[:] = 0.999 * second + 0.001 * gradient**2
    largest[:] = np.maximum(largest, second)
    size = np.sqrt((largest if how.optimizer == "amsgrad" else second) / (1 - 0.999**step))
    parameter -= rate * first / (1 - 0.9**step) / (size + 1e-8)
