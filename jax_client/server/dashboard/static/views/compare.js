// How do runs differ? Their curves overlaid, two to six of them, and the settings in which they are not alike.

import { add, button, h, put } from "../core/dom.js";
import { get, ofRun } from "../core/api.js";
import { compared, number, title } from "../core/format.js";
import { runs, store } from "../core/store.js";
import { copy, toast } from "../core/toast.js";
import { Chart, DASHES } from "../charts/chart.js";
import { RunData } from "../charts/data.js";
import { Group } from "../charts/group.js";
import { arrange } from "../charts/order.js";
import { svg } from "../core/dom.js";
import { stateBadge } from "./parts/state.js";
import { Toolbar } from "./parts/toolbar.js";

const MOST = 6;
const EACH_SECONDS = 3; // live runs are asked for what is new

export function open(root, argument, query) {
  const wanted = query.getAll("runs").filter(Boolean).slice(0, MOST);
  const view = wanted.length ? new Compare(root, wanted, query) : choose(root);
  view.load?.();
  return {
    title: () => "compare",
    themed: () => view.group?.draw(true),
    close: () => view.close?.(),
    keys: view.group
      ? {
          l: ["log axis", () => view.toolbar.flip()],
          x: ["step, time or tokens", () => view.toolbar.turn()],
          0: ["show all", () => view.group.show(null)],
        }
      : {},
  };
}

function choose(root) {
  const boxes = new Map();
  const go = button(
    "Compare",
    () => {
      location.hash = compared(chosen());
    },
    { class: "strong", disabled: true },
  );
  const chosen = () => [...boxes].filter(([, box]) => box.checked).map(([run]) => run);
  const list = runs()
    .slice(0, 60)
    .map((row) => {
      const box = h("input", {
        type: "checkbox",
        onchange: () => {
          if (chosen().length > MOST) box.checked = false;
          go.disabled = chosen().length < 2;
        },
      });
      boxes.set(row.run, box);
      return h(
        "li",
        {},
        h(
          "label",
          { class: "inline" },
          box,
          h("b", {}, title(row)),
          stateBadge(row),
          h("span", { class: "muted" }, `step ${number(row.step)} · ${row.model ?? ""}`),
        ),
      );
    });
  add(root, [
    h(
      "section",
      { class: "choose" },
      h("h1", {}, "Compare runs"),
      list.length < 2
        ? h("p", {}, "Comparing takes two runs; there are fewer.")
        : h("p", { class: "muted" }, "Choose two to six. In the list of runs, ", h("kbd", {}, "c"), " marks one."),
      h("ul", { class: "bare" }, list),
      go,
    ),
  ]);
  return {};
}

class Compare {
  constructor(root, wanted, query) {
    this.datas = wanted.map((run) => new RunData(run));
    this.off = new Set();
    this.charts = new Map();
    this.group = new Group({ place: () => NaN });
    this.toolbar = new Toolbar(this.group, query, [
      button("Copy link", () => copy(`${location.origin}/${compared(wanted)}&${this.toolbar.query()}`, "Link")),
    ]);
    this.legend = h("ul", { class: "legend compare-legend" });
    this.grid = h("div", { class: "charts" });
    this.more = h("div", { class: "charts" });
    this.rest = h(
      "details",
      { class: "rest", ontoggle: () => this.arrangeCharts() },
      h("summary", {}, "More charts"),
      this.more,
    );
    this.differences = h("section", {});
    add(root, [
      h("h1", { class: "offscreen" }, "Compare"),
      this.legend,
      this.toolbar.element,
      this.grid,
      this.rest,
      this.differences,
    ]);
    this.timer = setInterval(() => document.hidden || this.follow(), EACH_SECONDS * 1000);
  }

  async load() {
    const answers = await Promise.allSettled(
      this.datas.map((data) => get(ofRun(data.run, "/series"), { points: 2000 })),
    );
    if (this.closed) return;
    answers.forEach((answer, i) => {
      if (answer.status === "fulfilled") this.datas[i].take(answer.value);
      else toast(`${this.datas[i].run}: ${answer.reason.message}`, { bad: true });
    });
    this.showLegend();
    this.arrangeCharts();
    try {
      const { differences } = await get("/compare", { runs: this.datas.map((data) => data.run) });
      if (!this.closed) this.showDifferences(differences);
    } catch (error) {
      put(this.differences, h("p", { class: "muted" }, error.message));
    }
  }

  async follow() {
    if (this.asking) return;
    this.asking = true;
    const live = this.datas.filter((data) => store.runs.get(data.run)?.state === "live" && data.next);
    const answers = await Promise.allSettled(
      live.map((data) => get(ofRun(data.run, "/series"), { points: 2000, since: data.next })),
    );
    this.asking = false;
    if (this.closed) return;
    const fresh = answers.map((answer, i) => answer.status === "fulfilled" && live[i].take(answer.value));
    if (fresh.some(Boolean)) this.arrangeCharts();
    else if (live.length) this.group.draw();
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
    this.group.close();
  }

  showLegend() {
    put(
      this.legend,
      this.datas.map((data, i) => {
        const row = store.runs.get(data.run) ?? { run: data.run, state: "unknown" };
        const box = h("input", {
          type: "checkbox",
          checked: true,
          onchange: () => {
            if (box.checked) this.off.delete(data.run);
            else this.off.add(data.run);
            this.group.draw(true);
          },
        });
        const line = svg(
          "svg",
          { viewBox: "0 0 30 8", class: "line-sample", "aria-hidden": "true" },
          svg("line", {
            x1: 0,
            x2: 30,
            y1: 4,
            y2: 4,
            class: `stroke-${(i % 6) + 1}`,
            "stroke-dasharray": DASHES[i % 6].join(" "),
          }),
        );
        return h(
          "li",
          {},
          h("label", { class: "inline" }, box, line, h("b", {}, `${i + 1} `)),
          h("a", { href: `#/run/${encodeURIComponent(data.run)}` }, title(row)),
          " ",
          stateBadge(row),
          h("span", { class: "muted" }, ` step ${number(row.step)} · loss ${number(row.loss)}`),
        );
      }),
    );
  }

  arrangeCharts() {
    const names = new Set(
      this.datas.flatMap((data) => [...data.series.keys()].filter((name) => data.series.get(name).value.length)),
    );
    const { first, rest } = arrange([...names]);
    const place = (grid, list) =>
      put(
        grid,
        list.map((name) => {
          if (!this.charts.has(name)) {
            const curves = () =>
              this.datas.flatMap((data, index) =>
                data.series.has(name) && !this.off.has(data.run)
                  ? [{ label: data.run, points: data.series.get(name), index }]
                  : [],
              );
            this.charts.set(name, new Chart(name, curves, this.group));
            this.group.add(this.charts.get(name));
          }
          return this.charts.get(name).element;
        }),
      );
    place(this.grid, first);
    place(this.more, this.rest.open ? rest : []);
    this.rest.hidden = !rest.length;
    this.group.draw(true);
  }

  showDifferences(differences) {
    const ids = this.datas.map((data) => data.run);
    const text = (value) =>
      value === null || value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);
    put(
      this.differences,
      h("h2", {}, `Differences (${differences.length})`),
      differences.length
        ? h(
            "div",
            { class: "scroll", tabIndex: 0, role: "group", "aria-label": "Differences" },
            h(
              "table",
              { class: "plain" },
              h(
                "thead",
                {},
                h(
                  "tr",
                  {},
                  h("th", { scope: "col" }, "setting"),
                  ids.map((run, i) => h("th", { scope: "col" }, `${i + 1} ${title(store.runs.get(run) ?? { run })}`)),
                ),
              ),
              h(
                "tbody",
                {},
                differences.map(({ field, values }) =>
                  h(
                    "tr",
                    {},
                    h("th", { scope: "row" }, field),
                    ids.map((run) => h("td", {}, text(values[run]))),
                  ),
                ),
              ),
            ),
          )
        : h("p", { class: "muted" }, "Their recorded settings are alike."),
    );
  }
}
