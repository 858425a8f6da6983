"""What do the processes do that sample with a pickled client? Their parents do the same, and compare.

Run as a program it is such a parent itself, one that forks, and that can be killed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import tinker
from tinker import types

PROMPT = types.ModelInput.from_ints([3, 1, 4, 1, 5])


def numbers(client: Any) -> dict[str, Any]:
    """Return all that a client says, so that two can be compared bit for bit."""
    # The SDK deprecates its `_async` methods.
    warnings.simplefilter("ignore", FutureWarning)
    params = types.SamplingParams(max_tokens=8, temperature=0.7, seed=5, stop=[])
    targets = types.TensorData(data=[1, 2, 3, 4], dtype="int64", shape=[4, 1])
    future = client.sample(
        PROMPT, 2, params, True, topk_prompt_logprobs=2, topk_sample_logprobs=2, target_prompt_logprobs=targets
    )
    answer = future.result()
    again = asyncio.run(client.sample_async(PROMPT, 1, params))
    assert answer.target_prompt_logprobs is not None
    return {
        "tokens": [sequence.tokens for sequence in answer.sequences],
        "logprobs": [list(map(float, sequence.logprobs or [])) for sequence in answer.sequences],
        "stops": [sequence.stop_reason for sequence in answer.sequences],
        "topk": [sequence.topk_logprobs for sequence in answer.sequences],
        "prompt": answer.prompt_logprobs,
        "prompt_topk": answer.topk_prompt_logprobs,
        "targets": answer.target_prompt_logprobs.to_numpy().tolist(),
        "async": [list(again.sequences[0].tokens), list(map(float, again.sequences[0].logprobs or []))],
        "scores": client.compute_logprobs(PROMPT).result(),
        "last": asyncio.run(client.compute_logprobs_async(PROMPT, 2)),
        "base_model": client.get_base_model(),
        "text": client.get_tokenizer().decode(answer.sequences[0].tokens),
    }


def sampled(client: Any) -> dict[str, Any]:
    """Return what a client that came here says, and what this process became by it."""
    found = numbers(client)
    onwards = pickle.loads(pickle.dumps(client))
    return found | {
        "process": os.getpid(),
        "jax": sorted({"jax", "flax", "orbax"} & set(sys.modules)),
        "onwards": onwards.compute_logprobs(PROMPT).result(),
        "sdk": isinstance(client, tinker.SamplingClient) and isinstance(onwards, tinker.SamplingClient),
    }


def scored(client: Any) -> list[float | None]:
    """Return only the prompt's scores."""
    return client.compute_logprobs(PROMPT).result(120)


def scored_from_bytes(pickled: bytes) -> dict[str, Any]:
    """Unpickle, then `scored`; what fails is told, and how long it took."""
    start = time.monotonic()
    try:
        return {"scores": scored(pickle.loads(pickled))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}


def failed(client: Any) -> dict[str, Any]:
    """Score with a client that was inherited, not pickled."""
    try:
        return {"scores": scored(client)}
    except tinker.BadRequestError as error:
        return {"error": str(error)}


def bad_call() -> None:
    """Raise an error of the clients, without the imports of an engine."""
    from jax_client.clients.sdk_errors import translate
    from jax_client.errors import BadRequestError

    raise translate(BadRequestError("rank is 0; give 1 or more."))


def in_fork(what: Any, argument: Any) -> Any:
    """Return `what(argument)` of a forked process."""
    here, there = multiprocessing.Pipe()

    def work() -> None:
        there.send(what(argument))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    found = here.recv() if here.poll(60) else {"error": "no answer"}
    process.kill()
    process.join()
    return found


def main(model: str, state: str) -> None:
    """Sample, fork, tell what came of it, wait to be killed."""
    import jax_client

    config = jax_client.EngineConfig(
        dtype="float32", state_dir=Path(state), compilation_cache_dir="", precompile=False, autosave_minutes=None
    )
    client = jax_client.ServiceClient(config=config).create_sampling_client(base_model=model).result()
    pickled = pickle.dumps(client)
    told = {
        "here": scored(client),
        "inherited": in_fork(failed, client),
        "sent": in_fork(scored_from_bytes, pickled),
        "pickled": pickled,
        "handle": client.get_sampler_handle(),
    }
    # It has the listening socket too, and outlives this process.
    sleeper = os.fork()
    if not sleeper:
        time.sleep(120)
        os._exit(0)
    sys.stdout.buffer.write(pickle.dumps(told | {"sleeper": sleeper}))
    sys.stdout.buffer.flush()
    sys.stdout.close()
    time.sleep(120)


if __name__ == "__main__":
    main(*sys.argv[1:])
