// Which points does the page have of a run? All that came, by name, with a curve for each axis they are drawn over.

import { Curve, smoothed } from "./pyramid.js";

export const AXES = { step: "Step", time: "Time", tokens: "Tokens" };

export class RunData {
  constructor(run) {
    this.run = run;
    this.series = new Map();
    this.names = [];
    this.events = [];
    this.next = null;
    this.places = new Map();
  }

  /** Take what the server sent: of names it had, later points; true if a name is new. */
  take(sent) {
    let fresh = false;
    this.places.clear();
    for (const [name, points] of Object.entries(sent.series ?? {})) {
      if (!this.series.has(name)) {
        this.series.set(name, new Points(points.kind));
        fresh = true;
      }
      this.series.get(name).append(points);
    }
    const names = sent.names ?? Object.keys(sent.series ?? {});
    this.names = [...new Set([...this.names, ...names, ...this.series.keys()])];
    for (const event of sent.events ?? []) {
      if (!this.events.some((e) => e.kind === event.kind && e.time === event.time && e.step === event.step))
        this.events.push(event);
    }
    this.next = sent.next ?? this.next;
    return fresh;
  }

  /** Put more points in the place of a name's thinned ones. */
  refine(sent) {
    for (const [name, points] of Object.entries(sent.series ?? {})) {
      const kept = this.series.get(name);
      const fuller = new Points(points.kind);
      fuller.append(points);
      if (kept && kept.lastTime > fuller.lastTime) fuller.append(kept.after(fuller.lastTime));
      fuller.whole = true;
      this.series.set(name, fuller);
    }
  }

  /** Return the x of an event on an axis, NaN if it has none. */
  place(event, axis) {
    if (axis === "time") return event.time ?? NaN;
    if (axis === "step") return event.step ?? NaN;
    if (!this.places.has(event)) this.places.set(event, this.#tokensAt(event.time));
    return this.places.get(event);
  }

  #tokensAt(time) {
    for (const points of this.series.values()) {
      if (points.kind !== "step" || !points.tokens.length) continue;
      const at = points.time.findIndex((each) => each >= time);
      return points.tokens[at < 0 ? points.tokens.length - 1 : at] ?? NaN;
    }
    return NaN;
  }
}

export class Points {
  constructor(kind) {
    this.kind = kind;
    this.whole = false;
    for (const column of ["step", "time", "tokens", "value"]) this[column] = [];
    this.curves = new Map();
    this.means = new Map();
  }

  get lastTime() {
    return this.time[this.time.length - 1] ?? -Infinity;
  }

  append({ step = [], time = [], tokens = [], value = [] }) {
    for (let i = 0; i < value.length; i++) {
      this.step.push(step[i] ?? NaN);
      this.time.push(time[i] ?? NaN);
      this.tokens.push(tokens[i] ?? NaN);
      this.value.push(value[i]);
    }
    for (const [axis, curve] of this.curves) {
      for (let i = this[axis].length - value.length; i < this[axis].length; i++) {
        const x = this[axis][i];
        if (curve.length && x < curve.last) {
          this.curves.delete(axis);
          this.means.delete(axis);
          break;
        }
        if (Number.isFinite(x) && Number.isFinite(this.value[i])) curve.push(x, this.value[i]);
      }
    }
  }

  after(time) {
    const from = this.time.findIndex((each) => each > time);
    const rest = (column) => (from < 0 ? [] : this[column].slice(from));
    return { step: rest("step"), time: rest("time"), tokens: rest("tokens"), value: rest("value") };
  }

  /** Return the curve over an axis; that over the steps where the points do not say their tokens. */
  curve(axis) {
    if (!this.curves.has(axis)) this.curves.set(axis, Curve.of(this[axis], this.value));
    return this.curves.get(axis);
  }

  /** Return the smoothed values at the curve's points. */
  mean(axis, weight) {
    const curve = this.curve(axis);
    this.means.set(axis, smoothed(curve.y, curve.length, weight, this.means.get(axis)));
    return this.means.get(axis).y;
  }
}
