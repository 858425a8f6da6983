// Which runs are there, and how do they do? A table, newest activity first, each row kept in place as news comes.

import { add, button, h, put, say } from "../core/dom.js";
import { ofRun, post } from "../core/api.js";
import { ago, bytes, compared, count, moment, number, span, title } from "../core/format.js";
import { move } from "../core/keys.js";
import { refresh, replace, runs, store } from "../core/store.js";
import { toast } from "../core/toast.js";
import { spark } from "../charts/spark.js";
import { noRuns } from "./parts/runs_empty.js";
import { alertBadges, stateBadge } from "./parts/state.js";

const COLUMNS = [
  ["", "pick"],
  ["Run", "name"],
  ["State", "state"],
  ["Step", "num"],
  ["Loss", "num"],
  ["Reward", "num"],
  ["Curve", "curve"],
  ["Tokens", "num wide"],
  ["Tokens/s", "num wide"],
  ["Time", "num wide"],
  ["Disk", "num wide"],
  ["Saved", "num wide"],
  ["Active", "num"],
];
const ALL_ARCHIVED = "Every run is archived; the box above shows them.";
const picked = new Set();
let wanted = "";
let archived = false;

class Row {
  constructor(row, view) {
    this.view = view;
    this.link = h("a", { class: "run-name" });
    this.check = h("input", {
      type: "checkbox",
      class: "pick",
      onchange: () => view.pick(this.row.run, this.check.checked),
    });
    this.cells = COLUMNS.map(([label, kind]) => h("td", { class: kind, dataset: { label } }));
    this.extra = h("div", { class: "under" });
    this.cells[0].append(this.check);
    this.cells[1].append(this.link, this.extra);
    this.element = h(
      "tr",
      {
        onclick: (event) =>
          event.target.closest("a, button, input") || event.detail !== 1 || String(getSelection()) || this.link.click(),
      },
      this.cells,
    );
    this.update(row);
  }

  update(row) {
    const key = JSON.stringify(row);
    if (key === this.key) return;
    this.key = key;
    this.row = row;
    say(this.link, title(row));
    this.link.href = `#/run/${encodeURIComponent(row.run)}`;
    this.link.title = row.run;
    this.check.checked = picked.has(row.run);
    this.check.setAttribute("aria-label", `Compare ${title(row)}`);
    this.element.classList.toggle("archived", Boolean(row.archived));
    put(
      this.extra,
      h("span", { title: row.model ?? "" }, (row.model ?? "").split("/").at(-1)),
      row.model ? " · " : "",
      [row.rank ? `rank ${row.rank}` : null, row.script || null].filter(Boolean).join(" · "),
      (row.tags ?? []).map((tag) => h("span", { class: "badge" }, tag)),
      row.note ? h("span", { class: "note" }, row.note) : null,
      row.resumed_from ? h("span", { class: "muted", title: row.resumed_from }, " ↺ resumed") : null,
    );
    const [, , state, step, loss, reward, curve, tokens, speed, wall, disk, saved, active] = this.cells;
    put(
      state,
      stateBadge(row),
      alertBadges(row.alerts),
      row.state === "crashed" && row.reason ? h("div", { class: "under" }, row.reason) : null,
    );
    say(step, number(row.step));
    say(loss, number(row.loss));
    say(reward, number(row.reward));
    reward.classList.toggle("none", !Number.isFinite(row.reward));
    loss.classList.toggle("none", !Number.isFinite(row.loss));
    put(curve, spark(row.spark, row.spark_name));
    say(tokens, count(row.tokens));
    say(speed, count(row.tokens_per_second));
    say(wall, span(row.wall_seconds));
    say(disk, bytes(row.disk_bytes));
    for (const [cell, time] of [
      [saved, row.last_saved],
      [active, row.updated],
    ]) {
      put(cell, h("span", { dataset: time ? { time } : {}, title: moment(time) }, ago(time)));
    }
  }
}

export function open(root) {
  const rows = new Map();
  const body = h("tbody");
  const search = h("input", {
    type: "search",
    placeholder: "Search name, model, tag, state  ( / )",
    "aria-label": "Search runs",
    value: wanted,
    oninput: () => {
      wanted = search.value;
      list();
    },
  });
  const compare = button(
    "Compare",
    () => {
      location.hash = compared([...picked]);
    },
    { class: "strong" },
  );
  const all = h("input", {
    type: "checkbox",
    checked: archived,
    onchange: async () => {
      archived = all.checked;
      await refresh(archived).catch((error) => toast(error.message, { bad: true }));
      list();
    },
  });
  const found = h("span", { class: "muted", role: "status" });
  const table = h(
    "table",
    { class: "runs" },
    h("caption", { class: "offscreen" }, "Runs"),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        COLUMNS.map(([label, kind]) =>
          h("th", { class: kind, scope: "col" }, label || h("span", { class: "offscreen" }, "Compare")),
        ),
      ),
    ),
    body,
  );
  const view = {
    pick(run, on) {
      if (on && picked.size >= 6) toast("Six runs at most are compared.");
      else if (on) picked.add(run);
      else picked.delete(run);
      for (const row of rows.values()) row.check.checked = picked.has(row.row.run);
      tellPicked();
    },
  };
  function tellPicked() {
    compare.disabled = picked.size < 2;
    say(compare, picked.size ? `Compare ${picked.size}` : "Compare");
  }
  function matches(row) {
    const text = [title(row), row.run, row.model, row.state, row.note, row.script, ...(row.tags ?? [])]
      .join(" ")
      .toLowerCase();
    return wanted
      .toLowerCase()
      .split(/\s+/)
      .every((word) => text.includes(word));
  }
  const empty = h("div");
  const tools = h("div", { class: "tools" }, search, compare, h("label", { class: "inline" }, all, "Archived"), found);
  const holder = h("div", { class: "scroll", tabIndex: -1 }, table);

  function list() {
    const known = runs(archived);
    const shown = known.filter(matches);
    const bare = known.length === 0;
    const some = store.archived || runs(true).length > 0;
    holder.hidden = bare;
    tools.hidden = bare && !some;
    put(empty, !bare ? null : some ? h("p", { class: "muted" }, ALL_ARCHIVED) : noRuns(store.state));
    const order = shown.map((row) => {
      if (!rows.has(row.run)) rows.set(row.run, new Row(row, view));
      const kept = rows.get(row.run);
      kept.update(row);
      return kept.element;
    });
    if (order.length !== body.children.length || order.some((element, i) => body.children[i] !== element)) {
      const focused = document.activeElement;
      put(body, order);
      if (focused !== document.activeElement && body.contains(focused)) focused.focus();
    }
    const more = store.total > store.runs.size ? `, the newest of ${store.total}` : "";
    say(
      found,
      shown.length === known.length && !more
        ? `${known.length} run${known.length === 1 ? "" : "s"}`
        : `${shown.length} of ${known.length} runs${more}`,
    );
  }

  add(root, [h("h1", { class: "offscreen" }, "Runs"), tools, holder, empty]);
  list();
  tellPicked();
  const focusedRow = () => [...rows.values()].find((row) => row.element.contains(document.activeElement));
  return {
    title: () => null,
    news: (kind) => kind === "runs" && list(),
    keys: {
      j: ["next run", () => move(body.querySelectorAll("a.run-name"), 1)],
      k: ["run before", () => move(body.querySelectorAll("a.run-name"), -1)],
      c: [
        "mark for comparing; compare with two marked",
        () => {
          const row = focusedRow();
          if (row) view.pick(row.row.run, !picked.has(row.row.run));
          else if (picked.size > 1) compare.click();
        },
      ],
      C: ["compare the marked runs", () => compare.disabled || compare.click()],
      a: [
        "archive, or bring back",
        async () => {
          const row = focusedRow()?.row;
          if (!row || row.source === "log") return;
          try {
            await post(ofRun(row.run, "/note"), {
              note: row.note ?? "",
              tags: row.tags ?? [],
              archived: !row.archived,
            });
            replace({ ...row, archived: !row.archived });
            toast(row.archived ? "Back among the runs" : "Archived; the box above shows it again");
          } catch (error) {
            toast(error.message, { bad: true });
          }
        },
      ],
    },
  };
}
