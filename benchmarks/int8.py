"""Whether faults in int8 files are caught, and correct ones pass; and what int8 costs in accuracy.

    python benchmarks/int8.py                      # planted faults, of 12 small networks with sn, brn and gn each
    python benchmarks/int8.py torch:heads keras:mean
    python benchmarks/int8.py --accuracy DATA      # ResNet-20 on CIFAR-10, EfficientNet-Lite0 on ImageNet, each as int8

A fault counts where the file has something of its kind, and its outputs move. Accuracy is that of images that nothing
was chosen by.
"""

import argparse
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from fault_subjects import KERAS, TORCH, Subject, keras_subject, torch_subject
from lite0 import efficientnet_lite0, images
from numpy.typing import NDArray
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

import normswap
from normswap.bundles.source import load_model
from normswap.data.dataset import Data, open_data
from normswap.data.preprocessing import preprocessing_of
from normswap.errors import NormswapError
from normswap.verification.inference import open_onnx
from normswap.verification.runtime import session

Array = NDArray[Any]
Change = Callable[[onnx.ModelProto, random.Random], bool]
"""Puts a fault into an int8 file, and returns whether it has something of the kind."""


# ------------------------------------------------------------------------------------------------------------- faults


def put(proto: onnx.ModelProto, name: str, array: Array) -> None:
    """Give a stored tensor other values."""
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    old = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(old.dtype).reshape(old.shape), name))


def get(proto: onnx.ModelProto, name: str) -> Array:
    """Return a stored tensor."""
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name)).copy()


def nodes(proto: onnx.ModelProto, kind: str, dtype: type | None = None) -> list[onnx.NodeProto]:
    """Return nodes of a type; with ``dtype`` those that decode stored codes of it."""
    found = [node for node in proto.graph.node if node.op_type == kind]
    stored = {tensor.name for tensor in proto.graph.initializer}
    if dtype is None:
        return [node for node in found if node.input[0] not in stored]
    return [node for node in found if node.input[0] in stored and get(proto, node.input[0]).dtype == dtype]


def tensor(index: int, kind: str, dtype: type | None, draw: Callable[[Array, random.Random], Array]) -> Change:
    """Return a fault in what a random node of ``kind`` reads at ``index``: codes, scale, zero point."""

    def apply(proto: onnx.ModelProto, rng: random.Random) -> bool:
        found = nodes(proto, kind, dtype)
        if not found:
            return False
        name = rng.choice(found).input[index]
        array = get(proto, name)
        new = np.asarray(draw(array.copy(), rng)).astype(array.dtype).reshape(array.shape)
        put(proto, name, new)
        return not np.array_equal(new, array)

    return apply


def decoded_otherwise(proto: onnx.ModelProto, rng: random.Random) -> bool:
    """Double the scale of a pair where it is decoded alone."""
    found = nodes(proto, "DequantizeLinear")
    if not found:
        return False
    node = rng.choice(found)
    proto.graph.initializer.append(numpy_helper.from_array(2 * get(proto, node.input[1]), "other_scale"))
    node.input[1] = "other_scale"
    return True


def pair_removed(proto: onnx.ModelProto, rng: random.Random, *, twice: bool) -> bool:
    """Take a pair out; ``twice`` has its scale multiplied into the weight that reads it."""
    found = nodes(proto, "DequantizeLinear")
    if not found:
        return False
    node = rng.choice(found)
    coder = next(each for each in proto.graph.node if each.output[0] == node.input[0])
    value, decoded, scale = coder.input[0], node.output[0], get(proto, node.input[1])
    readers = [each for each in proto.graph.node if decoded in each.input]
    if decoded in {output.name for output in proto.graph.output} or not readers:
        return False
    if twice:
        weights = {each.output[0]: each.input[1] for each in nodes(proto, "DequantizeLinear", np.int8)}
        reading = [each.input[1] for each in readers if len(each.input) > 1 and each.input[1] in weights]
        if not reading:
            return False
        put(proto, weights[reading[0]], get(proto, weights[reading[0]]) * scale)
    for reader in readers:
        reader.input[:] = [value if name == decoded else name for name in reader.input]
    proto.graph.node.remove(node)
    if not any(coder.output[0] in each.input for each in proto.graph.node):
        proto.graph.node.remove(coder)
    return True


def relu_left_out(proto: onnx.ModelProto, rng: random.Random) -> bool:
    """Leave a ReLU out."""
    found = [node for node in proto.graph.node if node.op_type == "Relu"]
    if found:
        rng.choice(found).op_type = "Identity"
    return bool(found)


def one_channel(array: Array, rng: random.Random, factor: float) -> Array:
    """Multiply the codes of one channel of the first axis."""
    rows = [row for row in range(len(array)) if array[row].any()]
    row = rng.choice(rows)
    array[row] = array[row] * factor
    return array


def permuted(array: Array, rng: random.Random) -> Array:
    """Return numbers in the order of their neighbours."""
    return np.roll(array, 1) if array.ndim else array


ACTIVATION, CODED, DECODED = "QuantizeLinear", np.int8, "DequantizeLinear"
FAULTS: dict[str, Change] = {
    "activation scale x2": tensor(1, ACTIVATION, None, lambda a, _: a * 2),
    "activation scale /2": tensor(1, ACTIVATION, None, lambda a, _: a / 2),
    "activation scale x1.05": tensor(1, ACTIVATION, None, lambda a, _: a * 1.05),
    "decoded by another scale": decoded_otherwise,
    "zero point + 1": tensor(2, ACTIVATION, None, lambda a, _: a + 1 if a < 255 else a - 1),
    "zero point + 16": tensor(2, ACTIVATION, None, lambda a, _: a + 16 if a < 240 else a - 16),
    "weight scale x2": tensor(1, DECODED, CODED, lambda a, _: a * 2),
    "weight scale /2": tensor(1, DECODED, CODED, lambda a, _: a / 2),
    "weight scales permuted": tensor(1, DECODED, CODED, permuted),
    "one channel's scale x1.1": tensor(1, DECODED, CODED, lambda a, rng: one_channel(np.atleast_1d(a), rng, 1.1)),
    "weight channel zeroed": tensor(0, DECODED, CODED, lambda a, rng: one_channel(a, rng, 0)),
    "weight channel negated": tensor(0, DECODED, CODED, lambda a, rng: one_channel(a, rng, -1)),
    "weight codes + 1": tensor(0, DECODED, CODED, lambda a, _: np.where(a < 127, a + 1, a - 1)),
    "weight transposed": tensor(0, DECODED, CODED, lambda a, _: np.roll(a, 1, axis=-1)),
    "bias scale x2": tensor(1, DECODED, np.int32, lambda a, _: a * 2),
    "bias of other steps": tensor(0, DECODED, np.int32, lambda a, _: a // 2),
    "bias zeroed": tensor(0, DECODED, np.int32, lambda a, _: a * 0),
    "pair removed": lambda proto, rng: pair_removed(proto, rng, twice=False),
    "pair removed, scale twice": lambda proto, rng: pair_removed(proto, rng, twice=True),
    "ReLU left out": relu_left_out,
}


def planted(names: list[str], console: Console) -> None:
    """Print how many faults of each kind were caught, and how many correct files failed."""
    counts, caught, missed = Counter[str](), Counter[str](), []
    files = alarms = 0
    for name in names:
        for target in ("sn", "brn", "gn"):
            for kind, found in sweep(name, target):
                if kind == "none":
                    files, alarms = files + 1, alarms + (found is not None)
                else:
                    counts[kind] += 1
                    caught[kind] += found is not None
                if (found is None) == (kind != "none"):
                    missed.append(f"{name} {target}: {kind}: {found}")
            console.print(f"{name} {target}: {caught.total()} of {counts.total()}, {alarms} of {files} false alarms")
    table = Table("fault", "planted", "caught")
    for kind in FAULTS:
        table.add_row(kind, str(counts[kind]), str(caught[kind]))
    table.add_row("all", str(counts.total()), str(caught.total()))
    console.print(
        table,
        f"{alarms} false alarms of {files} correct files, each verified at export and once more",
        *missed,
        sep="\n",
    )


def moves(faulty: onnx.ModelProto, proto: onnx.ModelProto, inputs: normswap.Inputs) -> bool:
    """Return whether any output of a file is another for a fault in it, or it cannot be run any more."""
    feed = dict(zip((value.name for value in proto.graph.input), inputs.arrays.values(), strict=True))
    runner = session(proto.SerializeToString(), optimised=False)
    types = {value.name: runner.get_inputs()[i].type for i, value in enumerate(proto.graph.input)}
    feed = {name: array.astype(np.int32) if types[name] == "tensor(int32)" else array for name, array in feed.items()}
    try:
        found = session(faulty.SerializeToString(), optimised=False).run(None, feed)
    except Exception:
        return True
    return any(not np.array_equal(a, b) for a, b in zip(found, runner.run(None, feed), strict=True))


def subject(name: str) -> Subject:
    """Return a small network by its name."""
    framework, _, own = name.partition(":")
    return torch_subject(own) if framework == "torch" else keras_subject(own)


def sweep(name: str, target: str) -> Iterator[tuple[str, str | None]]:
    """Yield what was put into the int8 file of a network, ``none`` first, and what is said of it, None if it passes."""
    rng, network = np.random.default_rng(1), subject(name)
    example = network.draw(rng)
    normswap.patch(network.model, target, example=example)
    options: dict[str, Any] = {"example": example, "dynamic_size": network.dynamic}
    with tempfile.TemporaryDirectory() as folder:
        path, plain, faulty = (Path(folder) / f"{each}.onnx" for each in ("int8", "float", "faulty"))
        data = [network.draw(rng) for _ in range(12)]
        try:
            normswap.to_onnx(network.model, path, **options, int8=data)
        except NormswapError as error:
            yield "none", str(error)
            return
        normswap.to_onnx(network.model, plain, **options, check=False)
        more = [network.draw(rng) for _ in range(4)]
        again = normswap.verify(network.model, path, example=example, data=more, float_file=plain, seed=1)
        yield "none", None if again else str(again)
        for kind, change in FAULTS.items():
            proto = onnx.load(path)
            if not change(proto, random.Random(f"{name} {target} {kind}")) or not moves(
                proto, onnx.load(path), more[0]
            ):
                continue
            faulty.write_bytes(proto.SerializeToString())
            try:
                verdict = normswap.verify(network.model, faulty, example=example, data=more[:1], float_file=plain)
                yield kind, None if verdict else str(verdict)
            except NormswapError as error:
                yield kind, str(error)


# ----------------------------------------------------------------------------------------------------------- accuracy


IMAGES = 128


def accuracies(data: Path, console: Console) -> None:
    """Print the accuracy of the float and int8 files of two trained networks with each norm."""
    table = Table("network", "norm", "float", "int8", "the same answer", "noise, dB", "left in float", "MB")
    for network, make, (chosen, tested), shape in trained(data):
        for target in ("brn", "gn", "sn"):
            model = make()
            report = normswap.patch(model, target, example=torch.zeros(2, *shape))
            x, _ = chosen.batch(chosen.sample(IMAGES))
            batches = [torch.from_numpy(x[start : start + 16]) for start in range(0, len(x), 16)]
            if target == "gn":
                normswap.calibrate(report, batches, refit=False)
            told = {"preprocessing": chosen.preprocessing.to_dict()}
            with tempfile.TemporaryDirectory() as folder:
                answers, sizes = [], []
                for int8 in (None, batches):
                    path = Path(folder) / f"{int8 is None}.onnx"
                    made = normswap.to_onnx(model, path, example=torch.randn(2, *shape), int8=int8, metadata=told)
                    predict, _ = open_onnx(path)
                    answers.append(np.concatenate([predict(x).argmax(1) for x, _ in tested.batches(50)]))
                    sizes.append(made.size / 1e6)
            right = [f"{100 * float((each == tested.labels).mean()):.2f}" for each in answers]
            same = f"{100 * float((answers[0] == answers[1]).mean()):.2f}"
            assert made.int8 is not None
            left = ", ".join(made.int8.left) or "-"
            size = " -> ".join(f"{each:.2f}" for each in sizes)
            table.add_row(network, target, *right, same, f"{made.int8.noise_db:.1f}", left, size)
            console.print(network, target, right, same)
    console.print(table)


def trained(data: Path) -> Iterator[tuple[str, Callable[[], Any], tuple[Data, Data], tuple[int, ...]]]:
    """Yield the networks that there are: name, how to build it, images to choose by and to test on, and their shape."""
    source, weights = Path(__file__).parent.parent / "examples" / "resnet20.py", data / "torch" / "cifar10_resnet20.th"
    known = preprocessing_of(load_model(f"{source}:resnet20", weights))
    assert known is not None
    parts = [open_data(str(data / "cifar10" / part), known) for part in ("train", "test")]
    yield "ResNet-20", lambda: load_model(f"{source}:resnet20", weights), (parts[0], parts[1]), (3, 32, 32)
    yield "EfficientNet-Lite0", efficientnet_lite0, images(data), (3, 224, 224)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="torch:NAME or keras:NAME of fault_subjects.py")
    parser.add_argument("--accuracy", type=Path, metavar="DATA", help="measure accuracy instead")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=120)
    if asked.accuracy:
        accuracies(asked.accuracy, console)
        return
    planted(asked.names or [*(f"torch:{n}" for n in TORCH), *(f"keras:{n}" for n in KERAS)], console)


if __name__ == "__main__":
    main()
