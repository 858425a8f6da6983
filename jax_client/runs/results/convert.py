"""How does an answer of the engine become the API's type? Each function here converts one kind of answer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from tinker import types

from jax_client.engine.core.requests import GenerationResult, TrainResult
from jax_client.runs.sdk import TopkLogprobs


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
    result: GenerationResult,
    *,
    request_id: str,
    targets: types.TensorData | None = None,
) -> types.SampleResponse:
    """Show a generation.

    Args:
        result: the engine's answer.
        request_id: makes the sequences' ids distinct.
        targets: the ids whose scores were asked for, whose layout the answer has.
    """
    sequences = [
        types.SampledSequence(
            stop_reason=row.stop_reason,
            sequence_id=f"{request_id}:{index}",
            tokens_np=np.asarray(row.tokens, np.int32),
            logprobs_np=np.asarray(row.logprobs, np.float32),
            topk_logprobs_np=_topk(row.top_ids, row.top_logprobs),
        )
        for index, row in enumerate(result.rows)
    ]
    alternatives = None
    if result.alternative_ids_Tk is not None and result.alternative_logprobs_Tk is not None:
        alternatives = types.PromptAltTokens(
            tokens=types.TensorData.from_numpy(result.alternative_ids_Tk.astype(np.int64)),
            logprobs=types.TensorData.from_numpy(result.alternative_logprobs_Tk.astype(np.float32)),
        )
    prompt_T = result.prompt_logprobs_T
    return types.SampleResponse(
        sequences=sequences,
        prompt_logprobs_np=None if prompt_T is None else prompt_T.astype(np.float32),
        topk_prompt_logprobs_np=_topk(result.topk_ids_Tk, result.topk_logprobs_Tk),
        target_prompt_logprobs=_like(targets, result.target_logprobs_TK),
        prompt_cache_hit_tokens=result.cached_tokens,
        prompt_alt_tokens=alternatives,
    )


def _topk(ids_Nk: np.ndarray | None, logprobs_Nk: np.ndarray | None) -> TopkLogprobs | None:
    if ids_Nk is None or logprobs_Nk is None:
        return None
    return TopkLogprobs(token_ids=ids_Nk.astype(np.int32), logprobs=logprobs_Nk.astype(np.float32))


def _like(targets: types.TensorData | None, scores_TK: np.ndarray | None) -> types.TensorData | None:
    """Return the scores in the layout of the ids that they belong to."""
    if targets is None or scores_TK is None:
        return None
    crow, columns = targets.sparse_crow_indices, targets.sparse_col_indices
    if crow is None or columns is None:
        return types.TensorData.from_numpy(scores_TK)
    rows = np.repeat(np.arange(len(scores_TK)), np.diff(crow))
    return types.TensorData(
        data=scores_TK[rows, np.asarray(columns, np.int64)],
        dtype="float32",
        shape=list(scores_TK.shape),
        sparse_crow_indices=crow,
        sparse_col_indices=columns,
    )
