// Which points of a long curve does a screen need? The lowest and the highest of each pixel's, found without a walk
// over all: level k of a pyramid has, for each 8 * 4^k points, the indices of the lowest and of the highest.

const FIRST = 3; // 2^3 points a bucket of the lowest level
const WIDER = 2; // each level's buckets are 2^2 of the level below

/** Points in the order of x, which only grows at its end; values are finite. */
export class Curve {
  constructor(capacity = 64) {
    this.length = 0;
    this.x = new Float64Array(capacity);
    this.y = new Float64Array(capacity);
    this.stands = null;
    this.levels = [];
  }

  /** Return a curve of arrays; they are sorted by x where they are not. count, mean: what thinned points stand for. */
  static of(xs, ys, count = null, mean = null) {
    const curve = new Curve(Math.max(64, xs.length));
    if (count) curve.stands = { count: new Float64Array(curve.x.length), mean: new Float64Array(curve.x.length) };
    let order = null;
    for (let i = 1; i < xs.length; i++) {
      if (!(xs[i] >= xs[i - 1])) {
        order = Array.from(xs.keys()).sort((a, b) => xs[a] - xs[b] || a - b);
        break;
      }
    }
    for (let i = 0; i < xs.length; i++) {
      const at = order ? order[i] : i;
      if (Number.isFinite(xs[at]) && Number.isFinite(ys[at])) curve.push(xs[at], ys[at], count?.[at], mean?.[at]);
    }
    return curve;
  }

  get first() {
    return this.x[0];
  }

  get last() {
    return this.x[this.length - 1];
  }

  /** Append a point whose x is not below the last one's, and which stands for `count` of mean `mean`. */
  push(x, y, count = 1, mean = y) {
    if (this.length === this.x.length) this.#grow();
    const i = this.length++;
    this.x[i] = x;
    this.y[i] = y;
    if (this.stands) {
      this.stands.count[i] = count;
      this.stands.mean[i] = mean;
    }
    for (let level = 0, shift = FIRST; ; level++, shift += WIDER) {
      const bucket = i >>> shift;
      const kept = (this.levels[level] ??= { low: new Uint32Array(16), high: new Uint32Array(16) });
      if (bucket >= kept.low.length) {
        kept.low = longer(kept.low, bucket);
        kept.high = longer(kept.high, bucket);
      }
      if (i === bucket << shift) kept.low[bucket] = kept.high[bucket] = i;
      else {
        if (y < this.y[kept.low[bucket]]) kept.low[bucket] = i;
        if (y > this.y[kept.high[bucket]]) kept.high[bucket] = i;
      }
      // A level that is new holds only its last buckets' points: so all are there from the first point on.
      if (shift >= 26) return;
    }
  }

  #grow() {
    const grown = (array) => {
      const next = new Float64Array(array.length * 2);
      next.set(array);
      return next;
    };
    this.x = grown(this.x);
    this.y = grown(this.y);
    if (this.stands) this.stands = { count: grown(this.stands.count), mean: grown(this.stands.mean) };
  }

  /** Return the index of the first point with an x of at least this. */
  find(x) {
    return this.#first((each) => each >= x);
  }

  #first(holds) {
    let low = 0;
    let high = this.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (!holds(this.x[middle])) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /**
   * Return the indices, ascending, of at most `2 * bins` points that draw as all from x0 to x1 do in `bins` pixels.
   * One point beyond each end is among them, so that lines leave the screen where they should.
   */
  pick(x0, x1, bins) {
    const from = Math.max(0, this.find(x0) - 1);
    const to = Math.min(this.length, this.#first((each) => each > x1) + 1);
    const picked = [];
    const points = to - from;
    if (points <= 2 * bins) {
      for (let i = from; i < to; i++) picked.push(i);
      return picked;
    }
    // Two of the places are the ends, and a bucket that the range cuts is read point by point.
    let level = -1;
    while (level + 1 < this.levels.length && points / (1 << (FIRST + WIDER * (level + 1))) >= bins - 1) level++;
    const shift = level < 0 ? 0 : FIRST + WIDER * level;
    const firstBucket = from >>> shift;
    const buckets = ((to - 1) >>> shift) - firstBucket + 1;
    const step = Math.ceil(buckets / (bins - 1));
    picked.push(from);
    for (let b = 0; b < buckets; b += step) {
      this.#extremes(picked, firstBucket + b, firstBucket + Math.min(buckets, b + step), level, shift, from, to);
    }
    if (picked[picked.length - 1] !== to - 1) picked.push(to - 1);
    return picked;
  }

  #extremes(picked, bucket, end, level, shift, from, to) {
    let low = -1;
    let high = -1;
    const take = (i) => {
      if (low < 0 || this.y[i] < this.y[low]) low = i;
      if (high < 0 || this.y[i] > this.y[high]) high = i;
    };
    for (; bucket < end; bucket++) {
      const start = bucket << shift;
      const stop = start + (1 << shift);
      if (level >= 0 && start >= from && stop <= to) {
        take(this.levels[level].low[bucket]);
        take(this.levels[level].high[bucket]);
      } else for (let i = Math.max(from, start); i < Math.min(to, stop); i++) take(i);
    }
    for (const i of low < high ? [low, high] : [high, low]) {
      if (i > picked[picked.length - 1]) picked.push(i);
    }
  }
}

function longer(array, least) {
  const next = new Uint32Array(Math.max(array.length * 2, least + 1));
  next.set(array);
  return next;
}

/**
 * Return the running mean of a curve's values: `weight` of the past, 0 for none; unbiased at the start.
 * stands: {count, mean} of thinned points. One that stands for n points is n - 1 of the mean of the others, then itself:
 * it is often the lowest or the highest of them, so that n steps towards the mean of all would lag behind it.
 */
export function smoothed(values, length, weight, kept = null, stands = null) {
  const state =
    kept && kept.weight === weight && kept.length <= length
      ? kept
      : { weight, length: 0, mean: 0, mass: 0, y: new Float64Array(0) };
  if (state.y.length < length) {
    const next = new Float64Array(Math.max(length, values.length));
    next.set(state.y.subarray(0, state.length));
    state.y = next;
  }
  const step = (past, towards) => {
    state.mean = past * state.mean + (1 - past) * towards;
    state.mass = past * state.mass + (1 - past);
  };
  for (let i = state.length; i < length; i++) {
    const count = stands ? stands.count[i] : 1;
    if (count > 1) step(weight ** (count - 1), (count * stands.mean[i] - values[i]) / (count - 1));
    if (count > 0) step(weight, values[i]);
    state.y[i] = state.mass > 0 ? state.mean / state.mass : values[i];
  }
  state.length = length;
  return state;
}
