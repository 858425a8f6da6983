// Is the newest run healthy? One line: its name and state, step, loss or reward, speed, last save, and any alert.

import { h, put } from "../../core/dom.js";
import { ago, count, number, title } from "../../core/format.js";
import { newest, runs, store } from "../../core/store.js";
import { alertBadges, stateBadge } from "./state.js";

/** Return the page's title: alerts first, then the newest run. */
export function pageTitle(view) {
  const alerts = runs()
    .filter((row) => ["live", "idle", "crashed"].includes(row.state))
    .reduce((sum, row) => sum + (row.alerts?.length ?? 0), 0);
  const run = newest();
  const words = view ?? (run ? `${title(run)} · step ${run.step ?? 0}` : "runs");
  return `${alerts ? `(${alerts} ▲) ` : ""}${words} · jax_client`;
}

/** Show the newest live run, unless its own view is open. */
export function nowLine(line, open) {
  const run = newest();
  line.hidden = !run || run.run === open;
  if (line.hidden) return;
  const key = JSON.stringify([run, Math.floor(Date.now() / 10_000), store.connected]);
  if (line.dataset.key === key) return;
  line.dataset.key = key;
  const had = line.contains(document.activeElement);
  const name = h("a", { href: `#/run/${encodeURIComponent(run.run)}` }, title(run));
  put(
    line,
    stateBadge(run),
    h("b", {}, name),
    h("span", {}, "step ", h("b", { class: "num" }, number(run.step))),
    run.loss !== null && run.loss !== undefined
      ? h("span", {}, "loss ", h("b", { class: "num" }, number(run.loss)))
      : null,
    run.reward !== null && run.reward !== undefined
      ? h("span", {}, "reward ", h("b", { class: "num" }, number(run.reward)))
      : null,
    run.tokens_per_second
      ? h("span", { class: "wide" }, h("b", { class: "num" }, count(run.tokens_per_second)), " tokens/s")
      : null,
    h("span", { class: "wide" }, run.last_saved ? `saved ${ago(run.last_saved)}` : "not saved yet"),
    alertBadges(run.alerts),
  );
  if (had) name.focus();
}
