"""How does an uploaded loss see a batch, and what does it report?

`GraphCall` checks and copies the inputs of one call, and has its programs compiled; its `run` is the engine's custom
loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tinker import types

from jax_client.errors import BadRequestError, BadTypeError, RequestFailedError
from jax_client.runs.checks.tensors import dense
from jax_client.torch_graph.graph import Input
from jax_client.torch_graph.program import GraphProgram, shapes_of
from jax_client.values import TrainExample


class GraphCall:
    """One call of an uploaded loss: what it reads of the batch, checked and copied.

    Attributes:
        prepared: done when the loss can be run; it fails with a BadRequestError if it cannot be computed for the batch.
            Cancelling it ends the compiles that nothing else waits for.

    Args:
        program: the loss.
        data: the batch.
        sequences: the same, as the engine takes it.

    Raises:
        BadRequestError: a datum lacks an input or has it in another rank.
        BadTypeError: an input is of a type that is no number.
    """

    def __init__(self, program: GraphProgram, data: Sequence[types.Datum], sequences: Sequence[TrainExample]) -> None:
        self._program = program
        logprobs, *others = program.graph.inputs
        self._inputs = []
        for i, (datum, sequence) in enumerate(zip(data, sequences, strict=True)):
            if sequence.targets.ndim != logprobs.rank:
                raise self._wrong_rank(i, "target_tokens", sequence.targets.shape, logprobs)
            self._inputs.append([self._input(datum, i, entry) for entry in others])
        self.prepared = program.prepare(
            shapes_of([np.empty(sequence.targets.shape, np.float32), *inputs])
            for sequence, inputs in zip(sequences, self._inputs, strict=True)
        )

    def _input(self, datum: types.Datum, i: int, entry: Input) -> np.ndarray:
        if entry.name not in datum.loss_fn_inputs:
            present = ", ".join(datum.loss_fn_inputs) or "none"
            raise BadRequestError(
                f"data[{i}].loss_fn_inputs has no {entry.name!r}, which loss {self._program.graph.name} takes; "
                f"present: {present}. Add it to the Datum."
            )
        where = f"data[{i}].loss_fn_inputs[{entry.name!r}]"
        array = dense(datum.loss_fn_inputs[entry.name], where)
        if array.dtype.kind not in "fi":
            raise BadTypeError(f"{where} has dtype {array.dtype}; give float32 or int64.")
        if entry.rank == 0 and array.size == 1:
            array = array.reshape(())  # on the wire a scalar looks like a list of one
        if array.ndim != entry.rank:
            raise self._wrong_rank(i, entry.name, array.shape, entry)
        return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)

    def _wrong_rank(self, i: int, key: str, shape: tuple[int, ...], entry: Input) -> BadRequestError:
        return BadRequestError(
            f"data[{i}].loss_fn_inputs[{key!r}] has shape {list(shape)}, but loss {self._program.graph.name} declared "
            f"{entry.name} with rank {entry.rank}. Create the loss with the rank that the data have."
        )

    def run(self, logprobs: list[np.ndarray]) -> tuple[float, list[np.ndarray], dict[str, float]]:
        """Return the sum of the losses, their gradients and the metrics, as the engine asks for them.

        Metrics add up over the datums, those named `:mean` are divided by their number. The others are those of the
        SDK's own way, which sends the gradients as the weights of a cross entropy.

        Raises:
            RequestFailedError: the loss or a gradient is not finite.
        """
        found = self.prepared.result().evaluate(
            [[p, *inputs] for p, inputs in zip(logprobs, self._inputs, strict=True)]
        )
        for i, (loss, gradient, _) in enumerate(found):
            _check_finite(i, loss, gradient)
        gradients = [gradient for _, gradient, _ in found]
        metrics = {
            key: sum(own[key] for _, _, own in found) / (len(found) if key.endswith(":mean") else 1)
            for key in self._program.graph.metrics
        }
        pairs = list(zip(gradients, logprobs, strict=True))
        tokens = sum(int(np.count_nonzero(g)) for g in gradients)
        if tokens:
            metrics["nll:mean"] = -sum(float(p[g != 0].sum(dtype=np.float64)) for g, p in pairs) / tokens
        metrics |= {
            "tokens:sum": float(tokens),
            "surrogate_loss:sum": sum(float(np.vdot(g, p)) for g, p in pairs),
        }
        return sum(loss for loss, _, _ in found), gradients, metrics


def _check_finite(i: int, loss: float, gradient: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(gradient))
    if math.isfinite(loss) and not len(bad):
        return
    where = f"datum {i}"
    if len(bad):
        where += f", whose gradient is {gradient[tuple(bad[0])]} at position {bad[0].tolist()}"
    raise RequestFailedError(
        f"your loss is {loss} for {where}; no gradients were accumulated. Look for an index out of range, a division, "
        "a logarithm or a square root of zero there.",
        category="user",
    )
