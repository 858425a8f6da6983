"""A program that trains and samples on several hosts of this machine, for tests that compare numbers or end a host.

    python tests/support/hosts/child.py HOSTS DEVICES MESH CASE DIRECTORY COMMAND

`numbers` prints hashes of everything that is computed, as JSON. A number has three clients do as many things at random,
and prints what each host has launched. `loop` trains and samples until it is ended; a line for
each thing done says so.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def join(hosts: int, devices: int) -> list[Any]:
    """Join the hosts, of which this process leads; return the channels to the others."""
    os.environ |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    from jax_client.engine.hosts import joining
    from support.hosts import pipes

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listening.getsockname()[1]}"
    if hosts == 1:  # with the collectives that several hosts have, whose sums have another order than XLA's own
        joining.join(coordinator, 1, 0, 60)
        return []
    channels = pipes.start(hosts - 1, {})
    print("pids", *(channel.process.pid for channel in channels), flush=True)
    pipes.lead(channels, coordinator)
    return channels


def model_of(case: str, directory: Path) -> tuple[dict[str, Any], str]:
    """Write a golden case's model; return its configuration and its path."""
    from support import number_hashes
    from support.families import cases
    from support.golden_cases import CASES, base_values
    from support.weight_files import write_hf

    if case in CASES:
        return CASES[case], number_hashes.write_model(directory / "model", CASES[case], base_values(CASES[case]))
    return cases.CASES[case], str(write_hf(directory / "model", cases.CASES[case], cases.tensors(case)))


def numbers(service: Any, model: str, config: dict[str, Any], state_dir: Path) -> dict[str, str]:
    """Return hashes of what training, custom losses, sampling, saving and loading give."""
    from jax_client.checkpoint import zarr
    from support import number_hashes as hashes

    class Run(hashes.Run):
        """One whose saves are read without orbax, which would wait for the other hosts."""

        def saved(self) -> dict[str, Any]:
            self.client.save_state(f"state-{len(self._seen)}").result()
            (new,) = {path.parent for path in self._state_dir.rglob("_METADATA")} - self._seen
            self._seen.add(new)
            return zarr.read(new)

    client = service.create_lora_training_client(model, rank=4, seed=0).result()
    data, run, found = hashes.datums(config), Run(client, state_dir), {}
    found["forward"] = hashes.digest(hashes.output(client.forward(data, "cross_entropy").result()))
    for i in range(2):
        found[f"step {i}"] = hashes.digest(run.step(data, "cross_entropy", hashes.ADAM))
    client.forward_backward_custom(data, lambda _, each: (sum((x**2).sum() for x in each), {})).result()
    client.optim_step(hashes.ADAM).result()
    found["custom"] = hashes.digest(run.saved())
    found["sampled"] = hashes.sampled(client, config)
    path = client.save_state("end").result().path
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    resumed.forward_backward(data, "cross_entropy").result()
    resumed.optim_step(hashes.ADAM).result()
    found["resumed"] = hashes.sampled(resumed, config)
    return found


def loop(service: Any, model: str, config: dict[str, Any]) -> None:
    """Train and sample until this process is ended."""
    from support import number_hashes as hashes

    client = service.create_lora_training_client(model, rank=4, seed=0).result()
    data, step = hashes.datums(config), 0
    while True:
        print("forward", flush=True)
        client.forward_backward(data, "cross_entropy").result()
        print("step", flush=True)
        client.optim_step(hashes.ADAM).result()
        step += 1
        print("acknowledged", step, flush=True)
        print("sample", flush=True)
        hashes.sampled(client, config)
        if step == 3:
            print("save", flush=True)
            client.save_state("three").result()


def at_random(service: Any, model: str, config: dict[str, Any], operations: int) -> dict[str, Any]:
    """Have three clients do things at once; return what was launched, as each host says."""
    import random
    import threading
    import time

    from tinker import types

    from jax_client.engine.devices.current import current
    from support import number_hashes as hashes

    data, failed = hashes.datums(config), []
    clients = [service.create_lora_training_client(model, rank=4, seed=i).result() for i in range(3)]

    def work(number: int) -> None:
        client, draw, waiting = clients[number], random.Random(number), []
        prompt, params = types.ModelInput.from_ints([5, 6, 7, 8]), types.SamplingParams(max_tokens=5, seed=1)
        sampler = client.save_weights_and_get_sampling_client().result()
        for i in range(operations // 3):
            kind = draw.choice(("train", "train", "forward", "custom", "sample", "sample", "save", "new sampler"))
            some = draw.sample(data, draw.randint(1, 3))
            if kind == "train":
                waiting += [client.forward_backward(some, "cross_entropy"), client.optim_step(hashes.ADAM)]
            elif kind == "forward":
                waiting.append(client.forward(some, "cross_entropy"))
            elif kind == "custom":
                waiting.append(client.forward_backward_custom(some, lambda _, x: (sum(a.sum() for a in x), {})))
                waiting.append(client.optim_step(hashes.ADAM))
            elif kind == "sample":
                waiting.append(sampler.sample(prompt, draw.randint(1, 4), params))
            elif kind == "save":
                waiting.append(client.save_state(f"s{i}"))
            else:
                sampler = client.save_weights_and_get_sampling_client().result()
            if draw.random() < 0.2:
                try:
                    [each.result() for each in waiting]
                except Exception as error:
                    failed.append(repr(error))
                waiting.clear()
        [each.result() for each in waiting]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    time.sleep(1)  # until the others have answered
    hosts = current().health()
    return {"failed": failed, "own": current().launches, "others": [host["launches"] for host in hosts]}


def main() -> None:
    """Run what the command line says."""
    hosts, devices, mesh, case, directory, command = sys.argv[1:]
    join(int(hosts), int(devices))
    import jax_client

    config, model = model_of(case, Path(directory))
    settings: dict[str, Any] = {"mesh": json.loads(mesh), "dtype": "float32", "precompile": False}
    settings |= {"compilation_cache_dir": "", "state_dir": Path(directory) / "state"}
    settings |= {"hosts": "ray" if int(hosts) > 1 else None}
    with jax_client.ServiceClient(config=jax_client.EngineConfig(**settings)) as service:
        if command == "numbers":
            print(json.dumps(numbers(service, model, config, Path(directory) / "state")), flush=True)
        elif command.isdecimal():
            print(json.dumps(at_random(service, model, config, int(command))), flush=True)
        else:
            loop(service, model, config)


if __name__ == "__main__":
    main()
