"""Does valid input become the plain values that the engine takes, at once and with nothing lost?"""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tinker import types

from jax_client.errors import BadTypeError
from jax_client.runs import checks
from jax_client.runs.paths import sampler_path, training_path
from jax_client.values import CheckpointKey
from support.calls import (
    CONTEXT,
    NAN,
    TEXT,
    VOCAB,
    csr,
    custom,
    datum,
    lora,
    params,
    rl,
    sample,
    train,
)


def test_settings_come_back_whole() -> None:
    spec = lora(rank=np.int64(512), seed=2**32 - 1, train_mlp=False)
    assert (spec.rank, spec.seed, spec.train_mlp, spec.train_attn) == (512, 2**32 - 1, False, True)
    assert type(spec.rank) is int
    drawn = lora(seed=None).seed
    assert 0 <= drawn < 2**31 and drawn != lora(seed=None).seed
    settings = checks.adam_settings(None, types.AdamParams(learning_rate=0, grad_clip_norm=1))
    assert (settings.learning_rate, settings.beta2, settings.eps, settings.grad_clip_norm) == (0.0, 0.95, 1e-12, 1.0)
    assert checks.user_metadata(None) == {} and checks.user_metadata({"a": "b"}) == {"a": "b"}
    assert checks.ttl(None) is None and checks.ttl(3600) == 3600
    assert checks.checkpoint_name("step-1.final_2") == "step-1.final_2"
    checks.refuse_optimizer(None)
    checks.refuse_optimizer(types.AdamOptimizerConfig())


def test_training_data_become_plain_arrays() -> None:
    weights = np.array([1.0, 0.5, -2.0], dtype=np.float32)
    split = types.ModelInput(chunks=[TEXT, types.EncodedTextChunk(tokens=[]), types.EncodedTextChunk(tokens=(3,))])
    sequences, loss = train([datum(split, weights=weights), datum()])
    first, second = sequences
    assert first.tokens_T.tolist() == [1, 2, 3] and first.targets.tolist() == [2, 3, 4]
    assert first.tokens_T.dtype == first.targets.dtype == np.int32
    assert first.inputs["weights"].dtype == np.float32
    weights[:] = 9
    assert first.inputs["weights"].tolist() == [1.0, 0.5, -2.0], "the caller's later changes do not reach the request"
    assert second.inputs["weights"].tolist() == [1.0, 1.0, 1.0], "weights default to one"
    assert (loss.name, dict(loss.config)) == ("cross_entropy", {})
    integers = train([datum(weights=np.array([0, 1, 1]))])[0][0].inputs["weights"]
    assert integers.dtype == np.float32 and integers.tolist() == [0, 1, 1]


def test_loss_settings_are_filled_in() -> None:
    bounds = [0.5, 0.6, 0.7]
    sequences, loss = train([rl(clip_low_threshold=bounds), rl()], "ppo", {"clip_low_threshold": 0.9})
    assert dict(loss.config) == {"clip_low_threshold": 0.9, "clip_high_threshold": 1.2}
    assert np.allclose(sequences[0].inputs["clip_low_threshold"], bounds)
    assert "clip_low_threshold" not in sequences[1].inputs, "packing fills it in from the settings"
    assert all("clip_high_threshold" not in sequence.inputs for sequence in sequences)
    assert all(set(sequence.inputs) == {"logprobs", "advantages"} for sequence in train([rl()], "cispo")[0])


def test_gspo_without_a_mask_takes_the_tokens_that_have_an_advantage() -> None:
    (example,), _ = train([rl(advantages=[0.0, 2.0, -1.0])], "gspo")
    assert (example.inputs["sequence_ratio_mask"] != 0).tolist() == [False, True, True]
    (example,), _ = train([rl(sequence_ratio_mask=[1.0, 0.0, 0.0])], "gspo")
    assert example.inputs["sequence_ratio_mask"].tolist() == [1.0, 0.0, 0.0]


def test_sparse_targets_are_densified_with_zero() -> None:
    targets = np.array([[0, 5], [0, 0], [7, 0]])
    sparse = types.TensorData(
        data=[5, 7], dtype="int64", shape=[3, 2], sparse_crow_indices=[0, 1, 1, 2], sparse_col_indices=[1, 0]
    )
    weights = np.array([[0, 0.5], [1, 2], [0.25, 0]], np.float32)
    (one,), _ = train([datum(targets=sparse, weights=weights)])
    assert one.targets.tolist() == targets.tolist()
    sparse_weights = csr([0.5, 0.25], [0, 1, 1, 2], [1, 0], [3, 2])
    (two,), _ = train([datum(targets=targets, weights=sparse_weights)])
    assert two.inputs["weights"].tolist() == [[0, 0.5], [0, 0], [0.25, 0]]
    (empty,), _ = train([datum(targets=targets, weights=csr([], [0, 0, 0, 0], [], [3, 2]))])
    assert not empty.inputs["weights"].any()


@pytest.mark.torch
def test_sparse_tensors_equal_torch() -> None:
    import torch

    rng = np.random.default_rng(0)
    dense = rng.integers(1, VOCAB, (CONTEXT, 40)) * (rng.random((CONTEXT, 40)) < 0.05)
    weights = (dense > 0).astype(np.float32)
    item = datum([1] * CONTEXT, torch.from_numpy(dense), weights=torch.from_numpy(weights))
    assert item.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    (sequence,), _ = train([item])
    assert (sequence.targets == dense).all() and (sequence.inputs["weights"] == weights).all()


def test_the_first_batch_without_a_weighted_token_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    empty, warned = [datum(weights=[0.0, 0.0, 0.0])] * 2, set[str]()
    unmoved = [rl(advantages=[0.0, 0.0, 0.0])]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            train([datum(weights=[0.0, 0.0, 0.0]), datum()], warned=warned)
            train(empty, warned=warned)
            train([rl()], "ppo", warned=warned)
            train(unmoved, "ppo", warned=warned)
            train(unmoved, "dro", {"beta": 0.1}, warned=warned)
    weights, advantages = (record.getMessage() for record in caplog.records)
    assert weights.startswith("every weight of the 2 datums is zero: loss and gradient are zero. Perhaps the prompts")
    assert advantages.startswith("every advantage of the 1 datums is zero") and "rewards of each group" in advantages


def test_custom_data_leave_other_inputs_to_the_user() -> None:
    (sequence,) = custom([datum(reward=np.array([NAN]), weights=[1.0])])
    assert sequence.targets.tolist() == [2, 3, 4] and dict(sequence.inputs) == {}


def test_long_batches_are_checked_fast() -> None:
    tokens = list(range(50)) * 80
    batch = [datum(tokens, np.array(tokens), weights=np.ones(4000, np.float32)) for _ in range(250)]
    start = time.perf_counter()
    checks.training_data(batch, "cross_entropy", None, vocab_size=VOCAB, max_context=4096)
    assert time.perf_counter() - start < 2.0, "a million tokens take about 0.1 s"


def test_generation_request() -> None:
    request = sample(
        num_samples=np.int64(2),
        params=types.SamplingParams(max_tokens=13, seed=5, temperature=0, top_k=100, top_p=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=128,
        prompt_logprobs_last_n=2,
    )
    assert request.tokens_T.tolist() == [1, 2, 3] and request.tokens_T.dtype == np.int32
    assert (request.num_samples, request.max_tokens, request.seed, request.temperature) == (2, 13, 5, 0.0)
    assert request.top_k == -1, "all of the vocabulary is no limit"
    assert (request.stop_ids, request.find_stop) == ((7, 9), None)
    assert request.prompt_logprobs and request.topk_prompt == 128
    assert sample().max_tokens == CONTEXT - 3, "None takes the rest of the context"
    assert sample().seed != sample().seed


def test_stop_kinds() -> None:
    def stops(stop: object) -> tuple[tuple[int, ...], bool]:
        request = sample(params=params(stop=stop))
        return request.stop_ids, request.find_stop is not None

    assert stops(None) == ((7, 9), False)
    assert stops([]) == ((), False), "an empty list turns off every stop, EOS included"
    assert stops([5, 6, 5]) == ((5, 6), False)
    assert stops("ab") == stops(["ab", "c"]) == ((7, 9), True), "EOS still ends a row"


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_paths_round_trip(kind: str) -> None:
    written = f"tinker://0b1c-2d:train:3/{kind}/step-0100"
    path = CheckpointKey.parse(written)
    assert (path.run_id, path.kind, path.name) == ("0b1c-2d:train:3", kind, "step-0100")
    assert str(path) == written
    sdk = types.ParsedCheckpointTinkerPath.from_tinker_path(written)
    assert (sdk.training_run_id, sdk.checkpoint_id) == (path.run_id, f"{path.kind}/{path.name}")


def test_right_kinds_pass() -> None:
    assert training_path("tinker://r/weights/a", "load_state").name == "a"
    assert sampler_path("tinker://r/sampler_weights/a", "create_sampling_client").name == "a"


def test_unknown_chunk_is_named() -> None:
    prompt = types.ModelInput.model_construct(chunks=[TEXT, SimpleNamespace(type="video")])
    with pytest.raises(BadTypeError, match=r"prompt\.chunks\[1\] is SimpleNamespace"):
        sample(prompt)
