"""How do the tests run a golden case on the engine, and see on which threads it compiles?"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_client.config import EngineConfig
from jax_client.engine.core.requests import AdamSettings, LossSpec, TrainResult
from jax_client.engine.engine import Engine
from jax_client.models.lora_arrays import flatten
from jax_client.values import AdapterState, LoraSpec, TrainExample
from jax_client.weights.read.source import resolve
from support.golden_cases import ADAM, RANK, STEPS, base_values, lora_values, module_shapes, sequences
from support.weight_files import write_hf

SPEC = LoraSpec(rank=RANK, seed=0)
CROSS_ENTROPY = LossSpec(name="cross_entropy")
OURS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}  # fmt: skip # noqa: E501


def open_engine(directory: Path, config: dict[str, Any], **settings: Any) -> Engine:
    path = write_hf(directory, config, base_values(config))
    settings = {"dtype": "float32", "compilation_cache_dir": "", "precompile": False} | settings
    return Engine(resolve(str(path)), EngineConfig(**settings))


def data(config: dict[str, Any]) -> list[TrainExample]:
    return [
        TrainExample(tokens_T=s["tokens"], targets=s["targets"], inputs={"weights": s["weights"]})
        for s in sequences(config)
    ]


def to_ours(config: dict[str, Any], peft: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn A (R, in) and B (out, R) under peft-like names into the engine's stacked arrays."""
    K, G = config["num_key_value_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    H, L = config["head_dim"], config["num_hidden_layers"]
    out = {"unembed.A": peft["lm_head.A"], "unembed.B": peft["lm_head.B"].T}
    for module in module_shapes(config):
        name = OURS[module.split(".")[1]]
        a = np.stack([peft[f"layers.{i}.{module}.A"] for i in range(L)])
        b = np.stack([peft[f"layers.{i}.{module}.B"].T for i in range(L)])
        heads_out = {"q": (K, G, H), "k": (K, H), "v": (K, H)}.get(name, (b.shape[-1],))
        heads_in = (K, G, H) if name == "o" else (a.shape[-1],)
        out[f"{name}.A"], out[f"{name}.B"] = a.reshape(L, RANK, *heads_in), b.reshape(L, RANK, *heads_out)
    return out


def train(engine: Engine, config: dict[str, Any]) -> tuple[TrainResult, dict[str, np.ndarray], TrainResult]:
    """Run the case: the first pass with its gradients by flat name, and the pass after `STEPS` steps."""
    lane = engine.open_lane()
    state = AdapterState(spec=SPEC, step=0, weights=to_ours(config, lora_values(config)))
    adapter = engine.open_adapter(lane, state).result()
    first: Any = None
    grads: dict[str, np.ndarray] = {}
    for _ in range(STEPS):
        result = engine.train_batch(lane, adapter, data(config), CROSS_ENTROPY).result()
        if first is None:
            assert adapter.grads is not None
            first, grads = result, {n: np.asarray(g) for n, g in flatten(adapter.grads).items()}
        engine.optim_step(lane, adapter, AdamSettings(**ADAM)).result()
    return first, grads, engine.score_batch(lane, adapter, data(config), CROSS_ENTROPY).result()


@contextlib.contextmanager
def compile_threads() -> Iterator[list[str]]:
    """Collect the name of the thread of each compile in the body, of programs and of single operations."""
    threads: list[str] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            threads.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield threads
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
