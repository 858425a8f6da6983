"""Which hosts does the Ray cluster have, and which versions has each? `hosts` runs this in a child process.

It joins the cluster that `$RAY_ADDRESS` names, and prints an object of JSON. No host computes, and no chip is reserved.
"""

from __future__ import annotations

import json


def main() -> None:
    """Join the cluster, ask each host, print what there is."""
    from jax_client.engine.hosts import ray_cluster
    from jax_client.engine.hosts.actor import FollowerActor
    from jax_client.engine.hosts.joining import versions
    from jax_client.engine.hosts.start import environment

    ray = ray_cluster.connect(start=False)
    found = ray_cluster.hosts(ray)
    remote = ray.remote(FollowerActor)
    free = {"num_gpus": 0, "resources": {}}  # a program may have the chips
    actors = [remote.options(**ray_cluster.on_host(host) | free).remote(environment()) for host in found]
    asked = [actor.versions.remote() for actor in actors]
    shown = []
    for host, answer in zip(found, asked, strict=True):
        try:
            theirs, problem = ray.get(answer), ""
        except ray.exceptions.RayError as error:
            theirs, problem = {}, (str(error).strip().splitlines() or [type(error).__name__])[-1]
        chips = {name: count for name, count in (("TPU", host.tpus), ("GPU", host.gpus)) if count}
        shown.append(
            {"name": host.name, "address": host.address, "chips": chips, "versions": theirs, "problem": problem}
        )
    print(f"\n{json.dumps({'hosts': shown, 'versions': versions()})}", flush=True)
    for actor in actors:
        ray.kill(actor)


if __name__ == "__main__":
    main()
