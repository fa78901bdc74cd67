"""Networks with what those of timm and keras.applications lack: tables, three outputs and more, free sizes.

Each is small, has norms to be patched, random weights and running statistics of what it was given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap import Inputs


@dataclass(frozen=True)
class Subject:
    """A model, and ``draw``, which returns inputs that are valid for it.

    ``rows`` are for each input of whole numbers below how many they have to be. ``dynamic`` asks for free sizes.
    """

    model: Any
    draw: Callable[[np.random.Generator], Inputs]
    rows: Mapping[str, int] = field(default_factory=dict)
    dynamic: bool = False


def noise(*shape: int) -> Callable[[np.random.Generator], Inputs]:
    """Return what draws one normally distributed input."""
    return lambda rng: Inputs(rng.standard_normal(shape, np.float32))


def normal(rng: np.random.Generator, *shape: int) -> Any:
    """Return normally distributed numbers in float32."""
    return rng.standard_normal(shape, np.float32)


# ---------------------------------------------------------------------------------------------------------- PyTorch


class Tokens(nn.Module):
    """Scores of sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(2000, 16), nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Return scores (N, 5) of token ids (N, T)."""
        return self.head(self.norm(self.conv(self.table(ids).transpose(1, 2))).relu().mean(2))


class Sentences(nn.Module):
    """Words and their kinds, looked up, mixed by attention: one word of many changes little."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(5000, 32, padding_idx=0), nn.Embedding(7, 32)
        self.mix, self.norm = nn.MultiheadAttention(32, 4, batch_first=True), nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 3)

    def forward(self, words: Tensor, kinds: Tensor) -> dict[str, Any]:
        """Return logits, the mean, and all states with a mask, of ids (N, T)."""
        x = self.words(words) + self.kinds(kinds)
        x = self.norm((x + self.mix(x, x, x, need_weights=False)[0]).transpose(1, 2))
        mean = x.mean(2)
        return {"logits": self.head(mean), "mean": mean, "states": (x, [words != 0, x.abs().amax(2)])}


class Bag(nn.Module):
    """Scores of bags of words, beside numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.line, self.norm = nn.Embedding(400, 12), nn.Linear(4, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, words: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, features and the best class."""
        x = self.norm(self.bag(words).mean(1) + self.line(numbers))
        scores = self.head(x.relu())
        return scores, x, scores.argmax(1)


class Detector(nn.Module):
    """Maps of three sizes as a detector returns them, at any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.down, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.scores, self.boxes = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return scores and boxes of two levels, and the mean of each image."""
        first = self.bn(self.stem(x)).relu()
        second = self.bn2(self.down(first)).relu()
        maps = [self.scores(first), self.scores(second)]
        return {"scores": maps, "boxes": (self.boxes(first), self.boxes(second)), "mean": first.mean((1, 2, 3))}


class Heads(nn.Module):
    """One image in, five outputs of one shape, of which two are small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.heads = nn.ModuleList(nn.Linear(16, 6) for _ in range(5))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
        """Return the heads' outputs, nested, the last two a thousandth."""
        x = self.bn(self.conv(x)).relu().mean((2, 3))
        a, b, c, d, e = (head(x) for head in self.heads)
        return a, (b, c), [d / 1000, e / 1000]


class Pair(nn.Module):
    """Two images of sizes of their own, and a number for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, 4)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vectors of both, and how near they are in the mean."""
        a, b = (self.head(self.bn(self.conv(each)).relu().mean((2, 3))) for each in (left, right))
        return a, b, (a * b).mean()


class Graph(nn.Module):
    """A graph's nodes and edges, of which there are other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.line, self.norm = nn.Embedding(30, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> dict[str, Tensor]:
        """Return scores of the nodes, those of edges (E, 2), and the sum."""
        x = self.kinds(nodes)
        x = self.norm(self.line(x + torch.zeros_like(x).index_add(0, edges[:, 1], x[edges[:, 0]]))).relu()
        scores = self.head(x)
        return {"nodes": scores, "edges": (x[edges[:, 0]] * x[edges[:, 1]]).sum(1), "sum": scores.sum(0)}


def settled(model: nn.Module, draw: Callable[[np.random.Generator], Inputs]) -> nn.Module:
    """Give a module random γ and β, and running statistics of eight batches."""
    rng = np.random.default_rng(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    with torch.no_grad():
        for _ in range(8):
            inputs = draw(rng).map(torch.from_numpy)
            model.train()(*inputs.args, **inputs.kwargs)
    return model.eval()


def ids(rng: np.random.Generator, below: int, *shape: int) -> Any:
    """Return whole numbers from 0 to ``below``."""
    return rng.integers(0, below, shape)


TORCH: dict[str, tuple[type[nn.Module], Callable[[np.random.Generator], Inputs], dict[str, int], bool]] = {
    "tokens": (Tokens, lambda rng: Inputs(ids(rng, 2000, 4, 12)), {"ids": 2000}, False),
    "sentences": (
        Sentences,
        lambda rng: Inputs(words=ids(rng, 5000, 3, 100), kinds=ids(rng, 7, 3, 100)),
        {"words": 5000, "kinds": 7},
        False,
    ),
    "bag": (Bag, lambda rng: Inputs(ids(rng, 400, 6, 9), normal(rng, 6, 4)), {"words": 400}, False),
    "detector": (Detector, noise(2, 3, 32, 48), {}, True),
    "heads": (Heads, noise(3, 3, 16, 16), {}, False),
    "pair": (Pair, lambda rng: Inputs(normal(rng, 2, 3, 16, 24), normal(rng, 2, 3, 20, 12)), {}, True),
    "graph": (
        Graph,
        lambda rng: Inputs(ids(rng, 30, 9), ids(rng, 9, 14, 2)),
        {"nodes": 30},
        False,
    ),
}  # fmt: skip


def torch_subject(name: str) -> Subject:
    """Return one of the modules above."""
    kind, draw, rows, dynamic = TORCH[name]
    torch.manual_seed(0)
    return Subject(settled(kind(), draw), draw, rows, dynamic)


# ------------------------------------------------------------------------------------------------------------ Keras


def keras_tokens() -> Any:
    """Return scores of sequences of tokens."""
    from keras import Input, Model, layers

    words = Input((12,), dtype="int32", name="words")
    x = layers.Conv1D(24, 3, name="conv")(layers.Embedding(1500, 16, name="table")(words))
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return Model(words, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def keras_tables() -> Any:
    """Return a model of words, their kinds and numbers, with outputs by name."""
    from keras import Input, Model, layers

    words, kinds = Input((60,), dtype="int32", name="words"), Input((60,), dtype="int32", name="kinds")
    numbers = Input((4,), name="numbers")
    x = layers.Embedding(3000, 16, name="words_table")(words) + layers.Embedding(5, 16, name="kinds_table")(kinds)
    x = layers.BatchNormalization()(layers.Conv1D(24, 1)(x))
    mean = layers.GlobalAveragePooling1D()(x)
    both = layers.Concatenate()([mean, layers.BatchNormalization()(layers.Dense(8)(numbers))])
    scores = layers.Dense(3)(layers.ReLU()(both))
    return Model([words, kinds, numbers], {"scores": scores, "mean": mean, "largest": layers.GlobalMaxPooling1D()(x)})


def keras_detector() -> Any:
    """Return maps of two sizes at any height and width, with a vector and a number."""
    from keras import Input, Model, layers, ops

    image = Input((None, None, 3), name="image")
    first = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, padding="same")(image)))
    second = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, strides=2, padding="same")(first)))
    head = layers.Conv2D(4, 1)
    return Model(image, [head(first), head(second), layers.GlobalAveragePooling2D()(second), ops.mean(first)])


def keras_heads() -> Any:
    """Return a model of five outputs of one shape, nested, of which two are small."""
    from keras import Input, Model, layers

    image = Input((16, 16, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3)(image)))
    a, b, c, d, e = (layers.Dense(6)(layers.GlobalAveragePooling2D()(x)) for _ in range(5))
    return Model(image, {"a": a, "pair": [b, c], "small": [d / 1000, e / 1000]})


def keras_mean() -> Any:
    """Return a model whose third output is one number, which is near zero."""
    from keras import Input, Model, layers, ops

    image = Input((16, 16, 3), name="image")
    x = layers.BatchNormalization()(layers.Conv2D(16, 3)(image))
    return Model(image, [layers.GlobalAveragePooling2D()(x), x, ops.mean(x)])


KERAS: dict[str, tuple[Callable[[], Any], Callable[[np.random.Generator], Inputs], dict[str, int], bool]] = {
    "tokens": (keras_tokens, lambda rng: Inputs(ids(rng, 1500, 4, 12).astype(np.int32)), {"words": 1500}, False),
    "tables": (
        keras_tables,
        lambda rng: Inputs(
            [ids(rng, 3000, 3, 60).astype(np.int32), ids(rng, 5, 3, 60).astype(np.int32), normal(rng, 3, 4)]
        ),
        {"words": 3000, "kinds": 5},
        False,
    ),
    "detector": (keras_detector, noise(2, 32, 48, 3), {}, True),
    "heads": (keras_heads, noise(3, 16, 16, 3), {}, False),
    "mean": (keras_mean, noise(3, 16, 16, 3), {}, False),
}


def keras_subject(name: str) -> Subject:
    """Return one of the models above, with random γ and β, and running statistics of a batch."""
    import keras

    make, draw, rows, dynamic = KERAS[name]
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = make()
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.5
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(0, 0.1, layer.beta.shape))
    for _ in range(8):
        model(*draw(rng).args, training=True)
    return Subject(model, draw, rows, dynamic)
