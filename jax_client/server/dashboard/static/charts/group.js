// How do charts move as one? They share the visible range, the axis, the smoothing and the events; one frame draws all.

import { moment, number, span } from "../core/format.js";
import { say } from "../core/dom.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const GLYPHS = {
  start: "▶",
  compile: "⚙",
  save: "◆",
  autosave: "◇",
  export: "⇪",
  load: "↺",
  end: "■",
  host: "⌂",
  alert: "▲",
};
const LABEL_PIXELS = 15;

let groups = 0;

export class Group {
  /** place(event, axis) → x; status: where words on what is under the cursor go; moved(range): called after zooms. */
  constructor({ place = () => NaN, status = null, moved = () => {} } = {}) {
    Object.assign(this, { place, status, moved });
    this.key_ = `group-${++groups}`;
    this.charts = [];
    this.events = [];
    Object.assign(this, { axis: "step", log: false, weight: 0, zoom: null, frame: 0, anew: false });
    this.sizes = new ResizeObserver(() => this.charts.forEach((chart) => chart.resize()));
  }

  add(chart) {
    this.charts.push(chart);
    this.sizes.observe(chart.box);
  }

  remove(chart) {
    this.charts = this.charts.filter((each) => each !== chart);
    this.sizes.unobserve(chart.box);
    chart.close();
  }

  close() {
    cancelAnimationFrame(this.frame);
    this.sizes.disconnect();
    for (const chart of this.charts) chart.close();
    this.charts = [];
  }

  /** Return all that there is to see. */
  whole() {
    const ends = this.charts.map((chart) => chart.extent()).filter(([low]) => Number.isFinite(low));
    const low = Math.min(...ends.map(([a]) => a));
    const high = Math.max(...ends.map(([, b]) => b));
    if (!Number.isFinite(low)) return [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  range() {
    return this.zoom ?? (this.wholeNow ??= this.whole());
  }

  /** Draw all in the next frame; `anew`: with other axes, colours or curves. */
  draw(anew = false) {
    this.anew ||= anew;
    this.frame ||= requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    const again = this.anew;
    this.frame = 0;
    this.anew = false;
    this.wholeNow = null;
    for (const chart of this.charts) chart.draw(again);
  }

  set(options) {
    if (options.axis && options.axis !== this.axis) this.zoom = null;
    Object.assign(this, options);
    this.draw(true);
  }

  /** Show a range, within what there is; null shows all. */
  show(range) {
    if (range) {
      const [low, high] = this.whole();
      const width = Math.min(range[1] - range[0], high - low);
      const from = Math.min(Math.max(range[0], low), high - width);
      const least = Math.max((high - low) * 1e-7, this.axis === "step" ? 1 : 1e-3);
      range = width >= (high - low) * 0.999 ? null : [from, from + Math.max(width, least)];
    }
    this.zoom = range;
    this.draw();
    this.moved(range);
  }

  pan(share) {
    const [low, high] = this.range();
    if (this.zoom) this.show([low + (high - low) * share, high + (high - low) * share]);
  }

  scale(factor, at = 0.5) {
    const [low, high] = this.range();
    const middle = low + (high - low) * at;
    this.show([middle - (middle - low) * factor, middle + (high - middle) * factor]);
  }

  key(event) {
    const actions = {
      ArrowLeft: () => this.pan(-0.2),
      ArrowRight: () => this.pan(0.2),
      "+": () => this.scale(0.6),
      "=": () => this.scale(0.6),
      "-": () => this.scale(1 / 0.6),
      0: () => this.show(null),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
  }

  /** Zoom to what was marked with the mouse. */
  select(plot) {
    const { left, width } = plot.select;
    if (width < 5) return;
    const range = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.show(range);
  }

  /** Let a plot be moved by wheel, by shift and the mouse, and by fingers. */
  hold(plot) {
    const over = plot.over;
    const fingers = new Map();
    over.addEventListener("dblclick", () => this.show(null));
    over.addEventListener(
      "wheel",
      (event) => {
        if (event.ctrlKey) this.scale(event.deltaY > 0 ? 1.25 : 0.8, event.offsetX / over.clientWidth);
        else if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey)
          this.pan((event.deltaX || event.deltaY) / over.clientWidth);
        else return;
        event.preventDefault();
      },
      { passive: false },
    );
    over.addEventListener(
      "mousedown",
      (event) => {
        if (!event.shiftKey) return;
        event.stopImmediatePropagation();
        const moved = (move) => this.pan(-move.movementX / over.clientWidth);
        addEventListener("mousemove", moved);
        addEventListener("mouseup", () => removeEventListener("mousemove", moved), { once: true });
      },
      true,
    );
    over.addEventListener(
      "pointerdown",
      (event) => event.pointerType === "touch" && fingers.set(event.pointerId, event.clientX),
    );
    over.addEventListener("pointermove", (event) => this.#finger(event, fingers, over));
    for (const end of ["pointerup", "pointercancel", "pointerleave"])
      over.addEventListener(end, (event) => fingers.delete(event.pointerId));
  }

  #finger(event, fingers, over) {
    if (!fingers.has(event.pointerId)) return;
    const before = [...fingers.values()];
    const moved = event.clientX - fingers.get(event.pointerId);
    fingers.set(event.pointerId, event.clientX);
    if (before.length === 1) this.pan(-moved / over.clientWidth);
    else {
      const after = [...fingers.values()];
      const [was, is] = [Math.abs(before[0] - before[1]), Math.abs(after[0] - after[1])];
      if (was > 4 && is > 4)
        this.scale(was / is, ((after[0] + after[1]) / 2 - over.getBoundingClientRect().left) / over.clientWidth);
    }
  }

  /** Draw the events as lines with a sign above, those of one place as one. */
  mark(plot) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio || 1;
    const [low, high] = this.range();
    const marks = new Map();
    for (const event of this.events) {
      const x = this.place(event, this.axis);
      if (!(x >= low && x <= high)) continue;
      const at = Math.round(plot.valToPos(x, "x", true));
      const place = Math.round(at / (LABEL_PIXELS * ratio));
      if (!marks.has(place)) marks.set(place, { at, events: [] });
      marks.get(place).events.push(event);
    }
    ctx.save();
    ctx.font = `${10 * ratio}px ${css("--sans")}`;
    ctx.textAlign = "center";
    for (const { at, events } of marks.values()) {
      const loud = events.some((event) => event.kind === "alert");
      const worst = loud ? events.find((event) => event.kind === "alert") : events[events.length - 1];
      ctx.strokeStyle = ctx.fillStyle = css(loud ? "--bad" : "--mark");
      ctx.lineWidth = ratio;
      ctx.setLineDash([2 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(GLYPHS[worst.kind] ?? "•", at, bbox.top - ratio);
    }
    ctx.restore();
  }

  /** Say which events are near an x. */
  hover(plot, x) {
    if (!this.status) return;
    const near = Math.abs(plot.posToVal(LABEL_PIXELS / 2, "x") - plot.posToVal(0, "x"));
    const events = this.events.filter((event) => Math.abs(this.place(event, this.axis) - x) <= near).slice(-3);
    say(this.status, events.map(words).join("   ") || "");
  }
}

/** Return an event in words. */
export function words(event) {
  const d = event.details ?? {};
  const what =
    {
      compile: () =>
        `compiled ${d.program ?? "a program"} ${d.shapes ?? ""} in ${span(d.seconds)} (${d.cached ? "from the cache" : (d.cause ?? "first use")})`,
      start: () =>
        `started ${[d.base_model, d.rank && `rank ${d.rank}`, d.origin && `from ${d.origin}`].filter(Boolean).join(", ")}`,
      save: () => `saved ${d.path ?? ""} in ${span(d.seconds)}`,
      autosave: () => `saved by itself ${d.path ?? ""} in ${span(d.seconds)}`,
      load: () => `loaded ${d.path ?? ""}`,
      export: () => `exported ${d.path ?? ""}`,
      end: () => `ended: ${[d.how, d.text].filter(Boolean).join(", ")}`,
      host: () => `${d.role} ${d.number} on ${d.host}: ${d.state}`,
      alert: () => event.text ?? "alert",
    }[event.kind]?.() ?? event.kind;
  return `${GLYPHS[event.kind] ?? "•"} ${event.step === null || event.step === undefined ? moment(event.time) : `step ${number(event.step)}`}: ${what.trim()}`;
}
