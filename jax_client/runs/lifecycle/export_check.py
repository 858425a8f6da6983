"""Does an export compute what the adapter computed? Both score a probe text on the engine, over all the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jax_client.errors import BadRequestError, JaxClientError, NotFoundError, RequestFailedError
from jax_client.models.config import ModelConfig
from jax_client.values import AdapterState
from jax_client.weights.read import hf
from jax_client.weights.read.source import ModelSource
from jax_client.weights.read.tokenizer import load_tokenizer
from jax_client.weights.write import peft_config
from jax_client.weights.write.peft import read_adapter

if TYPE_CHECKING:
    from jax_client.engine.protocol import Engine

# No multiple of 128: such rows go through an attention that every platform and mesh has (models/parts/attention.py).
PROBE_TOKENS = 96
PROBE = """The harbour master kept two notebooks. In the first one he wrote the names of the ships, their tonnage, and
the hour at which they passed the light; in the second one, which nobody but the cook had ever seen, he drew the birds.
On 14 March 1923 there were 27 entries in the first and 3 in the second: a heron, a gull with one leg, and something
that he could not name. "It came from the north," he told the cook, "and it did not land." She looked at the page for a
long time. Then she said: if x = 4 and y = x * (x + 1), how far is it to Bergen? He laughed and put on his coat."""
# Largest difference of a logit that is let through, as a share of the largest logit. Rounding was measured to make up
# to 6e-6 in float32 and up to 0.026 in bfloat16 (docs/export.md).
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
# Of some merged models, the share of the tokens that must be within it in bfloat16, those that differ least. Rounding
# moves the rest far without an error: routers choose other experts, and the norm behind a gated delta rule makes much
# of a small output, and of what rounding did to it.
STEADY_OF_EXPERTS, STEADY_OF_DELTA = 0.5, 0.75
AGAIN = "Do not use it: delete it and export again; if that fails too, look at the disk."


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportCheck:
    """What was compared, and how far apart it was.

    Attributes:
        tokens: of the probe text that count: all, or a `STEADY_...` share of them.
        difference: the largest absolute difference of a logit, over these tokens and the whole vocabulary.
        tolerance: the difference above which the export would have been refused.
    """

    tokens: int
    difference: float
    tolerance: float


def check_export(engine: Engine, state: AdapterState | None, directory: Path, owner: str = "") -> ExportCheck:
    """Compare what was exported, read back from the disk, with the adapter that it was exported from.

    A PEFT directory is loaded as a second adapter of the engine; a merged one as a second model beside the engine's,
    in the engine's dtype.

    Args:
        engine: of the base model.
        state: the adapter; None is the base model, for a merged directory.
        directory: as `peft.write_adapter` or `merged.write_merged` left it.
        owner: who pays for the time on the device, "" for no one.

    Raises:
        RequestFailedError: the export cannot be read back, or computes something else; or there is no memory for a
            second model (category "user").
    """
    tokens_T, lane = probe_tokens(engine.source, engine.model), engine.open_lane(owner)
    live_TV = engine.logits(lane, tokens_T, state).result()
    dtypes, share_of_tokens = {engine.dtype.name}, 1.0
    try:
        if (directory / peft_config.CONFIG).is_file():
            back = read_adapter(directory, engine.model)
            _refuse_other_arrays(state, back, directory)
            exported_TV = engine.logits(lane, tokens_T, back).result()
        else:
            source = ModelSource(name=str(directory), path=directory, kind="hf")
            exported_TV = engine.logits(lane, tokens_T, None, source).result()
            dtypes.add(str(hf.read_json(directory, hf.CONFIG).get("dtype")))
            if "bfloat16" in dtypes:
                share_of_tokens = _steady(engine.model)
    except (BadRequestError, NotFoundError) as error:
        raise RequestFailedError(f"the export cannot be read back: {error} {AGAIN}") from error
    apart_T = np.sort(np.abs(live_TV - exported_TV).max(-1))  # not finite ones are last
    count = int(np.ceil(share_of_tokens * len(apart_T)))
    difference = float(apart_T[count - 1])
    share = max(TOLERANCE[dtype] for dtype in dtypes)
    tolerance = share * float(np.abs(live_TV).max())
    if not (difference <= tolerance and np.isfinite(apart_T[-1])):
        raise RequestFailedError(
            f"{directory}: the export computes something else than the adapter: on {count} probe tokens a "
            f"logit differs by {difference:.3g}, and rounding explains no more than {tolerance:.3g}. {AGAIN}"
        )
    return ExportCheck(tokens=count, difference=difference, tolerance=tolerance)


def _steady(c: ModelConfig) -> float:
    """Return the share of the tokens that count in bfloat16."""
    if c.experts is not None:
        return STEADY_OF_EXPERTS
    return 1.0 if c.delta is None else STEADY_OF_DELTA


def probe_tokens(source: ModelSource, config: ModelConfig) -> np.ndarray:
    """Return the probe text as int32 token ids; its bytes, where the model has no tokenizer that is read."""
    try:
        ids = load_tokenizer(source).encode(PROBE)
    except JaxClientError:
        ids = [byte % config.vocab_size for byte in PROBE.encode()]
    return np.array(ids[: min(PROBE_TOKENS, config.max_context)], np.int32)


def _refuse_other_arrays(state: AdapterState | None, back: AdapterState, directory: Path) -> None:
    """Raise unless every array came back bit for bit: a small change would hide in the tolerance."""
    weights = {} if state is None else state.weights
    names = sorted(weights.keys() | back.weights.keys())
    wrong = [n for n in names if not np.array_equal(weights.get(n, ()), back.weights.get(n, ()))]
    if wrong:
        raise RequestFailedError(
            f"{directory}: {len(wrong)} arrays of the export are not the adapter's ({', '.join(wrong[:5])}). {AGAIN}"
        )
