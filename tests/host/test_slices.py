"""Is a machine that has a part of a TPU slice refused before jax's backend starts?"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from jax_client.errors import UnsupportedError
from jax_client.host import slices

FOUR = {"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1,t1v-2,t1v-3"}


@pytest.mark.parametrize(
    "environ",
    [
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": ""},
        FOUR | {"JAX_PLATFORMS": "cpu"},
        FOUR | {"JAX_PLATFORMS": "cuda,cpu"},
        FOUR | {"TPU_PROCESS_BOUNDS": "1,1,1"},
        {},
    ],
)
def test_a_machine_that_computes_alone_goes_on(environ: dict[str, str]) -> None:
    slices.refuse_part_of_a_slice(environ)


@pytest.mark.parametrize("environ", [FOUR, FOUR | {"JAX_PLATFORMS": "tpu,cpu"}, FOUR | {"TPU_PROCESS_BOUNDS": "2,2,1"}])
def test_one_host_of_several_is_refused_and_told_what_to_do(environ: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match=r"one of the 4 hosts .*t1v-0.*TPU_PROCESS_BOUNDS=1,1,1"):
        slices.refuse_part_of_a_slice(environ)


def test_a_virtual_machine_asks_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[urllib.request.Request] = []

    def opened(self: Any, request: urllib.request.Request, timeout: float) -> Any:
        asked.append(request)
        return io.BytesIO(b"unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", opened)
    monkeypatch.setattr(slices, "_CHIPS", ("null",))
    slices._metadata_hosts.cache_clear()
    assert slices.slice_hosts({}) == ("10.0.0.2", "10.0.0.3")
    assert asked[0].full_url == slices.METADATA and asked[0].headers["Metadata-flavor"] == "Google"
    # Without TPUs nothing is asked.
    monkeypatch.setattr(slices, "_CHIPS", ("no such file",))
    slices._metadata_hosts.cache_clear()
    assert slices.slice_hosts({}) == () and len(asked) == 1
    slices._metadata_hosts.cache_clear()


def test_no_backend_is_started_for_that() -> None:
    code = (
        "import jax\n"
        "from jax_client.errors import UnsupportedError\n"
        "from jax_client.sharding import make_mesh\n"
        "jax.devices = lambda *_: exit('a backend was started')\n"
        "try:\n    make_mesh('auto')\n"
        "except UnsupportedError as error:\n    print(error)\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | FOUR
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("this machine is one of the 4 hosts"), done.stderr[-2000:]
