"""Which arguments do the training programs take? Their shapes, types and places say it, and nothing is on a device."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_client.engine.core.adapters import Weights
from jax_client.engine.core.requests import AdamSettings
from jax_client.engine.train import packing
from jax_client.engine.train.programs import Batch, laid_out
from jax_client.losses import registry
from jax_client.sharding import shape_of_rows, shape_of_whole
from jax_client.values import TrainExample


def batch_shapes(rows: int, length: int, targets: int, mesh: Mesh) -> Batch:
    """Return a micro-batch of this rectangle, with a number of targets for each position, as shapes."""
    example = TrainExample(tokens_T=np.zeros(1, np.int32), targets=np.zeros((1, targets), np.int32))
    slots = (packing.Slot(index=0, row=0, start=0, length=1),)
    plan = packing.Plan(rows=rows, length=length, slots=slots)
    filled = packing.fill(plan, [example], dict.fromkeys(registry.INPUTS, 0.0))
    return laid_out(filled, partial(shape_of_rows, mesh=mesh), partial(shape_of_whole, mesh=mesh))


def loss_shape(mesh: Mesh) -> jax.Array:
    """Return the number of a loss as a shape."""
    return shape_of_whole(np.int32(0), mesh)


def step_shapes(weights: Weights, mesh: Mesh) -> tuple[Any, ...]:
    """Return the arguments of an optimizer step of an adapter, given as shapes."""
    hyper = {field.name: shape_of_whole(np.float32(0), mesh) for field in fields(AdamSettings)}
    return weights, weights, weights, weights, shape_of_whole(np.int32(0), mesh), hyper
