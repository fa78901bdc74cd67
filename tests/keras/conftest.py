"""Trained models of every kind, and one seed and naming for every Keras test."""

import keras
import numpy as np
import pytest

from normswap.patchers.keras.sites import find_sites

from .models import MODELS


@pytest.fixture(autouse=True)
def _fresh_session():
    """Start each test from seed 0 and layer names without numbers."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture
def images():
    """Return seeded inputs that every model of `make` takes."""
    return np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype("float32")


@pytest.fixture
def train():
    """Return the function that gives every BatchNorm of a model the values of a trained one."""

    def train(model):
        rng = np.random.default_rng(0)
        for layer in find_sites(model)[0]:
            for variable in layer.weights:
                variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        return model

    return train


@pytest.fixture
def make(train):
    """Return the function that makes a model of one kind, with trained BatchNorms."""
    return lambda kind: train(MODELS[kind]())
