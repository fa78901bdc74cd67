"""Fine-tune in Keras's ``fit`` with two images a step: BatchNorm, and anchored SN with the callback.

The network is trained with BatchNorm on other digits; those learned here are mirrored. Takes half a minute:
``python examples/keras_fit.py``
"""

import keras

import normswap
from normswap.demo.digits import digits
from normswap.demo.keras import trained
from normswap.finetune import GateSchedule, KerasCallback, StopAtNaN

BATCH, COUNT, RATE = 2, 1000, 0.01


def main(count=COUNT):
    """Return for each network the accuracy on mirrored digits before and after."""
    learn, public = digits("channels_last")
    original = trained(public)
    images, labels = learn.batch(range(len(learn)))
    images = images[:, :, ::-1]
    anchored = normswap.patch(original, normswap.SwitchNorm(batch_statistics="frozen"), inplace=False).model
    steps = count // BATCH
    rows = {}
    for name, model, callbacks in (
        ("BatchNorm", original, []),
        ("anchored SN", anchored, [KerasCallback(GateSchedule(anchored, steps, freeze=0.1), StopAtNaN())]),
    ):
        keras.utils.set_random_seed(0)
        rate = keras.optimizers.schedules.CosineDecay(RATE, steps)
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.9, global_clipnorm=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        held_out = {"x": images[COUNT:], "y": labels[COUNT:], "verbose": 0, "return_dict": True}
        before = model.evaluate(**held_out)["accuracy"]
        model.fit(images[:count], labels[:count], batch_size=BATCH, verbose=0, callbacks=callbacks)
        rows[name] = (100 * before, 100 * model.evaluate(**held_out)["accuracy"])
    return rows


if __name__ == "__main__":
    for name, (before, after) in main().items():
        print(f"{name:12}{before:6.1f} % -> {after:.1f} %")
