"""Does the package work on hard hosts, or say in one line what to set? Each runs the quickstart's model in a child.

A child trains a step, saves, samples and scores, in-process or with the SDK under `jax_client run`. It works, or it is
refused by an error of the package whose text names the setting; anything else, a traceback among it, is a fault. Needs
Linux, a C compiler, and the right to make user namespaces; root for the small /dev/shm.

    python scripts/probes/hosts.py
    python scripts/probes/hosts.py --model DIRECTORY --only "no HOME" "proxy"
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.command_line import write_archive
from support.faults import fault_child
from support.faults.fault_child import Calls

USER = ("unshare", "-U", "--map-user=54321", "--map-group=54321")
STATE = r"EngineConfig\.state_dir \(or JAX_CLIENT_HOME"
LOCAL = STATE + r".*to a local disk"
DEAD_PROXY = dict.fromkeys(("HTTP_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")

PROGRAM = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

def score(client):
    from tinker import types
    return client.compute_logprobs(types.ModelInput.from_ints([5, 6, 7, 8])).result()

if __name__ == "__main__":
    import jax_client, tinker
    from tinker import types
    served = "TINKER_BASE_URL" in os.environ
    print("package:", jax_client.__file__)
    try:
        service = tinker.ServiceClient() if served else jax_client.ServiceClient()
        client = service.create_lora_training_client(base_model=sys.argv[1], rank=4).result()
        inputs = {"target_tokens": [6, 7, 8], "weights": [1.0, 1.0, 1.0]}
        datum = types.Datum(model_input=types.ModelInput.from_ints([5, 6, 7]), loss_fn_inputs=inputs)
        client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        path = client.save_weights_for_sampler("probe").result().path
        sampler = service.create_sampling_client(model_path=path)
        sampler.sample(types.ModelInput.from_ints([5, 6, 7]), 2, types.SamplingParams(max_tokens=4)).result()
        if len(sys.argv) > 2:
            with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
                assert len(set(map(str, pool.map(score, [sampler] * 4)))) == 1
        score(sampler)
        print("WORKS")
    except tinker.TinkerError as error:
        print("REFUSED:", " ".join(str(error).split()))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A host and what is right on it.

    Attributes:
        name: of the table's row.
        wrapper: the command before the program's.
        environment: what is set; None unsets.
        refused: a pattern of the refusal; None where the program has to work.
        run: whether the program is the SDK's, under `jax_client run`.
        workers: whether it also samples in two worker processes.
    """

    name: str
    wrapper: tuple[str, ...] = ()
    environment: dict[str, str | None] = field(default_factory=dict)
    refused: str | None = None
    run: bool = False
    workers: bool = False


def library(root: Path, name: str) -> str:
    """Compile a library to preload."""
    path = root / f"{name}.so"
    command = [
        "cc",
        "-std=gnu11",
        "-O1",
        "-shared",
        "-fPIC",
        "-o",
        str(path),
        str(Path(fault_child.__file__).with_name(f"{name}.c")),
        "-ldl",
    ]
    subprocess.run([*command, "-lpthread"], check=True)
    return str(path)


def hosts(root: Path) -> Iterator[Host]:
    """Yield the hosts; what they need is below `root`."""
    read_only = root / "read-only"
    read_only.mkdir()
    read_only.chmod(0o555)
    for name, home in (("no HOME, no passwd entry", None), ("HOME read-only", str(read_only))):
        set_up: dict[str, str | None] = {"HOME": home, "XDG_CACHE_HOME": None}
        unsaved = set_up | {"JAX_CLIENT_HOME": None}
        yield Host(name=f"user id 54321, {name}", wrapper=USER, environment=set_up)
        yield Host(name=f"user id 54321, {name}, no JAX_CLIENT_HOME", wrapper=USER, environment=unsaved, refused=STATE)
    yield Host(name="a dead proxy, in-process", environment=DEAD_PROXY | {"NO_PROXY": None}, workers=True)
    yield Host(name="a dead proxy, the SDK under jax_client run", environment=DEAD_PROXY, run=True)
    faults, state = library(root, "fault_library"), "{state}"

    def network(
        name: str, kinds: int, code: int, place: str = state, refused: str | None = LOCAL, run: bool = False
    ) -> Host:
        plan = {"LD_PRELOAD": faults, "FAULT_PLAN": f"{place} {kinds} {code}"}
        return Host(name=f"{name}: {errno.errorcode[code]}", environment=plan, refused=refused, run=run)

    for code in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ESTALE):
        yield network("locks refused", Calls.LOCKS, code)
    for code in (errno.EINVAL, errno.EIO, errno.ESTALE):
        yield network("fsync refused", Calls.SYNCS, code)
    yield network("every change refused", Calls.ALL, errno.EREMOTEIO)
    for kinds, code in ((Calls.LOCKS, errno.ENOLCK), (Calls.SYNCS, errno.ESTALE)):
        yield network("the SDK under jax_client run, refused", kinds, code, run=True)
    yield network("fsync refused", Calls.SYNCS, errno.EDQUOT, refused=r"Make room there, or set " + STATE)
    for code in (errno.ENOLCK, errno.EIO):
        yield network("SQLite's locks of metrics.sqlite refused", Calls.LOCKS, code, f"{state}/metrics.sqlite", None)
    zipped = {"PYTHONPATH": str(write_archive(root / "package.zip")), "PYTHONSAFEPATH": "1"}
    yield Host(name="installed as an archive, user id 54321", wrapper=USER, environment=zipped)
    few = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    yield Host(name="ulimit -n 256", wrapper=few, workers=True)
    yield Host(name="ulimit -n 256, the SDK under jax_client run", wrapper=few, run=True)
    yield Host(name="a clock that jumps a day each second", environment={"LD_PRELOAD": library(root, "clock_library")})
    small = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm; exec "$@"', "sh")
    yield Host(name="64 MiB of /dev/shm", wrapper=small, workers=True)


def outcome(host: Host, model: str, root: Path, number: int) -> tuple[bool, str]:
    """Run the program on a host; return whether that was right, and what was said."""
    place = root / str(number)
    state, work = place / "state", place / "work"
    work.mkdir(parents=True)
    (work / "program.py").write_text(PROGRAM)
    # What one host has compiled, the others find, but those whose cache cannot be written.
    environment = {"JAX_CLIENT_HOME": str(state), "HOME": str(place / "home"), "XDG_CACHE_HOME": str(root / "cache")}
    environment = environment | {"HF_HUB_OFFLINE": "1"} | host.environment
    environment = {key: value and value.replace("{state}", str(state)) for key, value in environment.items()}
    unset = [word for key, value in environment.items() if value is None for word in ("-u", key)]
    given = [f"{key}={value}" for key, value in environment.items() if value is not None]
    program = [sys.executable, "program.py", model, *(["workers"] if host.workers else [])]
    if host.run:
        served = [str(Path(sys.executable).with_name("jax_client")), "run", "--model", model, "--"]
        program = [*served, *program]
    # The library is for the program alone, not for the commands around it.
    command = [*host.wrapper, "env", *unset, *given, *program]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=1200, env=dict(os.environ))
    said = done.stdout + done.stderr
    refused = re.search(r"^(?:REFUSED|error): (.*)", said, re.MULTILINE)
    # Not another installation, and no directory that is named after a home that is not there.
    elsewhere = "PYTHONPATH" in host.environment and f"package: {environment['PYTHONPATH']}" not in said
    if "Traceback" in said or elsewhere or (work / "~").exists():
        return False, said[-2000:]
    warned = re.findall(r"^(compiled programs .*|there is no home .*|metrics are not .*)", said, re.MULTILINE)
    if host.refused is None:
        return "WORKS" in said and done.returncode == 0, "works" + "".join(f"; {line}" for line in warned)
    right = refused is not None and re.search(host.refused, refused[1]) is not None
    return right, refused[1] if refused else said[-2000:]


def main() -> None:
    """Print a row for each host; exit with 1 if one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names of hosts")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        for number, host in enumerate(hosts(root)):
            if any(part in host.name for part in args.only):
                start = time.monotonic()
                right, said = outcome(host, args.model, root, number)
                wrong += not right
                print(
                    f"{'ok' if right else 'WRONG':5} {time.monotonic() - start:5.0f} s  {host.name}\n      {said}",
                    flush=True,
                )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
