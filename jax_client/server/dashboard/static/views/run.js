// How does one run do? Its state, then its curves in the order people ask for them, with the events on each.

import { add, button, field, h, put, say } from "../core/dom.js";
import { address, everyPoint, get, ofRun, post } from "../core/api.js";
import { ago, bytes, count, moment, number, span, title } from "../core/format.js";
import { replace, runs, store, watch } from "../core/store.js";
import { copy, toast } from "../core/toast.js";
import { Chart } from "../charts/chart.js";
import { RunData } from "../charts/data.js";
import { Group, words } from "../charts/group.js";
import { arrange } from "../charts/order.js";
import { alertBadges, stateBadge } from "./parts/state.js";
import { Toolbar } from "./parts/toolbar.js";

const POINTS = 2000; // of each curve at first: more than a screen has pixels
const MORE = 20_000; // of a curve that was thinned, once someone zooms in; and then all

export function open(root, run, query) {
  const view = new RunView(root, run, query);
  view.load();
  return {
    title: () => title(view.row ?? { run }) + (view.row ? ` · step ${view.row.step ?? 0}` : ""),
    news: (kind, data) => view.news(kind, data),
    themed: () => view.group.draw(true),
    close: () => view.close(),
    keys: {
      j: ["next run", () => view.go(1)],
      k: ["run before", () => view.go(-1)],
      l: ["log axis", () => view.toolbar.flip()],
      x: ["step, time or tokens", () => view.toolbar.turn()],
      0: ["show all", () => view.group.show(null)],
      e: [
        "all charts",
        () => {
          view.rest.open = !view.rest.open;
        },
      ],
    },
  };
}

class RunView {
  constructor(root, run, query) {
    Object.assign(this, {
      run,
      row: store.runs.get(run) ?? null,
      data: new RunData(run),
      charts: new Map(),
      fine: new Map(),
    });
    this.head = h("div", { class: "run-head" });
    this.status = h("p", { class: "under-charts muted", role: "status" });
    this.group = new Group({
      place: (event, axis) => this.data.place(event, axis),
      status: this.status,
      moved: () => this.refine(),
    });
    this.toolbar = new Toolbar(this.group, query, [
      h("a", { class: "button", href: address(ofRun(run, "/series.csv")), download: "" }, "CSV"),
      button("Copy link", () => copy(this.link(), "Link")),
    ]);
    this.grid = h("div", { class: "charts" });
    this.more = h("div", { class: "charts" });
    this.restName = h("summary", {}, "More charts");
    this.rest = h("details", { class: "rest", ontoggle: () => this.arrangeCharts() }, this.restName, this.more);
    this.events = h("details", { class: "rest" });
    this.about = h("details", { class: "rest" }, h("summary", {}, "Configuration and notes"));
    this.wait = h("div", { class: "wait", role: "status" }, "Loading the curves…");
    add(root, [this.head, this.toolbar.element, this.wait, this.grid, this.status, this.rest, this.events, this.about]);
    this.showHead();
  }

  async load() {
    try {
      const [about, sent] = await Promise.all([
        get(ofRun(this.run)),
        get(ofRun(this.run, "/series"), { points: POINTS }),
      ]);
      if (this.closed) return;
      this.row = about.row;
      this.data.take(sent);
      this.loaded = true;
      this.showAbout(about.config ?? {});
      this.arrangeCharts();
      this.showHead();
      this.showEvents();
      if (this.row.source === "log" || sent.live || this.row.state === "live" || this.row.state === "idle" || sent.next)
        watch(this.run, sent.next);
    } catch (error) {
      say(
        this.wait,
        error.status === 404 ? "There is no such run here. It may be of another state directory." : error.message,
      );
    }
  }

  close() {
    this.closed = true;
    this.group.close();
  }

  news(kind, data) {
    if (kind === "runs") {
      const row = store.runs.get(this.run);
      if (row) this.row = row;
      this.showHead();
      this.showWait();
    } else if (kind === "points" && this.loaded && data.run === this.run) {
      const fresh = this.data.take(data);
      if (data.reset) this.begin();
      if (fresh || !this.charts.size) this.arrangeCharts();
      else this.group.draw();
      if (data.reset || data.events?.length) this.showEvents();
      this.showWait();
    } else if (kind === "device") this.showWait();
  }

  /** Leave what was of points that are gone. */
  begin() {
    this.fine.clear();
    this.group.zoom = null;
    for (const [name, chart] of this.charts) {
      if (this.data.series.has(name)) continue;
      this.group.remove(chart);
      this.charts.delete(name);
    }
  }

  showHead() {
    const row = this.row;
    if (!row) return put(this.head, h("h1", {}, this.run));
    const facts = [
      ["step", number(row.step)],
      ["loss", number(row.loss)],
      ["reward", number(row.reward)],
      ["tokens", count(row.tokens)],
      ["tokens/s", count(row.tokens_per_second)],
      ["time", span(row.wall_seconds)],
      ["disk", bytes(row.disk_bytes)],
      ["saved", row.last_saved ? ago(row.last_saved) : "not yet"],
    ].filter(([name, text]) => text !== "–" || name === "step");
    const key = JSON.stringify([row, Math.floor(Date.now() / 5000)]);
    if (key === this.headKey) return null;
    this.headKey = key;
    return put(
      this.head,
      h(
        "div",
        { class: "line" },
        h("h1", { title: row.run }, title(row)),
        stateBadge(row),
        alertBadges(row.alerts),
        h("span", { class: "muted id" }, row.run),
      ),
      row.reason ? h("p", { class: row.state === "crashed" ? "reason bad" : "reason muted" }, row.reason) : null,
      (row.alerts ?? []).map((alert) =>
        h("p", { class: "reason bad" }, "▲ ", alert.text, alert.step ? ` (step ${alert.step})` : ""),
      ),
      h(
        "dl",
        { class: "facts" },
        facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", { class: "num" }, text))),
      ),
      this.kin(row),
    );
  }

  kin(row) {
    const link = (run, words) => h("a", { href: `#/run/${encodeURIComponent(run)}` }, words);
    const name = (run) => title(store.runs.get(run) ?? { run });
    if (!row.parent && !row.children?.length) return null;
    return h(
      "p",
      { class: "muted" },
      row.parent ? ["resumed from ", link(row.parent, name(row.parent)), "  "] : null,
      row.children?.length
        ? ["continued by ", row.children.map((run, i) => [i ? ", " : "", link(run, name(run))])]
        : null,
    );
  }

  arrangeCharts() {
    const names = [...this.data.series.keys()].filter((name) => this.data.series.get(name).value.length);
    const { first, rest } = arrange(names);
    this.place(this.grid, first);
    this.place(this.more, this.rest.open ? rest : []);
    say(this.restName, `More charts (${rest.length})`);
    this.rest.hidden = !rest.length;
    this.showWait();
    this.group.draw(true);
  }

  place(grid, names) {
    for (const name of names) {
      if (!this.charts.has(name)) {
        const chart = new Chart(
          name,
          () => [{ label: name, points: this.data.series.get(name), index: 0 }],
          this.group,
        );
        this.charts.set(name, chart);
        this.group.add(chart);
      }
    }
    const elements = names.map((name) => this.charts.get(name).element);
    if (elements.length !== grid.children.length || elements.some((element, i) => grid.children[i] !== element))
      put(grid, elements);
  }

  showWait() {
    const compiling = (store.device?.engines ?? []).flatMap((engine) => engine.health?.compiling ?? []);
    const bare = !this.charts.size;
    this.wait.hidden = !bare;
    this.toolbar.element.hidden = bare;
    if (!bare) return;
    if (compiling.length) {
      const [first] = compiling;
      put(
        this.wait,
        h("b", {}, `Compiling ${first.program} (${first.shapes}), ${span(first.seconds)} so far.`),
        " The first step of a shape waits for its program, up to some minutes for large models. It is kept: the next start takes it from the cache.",
      );
    } else if (this.row && ["live", "idle"].includes(this.row.state))
      say(this.wait, "No step yet. The curves begin with the first optim_step.");
    else say(this.wait, "No points are recorded of this run.");
  }

  showEvents() {
    const alerts = (this.row?.alerts ?? []).map((alert) => ({ ...alert, kind: "alert" }));
    this.group.events = [...this.data.events, ...alerts];
    const newestFirst = [...this.group.events].sort((a, b) => (b.time ?? 0) - (a.time ?? 0)).slice(0, 200);
    put(
      this.events,
      h("summary", {}, `Events (${this.group.events.length})`),
      h(
        "ol",
        { class: "events" },
        newestFirst.map((event) =>
          h("li", {}, h("time", { class: "muted num" }, moment(event.time)), h("span", {}, words(event))),
        ),
      ),
    );
    this.group.draw();
  }

  showAbout(config) {
    const row = this.row;
    const note = h("textarea", { value: row.note ?? "", rows: 2, maxLength: 4000 });
    const tags = h("input", { value: (row.tags ?? []).join(", ") });
    const save = async (more = {}) => {
      const next = {
        note: note.value,
        tags: tags.value
          .split(",")
          .map((tag) => tag.trim())
          .filter(Boolean),
        archived: Boolean(this.row.archived),
        ...more,
      };
      try {
        await post(ofRun(this.run, "/note"), next);
        replace({ ...this.row, ...next });
        toast("Kept");
      } catch (error) {
        toast(error.message, { bad: true });
      }
    };
    put(
      this.about,
      h("summary", {}, "Configuration and notes"),
      row.source === "log"
        ? null
        : h(
            "div",
            { class: "notes" },
            field("Note", note),
            field("Tags, with commas", tags),
            button("Keep", () => save(), { class: "strong" }),
            button(row.archived ? "Bring back" : "Archive", () => save({ archived: !this.row.archived })),
          ),
      h(
        "table",
        { class: "plain" },
        h("caption", { class: "offscreen" }, "Configuration"),
        h(
          "tbody",
          {},
          flat(config).map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value))),
        ),
      ),
    );
  }

  /** Ask for more points of what is zoomed in: for many, and where these are too few for the range, for all. */
  async refine() {
    if (!this.group.zoom) return;
    const [low, high] = this.group.zoom;
    const asked = this.data.asking();
    const thin = [...this.charts]
      .filter(([name, chart]) => {
        const points = this.data.series.get(name);
        const most = this.fine.get(name) ?? POINTS;
        if (most === Infinity || !chart.element.isConnected || points.value.length < most * 0.5) return false;
        const curve = points.curve(this.group.axis);
        return curve.find(high) - curve.find(low) < POINTS / 3;
      })
      .map(([name]) => name);
    const some = thin.filter((name) => !this.fine.has(name));
    const all = thin.filter((name) => this.fine.get(name) === MORE);
    some.forEach((name) => this.fine.set(name, MORE));
    all.forEach((name) => this.fine.set(name, Infinity));
    try {
      if (some.length) this.data.refine(await get(ofRun(this.run, "/series"), { names: some, points: MORE }), asked);
      for (const name of all) this.data.refine({ series: { [name]: await everyPoint(this.run, name) } }, asked);
      if (thin.length && !this.closed) this.group.draw();
    } catch (error) {
      toast(`The finer curve did not come: ${error.message}`, { bad: true });
    }
  }

  link() {
    return `${location.origin}/#/run/${encodeURIComponent(this.run)}?${this.toolbar.query()}`;
  }

  go(by) {
    const list = runs();
    const at = list.findIndex((row) => row.run === this.run);
    const next = list[at + by];
    if (next) location.hash = `#/run/${encodeURIComponent(next.run)}`;
  }
}

/** Return [name, text] of a configuration, nested names with dots. */
export function flat(config, prefix = "") {
  return Object.entries(config ?? {}).flatMap(([name, value]) => {
    if (value && typeof value === "object" && !Array.isArray(value)) return flat(value, `${prefix}${name}.`);
    return [[prefix + name, typeof value === "string" ? value : JSON.stringify(value)]];
  });
}
