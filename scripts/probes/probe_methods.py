"""Which public methods of the SDK's clients work, in-process and served? Writes the tables of docs/compatibility.md.

Every method that the SDK has needs a probe in a module of `PROBES_OF`, and every probe a method. Each runs for at most
a minute, on a tiny random model. Exits with 1 if one hangs, fails, is refused without being expected to, or if the
tables in the page say something else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from written_page import keep

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient", "APIFuture")
SIDES = ("in-process", "served")
# Each registers its probes as it is imported; they run in this order.
PROBES_OF = ("service_probes", "training_probes", "sampling_probes", "rest_probes", "argument_probes")
LIMIT_SECONDS = 60.0
# Making the clients that the probes use compiles all programs.
SETUP_SECONDS = 300.0
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by scripts/probes/probe_methods.py -->", "<!-- end -->"
KEY = "tml-probe"
VOCABULARY = 64


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write the tables into the page, instead of comparing")
    what.add_argument("--list", action="store_true", help="only compare the probes with the methods; runs none")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/compatibility.md")
    return parser.parse_args(argv)


def public_methods(client: type) -> list[str]:
    """Return the names that a class offers, inherited ones too."""
    return [name for name in dir(client) if not name.startswith("_")]


def differences() -> list[str]:
    """Return which methods have no probe, and which probes no method."""
    import tinker

    for module in PROBES_OF:
        importlib.import_module(module)
    from probing import ARGUMENTS, PROBES

    methods = [f"{client}.{name}" for client in CLIENTS for name in public_methods(getattr(tinker, client))]
    probes = [f"{each.client}.{each.method}" for each in PROBES if each.client != ARGUMENTS]
    return [
        *(f"{name} has no probe" for name in sorted(set(methods) - set(probes))),
        *(f"{name} is probed, and is no method" for name in sorted(set(probes) - set(methods))),
        *(f"{name} is probed twice" for name in sorted({name for name in probes if probes.count(name) > 1})),
    ]


def write_model(directory: Path) -> str:
    """Write a random Llama of two layers, and a tokenizer whose words are t0, t1, ..."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    width, hidden, heads, kv_heads, head, layers = 32, 48, 4, 2, 8, 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "hidden_act": "silu",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, width), "model.norm": (width,)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (heads * head, width), "self_attn.k_proj": (kv_heads * head, width),
            "self_attn.v_proj": (kv_heads * head, width), "self_attn.o_proj": (width, heads * head),
            "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden),
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    weights = {
        f"{name}.weight": (0.2 * rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(directory)


@contextlib.contextmanager
def running_server(config: Any) -> Iterator[str]:
    """Serve in this process, on a free port; yield the address."""
    import uvicorn

    from jax_client.server import LOOPBACK
    from jax_client.server.app import build_app
    from jax_client.server.state.request_log import RequestLog
    from jax_client.server.state.server import Server

    server = Server(config, log=RequestLog(config.state_dir))
    listening = socket.create_server(("127.0.0.1", 0))
    app = build_app(server, api_key=KEY, hosts=LOOPBACK)
    http = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join(30)
        server.close(30)


def limited(work: Callable[[], object], seconds: float | None = None) -> str | None:
    """Run something for so long at most, LIMIT_SECONDS if not told; return what went wrong."""
    seconds = LIMIT_SECONDS if seconds is None else seconds
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"hangs: no answer in {seconds:.0f} s"
    return f"{type(failed[0]).__name__}: {failed[0]}" if failed else None


def outcome(probe: Any, world: Any) -> tuple[str, str | None]:
    """Run a probe; return what the table says, and what is wrong, None if nothing is."""
    from probing import Ask

    if probe.absent is not None and world.side == "in-process":
        there = inspect.getattr_static(getattr(world.module, probe.client), probe.method, None) is not None
        return f"not there: {probe.absent}", "is there: it needs a probe" if there else None
    ask, expected = Ask(probe.client, probe.method), probe.refused.get(world.side)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            probe.run(world, ask)
        except BaseException as error:
            raised.append(error)
            raise

    wrong = limited(work)
    if expected is None:
        return "works" if wrong is None else "broken", wrong
    if not raised:
        return "broken", wrong or "is not refused"
    if raised[0] is not ask.refusal or not isinstance(raised[0], expected):
        return "broken", wrong
    return f"refused: {shown(raised[0])}", None


def shown(error: BaseException) -> str:
    """Return the class and the first sentence of an error, without what the SDK puts around a server's words."""
    body = getattr(error, "body", None)
    said = body["detail"] if isinstance(body, dict) and "detail" in body else getattr(error, "message", str(error))
    said = " ".join(said.split()).removeprefix("Request failed: ")
    sentence = re.split(r"(?<=[.;])\s", said, maxsplit=1)[0].rstrip(".;")
    return f"`{type(error).__name__}`: {sentence}".replace("|", "\\|")


def probe_all() -> tuple[dict[str, dict[str, dict[str, str]]], list[str]]:
    """Return what each side says, by client and method, and what is wrong."""
    import tinker

    import jax_client
    from probing import PROBES, World

    found: dict[str, dict[str, dict[str, str]]] = {}
    wrong: list[str] = []
    # Kept: the second shares the engine of the first, and what it compiled.
    worlds: list[World] = []
    # Not removed by a with: a probe that hangs may still write there.
    home = Path(tempfile.mkdtemp(prefix="probe-"))
    model = write_model(home / "model")

    def config(side: str) -> Any:
        (home / side).mkdir()
        return jax_client.EngineConfig(
            dtype="float32", state_dir=home / side, compilation_cache_dir="", precompile=False, autosave_minutes=None
        )

    with running_server(config("served")) as url:
        sides = (
            ("in-process", jax_client, {"config": config("in-process")}),
            ("served", tinker, {"base_url": url, "api_key": KEY}),
        )
        for side, module, where in sides:
            start = time.monotonic()
            make = partial(World, side=side, module=module, where=where, model=model)
            failed = limited(lambda make=make: worlds.append(make()), SETUP_SECONDS)
            if failed is not None:
                return found, [f"{side}: no client to probe with: {failed}"]
            for probe in PROBES:
                text, bad = outcome(probe, worlds[-1])
                found.setdefault(probe.client, {}).setdefault(probe.method, {})[side] = text
                if bad is not None:
                    wrong.append(f"{side}: {probe.client}.{probe.method}: {bad}")
            futures = worlds[-1].with_futures()
            for probe in PROBES:
                if probe.client in ("TrainingClient", "SamplingClient"):
                    text, bad = outcome(probe, futures)
                    if bad is not None or text != found[probe.client][probe.method][side]:
                        wrong.append(f"{side}: {probe.client}.{probe.method} of a future of the client: {bad or text}")
            print(f"{side}: {len(PROBES)} probes in {time.monotonic() - start:.0f} s", file=sys.stderr)
        for world in worlds:
            limited(world.service.close("success").result)
    shutil.rmtree(home, ignore_errors=True)
    return found, wrong


def tables(found: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return a Markdown table for each client; a method and its `_async` twin share a row if they say the same."""
    from probing import ARGUMENTS

    parts = []
    for client in (*CLIENTS, ARGUMENTS):
        rows: dict[tuple[str, ...], list[str]] = {}
        for method, said in sorted(found[client].items()):
            shown_as = method if client == ARGUMENTS else f"`{method}`"
            rows.setdefault((method.removesuffix("_async"), *(said[side] for side in SIDES)), []).append(shown_as)
        heading = "argument" if client == ARGUMENTS else "method"
        lines = [f"### {client}", "", f"| {heading} | {' | '.join(SIDES)} |", "|---|---|---|"]
        lines += [f"| {', '.join(methods)} | {' | '.join(said)} |" for (_, *said), methods in rows.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    for name in [name for name in os.environ if name.startswith(("TINKER_", "JAX_CLIENT_"))]:
        del os.environ[name]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # All that is needed is here; transformers would ask the hub about a directory too.
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    # The SDK logs what it is asked to do that is deprecated, and that is most of it.
    logging.disable(logging.ERROR)
    wrong = differences()
    if args.list or wrong:
        print(*(wrong or ["every method has its probe"]), sep="\n")
        return bool(wrong)
    found, wrong = probe_all()
    if wrong:
        print(*wrong, sep="\n")
        return 1
    return keep(args.page, (BEGIN, END), tables(found), write=args.write)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # A call that hangs must not keep the process.
    os._exit(code)
