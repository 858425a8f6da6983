// How fast do long curves pan? `window.dashboardBench(points, frames)` draws and measures, in the page of now.

import { h } from "../core/dom.js";
import { Chart, drawn } from "./chart.js";
import { Points } from "./data.js";
import { Group } from "./group.js";

/** Pan over a curve of this many points for some frames; return {fps, made_ms, most, width}: times, points a frame. */
export async function bench(points = 1_000_000, frames = 90) {
  const began = performance.now();
  const kept = new Points("step");
  const value = new Float64Array(points);
  let level = 3;
  for (let i = 0, seed = 7; i < points; i++) {
    seed = (seed * 1664525 + 1013904223) >>> 0;
    level += (seed / 2 ** 32 - 0.5) * 0.02;
    value[i] = level + (i % 9973 === 0 ? 4 : 0) + seed / 2 ** 33;
  }
  kept.append({ step: value.map((_, i) => i), value });
  const group = new Group();
  const chart = new Chart("loss:mean", () => [{ label: "bench", points: kept, index: 0 }], group);
  const box = h("section", { "aria-label": "Benchmark" }, chart.element);
  document.querySelector("main").append(box);
  group.add(chart);
  group.drawNow();
  const made = performance.now() - began;
  group.show([0, points * 0.7]);
  await frame();
  Object.assign(drawn, { frames: 0, most: 0, width: 0 });
  const start = performance.now();
  for (let i = 0; i < frames; i++) {
    group.pan(i < frames / 2 ? 0.004 : -0.004);
    await frame();
  }
  const seconds = (performance.now() - start) / 1000;
  const answer = { fps: frames / seconds, made_ms: made, most: drawn.most, width: drawn.width, drawn: drawn.frames };
  group.close();
  box.remove();
  return answer;
}

const frame = () => new Promise((done) => requestAnimationFrame(done));
