"""Which bits do training and sampling give on this machine?

The script prints SHA-256 hashes of logprobs, gradients, adapter states and sampled tokens as one JSON object. It uses
public names only, so that it runs unchanged with an older package on PYTHONPATH, whose modules lie elsewhere:

    python tests/support/number_hashes.py                       # of every golden case, by a child process for each core
    python tests/support/number_hashes.py CASE ...              # of the cases named, in this process
    python tests/support/number_hashes.py --store FILE          # and write them to FILE, under this kind of machine

Almost all of its time is spent compiling. $JAX_COMPILATION_CACHE_DIR keeps programs between runs: a package that builds
equal programs then answers in a minute, and one that builds others compiles those.

The module is not called `numbers`: beside a script, a file of that name hides the standard library's module.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tinker import types

import jax_client
from support.golden_cases import CASES, RANK, base_values, sequences

REMATS = ("none", "selective", "full")
DTYPES = ("float32", "bfloat16")
# The losses differ in no model, so one case trains with each; what all share is the cross entropy of every case.
LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")
LOSS_CASE = ("llama_tied", "none", "float32")
# The flags for which XLA, Eigen and LLVM choose other vector widths or other matrix products.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_fp16")
ADAM = types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0)
# Without memory (beta1 = 0) the first moment after a step is the accumulated gradient itself, bit for bit:
# 0 * mu + 1 * g. Nothing is clipped, and at rate 0 the weights stay. A saved state thereby shows the gradient.
SHOW_GRADIENT = types.AdamParams(learning_rate=0, beta1=0, beta2=0, eps=1, weight_decay=0, grad_clip_norm=0)

Hashes = dict[str, dict[str, str]]


def machine_kind() -> str:
    """Return what decides the bits beside the code: the processor's model and flags, one core or more, jax, numpy."""
    fields: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    model = "-".join(fields.get(name, "?") for name in ("vendor_id", "cpu family", "model"))
    flags = set(fields.get("flags", "").split())
    jax, jaxlib, np_ = (importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy"))
    cores = "one core" if len(os.sched_getaffinity(0)) == 1 else "cores"
    found = " ".join(flag for flag in FLAGS if flag in flags)
    return f"{platform.machine()} {model} [{found}], {cores}, jax {jax}, jaxlib {jaxlib}, numpy {np_}"


def digest(arrays: Mapping[str, Any]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return sha.hexdigest()


def write_model(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """Write a model as config.json and one file of safetensors, whose header is JSON behind its length in 8 bytes."""
    directory.mkdir(parents=True)
    header, start = {}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(tensor.tobytes() for tensor in tensors.values())
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def datums(config: dict[str, Any]) -> list[types.Datum]:
    """Return the golden case's three ragged sequences as data of the cross entropy."""
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(s["tokens"].tolist()),
            loss_fn_inputs={"target_tokens": s["targets"].tolist(), "weights": s["weights"].tolist()},
        )
        for s in sequences(config)
    ]


def policy_datums(config: dict[str, Any], loss: str) -> list[types.Datum]:
    """Return the sequences as data of a policy loss; ratios lie on both sides of the clip."""
    rng = np.random.default_rng(3)
    out = []
    for s in sequences(config):
        n = len(s["targets"])
        inputs = {
            "target_tokens": s["targets"].tolist(),
            "logprobs": rng.uniform(-6, -3, n).astype(np.float32).tolist(),
            "advantages": rng.normal(size=n).astype(np.float32).tolist(),
        }
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = [0.0] * 3 + [1.0] * (n - 3)
        out.append(types.Datum(model_input=types.ModelInput.from_ints(s["tokens"].tolist()), loss_fn_inputs=inputs))
    return out


class Run:
    """A training client, and the arrays of what it saves."""

    def __init__(self, client: Any, state_dir: Path) -> None:
        self.client, self._state_dir = client, state_dir
        self._seen: set[Path] = set()

    def saved(self) -> dict[str, np.ndarray]:
        """Save the state and read it as orbax does, by "weights/NAME", "mu/NAME" and "nu/NAME"."""
        import orbax.checkpoint as ocp

        self.client.save_state(f"state-{len(self._seen)}").result()
        (new,) = {path.parent for path in self._state_dir.rglob("_METADATA")} - self._seen
        self._seen.add(new)
        with ocp.StandardCheckpointer() as reader:
            return {name: np.asarray(array) for name, array in reader.restore(new).items()}

    def step(self, data: list[types.Datum], loss: Any, adam: types.AdamParams) -> dict[str, np.ndarray]:
        """Train one step; return the state after it, and of the pass "pass/logprobs.I" and "pass/loss:sum"."""
        passed = self.client.forward_backward(data, loss)
        self.client.optim_step(adam).result()
        return self.saved() | output(passed.result())


def output(passed: Any) -> dict[str, np.ndarray]:
    """Return the logprobs of each datum, and the loss, of a pass."""
    logprobs = {f"pass/logprobs.{i}": out["logprobs"].to_numpy() for i, out in enumerate(passed.loss_fn_outputs)}
    return logprobs | {"pass/loss:sum": np.asarray(passed.metrics["loss:sum"], np.float64)}


def group(arrays: Mapping[str, np.ndarray], *names: str) -> str:
    """Hash the arrays of groups such as "weights"; each must be there."""
    found = {name: array for name, array in arrays.items() if name.split("/")[0] in names}
    assert {name.split("/")[0] for name in found} == set(names), (names, sorted(arrays))
    return digest(found)


def gradient(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash the gradient that a step of SHOW_GRADIENT left in the first moments; every leaf has one that is not 0."""
    assert all(np.any(array) for name, array in arrays.items() if name.startswith("mu/"))
    return group(arrays, "mu")


def sampled(client: Any, config: dict[str, Any]) -> str:
    """Hash 32 tokens, with their logprobs, of two rows of each of two prompts."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=32, temperature=1.0, seed=5, stop=[])
    arrays: dict[str, Any] = {}
    for i, s in enumerate(sequences(config)[:2]):
        answer = sampler.sample(types.ModelInput.from_ints(s["tokens"].tolist()), 2, params).result()
        for j, row in enumerate(answer.sequences):
            assert len(row.tokens) == 32, len(row.tokens)
            arrays[f"tokens.{i}.{j}"] = np.asarray(row.tokens, np.int64)
            arrays[f"logprobs.{i}.{j}"] = np.asarray(row.logprobs, np.float64)
    return digest(arrays)


def case_hashes(case: str, remat: str, dtype: str, model: str, state_dir: Path) -> dict[str, str]:
    """Return the hashes of one case by quantity."""
    config = CASES[case]
    settings: dict[str, Any] = {"remat": remat, "dtype": dtype, "state_dir": state_dir, "autosave_minutes": None}
    settings |= {"compilation_cache_dir": "", "precompile": False, "record_metrics": False}
    data = datums(config)
    with jax_client.ServiceClient(config=jax_client.EngineConfig(**settings)) as service:
        client = service.create_lora_training_client(model, rank=RANK, seed=0).result()
        run = Run(client, state_dir)
        first = output(client.forward(data, "cross_entropy").result())
        one = run.step(data, "cross_entropy", ADAM)
        two = run.step(data, "cross_entropy", ADAM)
        last = run.step(data, "cross_entropy", SHOW_GRADIENT)
        hashes = {
            "forward": digest(first),
            "weights after 1 step": group(one, "weights"),
            "moments after 1 step": group(one, "mu", "nu"),
            "weights after 2 steps": group(two, "weights"),
            "moments after 2 steps": group(two, "mu", "nu"),
            "logprobs after 2 steps": group(last, "pass"),
            "gradients after 2 steps": gradient(last),
        }
        assert group(last, "weights") == hashes["weights after 2 steps"], "a step at rate 0 moved the weights"
        if remat == "none":
            hashes["32 sampled tokens"] = sampled(client, config)
        if (case, remat, dtype) == LOSS_CASE:
            for loss in LOSSES:
                hashes[f"gradients of {loss}"] = gradient(run.step(policy_datums(config, loss), loss, SHOW_GRADIENT))
    return hashes


def all_hashes(cases: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the hashes of each case x remat x dtype, and those of what the cases are made of."""
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases:
            values = base_values(CASES[case])
            made = {f"{i}.{name}": array for i, s in enumerate(sequences(CASES[case])) for name, array in s.items()}
            yield case, {"inputs": digest(values | made)}
            model = write_model(Path(temporary, "models", case), CASES[case], values)
            for remat, dtype in itertools.product(REMATS, DTYPES):
                name = f"{case} {remat} {dtype}"
                yield name, case_hashes(case, remat, dtype, model, Path(temporary, "state", name.replace(" ", "-")))


def differences(ours: Hashes, theirs: Hashes) -> list[str]:
    """Return "CASE: QUANTITY" of each hash that differs or that one of both lacks."""
    pairs = sorted({(case, quantity) for hashes in (ours, theirs) for case in hashes for quantity in hashes[case]})
    return [
        f"{case}: {quantity}"
        for case, quantity in pairs
        if ours.get(case, {}).get(quantity) != theirs.get(case, {}).get(quantity)
    ]


def child_environment(older: Path | None, cache: str) -> dict[str, str]:
    """Return this process's environment without settings of jax, with `older` first on the path of modules."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PYTHONPATH"))}
    path = {} if older is None else {"PYTHONPATH": str(older)}
    caching = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return kept | path | caching | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}


def hashes_by_children(older: Path | None = None, cases: Sequence[str] = tuple(CASES)) -> tuple[Path, Hashes]:
    """Run this script in a process for each core; return the package that answered, and its hashes.

    Args:
        older: a directory with an installed package; None is the package of this environment.
        cases: the golden cases.
    """
    cores = len(os.sched_getaffinity(0))
    shares = [share for i in range(cores) if (share := list(cases[i::cores]))]
    with tempfile.TemporaryDirectory() as temporary:
        environment = child_environment(older, os.environ.get("JAX_COMPILATION_CACHE_DIR", temporary))
        children = [
            subprocess.Popen([sys.executable, __file__, *share], stdout=subprocess.PIPE, env=environment, text=True)
            for share in shares
        ]
        answers = [child.communicate()[0] for child in children]
    for child, share in zip(children, shares, strict=True):
        assert child.returncode == 0, f"the process of {share} ended with exit code {child.returncode}"
    found = [json.loads(answer) for answer in answers]
    (package,) = {answer["package"] for answer in found}
    return Path(package), {case: hashes for answer in found for case, hashes in answer["hashes"].items()}


def main() -> None:
    """Print what `all_hashes` gives, beside the machine's kind and the package that was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--store", type=Path, metavar="FILE", help="JSON by kind of machine, to add to")
    arguments = parser.parse_args()
    if arguments.cases:
        package, hashes = Path(jax_client.__file__).parent, dict(all_hashes(arguments.cases))
    else:
        package, hashes = hashes_by_children()
    kind = machine_kind()
    if arguments.store is not None:
        stored = json.loads(arguments.store.read_text()) if arguments.store.exists() else {}
        arguments.store.write_text(json.dumps(stored | {kind: hashes}, indent=1, sort_keys=True) + "\n")
    print(json.dumps({"package": str(package), "kind": kind, "hashes": hashes}))


if __name__ == "__main__":
    main()
