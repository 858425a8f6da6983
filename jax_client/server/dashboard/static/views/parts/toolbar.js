// How are curves shown? Over which axis, how smooth, with a log axis, which part: one bar for all charts of a view.

import { button, h, say } from "../../core/dom.js";
import { AXES } from "../../charts/data.js";

// At first; the raw curve stays beside it, faint.
const SMOOTH = 80;

export class Toolbar {
  /** group: what it steers. query: of the address, whose choices are taken. more: what stands at its end. */
  constructor(group, query, more = []) {
    this.group = group;
    this.axis = h(
      "div",
      { class: "choice", role: "group", "aria-label": "Axis" },
      Object.entries(AXES).map(([axis, label]) => button(label, () => this.set({ axis }), { dataset: { axis } })),
    );
    this.smooth = h("input", {
      type: "range",
      min: 0,
      max: 99,
      value: 0,
      "aria-label": "Smoothing",
      oninput: () => this.set({ weight: weightOf(Number(this.smooth.value)) }),
    });
    this.smoothValue = h("output", { class: "num muted" });
    this.log = h("input", { type: "checkbox", onchange: () => this.set({ log: this.log.checked }) });
    this.element = h(
      "div",
      { class: "tools charts-tools" },
      this.axis,
      h("label", { class: "inline" }, "Smoothing", this.smooth, this.smoothValue),
      h("label", { class: "inline" }, this.log, "Log"),
      h(
        "div",
        { class: "choice", role: "group", "aria-label": "Zoom" },
        button("◀", () => group.pan(-0.25), { "aria-label": "Pan left" }),
        button("−", () => group.scale(1 / 0.6), { "aria-label": "Zoom out" }),
        button("All", () => group.show(null)),
        button("+", () => group.scale(0.6), { "aria-label": "Zoom in" }),
        button("▶", () => group.pan(0.25), { "aria-label": "Pan right" }),
      ),
      more,
    );
    const range = (query.get("range") ?? "").split("_").map(Number);
    this.smooth.value = query.get("smooth") ?? SMOOTH;
    this.set({
      axis: query.get("x") in AXES ? query.get("x") : "step",
      log: query.get("log") === "1",
      weight: weightOf(Number(this.smooth.value)),
    });
    if (range.length === 2 && range.every(Number.isFinite) && range[1] > range[0]) group.zoom = range;
  }

  set(options) {
    this.group.set(options);
    this.log.checked = this.group.log;
    say(this.smoothValue, this.smooth.value === "0" ? "off" : (this.smooth.value / 100).toFixed(2));
    for (const each of this.axis.children)
      each.setAttribute("aria-pressed", String(each.dataset.axis === this.group.axis));
  }

  flip() {
    this.set({ log: !this.group.log });
  }

  turn() {
    const axes = Object.keys(AXES);
    this.set({ axis: axes[(axes.indexOf(this.group.axis) + 1) % axes.length] });
  }

  /** Return the choices as a query, to be copied as a link. */
  query() {
    const { axis, log, zoom } = this.group;
    return new URLSearchParams({
      x: axis,
      smooth: this.smooth.value,
      log: log ? 1 : 0,
      ...(zoom ? { range: zoom.join("_") } : {}),
    }).toString();
  }
}

// The slider's upper end is where people look for more: 0.9 → a mean of ten points, 0.99 → of a hundred.
const weightOf = (value) => (value <= 0 ? 0 : value / 100);
