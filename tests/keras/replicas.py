"""What layers and trainings compute on one device and on two replicas of a strategy, for `test_backends`."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import tensorflow as tf

import normswap
from normswap.bundles import bundle
from normswap.errors import NormswapError
from normswap.finetune.run.run import Settings, finetune
from normswap.layers.keras import BatchRenormalization, SwitchNormalization

from .fitting import PREPROCESSING, fitted, losses, small_net, stripes
from .parity import inputs, numpy, values

PARTS = (5, 3)


def two():
    """Return the strategy of two devices made of one, which is possible before TensorFlow has computed anything."""
    (device,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def layers(strategy):
    """Return outputs, gradients and statistics on one device, and with the batch in uneven parts on two."""
    results = {}
    x, dy = inputs((sum(PARTS), 4, 6)), np.sin(np.arange(sum(PARTS) * 24, dtype="float32")).reshape(-1, 4, 6)
    strategies = {
        "one": tf.distribute.OneDeviceStrategy("CPU:0"),
        "two": strategy,
    }
    for cls in (SwitchNormalization, BatchRenormalization):
        for name, strategy in strategies.items():
            bounds = np.cumsum([0, *PARTS]) if name == "two" else [0, len(x)]
            with strategy.scope():
                layer = cls(momentum=0.5, synchronized=True)
                layer.build(x.shape)
                for variable, value in values(layer).items():
                    getattr(layer, variable).assign(value)

            def part(array, bounds=bounds, strategy=strategy):
                def piece(context):
                    rank = context.replica_id_in_sync_group
                    return tf.constant(array[bounds[rank] : bounds[rank + 1]])

                return strategy.experimental_distribute_values_from_function(piece)

            @tf.function
            def step(x, dy, layer=layer):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = layer(x, training=True)
                sources = [x, *(v.value for v in layer.trainable_variables)]
                return y, tape.gradient(y, sources, dy)

            y, (dx, *gradients) = strategy.run(step, args=(part(x), part(dy)))
            parts = strategy.experimental_local_results
            found = {"y": np.concatenate(parts(y)), "dx": np.concatenate(parts(dx))}
            for variable, gradient in zip(layer.trainable_variables, gradients, strict=True):
                found[variable.name] = np.sum([g.numpy() for g in parts(gradient)], 0)
            for variable in layer.non_trainable_variables:
                found[variable.name] = numpy(variable)
            results.update({f"{cls.__name__}/{name}/{key}": value for key, value in found.items()})
    return results


def trainings(strategy):
    """Return the losses of each norm on one device and on two, and what is refused on two."""
    found = {}
    for norm in ("gn", "sn", "brn"):
        found[norm] = []
        for scope in (nullcontext(), strategy.scope()):
            with scope:
                found[norm].append(losses(small_net(norm), steps=6, weight_decay=0.01, gate_lr=3.0))
    with strategy.scope():
        model = small_net("sn")
        found["flag"] = model.get_layer("norm").synchronized
        for name, options in {"uneven": {"batch_size": 15}, "accumulate": {"accumulate": 2}}.items():
            try:
                fitted(model, **options)
            except NormswapError as error:
                found[name] = f"{type(error).__name__}: {error}"
    found["run"] = [run(scope) for scope in (nullcontext(), strategy.scope())]
    return found


def run(scope):
    """Distil, re-estimate and evaluate a bundle, and return the figures."""
    with scope, tempfile.TemporaryDirectory() as folder:
        original = small_net("bn")
        report = normswap.patch(original, "sn", inplace=False, example=np.zeros((1, 6, 6, 1), np.float32))
        bundle.save(report, Path(folder, "in"), original=original, preprocessing=PREPROCESSING)
        settings = Settings(steps=4, batch_size=16, teacher="original", ema=0.5, reestimate=16, early_stop=False)
        result = finetune(Path(folder, "in"), Path(folder, "out"), stripes(), settings, eval_data=stripes())
        return {"loss": result.loss, "top1": result.evaluation.top1}
