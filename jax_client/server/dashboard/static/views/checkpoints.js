// Which checkpoints are there, and what can be done with them? Deleting hides one, and can be undone for ten minutes.

import { add, button, h, put, say } from "../core/dom.js";
import { get, post } from "../core/api.js";
import { ago, bytes, moment, number, span, title } from "../core/format.js";
import { move } from "../core/keys.js";
import { listen, store } from "../core/store.js";
import { copy, toast, undoable } from "../core/toast.js";

const LIMIT = 500;
// Until when deletions can be undone, by path: each is offered once, however often the view is opened.
const offered = new Map();
let opened = null;
const DAY = 86_400;
const LIFETIMES = [
  ["for ever", null],
  ["1 day", DAY],
  ["7 days", 7 * DAY],
  ["30 days", 30 * DAY],
];

export function open(root, argument, query) {
  const view = new Checkpoints(root, query.get("run"));
  opened = view;
  view.load();
  const timer = setInterval(() => document.hidden || view.load(), 15_000);
  let soon = null;
  const end = listen((kind, rows) => {
    if (kind !== "runs" || !rows) return;
    clearTimeout(soon);
    soon = setTimeout(() => view.load(), 400);
  });
  return {
    title: () => "checkpoints",
    close: () => {
      opened = null;
      clearInterval(timer);
      clearTimeout(soon);
      end();
    },
    keys: {
      j: ["next checkpoint", () => move(view.body.querySelectorAll(".resume"), 1)],
      k: ["checkpoint before", () => move(view.body.querySelectorAll(".resume"), -1)],
    },
  };
}

class Checkpoints {
  constructor(root, run) {
    Object.assign(this, { run, rows: [], key: "", hidden: new Set(), wanted: "" });
    this.search = h("input", {
      type: "search",
      placeholder: "Search name, run, kind  ( / )",
      "aria-label": "Search checkpoints",
      oninput: () => {
        this.wanted = this.search.value;
        this.show();
      },
    });
    this.found = h("span", { class: "muted", role: "status" });
    this.body = h("tbody");
    this.empty = h("div");
    this.holder = h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "checkpoints" },
        h("caption", { class: "offscreen" }, "Checkpoints"),
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["Name", "Kind", "Step", "Loss", "Reward", "Size", "Verified", "Lives", "Made", "Actions"].map((head) =>
              h("th", { scope: "col" }, head),
            ),
          ),
        ),
        this.body,
      ),
    );
    add(root, [
      h("h1", { class: "offscreen" }, "Checkpoints"),
      h(
        "div",
        { class: "tools" },
        this.search,
        this.found,
        run ? h("a", { href: "#/checkpoints" }, "of all runs") : null,
      ),
      this.holder,
      this.empty,
    ]);
  }

  async load() {
    try {
      const sent = await get("/checkpoints", { run: this.run, limit: LIMIT });
      this.total = sent.total;
      this.rows = sent.checkpoints;
      this.hidden = new Set((sent.deleted ?? []).map((each) => each.path));
      if (!this.told) {
        this.told = true;
        for (const each of sent.deleted ?? []) this.offerUndo(each.path, each.until);
      }
      this.show();
    } catch (error) {
      say(this.found, error.message);
    }
  }

  show() {
    const words = this.wanted.toLowerCase().split(/\s+/);
    const shown = this.rows.filter(
      (row) =>
        !this.hidden.has(row.path) &&
        words.every((word) =>
          `${row.path} ${row.name} ${row.kind} ${title(store.runs.get(row.run) ?? { run: row.run })}`
            .toLowerCase()
            .includes(word),
        ),
    );
    const key = JSON.stringify([shown, store.state?.can_act]);
    if (key === this.key) return;
    this.key = key;
    const focused = document.activeElement?.closest?.("tr")?.dataset.path;
    const which = document.activeElement?.dataset?.act;
    this.holder.hidden = !shown.length;
    put(
      this.empty,
      shown.length
        ? null
        : h(
            "section",
            { class: "empty small" },
            h("h2", {}, this.wanted ? "Nothing is called so" : "No checkpoints yet"),
            this.wanted
              ? null
              : h(
                  "p",
                  {},
                  h("code", {}, 'client.save_state("name")'),
                  " keeps a training state; runs also save by themselves every few minutes.",
                ),
          ),
    );
    put(
      this.body,
      this.tree(shown).map(({ row, depth }) => this.line(row, depth)),
    );
    say(
      this.found,
      `${shown.length}${this.total > this.rows.length ? ` of ${this.total}` : ""} checkpoint${shown.length === 1 ? "" : "s"}`,
    );
    if (focused)
      [...this.body.children]
        .find((line) => line.dataset.path === focused)
        ?.querySelector(`[data-act="${which}"]`)
        ?.focus();
  }

  /** Return the rows so that each follows what it was resumed from, with its depth. */
  tree(rows) {
    const known = new Set(rows.map((row) => row.path));
    const below = Map.groupBy
      ? Map.groupBy(rows, (row) => (known.has(row.parent) ? row.parent : null))
      : grouped(rows, known);
    const lines = [];
    const seen = new Set();
    const walk = (parent, depth) => {
      for (const row of below.get(parent) ?? []) {
        if (seen.has(row.path)) continue;
        seen.add(row.path);
        lines.push({ row, depth });
        walk(row.path, Math.min(depth + 1, 4));
      }
    };
    walk(null, 0);
    for (const row of rows) if (!seen.has(row.path)) lines.push({ row, depth: 0 });
    return lines;
  }

  line(row, depth) {
    const may = Boolean(store.state?.can_act);
    const act = (label, name, what, props = {}) => button(label, what, { dataset: { act: name }, ...props });
    const verified = row.verified;
    const badge = !verified
      ? h("span", { class: "muted" }, "not yet")
      : verified.ok
        ? h("span", { class: "badge good", title: moment(verified.time) }, "✓ ", ago(verified.time))
        : h("span", { class: "badge bad", title: verified.error ?? "" }, "✕ damaged");
    const run = store.runs.get(row.run);
    return h(
      "tr",
      { dataset: { path: row.path }, class: verified && !verified.ok ? "damaged" : "" },
      h(
        "td",
        { class: `name depth-${depth}` },
        depth ? h("span", { class: "muted", title: `resumed from ${row.parent}` }, "└ ") : null,
        h("b", {}, row.name || row.path),
        h(
          "div",
          { class: "under" },
          h("a", { href: `#/run/${encodeURIComponent(row.run)}` }, title(run ?? { run: row.run })),
          row.public ? " · public" : "",
          verified && !verified.ok && verified.error ? h("div", { class: "bad-text" }, verified.error) : null,
        ),
      ),
      h("td", {}, row.kind),
      h("td", { class: "num", dataset: { label: "Step" } }, number(row.step)),
      h("td", { class: "num", dataset: { label: "Loss" } }, number(row.loss)),
      h("td", { class: "num", dataset: { label: "Reward" } }, number(row.reward)),
      h("td", { class: "num", dataset: { label: "Size" } }, bytes(row.size_bytes)),
      h("td", {}, badge),
      h("td", {}, may ? this.lifetime(row) : lives(row)),
      h(
        "td",
        { class: "num" },
        h("span", { title: moment(row.created), dataset: row.created ? { time: row.created } : {} }, ago(row.created)),
      ),
      h(
        "td",
        { class: "acts" },
        act("Copy resume", "resume", () => copy(row.resume, "Resume line"), {
          class: "resume",
          title: row.resume,
          disabled: !row.resume,
        }),
        act(
          "Ask",
          "ask",
          () => {
            location.hash = `#/playground?path=${encodeURIComponent(row.path)}`;
          },
          { title: "Open it in the playground" },
        ),
        may
          ? [
              act("Verify", "verify", (event) => this.verify(row, event.target)),
              act("Export", "export", () => this.exported(row)),
              act("Delete", "delete", () => this.remove(row), { class: "danger" }),
            ]
          : null,
      ),
    );
  }

  lifetime(row) {
    const now = lives(row);
    const choices = LIFETIMES.some(([name]) => name === now) ? LIFETIMES : [[now, undefined], ...LIFETIMES];
    return h(
      "select",
      {
        "aria-label": `Lifetime of ${row.name || row.path}`,
        dataset: { act: "lifetime" },
        onchange: async (event) => {
          const seconds = choices[event.target.selectedIndex][1];
          if (seconds !== undefined) await this.tell("lifetime", { path: row.path, seconds }, "Lifetime kept");
        },
      },
      choices.map(([name]) => h("option", { selected: name === now }, name)),
    );
  }

  async tell(action, body, words) {
    try {
      const answer = await post(`/checkpoints/${action}`, body);
      if (words) toast(words);
      await this.load();
      return answer;
    } catch (error) {
      toast(error.message, { bad: true });
      return null;
    }
  }

  async verify(row, pressed) {
    pressed.disabled = true;
    say(pressed, "Reading…");
    const answer = await this.tell("verify", { path: row.path });
    if (answer)
      toast(
        answer.verified.ok
          ? `${row.name}: every byte is as saved`
          : `${row.name} is damaged: ${answer.verified.error}`,
        { bad: !answer.verified.ok },
      );
    this.key = "";
    this.show();
  }

  async remove(row) {
    const answer = await this.tell("delete", { path: row.path });
    if (!answer) return;
    this.hidden.add(row.path);
    this.show();
    this.offerUndo(row.path, answer.until ?? Date.now() / 1000 + 600, row.name);
    this.body.querySelector(".resume")?.focus();
  }

  offerUndo(path, until, known = "") {
    if (Math.abs((offered.get(path) ?? 0) - until) < 5) return;
    offered.set(path, until);
    const name = known || path;
    undoable(`${name} is deleted`, until, async () => {
      offered.delete(path);
      // The bar stays while other views are open: it is the view of then that shows the checkpoint again.
      const view = opened ?? this;
      if (await view.tell("undelete", { path }, `${name} is back`)) view.hidden.delete(path);
      view.show();
    });
  }

  exported(row) {
    const command = h("pre", { tabIndex: 0 }, "…");
    const link = h("p");
    const box = h(
      "dialog",
      { "aria-label": "Export", onclose: () => box.remove() },
      h("h2", {}, `Export ${row.name || row.path}`),
    );
    const ask = async (format) => {
      for (const each of choice.children) each.setAttribute("aria-pressed", String(each.dataset.format === format));
      try {
        const answer = await post("/checkpoints/export", { path: row.path, format });
        say(command, answer.command);
        const url = answer.download;
        put(link, url ? h("a", { class: "button strong", href: url, download: "" }, "Download the adapter") : null);
      } catch (error) {
        say(command, error.message);
      }
    };
    const choice = h(
      "div",
      { class: "choice", role: "group", "aria-label": "Format" },
      [
        ["peft", "PEFT adapter"],
        ["merged", "Merged model"],
      ].map(([format, label]) => button(label, () => ask(format), { dataset: { format } })),
    );
    add(box, [
      choice,
      h(
        "div",
        { class: "code" },
        command,
        button("Copy", () => copy(command.textContent, "Command"), { class: "strong" }),
      ),
      link,
      h(
        "form",
        { method: "dialog" },
        button("Close", () => box.close()),
      ),
    ]);
    document.body.append(box);
    box.showModal();
    ask("peft");
  }
}

function lives(row) {
  return row.expires_at ? span(row.expires_at - Date.now() / 1000) : "for ever";
}

function grouped(rows, known) {
  const groups = new Map();
  for (const row of rows) {
    const parent = known.has(row.parent) ? row.parent : null;
    groups.set(parent, [...(groups.get(parent) ?? []), row]);
  }
  return groups;
}
