"""Does the package work for a user without a home directory, or with one that cannot be written, and past a proxy?"""

from __future__ import annotations

import logging
import pwd
from pathlib import Path
from typing import Any
from urllib.request import proxy_bypass_environment

import jax
import pytest

import jax_client
from jax_client.config import default_compilation_cache_dir, default_state_dir
from jax_client.engine.devices.compilation_cache import enable_compilation_cache
from jax_client.errors import BadRequestError, RequestFailedError
from jax_client.host import places
from jax_client.host.proxies import bypassing, proxy_variables, through_proxy
from jax_client.weights.read import hub
from support import fake_engine
from support.fake_engine import MODEL, PARAMS, PROMPT

models = fake_engine.models
VARIABLES = ("JAX_CLIENT_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user without $HOME and without a passwd entry, as in `docker run --user 54321`."""

    def no_entry(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


def test_without_a_home_only_what_is_saved_needs_a_named_place(homeless: None, models: Any) -> None:
    assert places.home() is None and default_compilation_cache_dir() is None
    with pytest.raises(BadRequestError, match=r"no home directory for checkpoints.*state_dir \(or JAX_CLIENT_HOME"):
        default_state_dir()
    with jax_client.ServiceClient(_models=models) as service:
        sampler = service.create_sampling_client(base_model=MODEL).result()
        assert sampler.sample(PROMPT, 1, PARAMS).result().sequences
        assert service.describe()["state_dir"].startswith("none: there is no home directory")
        with pytest.raises(BadRequestError, match="JAX_CLIENT_HOME"):
            service.create_lora_training_client(MODEL).result()


def test_a_hub_name_without_a_home_names_the_hubs_variable(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # As huggingface_hub sets it for such a user.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert hub.cached_models() == [] and hub.cached_snapshot("org/model") is None
    with pytest.raises(RequestFailedError, match=r"'org/model' is not on this machine.*Set HF_HOME to a directory"):
        hub.download("org/model", [])


def test_a_tilde_without_a_home_names_its_setting(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_CLIENT_HOME", "~/state")
    with pytest.raises(BadRequestError, match=r"JAX_CLIENT_HOME is '~/state', but '~'.*HOME is not set"):
        default_state_dir()
    with pytest.raises(BadRequestError, match=r"base_model is '~nobody-here/m', but '~nobody-here' stands for no home"):
        places.expand("~nobody-here/m", "base_model")
    assert places.expand("./~/m", "base_model") == Path("./~/m")
    monkeypatch.setenv("HOME", "/somewhere")
    assert default_state_dir() == Path("/somewhere/state")


def test_a_home_that_cannot_be_written_is_named_with_the_setting(
    models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # A file, and not a directory without permission, because root may write to the latter.
    (tmp_path / "home").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with jax_client.ServiceClient(_models=models) as service:
        sampler = service.create_sampling_client(base_model=MODEL).result()
        assert sampler.sample(PROMPT, 1, PARAMS).result().sequences
        with pytest.raises(RequestFailedError, match=r"cannot write to .*set EngineConfig\.state_dir \(or JAX_CLIENT"):
            service.create_lora_training_client(MODEL).result()


def test_a_cache_that_cannot_be_written_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):
        enable_compilation_cache(tmp_path / "file" / "xla")
        enable_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == before  # type: ignore[attr-defined]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2 and all("EngineConfig.compilation_cache_dir (or XDG_CACHE_HOME)" in line for line in said)
    assert "every start compiles" in said[0] and str(tmp_path) in said[0] and "no home directory" in said[1]


def test_a_server_of_this_machine_is_excepted_from_every_proxy() -> None:
    environment = {"HTTP_PROXY": "http://p:1", "https_proxy": "", "all_proxy": "socks5://p:2", "no_proxy": "a, b"}
    assert proxy_variables(environment) == ["HTTP_PROXY", "all_proxy"]
    assert through_proxy(environment, "127.0.0.1") == ["HTTP_PROXY", "all_proxy"]
    added = bypassing(environment, "127.0.0.1", "localhost")
    assert added == {"no_proxy": "a,b,127.0.0.1,localhost", "NO_PROXY": "a,b,127.0.0.1,localhost"}
    assert through_proxy(environment | added, "127.0.0.1") == []
    assert proxy_bypass_environment("127.0.0.1", {"no": added["NO_PROXY"]})
    proxied = {"HTTP_PROXY": "http://p:1"}
    assert through_proxy(proxied | {"NO_PROXY": "*"}, "127.0.0.1") == []
    assert through_proxy(proxied | {"no_proxy": ".lan,x"}, "gpu.lan") == []
    assert through_proxy(proxied | {"no_proxy": "pu.lan"}, "gpu.lan") == ["HTTP_PROXY"]
    assert bypassing({}, "127.0.0.1") == {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
