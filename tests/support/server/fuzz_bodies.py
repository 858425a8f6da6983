"""What can a client send that is nearly, or not at all, what a route asks for? Hypothesis strategies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import zstandard
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as pb

DEEP: Any = 0
for _ in range(60):
    DEEP = [DEEP]
NUMBERS = st.sampled_from([0, -1, 1, 2, 33, 2**31 - 1, 2**31, 2**63, 2**70, -(2**63), 10**9, 10**30, 0.5, -0.0, 1e308])
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "..", "../../etc/passwd", "tinker://", "a" * 5_000, "\ud800", "\u202e", "nan", "😀", "%00"]
    ),
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    TEXTS,
    st.lists(NUMBERS, max_size=5),
    st.dictionaries(TEXTS, NUMBERS, max_size=3),
    st.just(DEEP),
    st.just([float("nan"), float("inf")]),
    st.just([0] * 3_000),
)


def of_schema(schema: dict[str, Any], defs: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that a JSON schema of pydantic's allows, as far as such schemas go."""
    if "$ref" in schema:
        return of_schema(defs[schema["$ref"].rsplit("/", 1)[1]], defs, depth + 1)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return st.one_of([of_schema(each, defs, depth + 1) for each in schema[several]])
    kind = schema.get("type")
    if kind == "object":
        known = {name: of_schema(each, defs, depth + 1) for name, each in schema.get("properties", {}).items()}
        required = {name: known.pop(name) for name in schema.get("required", ()) if name in known}
        more = schema.get("additionalProperties")
        extra = st.dictionaries(TEXTS, of_schema(more, defs, depth + 1), max_size=3) if isinstance(more, dict) else None
        own = st.fixed_dictionaries(required, optional=known)
        return own if extra is None else st.builds(lambda a, b: a | b, extra, own)
    if kind == "array":
        return st.lists(of_schema(schema.get("items", {}), defs, depth + 1), max_size=5)
    simple = {
        "integer": st.one_of(st.integers(-2, 40), NUMBERS.filter(lambda n: isinstance(n, int))),
        "number": st.one_of(st.integers(-2, 40), st.floats(-2, 2), NUMBERS),
        "string": TEXTS,
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return simple.get(str(kind), JUNK)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


def changed(draw: Callable[[Any], Any], valid: dict[str, Any]) -> dict[str, Any]:
    """A copy with up to three values replaced, left out, or added."""
    found = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 3))):
        paths = list(places(found))
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        parent = found
        for key in way:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if what == "replace":
            parent[last] = deepcopy(draw(JUNK))
        elif what == "drop":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(TEXTS)] = deepcopy(draw(JUNK))
        else:
            parent.insert(last, deepcopy(draw(JUNK)))
    return found


def written(draw: Callable[[Any], Any], body: Any) -> bytes:
    """As JSON: surrogates escaped, NaN as a word; now and then with a key twice, or deeper than can be parsed."""
    text = json.dumps(body, allow_nan=True)
    how = draw(st.sampled_from(["plain"] * 6 + ["twice", "deep"]))
    if how == "twice" and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]
    elif how == "deep":
        text = text[:-1] + ', "x": ' + "[" * 10_000 + "]" * 10_000 + "}"
    return text.encode()


def damaged(draw: Callable[[Any], Any], body: bytes) -> bytes:
    """The same bytes, or some of them changed, or too few, or none that mean anything."""
    how = draw(st.sampled_from(["whole"] * 5 + ["cut", "flip", "insert", "random"]))
    # Not up to the length: that must not depend on how far the numbers of the test have come.
    at = draw(st.integers(0, 5_000)) % max(len(body), 1)
    if how == "cut":
        return body[:at]
    if how == "flip" and body:
        return body[:at] + bytes([body[at] ^ draw(st.integers(1, 255))]) + body[at + 1 :]
    if how == "insert":
        return body[:at] + draw(st.binary(max_size=20)) + body[at:]
    return draw(st.binary(max_size=200)) if how == "random" else body


def wrapped(draw: Callable[[Any], Any], body: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """A body with its headers: as it is, as zstd, as what claims to be, or as a frame that grows."""
    how = draw(st.sampled_from(["plain"] * 6 + ["zstd", "claimed", "bomb", "gzip"]))
    if how == "zstd":
        return zstandard.compress(body), [(b"content-encoding", b"zstd")]
    if how == "bomb":
        return zstandard.compress(body + b" " * 2**21), [(b"content-encoding", b"zstd")]
    if how in ("claimed", "gzip"):
        return body, [(b"content-encoding", b"zstd" if how == "claimed" else b"gzip")]
    return body, []


def tensor(draw: Callable[[Any], Any], length: int) -> pb.Tensor:
    """A tensor that may not be what it says of itself."""
    values = draw(st.lists(st.integers(0, 70), min_size=length, max_size=length))
    dtype = draw(st.sampled_from([pb.DTYPE_INT64] * 3 + [pb.DTYPE_FLOAT32, pb.DTYPE_INT32, pb.DTYPE_BFLOAT16, 0]))
    sizes = {pb.DTYPE_INT64: 8, pb.DTYPE_FLOAT32: 4, pb.DTYPE_INT32: 4}
    data = b"".join(value.to_bytes(sizes.get(dtype, 2), "little") for value in values)
    data = draw(st.sampled_from([data, data, data, data[:-1], data * 2, b"", b"\xff" * len(data)]))
    shapes = st.lists(st.sampled_from([0, 1, length, -1, 2**40, 2**62]), max_size=3)
    shape = draw(st.one_of(st.just([length]), shapes))
    if draw(st.integers(0, 3)):
        return pb.Tensor(dtype=dtype, dense=data, shape=shape)
    indices = st.lists(st.sampled_from([0, 1, 2, length, -1, 2**40, 2**62]), max_size=5)
    found = pb.Tensor(dtype=dtype, shape=shape)
    found.sparse_csr.values = data
    found.sparse_csr.crow_indices = b"".join(i.to_bytes(8, "little", signed=True) for i in draw(indices))
    found.sparse_csr.col_indices = b"".join(i.to_bytes(8, "little", signed=True) for i in draw(indices))
    return found


def forward_backward(draw: Callable[[Any], Any], model_id: str, number: int) -> bytes:
    """A message of one to three datums."""
    message = pb.ForwardBackwardRequest(
        model_id=draw(st.sampled_from([model_id] * 9 + ["", "x"])),
        seq_id=draw(st.sampled_from([number] * 9 + [0, -1, number + 1])),
        loss_fn=draw(st.sampled_from(["cross_entropy"] * 4 + ["ppo", "importance_sampling", "custom", "", "\u202e"])),
        forward_only=draw(st.booleans()),
    )
    for key in draw(st.lists(st.sampled_from(["loss_id", "clip_low_threshold", "", "beta"]), max_size=2)):
        if draw(st.booleans()):
            message.loss_fn_config_v2[key].number = draw(st.floats(width=32))
        else:
            message.loss_fn_config_v2[key].text = draw(st.sampled_from(["", f"{model_id}:loss:0", "x" * 300]))
    for _ in range(draw(st.integers(0, 3))):
        length = draw(st.integers(1, 6))
        datum = message.data.add()
        for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2]))):
            chunk = datum.model_input.add()
            kind = draw(st.sampled_from(["text"] * 8 + ["image", "dmel", "none"]))
            if kind == "text":
                tokens = [draw(st.sampled_from([1, 5, 63, 64, -1, 2**31 - 1])) if draw(st.booleans()) else 3]
                data = b"".join(token.to_bytes(4, "little", signed=True) for token in tokens * length)
                chunk.encoded_text.tokens = data if draw(st.integers(0, 9)) else data[:-1]
            elif kind == "image":
                chunk.image.data = b"\x89PNG"
            elif kind == "dmel":
                chunk.dmel.dmel = b"x"
        for name in draw(st.sampled_from([["target_tokens", "weights"]] * 4 + [["target_tokens"], [], ["advantages"]])):
            datum.loss_fn_inputs[name].CopyFrom(tensor(draw, length))
    return message.SerializeToString()
