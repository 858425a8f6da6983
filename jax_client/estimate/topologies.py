"""What is XLA's compiler told of devices that are not here? A topology's name and layout, of a GPU its description."""

from __future__ import annotations

from typing import Any

from jax_client.errors import UnsupportedError
from jax_client.estimate.chips import Machine

# By devices. A host of v5e, v6e has up to eight chips, of v4 and v5p four.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
# Two devices a chip.
_PAIRS = {2: "1x1x1", 8: "2x2x1", 16: "2x2x2", 32: "2x2x4"}
_TPUS = {
    "v4": ("v4", "megacore", _CUBES),
    "v5e": ("v5e", "default", _FLAT),
    "v5p": ("v5", "megacore", _CUBES),
    "v6e": ("v6e", "default", _FLAT),
    "v7x": ("tpu7x", None, _PAIRS),
}
# As openxla/xla has it in xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def topology_of(machine: Machine) -> dict[str, Any]:
    """Return the arguments of `jax.experimental.topologies.get_topology_desc` for a machine.

    Raises:
        UnsupportedError: no compiler knows the chip, or no slice has this number of devices.
    """
    name, count = machine.chip.name, machine.count
    if name == "h100":
        shape = f"1x1x{count}"
        return {"platform": "cuda", "topology_name": shape, "topology": shape, "target_config": _H100}
    if name not in _TPUS:
        raise UnsupportedError(
            f"--compile: XLA's compilers know {', '.join(_TPUS)} and h100 without the hardware, and not {name}; leave "
            "--compile out."
        )
    prefix, config, shapes = _TPUS[name]
    if count not in shapes:
        known = ", ".join(f"{name}-{n * machine.chip.counted}" for n in shapes)
        raise UnsupportedError(f"--compile: there is no slice {machine.name}; those are {known}.")
    topology: dict[str, Any] = {"platform": "tpu", "topology_name": f"{prefix}:{shapes[count]}"}
    if config is None:  # the name alone says all
        return topology
    host = (1, 1, 1) if count == 1 else (2, 2, 1)
    more = {"chip_config_name": config, "chips_per_host_bounds": host, "num_slices": 1, "wrap": (False,) * 3}
    return topology | more
