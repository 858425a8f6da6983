// How does a run do, in a sign and a word? Each state has a sign of its own, so that no one needs the colours.

import { h } from "../../core/dom.js";

const SIGNS = { live: "●", idle: "◐", done: "✓", unloaded: "⇣", crashed: "✕", unknown: "○" };
const MEANS = {
  live: "a step or sample within the last minute",
  idle: "open, and nothing has come for a minute",
  done: "closed in order",
  unloaded: "the server put it away; the next request loads it",
  crashed: "it did not end in order",
  unknown: "too little is recorded to tell",
};

export function stateBadge(row) {
  const why = row.reason ? `${MEANS[row.state] ?? ""}: ${row.reason}` : (MEANS[row.state] ?? "");
  return h(
    "span",
    { class: `state ${SIGNS[row.state] ? row.state : "unknown"}`, title: why },
    h("span", { "aria-hidden": "true" }, SIGNS[row.state] ?? "○"),
    ` ${row.state}`,
  );
}

/** Return the badges of a run's alerts. */
export function alertBadges(alerts = []) {
  return alerts.map((alert) => h("span", { class: "badge bad", title: alert.text }, "▲ ", alert.kind));
}
