"""Does the API show runs, curves, rollouts and differences as they are, also the strange ones?"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from urllib.parse import quote

import httpx

from jax_client.metrics.store import FILE_NAME, MetricsStore, Point
from jax_client.runs.overview.rows import Overview
from jax_client.server.dashboard.made import page_alone
from jax_client.server.dashboard.runs_routes import csv_of, differences
from jax_client.server.dashboard.source import WithoutEngines
from support.command_line import RUN as FILLED
from support.command_line import fill
from support.server.pages import HOSTILE, Page, Parts

API = "/dashboard/api"
RUN = "0b1c-aaaa:train:0"
PATH = f"{API}/runs/0b1c-aaaa%3Atrain%3A0"


def test_runs_come_in_pages(parts: Parts, client: httpx.Client) -> None:
    for number in range(5):
        parts.source.set(f"r{number}", archived=number == 1)
    found = client.get(f"{API}/runs", params={"limit": 2, "offset": 1}).json()
    assert [each["run"] for each in found["runs"]] == ["r2", "r3"] and found["total"] == 4
    assert found["changed"] == "5"
    assert client.get(f"{API}/runs", params={"archived": 1}).json()["total"] == 5
    for bad in ({"limit": 0}, {"limit": "x"}, {"offset": -1}, {"archived": 2}, {"limit": "9" * 30}):
        assert client.get(f"{API}/runs", params=bad).status_code == 400, bad


def test_one_run(parts: Parts, client: httpx.Client) -> None:
    parts.source.set(RUN, name="first")
    parts.source.configs[RUN] = {"model": "m"}
    found = client.get(PATH).json()
    assert found["row"]["name"] == "first" and found["config"] == {"model": "m"}
    missing = client.get(f"{API}/runs/none")
    assert missing.status_code == 404 and "none" in missing.json()["detail"]


def test_series_go_on_from_a_cursor(parts: Parts, client: httpx.Client) -> None:
    parts.source.set(RUN)
    for step in range(4):
        parts.source.add_point(RUN, step, float(step))
    whole = client.get(f"{PATH}/series", params={"names": "loss:mean", "points": 10}).json()
    assert whole["series"]["loss:mean"]["value"] == [0.0, 1.0, 2.0, 3.0] and whole["next"] == "4-0"
    parts.source.add_point(RUN, 4, 4.0)
    later = client.get(f"{PATH}/series", params={"since": whole["next"]}).json()
    assert later["series"]["loss:mean"]["value"] == [4.0]
    assert client.get(f"{PATH}/series", params={"since": "0a9z-4-0"}).status_code == 200
    for bad in ({"since": "x"}, {"since": "1"}, {"points": 1}, {"points": 10**6}, {"names": ["a"] * 501}):
        assert client.get(f"{PATH}/series", params=bad).status_code == 400, bad


def test_a_number_that_json_has_not_is_null(parts: Parts, client: httpx.Client) -> None:
    parts.source.set(RUN, loss=math.nan, reward=-math.inf, spark=[1.0, math.nan])
    row = client.get(PATH).json()["row"]
    assert row["loss"] is None and row["reward"] is None and row["spark"] == [1.0, None]


def test_csv_has_every_point_and_no_formula(parts: Parts, client: httpx.Client) -> None:
    parts.source.set(RUN)
    for step in range(3_000):
        parts.source.add_point(RUN, step, step / 7)
    answer = client.get(f"{PATH}/series.csv")
    assert (
        answer.headers["Content-Type"].startswith("text/csv") and "attachment" in answer.headers["Content-Disposition"]
    )
    header, *rows = csv.reader(io.StringIO(answer.text))
    assert header == ["kind", "step", "time", "tokens", "loss:mean", f"'=1+1 {HOSTILE}"]
    assert len(rows) == 3_000 and [float(row[4]) for row in rows] == [step / 7 for step in range(3_000)]
    assert rows[2][:4] == ["step", "2", "102.0", "16"]
    one = client.get(f"{PATH}/series.csv", params={"names": "loss:mean"}).text
    assert one.splitlines()[0] == "kind,step,time,tokens,loss:mean"


def write(folder: Path, *rows: dict[str, float]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_csv_of_a_log_has_each_row(tmp_path: Path) -> None:
    same = [{"step": 7, "a": float(i)} for i in range(3)]
    write(tmp_path / "a", *same, {"step": 7, "b": 4.5}, {"step": 8, "a": 5.0, "b": 6.0})
    overview = Overview(tmp_path / "state", logs=[tmp_path])
    text = b"".join(csv_of(overview.table("log:a", None))).decode().splitlines()
    values = ["0.0,", "1.0,", "2.0,", ",4.5"]
    assert text == ["kind,step,time,tokens,a,b", *(f"user,7,,0,{each}" for each in values), "user,8,,0,5.0,6.0"]
    text = b"".join(csv_of(overview.table("log:a", ["b", "none"]))).decode().splitlines()
    assert text == ["kind,step,time,tokens,b", "user,7,,0,4.5", "user,8,,0,6.0"]


def test_csv_without_engines_has_no_point_of_theirs(tmp_path: Path) -> None:
    store = MetricsStore(fill(tmp_path) / FILE_NAME)
    store.add([Point(run=FILLED, kind=kind, step=1, time=1.0, metrics={kind: 1.0}) for kind in ("step", "device")])
    assert Overview(tmp_path).table(FILLED, None).names == ["device", "step"]
    text = b"".join(csv_of(WithoutEngines(Overview(tmp_path)).table(FILLED, None))).decode().splitlines()
    assert text == ["kind,step,time,tokens,step", "step,1,1.0,0,1.0"]


def test_names_may_have_commas_percent_signs_and_those_of_routes(tmp_path: Path) -> None:
    names = ("lr=0.1,seed=1", "lr=0.1,seed=2", "drop 10%", "x/series", "x/series.csv", "x/rollouts", "x/note", "note")
    for number, name in enumerate(names):
        folder = write(tmp_path / "logs" / name, {"step": 1, "a,b": number, "c%": 2.0})
        (folder / "config.json").write_text(json.dumps({"lr": number}))
    served = Page(page_alone(tmp_path / "state", api_key=None, hosts={"127.0.0.1"}, logs=[tmp_path / "logs"]))
    try:
        with served.client(None) as client:
            runs = [row["run"] for row in client.get(f"{API}/runs").json()["runs"]]
            assert len(runs) == len(names)
            for run in runs:
                path = f"{API}/runs/{quote(run, safe='')}"
                assert client.get(path).json()["row"]["run"] == run
                found = client.get(f"{path}/series", params={"names": ["a,b", "c%"]}).json()
                assert found["run"] == run and sorted(found["series"]) == ["a,b", "c%"]
                table = client.get(f"{path}/series.csv", params={"names": "a,b"}).text
                assert table.splitlines()[0] == 'kind,step,time,tokens,"a,b"'
            pair = [f"log:{name}" for name in names[:2]]
            differ = client.get(f"{API}/compare", params={"runs": pair}).json()["differences"]
            assert {"field": "settings.lr", "values": {pair[0]: 0, pair[1]: 1}} in differ
    finally:
        served.stop()


def test_notes_are_kept(parts: Parts, client: httpx.Client) -> None:
    parts.source.set(RUN)
    answer = client.post(f"{PATH}/note", json={"note": HOSTILE, "tags": ["a"]})
    assert answer.json()["row"]["note"] == HOSTILE and parts.source.rows[RUN]["tags"] == ["a"]
    assert client.post(f"{PATH}/note", json={"run": "other"}).status_code == 400
    assert client.post(f"{API}/runs/none/note", json={"note": ""}).status_code == 404


def test_rollouts_come_in_pages(parts: Parts, client: httpx.Client) -> None:
    parts.source.set(RUN)
    found = client.get(f"{PATH}/rollouts", params={"offset": 3, "limit": 5}).json()
    assert [each["step"] for each in found["groups"]] == [3, 4] and found["total"] == 5


def test_differences_name_fields_by_their_path() -> None:
    configs = {
        "a": {"rank": 8, "spec": {"seed": 1, "attn": True}, "tags": ["x"]},
        "b": {"rank": 8, "spec": {"seed": 2, "attn": True}},
        "c": {"rank": 8, "spec": {}},
    }
    found = {each["field"]: each["values"] for each in differences(configs)}
    assert found["spec.seed"] == {"a": 1, "b": 2, "c": None}
    assert found["tags"] == {"a": ["x"], "b": None, "c": None}
    assert "rank" not in found and found["spec.attn"]["c"] is None


def test_compare(parts: Parts, client: httpx.Client) -> None:
    for run, rank in (("a", 1), ("b", 2)):
        parts.source.set(run)
        parts.source.configs[run] = {"rank": rank}
    found = client.get(f"{API}/compare", params={"runs": ["a", "b"]}).json()
    assert found == {"differences": [{"field": "rank", "values": {"a": 1, "b": 2}}]}
    for runs, status in (("a", 400), ("a,a", 400), ("a,none", 404), (",".join(map(str, range(20))), 400)):
        assert client.get(f"{API}/compare", params={"runs": runs.split(",")}).status_code == status, runs
