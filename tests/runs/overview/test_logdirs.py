"""Is what a loop wrote into a log directory shown, and does a hostile directory do no harm?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jax_client.errors import NotFoundError
from jax_client.runs.overview.logdirs import files, rows
from jax_client.runs.overview.logdirs.files import MAX_LINE, LogFile, find_logs
from jax_client.runs.overview.rows import Overview


def write(folder: Path, rows: list[object], **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, content in more.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def seen(root: Path) -> Overview:
    return Overview(root / "no state", logs=[root])


def test_a_log_directory_is_a_run_with_series(tmp_path: Path) -> None:
    rows = [
        {"step": i, "train_mean_nll": 2 - i / 10, "time/total": 3.0, "env/all/reward/total": i / 8} for i in range(8)
    ]
    config = {"model_name": "org/m", "lora_rank": 8, "learning_rate": 1e-4, "wandb_name": "math rl"}
    folder = write(tmp_path / "runs" / "a", rows, config=config)
    path = "tinker://s:train:0/weights/000005"
    (folder / "checkpoints.jsonl").write_text(json.dumps({"name": "5", "state_path": path}) + '\n{"x\n[]\n')
    overview = seen(tmp_path)
    (row,) = overview.runs()
    assert (row.run, row.source, row.name, row.state) == ("log:runs/a", "log", "math rl", "unknown")
    assert (row.step, row.model, row.rank, row.reward, row.loss) == (7, "org/m", 8, 7 / 8, pytest.approx(1.3))
    assert (row.last_checkpoint, row.parent) == (path, "s:train:0") and row.alerts == []
    config = overview.config("log:runs/a")
    assert config["settings"]["learning_rate"] == 1e-4 and config["checkpoints"] == [path]
    found = overview.series("log:runs/a", ["train_mean_nll"])
    series = found.series["train_mean_nll"]
    assert series["step"] == list(range(8)) and series["time"][1] - series["time"][0] == pytest.approx(3.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "train_mean_nll": 0.5}\n{"step": 9, "train_m')
    new = overview.series("log:runs/a", None, since=found.next)
    assert new.series["train_mean_nll"]["value"] == [0.5], "the last line is not whole yet"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('ean_nll": 0.25}\n')
    last = overview.series("log:runs/a", None, since=new.next)
    assert (last.series["train_mean_nll"]["step"], last.series["train_mean_nll"]["value"]) == ([9], [0.25])
    # The cookbook cuts the file where it resumes, and replaces it.
    write(folder, rows[:3])
    cut = overview.series("log:runs/a", ["train_mean_nll"], since=last.next)
    assert cut.series["train_mean_nll"]["step"] == [0, 1, 2] and cut.reset and not last.reset


def loss_of(overview: Overview, since: str | None = None) -> tuple[list[float], bool, str]:
    found = overview.series("log:a", None, since=since)
    return found.series.get("loss", {"value": []})["value"], found.reset, found.next


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("rows", [10, 15, 900])
@pytest.mark.parametrize("same", [0, 5])
def test_a_file_that_was_begun_anew_is_not_mixed_with_the_old_one(
    tmp_path: Path, in_place: bool, rows: int, same: int
) -> None:
    def lines(loss: float, count: int) -> list[object]:
        return [{"step": i, "loss": 1.0 if i < same else loss} for i in range(count)]

    folder = write(tmp_path / "a", lines(1.0, 10))
    overview = seen(tmp_path)
    assert loss_of(overview)[:2] == ([1.0] * 10, False)
    cursor = loss_of(overview)[2]
    if not in_place:
        os.rename(folder / "metrics.jsonl", folder / "old")
    write(folder, lines(2.0, rows))
    expected = [1.0] * same + [2.0] * (rows - same)
    # Also a process that never saw the old file knows that the cursor is none of this one.
    for reader in (overview, seen(tmp_path)):
        values, reset, following = loss_of(reader, cursor)
        assert (values, reset) == (expected, True)
        assert loss_of(reader, following) == ([], False, following)
        assert loss_of(reader)[0] == expected


def test_a_copy_of_a_log_that_replaces_it_continues_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [{"step": 0, "loss": 1.0}])
    overview = seen(tmp_path)
    cursor = loss_of(overview)[2]
    write(tmp_path / "b", [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}])
    os.replace(tmp_path / "b" / "metrics.jsonl", folder / "metrics.jsonl")
    assert loss_of(overview, cursor)[:2] == ([2.0], False)


def test_a_log_that_cannot_be_read_now_is_not_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a", [{"step": i, "loss": 1.0} for i in range(3)])
    overview, other = seen(tmp_path), seen(tmp_path)
    cursor = loss_of(overview)[2]
    assert other.runs()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 2.0}\n')
    with monkeypatch.context() as patched:
        patched.setattr(files, "open_inside", lambda *_: None)
        assert loss_of(overview, cursor) == loss_of(other, cursor) == ([], False, cursor)
    assert loss_of(overview, cursor)[:2] == loss_of(other, cursor)[:2] == ([2.0], False)


@pytest.mark.parametrize("step", ["1e300", "-1e300", str(2**63), str(10**400)])
def test_a_step_that_no_column_holds_costs_itself_alone(tmp_path: Path, step: str) -> None:
    rows = [f'{{"step": {step if i == 2 else i}, "loss": {i}.0}}\n' for i in range(6)]
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(rows))
    overview = seen(tmp_path)
    found = overview.series("log:a", None).series
    assert found["loss"]["value"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and found["loss"]["step"] == [0, 1, 1, 3, 4, 5]
    assert found["nonfinite/values"]["step"] == [1] and overview.runs()[0].step == 5


def test_many_watched_directories_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        write(tmp_path / f"run{number}", [{"step": 1, "loss": 1.0}])
    overview, read = seen(tmp_path), []
    monkeypatch.setattr(rows, "LogFile", lambda log: read.append(log) or LogFile(log))
    for _ in range(3):
        assert all(overview.series(f"log:run{number}", None).series for number in range(9))
    assert len(read) == 9


def test_lines_that_are_broken_cost_themselves_alone(tmp_path: Path) -> None:
    good = b'{"step": %d, "a": 1.5}\n'
    hostile = [
        b"{broken\n", b"[1, 2]\n", b"null\n", b"\xff\xfe\n", b"\n", b"   \n", b"[" * 100_000 + b"\n",
        b'{"step": "x", "a": "text", "b": null, "c": [1], "d": {"e": 1}, "f": true}\n',
        b'{"step": 2, "a": NaN, "b": Infinity, "c": 1' + b"0" * 400 + b"}\n",
        b'{"a": "' + b"x" * (MAX_LINE + 10) + b'"}\n',
        json.dumps({f"name {i}": i for i in range(5_000)}).encode() + b"\n",
        json.dumps({"n" * 10_000: 1, "<script>alert(1)</script>": 2}).encode() + b"\n",
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(good % 1 + b"".join(hostile) + good % 3)
    file = LogFile(find_logs([tmp_path])[0])
    file.update()
    assert file.columns.series(["a"], points=10)["a"]["step"] == [1, 3]
    assert file.broken == 6 and len(file.columns.names()) <= 512
    assert file.columns.series(["nonfinite/values"], points=10)["nonfinite/values"]["value"] == [3.0]
    row = seen(tmp_path).runs()[0]
    names = seen(tmp_path).series(row.run, None).names
    assert all(len(name) <= 200 for name in names), "names are data; a page that shows them escapes them"
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line for line in hostile if len(line) < MAX_LINE) + good % 3)
    row = seen(tmp_path).runs()[0]
    assert row.step == 3 and [alert.kind for alert in row.alerts] == ["nonfinite"]


def test_nothing_outside_of_the_directory_is_read(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    write(outside / "secret", [{"step": 1, "secret": 1.0}], config={"model_name": "secret"})
    write(root / "real", [{"step": 1, "a": 1.0}])
    (root / "linked").symlink_to(outside / "secret")
    (root / "file").mkdir()
    (root / "file" / "metrics.jsonl").symlink_to(outside / "secret" / "metrics.jsonl")
    (root / "real" / "config.json").symlink_to(outside / "secret" / "config.json")
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / "metrics.jsonl")
    (root / "loop").symlink_to(root)
    overview = seen(root)
    assert [row.run for row in overview.runs()] == ["log:real"] and overview.runs()[0].model is None
    # A directory that becomes a link after it was found.
    log = find_logs([root])[0]
    os.rename(root / "real", root / "moved")
    (root / "real").symlink_to(outside / "secret")
    file = LogFile(log)
    file.update()
    assert file.columns.names() == [] and file.glance().step == 0
    for odd in ("log:../outside/secret", "log:", "log:real/../../outside/secret", "log:/etc"):
        with pytest.raises(NotFoundError):
            overview.series(odd, None)
        with pytest.raises(NotFoundError):
            overview.rollouts(odd, offset=0, limit=1)


def test_directories_of_one_name_and_strange_ones_have_names_of_their_own(tmp_path: Path) -> None:
    for folder in ("x/a", "y/a", "y/<b>\x1b[2J"):
        write(tmp_path / folder, [{"step": 1}])
    found = [log.name for log in find_logs([tmp_path / "x", tmp_path / "y", tmp_path / "x"])]
    assert found[:3] == ["a", "y/<b>\N{REPLACEMENT CHARACTER}[2J", "y/a"][:1] + found[1:3]
    assert len(set(found)) == len(found) == 4 and all(name.isprintable() for name in found)


def test_a_large_file_is_listed_by_a_few_of_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": i, "loss": 1 + i / 30_000, "text": "x" * 40} for i in range(30_000)]
    write(tmp_path, list(rows))
    read = 0
    pread = os.pread

    def counted(*arguments: int) -> bytes:
        nonlocal read
        data = pread(*arguments)
        read += len(data)
        return data

    monkeypatch.setattr(files.os, "pread", counted)
    overview = seen(tmp_path)
    row = overview.runs()[0]
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert size > files.WHOLE_BYTES and read <= 2**20
    assert row.step == 29_999 and row.loss == pytest.approx(2.0, abs=1e-3)
    assert row.spark[0] == pytest.approx(1.0, abs=0.1) and list(row.spark) == sorted(row.spark)
    read = 0
    overview.runs()
    assert read == 0, "a file that has not changed is not read"


def conversation(*messages: tuple[str, str]) -> dict[str, object]:
    said = [{"role": role, "content": content} for role, content in messages]
    return {"tag": "div", "attrs": {}, "children": [], "data": {"type": "conversation", "messages": said}}


def section(title: str, *children: object) -> dict[str, object]:
    header = {"tag": "h2", "attrs": {}, "children": [title]}
    return {
        "tag": "section",
        "attrs": {},
        "children": [header, {"tag": "div", "attrs": {}, "children": list(children)}],
    }


def answered(text: str, reward: float) -> list[object]:
    cells = [{"tag": "td", "attrs": {}, "children": [cell]} for cell in ("reward", f"{reward:.3f}")]
    return [
        section("Prompt", conversation(("user", "2+2?"))),
        section("Policy Response", conversation(("assistant", text))),
        section("Reward", {"tag": "table", "attrs": {}, "children": [{"tag": "tr", "attrs": {}, "children": cells}]}),
    ]


def test_the_largest_rewards_have_a_mean(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 0}])
    folder = tmp_path / "iteration_000000"
    folder.mkdir()
    lines = [{"group_idx": 0, "total_reward": reward} for reward in (1e308, 1e308, 1e308)]
    (folder / "train_rollout_summaries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = seen(tmp_path).rollouts(f"log:{tmp_path.name}", offset=0, limit=1)
    assert [sample["advantage"] for sample in page["groups"][0]["samples"]] == [0.0, 0.0, 0.0]


def test_rollouts_have_rewards_and_the_texts_that_fit(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 0}])
    for iteration in (0, 1):
        folder = tmp_path / f"iteration_{iteration:06d}"
        folder.mkdir()
        lines = [
            {
                "iteration": iteration, "group_idx": group, "traj_idx": which, "total_reward": float(which),
                "final_reward": 0.0, "trajectory_metrics": {}, "steps": [{"ac_len": 7, "metrics": {"correct": which}}],
            }
            for group in range(3) for which in range(2)
        ]  # fmt: skip
        (folder / "train_rollout_summaries.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken")
        # The answer of reward 1 ended first.
        tree = [section("Group Rollout", *answered("<script>four", 1.0), *answered("five", 0.0))]
        (folder / "train_logtree.json").write_text(json.dumps({"root": {"tag": "body", "children": tree}}))
    overview = seen(tmp_path)
    run = f"log:{tmp_path.name}"
    page = overview.rollouts(run, offset=0, limit=2)
    assert page["total"] == 6 and [group["step"] for group in page["groups"]] == [1, 1]
    first, second = page["groups"]
    assert first["prompt"] == "user: 2+2?" and second["prompt"] is None
    assert [(s["text"], s["reward"], s["advantage"], s["tokens"]) for s in first["samples"]] == [
        ("five", 0.0, -0.5, 7), ("<script>four", 1.0, 0.5, 7),
    ]  # fmt: skip
    assert first["samples"][1]["parts"] == {"final_reward": 0.0, "correct": 1.0}
    assert [group["step"] for group in overview.rollouts(run, offset=2, limit=3)["groups"]] == [1, 0, 0]
    assert overview.rollouts(run, offset=99, limit=3)["groups"] == []


@pytest.mark.parametrize(
    "tree",
    ["[]", "{", '{"root": 3}', '{"root": {"children": "x"}}', '{"root": ' + '{"children": [' * 300 + "]}" * 300 + "}"],
)
def test_a_tree_of_another_form_has_no_texts(tmp_path: Path, tree: str) -> None:
    write(tmp_path, [{"step": 0}])
    folder = tmp_path / "iteration_000003"
    folder.mkdir()
    record = {"group_idx": 0, "total_reward": "x", "steps": [3, {"ac_len": "y", "metrics": [1]}], "final_reward": True}
    (folder / "train_rollout_summaries.jsonl").write_text(json.dumps(record))
    (folder / "train_logtree.json").write_text(tree)
    (group,) = seen(tmp_path).rollouts(f"log:{tmp_path.name}", offset=0, limit=9)["groups"]
    assert group["samples"] == [{"text": None, "reward": None, "advantage": None, "parts": {}, "tokens": 0}]
