"""How does an answer of the engine become the API's type?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from tinker import types
from tinker.types.topk_logprobs import MASK_LOGPROB, TopkLogprobs

from jax_client.engine.requests import GenerationResult, TrainResult


def metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Return finite metrics; a value that is not finite is left out and counted as `nonfinite/<key>`.

    JSON has no NaN: a reply that held one would be unreadable for the SDK.
    """
    finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
    return finite | {f"nonfinite/{key}": 1.0 for key in values if key not in finite}


def training_output(result: TrainResult, extra: Mapping[str, float] | None = None) -> types.ForwardBackwardOutput:
    """Show a training pass: `logprobs` per datum in the shape of its targets; `extra` metrics are kept as they are."""
    return types.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": types.TensorData.from_numpy(logprobs)} for logprobs in result.logprobs],
        metrics={**metrics(result.metrics), **(extra or {})},
    )


def sample_response(
    result: GenerationResult, *, request_id: str, last_n: int | None = None, prompt_logprobs: bool = True
) -> types.SampleResponse:
    """Show a generation.

    Args:
        result: the engine's answer.
        request_id: makes the sequences' ids distinct.
        last_n: only the last n prompt positions keep their log probabilities; earlier ones read as not computed.
        prompt_logprobs: whether they were asked for.
    """
    sequences = [
        types.SampledSequence(
            stop_reason=row.stop_reason,
            sequence_id=f"{request_id}:{index}",
            tokens_np=np.asarray(row.tokens, np.int32),
            logprobs_np=np.asarray(row.logprobs, np.float32),
        )
        for index, row in enumerate(result.rows)
    ]
    prompt_T, topk = result.prompt_logprobs_T, None
    if result.topk_ids_Tk is not None and result.topk_logprobs_Tk is not None:
        ids_Tk, logprobs_Tk = result.topk_ids_Tk.astype(np.int32), result.topk_logprobs_Tk.astype(np.float32)
        if last_n is not None:
            ids_Tk[:-last_n], logprobs_Tk[:-last_n] = 0, MASK_LOGPROB
        topk = TopkLogprobs(token_ids=ids_Tk, logprobs=logprobs_Tk)
    if prompt_T is not None:
        prompt_T = prompt_T.astype(np.float32)
        if last_n is not None:
            prompt_T[:-last_n] = np.nan
    return types.SampleResponse(
        sequences=sequences,
        prompt_logprobs_np=prompt_T if prompt_logprobs else None,
        topk_prompt_logprobs_np=topk,
    )
