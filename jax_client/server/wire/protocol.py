"""How do protobuf messages become the API's types, and responses messages? Through the SDK's own message classes.

The SDK encodes requests and decodes responses; this module is the other half of both. It checks that a message is
consistent (a shape fits the bytes); `runs` checks what it means, as it does for in-process calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from google.protobuf.message import DecodeError
from tinker import types

from jax_client.errors import BadRequestError
from jax_client.runs.sdk import TopkLogprobs
from jax_client.runs.sdk import tinker_public_pb2 as pb

ForwardBackwardRequest = pb.ForwardBackwardRequest
# A datum of a response, by the tensors' names.
Tensors = Mapping[str, types.TensorData]

_NUMPY: dict[int, tuple[np.dtype, types.TensorDtype]] = {
    pb.DTYPE_FLOAT32: (np.dtype("<f4"), "float32"),
    pb.DTYPE_INT64: (np.dtype("<i8"), "int64"),
    pb.DTYPE_INT32: (np.dtype("<i4"), "int64"),
}
_STOP = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}


def read_forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    """Parse a request.

    Raises:
        BadRequestError: the body is no such message.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise BadRequestError("the body is no ForwardBackwardRequest; use the tinker SDK 0.38.") from None
    return message


def loss_config(message: pb.ForwardBackwardRequest) -> dict[str, float | str] | None:
    """Return the loss's settings, from the newer map if the client sent it: that one can also hold text."""
    if message.loss_fn_config_v2:
        settings = message.loss_fn_config_v2.items()
        return {key: getattr(value, value.WhichOneof("value") or "number") for key, value in settings}
    return dict(message.loss_fn_config) or None


def read_datums(message: pb.ForwardBackwardRequest) -> list[types.Datum]:
    """Return the datums of a request.

    Raises:
        BadRequestError: a tensor's bytes do not fit its dtype and shape, or a chunk is of no known kind.
    """
    return [_datum(datum, f"data[{i}]") for i, datum in enumerate(message.data)]


def _datum(datum: pb.Datum, where: str) -> types.Datum:
    chunks = [_chunk(chunk, f"{where}.model_input[{i}]") for i, chunk in enumerate(datum.model_input)]
    inputs = {name: _tensor(tensor, f"{where}.{name}") for name, tensor in datum.loss_fn_inputs.items()}
    return types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs=inputs)


def _chunk(chunk: pb.Chunk, where: str) -> types.ModelInputChunk:
    kind = chunk.WhichOneof("chunk")
    if kind == "encoded_text":
        return types.EncodedTextChunk(tokens=_array(chunk.encoded_text.tokens, np.dtype("<i4"), where).tolist())
    raise BadRequestError(f"{where} is a chunk of kind {kind}; this server takes text.")


def _tensor(tensor: pb.Tensor, where: str) -> types.TensorData:
    if tensor.dtype not in _NUMPY:
        raise BadRequestError(f"{where} has dtype {tensor.dtype}; float32, int64 and int32 are known.")
    numpy_dtype, dtype = _NUMPY[tensor.dtype]
    shape = list(tensor.shape)
    if tensor.HasField("sparse_csr"):
        csr = tensor.sparse_csr
        return types.TensorData(
            data=_array(csr.values, numpy_dtype, where),
            dtype=dtype,
            shape=shape,
            sparse_crow_indices=_array(csr.crow_indices, np.dtype("<i8"), where).tolist(),
            sparse_col_indices=_array(csr.col_indices, np.dtype("<i8"), where).tolist(),
        )
    data = _array(tensor.dense, numpy_dtype, where)
    if shape and math.prod(shape) != data.size:
        raise BadRequestError(f"{where} has shape {shape}, but {data.size} values.")
    return types.TensorData(data=data, dtype=dtype, shape=shape or None)


def _array(data: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise BadRequestError(f"{where} has {len(data)} bytes, no multiple of {dtype.itemsize}.")
    return np.frombuffer(data, dtype).copy()


def forward_backward_answer(output: types.ForwardBackwardOutput) -> bytes:
    """Encode a response. Consecutive datums with the same trailing shapes share a record."""
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type=output.loss_fn_output_type,
        metrics=output.metrics,
    )
    for group in _same_shapes(output.loss_fn_outputs):
        record = message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type, num_datums=len(group))
        for name in group[0]:
            tensors = [datum[name] for datum in group]
            record.fields[name].CopyFrom(_batched(tensors))
    return message.SerializeToString()


def _same_shapes(datums: Sequence[Tensors]) -> list[list[Tensors]]:
    groups: list[list[Tensors]] = []
    last: dict[str, tuple[int, ...]] | None = None
    for datum in datums:
        shapes = {name: tuple(_shape(tensor)[1:]) for name, tensor in datum.items()}
        if shapes != last:
            groups.append([])
            last = shapes
        groups[-1].append(datum)
    return groups


def _batched(tensors: Sequence[types.TensorData]) -> pb.BatchedTensor:
    arrays = [np.ascontiguousarray(tensor.to_numpy()) for tensor in tensors]
    offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64)
    return pb.BatchedTensor(
        data=b"".join(array.tobytes() for array in arrays),
        offsets=offsets.tobytes(),
        dtype=_proto_dtype(arrays[0].dtype),
        trailing_shape=_shape(tensors[0])[1:],
    )


def _shape(tensor: types.TensorData) -> list[int]:
    return list(tensor.to_numpy().shape) if tensor.shape is None else list(tensor.shape)


def _proto_dtype(dtype: np.dtype) -> pb.DType.ValueType:
    return pb.DTYPE_FLOAT32 if dtype == np.float32 else pb.DTYPE_INT64


def sample_answer(response: types.SampleResponse) -> bytes:
    """Encode a response to a sampling request."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens or 0)
    for sequence in response.sequences:
        part = message.sequences.add(
            stop_reason=_STOP[sequence.stop_reason], tokens=np.asarray(sequence.tokens, np.int32).tobytes()
        )
        if sequence.logprobs is not None:
            part.logprobs = np.asarray(sequence.logprobs, np.float32).tobytes()
        if sequence.topk_logprobs_np is not None:
            part.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk_logprobs_np))
    if response.prompt_logprobs is not None:
        known = [math.nan if value is None else value for value in response.prompt_logprobs]
        message.prompt_logprobs = np.asarray(known, np.float32).tobytes()
    if response.topk_prompt_logprobs_np is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(response.topk_prompt_logprobs_np))
    if response.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_proto_tensor(response.target_prompt_logprobs))
    if response.prompt_alt_tokens is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(_proto_tensor(response.prompt_alt_tokens.tokens))
        message.prompt_alt_tokens.logprobs.CopyFrom(_proto_tensor(response.prompt_alt_tokens.logprobs))
    return message.SerializeToString()


def _topk(topk: TopkLogprobs) -> pb.TopkLogprobs:
    length, k = topk.token_ids.shape
    return pb.TopkLogprobs(
        token_ids=np.asarray(topk.token_ids, np.int32).tobytes(),
        logprobs=np.asarray(topk.logprobs, np.float32).tobytes(),
        k=k,
        length=length,
    )


def _proto_tensor(tensor: types.TensorData) -> pb.Tensor:
    message = pb.Tensor(dtype=_proto_dtype(np.dtype(tensor.dtype)), shape=tensor.shape or [])
    values = np.asarray(tensor.data, tensor.dtype).tobytes()
    if tensor.sparse_crow_indices is None:
        message.dense = values
    else:
        message.sparse_csr.values = values
        message.sparse_csr.crow_indices = np.asarray(tensor.sparse_crow_indices, np.int64).tobytes()
        message.sparse_csr.col_indices = np.asarray(tensor.sparse_col_indices, np.int64).tobytes()
    return message
