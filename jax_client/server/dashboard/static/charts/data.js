// Which points does the page have of a run? All that came, by name, with a curve for each axis they are drawn over.

import { Curve, smoothed } from "./pyramid.js";

export const AXES = { step: "Step", time: "Time", tokens: "Tokens" };
const COLUMNS = ["step", "time", "tokens", "value"];

export class RunData {
  constructor(run) {
    this.run = run;
    this.series = new Map();
    this.names = [];
    this.events = [];
    this.next = null;
    this.resets = 0;
    this.places = new Map();
  }

  /** Take what the server sent: later points, or all anew after a reset; true if the names may be others. */
  take(sent) {
    let fresh = Boolean(sent.reset);
    if (sent.reset) {
      this.resets++;
      this.series.clear();
      this.names = [];
      this.events = [];
    }
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

  /** Return what `refine` needs to know of the moment in which more points are asked for. */
  asking() {
    return { resets: this.resets, lengths: new Map([...this.series].map(([name, { value }]) => [name, value.length])) };
  }

  /** Put more points in the place of a name's thinned ones; those that came since they were asked for stay. */
  refine(sent, { resets = this.resets, lengths = new Map() } = {}) {
    if (resets !== this.resets) return;
    for (const [name, points] of Object.entries(sent.series ?? {})) {
      const fuller = new Points(points.kind);
      fuller.append(points);
      if (fuller.value.length) this.series.get(name)?.continue(fuller, lengths.get(name) ?? 0);
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
    for (const column of COLUMNS) this[column] = [];
    // Of thinned points: how many each stands for, and the mean of these. None means one each.
    this.counts = this.averages = null;
    this.held = [0, 0];
    this.expected = null;
    this.curves = new Map();
    this.means = new Map();
  }

  append(sent) {
    const { step = [], time = [], tokens = [], value = [], count = null, mean = null } = sent;
    if (count && !this.counts) this.#weigh();
    const before = this.value.length;
    for (let i = this.#known(sent); i < value.length; i++) {
      this.step.push(step[i] ?? NaN);
      this.time.push(time[i] ?? NaN);
      this.tokens.push(tokens[i] ?? NaN);
      this.value.push(value[i]);
      if (this.counts) this.#stand(value[i], count?.[i], mean?.[i]);
    }
    for (const [axis, curve] of this.curves) {
      for (let i = before; i < this[axis].length; i++) {
        const x = this[axis][i];
        if (curve.length && x < curve.last) {
          this.curves.delete(axis);
          this.means.delete(axis);
          break;
        }
        if (Number.isFinite(x) && Number.isFinite(this.value[i]))
          curve.push(x, this.value[i], this.counts?.[i], this.averages?.[i]);
      }
    }
  }

  /** Let all points that there are stand for themselves, from now on in columns. */
  #weigh() {
    this.counts = this.value.map((value) => (Number.isFinite(value) ? 1 : 0));
    this.averages = [...this.value];
    this.curves.clear();
    this.means.clear();
  }

  /** Note what the newest point stands for: that of one without a finite value is left to the next. */
  #stand(value, count = Number.isFinite(value) ? 1 : 0, mean = value) {
    const finite = Number.isFinite(value);
    const all = this.held[0] + count;
    const sum = this.held[1] + (count ? count * mean : 0);
    this.held = finite ? [0, 0] : [all, sum];
    this.counts.push(finite ? all : 0);
    this.averages.push(!finite || !all ? value : all === count ? mean : sum / all);
  }

  /** Append to fuller points what these have after their end, of those from index `asked` on. */
  continue(fuller, asked) {
    const end = pointOf(fuller, fuller.value.length - 1);
    let from = lastLike(this, end) + 1;
    if (!from) {
      from = this.value.length;
      while (from > 0 && later(pointOf(this, from - 1), end)) from--;
      // None is after it: what is on its way here has it.
      if (from === this.value.length) fuller.expected = end;
    }
    from = Math.max(from, asked);
    if (from === this.value.length) return;
    const rest = Object.fromEntries(COLUMNS.map((name) => [name, this[name].slice(from)]));
    fuller.append({ ...rest, count: this.counts?.slice(from), mean: this.averages?.slice(from) });
  }

  /** Return how many points of an answer are here already, from one that was on its way when these were asked for. */
  #known(sent) {
    const { expected } = this;
    if (!expected || !sent.value?.length) return 0;
    const found = lastLike(sent, expected) + 1;
    const end = pointOf(sent, sent.value.length - 1);
    const earlier = !found && Number.isFinite(expected.time) && end.time < expected.time;
    if (!earlier) this.expected = null;
    return earlier ? sent.value.length : found;
  }

  /** Return the curve over an axis; that over the steps where the points do not say their tokens. */
  curve(axis) {
    if (!this.curves.has(axis)) this.curves.set(axis, Curve.of(this[axis], this.value, this.counts, this.averages));
    return this.curves.get(axis);
  }

  /** Return the smoothed values at the curve's points. */
  mean(axis, weight) {
    const curve = this.curve(axis);
    this.means.set(axis, smoothed(curve.y, curve.length, weight, this.means.get(axis), curve.stands));
    return this.means.get(axis).y;
  }
}

function pointOf(columns, i) {
  return Object.fromEntries(COLUMNS.map((name) => [name, columns[name]?.[i] ?? NaN]));
}

/** Return the index of the last point that is this one, -1 for none; a point may lack its step or its time. */
function lastLike(columns, { step, time, value }) {
  const same = (name, i, x) => Object.is(columns[name]?.[i] ?? NaN, x);
  let i = columns.value.length - 1;
  while (i >= 0 && !(same("value", i, value) && same("step", i, step) && same("time", i, time))) i--;
  return i;
}

const later = (a, b) => (Number.isFinite(a.time) && Number.isFinite(b.time) ? a.time > b.time : a.step > b.step);
