"""Which quantised releases are read? MXFP4, and FP8 with a scale for each block; others are refused with the way out.

The weights are read as the numbers that they stand for. What a release's own kernels do to activations is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jax_client.errors import BadRequestError, UnsupportedError

KEY = "quantization_config"
READ = "'mxfp4', and 'fp8' with a weight_block_size"
WAY_OUT = "Use the unquantised release of the model (bfloat16), or one of a format that is read"
PACKED = (
    "two published decoders make different weights of its packed integers. Of four bits, one takes a code u of 8 or "
    "more as u - 16 (two's complement), the other takes every code as u - 8 (offset binary); only one of them can be "
    "right, and the files do not tell which"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How a release stores its quantised weights.

    Attributes:
        method: "mxfp4" (of stacked experts) or "fp8" (e4m3).
        block: (rows, columns) of an [out, in] weight that share one scale.
    """

    method: Literal["mxfp4", "fp8"]
    block: tuple[int, int]


def read_quantization(hf: Mapping[str, Any], where: str) -> Quantization | None:
    """Read the `quantization_config` of a config.json; None where there is none.

    A model with several towers may have it in its `text_config`.

    Args:
        hf: the parsed config.json.
        where: the file, for messages.

    Raises:
        UnsupportedError: a format that is not read: which, why, and what to use instead.
        BadRequestError: a value that is no description of a format.
    """
    text = hf.get("text_config")
    found = hf.get(KEY)
    if found is None and isinstance(text, Mapping):
        found = text.get(KEY)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if not isinstance(method, str):
        raise BadRequestError(
            f"{where}: {KEY} is {found!r:.200}; expected an object with a 'quant_method'. Use the release's own file."
        )
    if method == "mxfp4":
        return Quantization(method="mxfp4", block=(1, 32))
    if method == "fp8":
        return Quantization(method="fp8", block=_fp8_block(found, where))
    kind = f"quant_method is {method!r}"
    reason = "it is not read"
    if method == "compressed-tensors":
        kind += f", format {found.get('format')!r}"
        reason = PACKED if found.get("format") == "pack-quantized" else reason
    raise _refused(where, kind, reason)


def without_quantization(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without its `quantization_config`, at both places."""
    plain = {key: value for key, value in hf.items() if key != KEY}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key != KEY}
    return plain


def _fp8_block(found: Mapping[str, Any], where: str) -> tuple[int, int]:
    block = found.get("weight_block_size")
    if (kind := found.get("fmt", "e4m3")) != "e4m3":
        raise _refused(where, f"quant_method is 'fp8', fmt {kind!r}", "only e4m3 is read")
    if (scheme := found.get("activation_scheme", "dynamic")) != "dynamic":
        raise _refused(
            where,
            f"quant_method is 'fp8', activation_scheme {scheme!r}",
            "it brings scales of the activations, which are not read",
        )
    if block is None:
        raise _refused(where, "quant_method is 'fp8' without a weight_block_size", "only scales of blocks are read")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise BadRequestError(
            f"{where}: {KEY}: weight_block_size is {block!r:.80}; expected two positive integers, such as [128, 128]. "
            "Use the release's own file."
        )
    return block[0], block[1]


def _refused(where: str, kind: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{where}: {KEY}: {kind}, which is not loaded: {reason}. {WAY_OUT}: {READ}.")
