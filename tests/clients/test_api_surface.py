"""Is every name and every signature of the SDK here?"""

from __future__ import annotations

import inspect
import subprocess

import pytest
import tinker

import jax_client
from jax_client import errors
from support.children import STRICT

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient")
# The SDK's own plumbing: its connection holder, and a factory that takes one.
INTERNAL = {("ServiceClient", "holder"), ("SamplingClient", "create")}


@pytest.mark.parametrize("name", tinker.__all__)
def test_every_top_level_name(name):
    assert getattr(jax_client, name) is not None
    assert name in dir(jax_client)


def test_our_own_names():
    assert jax_client.EngineConfig().dtype == "auto"
    assert jax_client.errors is errors
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jax_client.nonsense


def test_types_are_the_sdks():
    from jax_client.types import Datum

    assert Datum is tinker.Datum
    assert jax_client.types.SamplingParams is tinker.types.SamplingParams
    for name in dir(tinker.types):
        if not name.startswith("_"):
            assert getattr(jax_client.types, name) is getattr(tinker.types, name)


def _methods():
    for client in CLIENTS:
        for name, member in vars(getattr(tinker, client)).items():
            if not name.startswith("_") and (client, name) not in INTERNAL:
                yield pytest.param(client, name, member, id=f"{client}.{name}")


def _plain(member):
    return member.__func__ if isinstance(member, staticmethod) else member


@pytest.mark.parametrize(("client", "name", "theirs"), list(_methods()))
def test_signatures(client, name, theirs):
    ours = inspect.getattr_static(getattr(jax_client, client), name)
    assert isinstance(ours, staticmethod) == isinstance(theirs, staticmethod)
    shape = [
        [(p.name, p.kind, p.default) for p in inspect.signature(_plain(member)).parameters.values()]
        for member in (ours, theirs)
    ]
    assert shape[0] == shape[1]
    kinds = {inspect.iscoroutinefunction(inspect.unwrap(_plain(member))) for member in (ours, theirs)}
    assert len(kinds) == 1
    assert _plain(ours).__doc__


@pytest.mark.parametrize("client", ["ServiceClient", "RestClient", "AdminClient"])
def test_constructors_add_only_config(client):
    ours = inspect.signature(getattr(jax_client, client)).parameters
    theirs = inspect.signature(getattr(tinker, client)).parameters
    assert [name for name in ours if name != "config"] == list(theirs)


@pytest.mark.parametrize("client", CLIENTS)
def test_registered_with_the_sdk(client):
    assert issubclass(getattr(jax_client, client), getattr(tinker, client))
    for kind in ("Training", "Sampling"):
        future = getattr(jax_client, f"Backcompat{kind}ClientFuture")
        assert issubclass(future, getattr(jax_client, f"{kind}Client"))
        assert issubclass(future, getattr(tinker, f"{kind}Client"))
        assert issubclass(future, getattr(tinker, f"Backcompat{kind}ClientFuture"))
        assert issubclass(future, tinker.APIFuture)


def test_base_url_gives_the_sdks_client():
    url = "http://127.0.0.1:9"
    assert type(jax_client.ServiceClient(base_url=url, api_key="tml-x")) is tinker.ServiceClient
    with pytest.raises(tinker.BadRequestError, match="config"):
        jax_client.ServiceClient(base_url=url, config=jax_client.EngineConfig())


def test_the_environment_does_not_send_work_elsewhere(monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    assert type(jax_client.ServiceClient()) is jax_client.ServiceClient


def test_admin_is_refused_by_name():
    with pytest.raises(errors.UnsupportedError, match="AdminClient") as caught:
        jax_client.AdminClient()
    assert isinstance(caught.value, tinker.BadRequestError)


def test_refused_rest_methods():
    rest = jax_client.RestClient()
    with pytest.raises(tinker.BadRequestError, match="search_sessions is not served"):
        rest.search_sessions("x")
    with pytest.raises(errors.UnsupportedError, match="whoami"):
        rest.whoami()


def test_importing_starts_no_backend_and_no_heavy_module():
    code = (
        "import sys, jax_client\n"
        "assert not {'jax', 'tinker', 'torch', 'transformers'} & set(sys.modules)\n"
        "jax_client.ServiceClient(); jax_client.RestClient()\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
    )
    subprocess.run([*STRICT, "-c", code], check=True)
