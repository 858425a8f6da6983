"""Can a person act on checkpoints, and take a deletion back, with what others do to them meanwhile?"""

from __future__ import annotations

import io
import json
import shlex
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from jax_client.checkpoint.store import CheckpointStore
from jax_client.cli import main
from jax_client.server.dashboard import deleted
from jax_client.values import AdapterState, CheckpointKey
from support.command_line import GOOD, LATER, SAMPLER, damage, state
from support.server.pages import Parts

API = "/dashboard/api/checkpoints"
HOUR = 3_600


def paths(client: httpx.Client) -> set[str]:
    return {each["path"] for each in client.get(API).json()["checkpoints"]}


def act(client: httpx.Client, action: str, path: str = GOOD, **fields: Any) -> dict[str, Any]:
    answer = client.post(f"{API}/{action}", json={"path": path, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def expires(parts: Parts, path: str = GOOD) -> float | None:
    return parts.store.record(CheckpointKey.parse(path)).expires_at


def test_the_list(client: httpx.Client) -> None:
    found = client.get(API).json()
    assert paths(client) == {GOOD, SAMPLER, LATER} and found["total"] == 3 and found["deleted"] == []
    page = client.get(API, params={"limit": 1, "offset": 1}).json()
    assert len(page["checkpoints"]) == 1 and page["total"] == 3
    run = LATER.removeprefix("tinker://").partition("/")[0]
    assert [each["path"] for each in client.get(API, params={"run": run}).json()["checkpoints"]] == [LATER]


@pytest.mark.parametrize("lifetime", [None, 5 * HOUR])
def test_a_deletion_is_taken_back(parts: Parts, client: httpx.Client, lifetime: int | None) -> None:
    parts.store.set_ttl(CheckpointKey.parse(GOOD), lifetime)
    before = expires(parts)
    until = act(client, "delete")["until"]
    assert abs(until - time.time() - deleted.UNDO_SECONDS) < 5 and expires(parts) == pytest.approx(until, abs=1)
    assert paths(client) == {SAMPLER, LATER}
    assert client.get(API).json()["deleted"] == [{"path": GOOD, "until": until}]
    assert act(client, "delete")["until"] == until, "twice is once"
    act(client, "undelete")
    assert paths(client) == {GOOD, SAMPLER, LATER} and client.get(API).json()["deleted"] == []
    after = expires(parts)
    assert after is None if before is None else after == pytest.approx(before, abs=2)
    assert client.post(f"{API}/undelete", json={"path": GOOD}).status_code == 404


def test_a_deletion_comes_to_its_end(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, key = deleted.Deleted(parts.store, seconds=0.2), CheckpointKey.parse(GOOD)
    hidden.delete(key)
    assert parts.store.exists(key)
    end = time.monotonic() + 20
    while parts.store.exists(key):
        hidden.sweep()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert hidden.listed() == [] and not parts.store.exists(key)
    hidden.sweep()
    assert hidden._hidden == {}, "what is gone is forgotten"


@pytest.mark.parametrize("lifetime", [None, 5 * HOUR])
def test_two_pages_delete_it_and_one_takes_that_back(parts: Parts, lifetime: int | None) -> None:
    key = CheckpointKey.parse(GOOD)
    parts.store.set_ttl(key, lifetime)
    before = expires(parts)
    # Of two servers, or of two owners of one server.
    here, there = deleted.Deleted(parts.store), deleted.Deleted(CheckpointStore(parts.home))
    until = here.delete(key)
    assert there.delete(key) == until
    CheckpointStore(parts.home).set_public(key, True)
    there.undelete(key)
    assert expires(parts) == before and parts.store.record(key).public
    for page in (here, there):
        assert len(page.shown([{"path": GOOD, **parts.store.record(key).to_json()}])) == 1
    here.undelete(key)
    assert expires(parts) == before
    # A server that ended within the ten minutes leaves it to the next one.
    here.delete(key)
    later = deleted.Deleted(CheckpointStore(parts.home))
    later.delete(key)
    later.undelete(key)
    assert expires(parts) == before


def test_a_deletion_and_its_undo_take_turns(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    key, hidden = CheckpointKey.parse(GOOD), deleted.Deleted(parts.store)
    hidden.delete(key)
    written, go, restore = threading.Event(), threading.Event(), parts.store.restore

    def slowly(*arguments: Any) -> Any:
        done = restore(*arguments)
        written.set()
        assert go.wait(10)
        return done

    monkeypatch.setattr(parts.store, "restore", slowly)
    undo = threading.Thread(target=hidden.undelete, args=(key,))
    undo.start()
    assert written.wait(10)
    again = threading.Thread(target=hidden.delete, args=(key,))
    again.start()
    again.join(0.05)
    go.set()
    for thread in (undo, again):
        thread.join(10)
    assert [each["path"] for each in hidden.listed()] == [GOOD] and expires(parts) is not None
    hidden.undelete(key)
    assert expires(parts) is None and hidden.listed() == []


def test_many_presses_lose_nothing(parts: Parts) -> None:
    key = CheckpointKey.parse(GOOD)
    for _ in range(10):
        hidden = deleted.Deleted(parts.store)
        threads = [threading.Thread(target=hidden.delete, args=(key,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hidden.undelete(key)
        assert expires(parts) is None


def test_what_is_saved_anew_is_not_hidden(parts: Parts, client: httpx.Client) -> None:
    key = CheckpointKey.parse(GOOD)
    act(client, "delete")
    metadata = parts.store.record(CheckpointKey.parse(SAMPLER)).metadata
    CheckpointStore(parts.home).save(key=key, state=state(9, True), metadata=metadata, overwrite=True)
    assert GOOD in paths(client)
    act(client, "undelete")
    assert expires(parts) is None and parts.store.record(key).step == 9


def test_another_lifetime_shows_it_again(parts: Parts, client: httpx.Client) -> None:
    act(client, "delete")
    CheckpointStore(parts.home).set_ttl(CheckpointKey.parse(GOOD), 8 * HOUR)
    assert GOOD in paths(client)
    act(client, "undelete")
    left = expires(parts)
    assert left is not None and left - time.time() > 7 * HOUR, "it keeps what another process gave it"


def test_lifetimes(parts: Parts, client: httpx.Client) -> None:
    found = act(client, "lifetime", seconds=2 * HOUR)
    assert found["expires_at"] == pytest.approx(time.time() + 2 * HOUR, abs=10)
    assert act(client, "lifetime", seconds=None)["expires_at"] is None
    for bad in (0, -1, 60, True, "3600", 10**12, [], 1e308):
        answer = client.post(f"{API}/lifetime", json={"path": GOOD, "seconds": bad})
        assert answer.status_code == 400 and "seconds" in answer.json()["detail"], bad
    assert expires(parts) is None


def test_verify(parts: Parts, client: httpx.Client) -> None:
    assert act(client, "verify")["verified"] == {"time": 1.0, "ok": True, "error": None}
    damage(parts.home, "runs/*/weights/b*/**/*")
    answer = client.post(f"{API}/verify", json={"path": LATER})
    assert answer.status_code == 400 and LATER.rpartition("/")[2] in answer.json()["detail"]


def test_paths_are_checked(client: httpx.Client) -> None:
    bad = (
        "",
        "../../etc",
        "tinker://a/weights/../b",
        "tinker://" + "a" * 5_000,
        None,
        5,
        "tinker://x:train:0/weights/n",
    )
    for action in ("verify", "delete", "undelete", "lifetime", "export"):
        for path in bad:
            answer = client.post(f"{API}/{action}", json={"path": path, "format": "peft"})
            assert answer.status_code in (400, 404), (action, path)
    assert client.get(f"{API}/download").status_code == 400


@pytest.mark.full
def test_the_export_command_is_one_that_runs(parts: Parts, client: httpx.Client, capsys: Any) -> None:
    for form in ("peft", "merged"):
        found = act(client, "export", format=form)
        words = shlex.split(found["command"])
        assert words[0] == "jax_client" and words[words.index("--state-dir") + 1] == str(parts.home)
        assert (found["download"] is not None) == (form == "peft")
        # Its base model is not on this machine; everything before that is taken.
        assert main([*words[1:-2], "--output", str(parts.home / "out")]) == 1
        assert "org/model" in capsys.readouterr().err
    assert client.post(f"{API}/export", json={"path": GOOD, "format": "gguf"}).status_code == 400
    link = act(client, "export", format="peft")["download"]
    answer = client.get(link)
    assert answer.status_code == 404 and "org/model" in answer.json()["detail"]


def test_a_small_adapter_is_sent_as_a_zip_file(parts: Parts, client: httpx.Client, tmp_path: Path) -> None:
    from support.golden_cases import CASES, base_values, lora_values
    from support.golden_engine import SPEC, to_ours
    from support.weight_files import write_hf

    case = CASES["qwen2_tied"]
    model = str(write_hf(tmp_path / "m", case, base_values(case)))
    key = CheckpointKey("0b1c2d3e-cccc:train:0", "sampler_weights", "z")
    metadata = {**parts.store.record(CheckpointKey.parse(SAMPLER)).metadata, "base_model": model}
    adapter = AdapterState(spec=SPEC, step=1, weights=to_ours(case, lora_values(case)))
    parts.store.save(key=key, state=adapter, metadata=metadata)
    answer = client.get(act(client, "export", str(key), format="peft")["download"])
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Disposition"] == 'attachment; filename="z-peft.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert set(archive.namelist()) == {"adapter_config.json", "adapter_model.safetensors"}
        assert json.loads(archive.read("adapter_config.json"))["r"] == SPEC.rank
