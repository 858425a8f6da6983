// How is one metric drawn? By uPlot, of the points that the visible range needs, in the colours of the theme.

import { count, metric, clock, day, number } from "../core/format.js";
import { h, say } from "../core/dom.js";

const HEIGHT = 178;
/** What was drawn since the page was opened: frames, and the most points of one curve group in one of them. */
export const drawn = { frames: 0, most: 0, width: 0 };
// Curves are told apart by their dashes too.
export const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [5, 5], [1, 2]];

// Steps and tokens are whole numbers, and so are their ticks.
const WHOLE = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Return the colour of a curve by its number, in the theme of now. */
export const colour = (i) => css(`--series-${(i % 6) + 1}`);

const faint = (hex) => `${hex}59`;

export class Chart {
  /**
   * name: the metric. curves: () => [{label, points, index}], read anew for each drawing. group: of charts that move as one.
   */
  constructor(name, curves, group) {
    Object.assign(this, { name, curves, group, plot: null, shown: true });
    this.value = h("span", { class: "value num" });
    this.box = h("div", { class: "plot" });
    this.element = h(
      "figure",
      {
        class: "chart",
        tabIndex: 0,
        "aria-label": `${metric(name)}, chart; arrows pan, plus and minus zoom, 0 shows all`,
      },
      h("figcaption", {}, h("span", { class: "name", title: name }, metric(name)), this.value),
      this.box,
    );
    this.element.addEventListener("keydown", (event) => group.key(event));
  }

  /** Draw, with a new plot if `anew`. */
  draw(anew = false) {
    if (!this.element.isConnected || !this.box.clientWidth) return;
    if (anew || !this.plot || this.plot.series.length !== this.#columns().length) this.#open();
    const { data, most, right } = this.#data();
    const [x0] = this.group.range();
    this.plot.batch(() => {
      this.plot.setData(data, false);
      this.plot.setScale("x", { min: x0, max: right });
    });
    drawn.frames++;
    drawn.most = Math.max(drawn.most, most);
    drawn.width = Math.max(drawn.width, this.box.clientWidth);
    this.tellLast();
  }

  /** Return the lowest and the highest x of the curves. */
  extent() {
    const ends = this.curves()
      .map(({ points }) => points.curve(this.group.axis))
      .filter((curve) => curve.length);
    return [Math.min(...ends.map((curve) => curve.first)), Math.max(...ends.map((curve) => curve.last))];
  }

  close() {
    this.plot?.destroy();
    this.plot = null;
  }

  tellLast() {
    if (this.plot?.cursor.idx !== null && this.plot?.cursor.idx !== undefined && this.plot.cursor.left >= 0) return;
    const ends = this.curves()
      .map(({ points }) => points.value[points.value.length - 1])
      .filter((v) => v !== undefined);
    say(this.value, ends.length === 1 ? number(ends[0]) : "");
  }

  #columns() {
    const raw = this.curves();
    return [null, ...raw.flatMap((curve) => (this.group.weight > 0 ? [curve, curve] : [curve]))];
  }

  #data() {
    const [x0, x1] = this.group.range();
    const list = this.curves();
    const bins = Math.max(8, Math.floor(this.box.clientWidth / Math.max(1, list.length)));
    const { axis, weight, log } = this.group;
    let right = x1;
    const tables = list.map(({ points }) => {
      const curve = points.curve(axis);
      const picked = curve.pick(x0, x1, bins);
      const xs = picked.map((i) => curve.x[i]);
      const of = (ys) => picked.map((i) => (log && !(ys[i] > 0) ? null : ys[i]));
      const columns = [of(curve.y)];
      if (weight > 0) columns.push(of(points.mean(axis, weight)));
      distinct(xs);
      // Those of the last x are drawn too, each a hair further to the right.
      const after = picked.findIndex((i) => curve.x[i] > x1);
      const shown = after < 0 ? xs.length : after;
      if (shown) right = Math.max(right, xs[shown - 1]);
      return [xs, ...columns];
    });
    const most = tables.reduce((sum, [xs]) => sum + xs.length, 0);
    const data = tables.length > 1 ? uPlot.join(tables) : (tables[0] ?? [[]]);
    return { data, most, right };
  }

  #open() {
    const cursor = this.plot?.cursor.left;
    this.close();
    const { axis, log, weight } = this.group;
    const [ink, grid] = [css("--muted"), css("--grid")];
    const font = `11px ${css("--sans")}`;
    const series = this.curves().flatMap(({ index = 0 }) => {
      const stroke = colour(index);
      const line = { stroke, width: 1.5, spanGaps: true, points: { show: false }, dash: DASHES[index % 6] };
      return weight > 0
        ? [
            { ...line, stroke: faint(stroke), width: 1, dash: [] },
            { ...line, width: 2 },
          ]
        : [line];
    });
    const ticks = axis === "time" ? { values: times } : { incrs: WHOLE, values: (_, splits) => splits.map(count) };
    const options = {
      width: this.box.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      padding: [10, 8, 0, 0],
      cursor: {
        y: false,
        sync: { key: this.group.key_, scales: ["x", null], setSeries: false },
        drag: { x: true, y: false, setScale: false },
        points: { size: 6 },
      },
      scales: { x: { time: axis === "time" }, y: { distr: log ? 3 : 1, range: log ? undefined : padded } },
      axes: [
        { stroke: ink, font, size: 26, grid: { stroke: grid, width: 1 }, ticks: { show: false }, ...ticks },
        {
          stroke: ink,
          font,
          size: 54,
          grid: { stroke: grid, width: 1 },
          ticks: { show: false },
          values: (_, s) => s.map((v) => (v === null ? null : tick(v))),
        },
      ],
      series: [{}, ...series],
      hooks: {
        setCursor: [() => this.#tellAt()],
        setSelect: [(plot) => this.group.select(plot)],
        draw: [(plot) => this.group.mark(plot)],
      },
    };
    this.plot = new uPlot(options, [[], ...series.map(() => [])], this.box);
    this.group.hold(this.plot);
    if (cursor >= 0) this.plot.setCursor({ left: cursor, top: 0 }, false);
  }

  #tellAt() {
    const { idx, left } = this.plot ? this.plot.cursor : {};
    if (idx === null || idx === undefined || !(left >= 0)) return this.tellLast();
    const x = this.plot.data[0][idx];
    if (x === undefined) return;
    const step = this.group.weight > 0 ? 2 : 1;
    const list = this.curves();
    const values = list.map((curve, i) => {
      const value = this.plot.data[1 + i * step + step - 1]?.[idx];
      return value === null || value === undefined ? null : (list.length > 1 ? `${i + 1}: ` : "") + number(value);
    });
    const at =
      this.group.axis === "time" ? clock(x) : this.group.axis === "tokens" ? `${count(x)} tokens` : `step ${number(x)}`;
    say(this.value, `${values.filter(Boolean).join("  ")} · ${at}`);
    this.group.hover(this.plot, x);
  }

  resize() {
    if (this.plot && this.box.clientWidth && this.plot.width !== this.box.clientWidth) {
      this.plot.setSize({ width: this.box.clientWidth, height: HEIGHT });
      this.draw();
    }
  }
}

const tick = (value) =>
  value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)
    ? value.toExponential(1).replace("e+", "e").replace(".0e", "e")
    : Math.abs(value) >= 1e4
      ? count(value)
      : String(Number(value.toPrecision(4)));

/** Return the ticks of a time axis in one line: times, and the day at the first of each day. */
function times(plot, splits, axis, space, step) {
  return splits.map((time, i) => {
    const midnight = i > 0 && new Date(time * 1000).getDate() !== new Date(splits[i - 1] * 1000).getDate();
    if (step >= 86_400 || midnight) return day(time);
    return clock(time, step < 60)
      .split(" ")
      .at(-1);
  });
}

// uPlot wants x to grow; points of one x stay in their order, a hair apart.
function distinct(xs) {
  for (let i = 1; i < xs.length; i++) if (xs[i] <= xs[i - 1]) xs[i] = xs[i - 1] + Math.abs(xs[i - 1]) * 1e-12 + 1e-9;
}

function padded(_, low, high) {
  if (low === null || high === null) return [0, 1];
  // What rounding made of a constant is one.
  if (high - low <= Math.abs(high) * 1e-6)
    return [low - Math.abs(low) * 0.1 - 1e-9, high + Math.abs(high) * 0.1 + 1e-9];
  return [low - (high - low) * 0.06, high + (high - low) * 0.06];
}
