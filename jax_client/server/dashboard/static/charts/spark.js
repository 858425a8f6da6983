// How does a run's newest curve look in a line of text? As a small line with its last point marked.

import { svg } from "../core/dom.js";

const [WIDTH, HEIGHT] = [108, 22];

/** Return a small picture of at most 60 numbers. */
export function spark(values = [], name = "") {
  const numbers = (values ?? []).filter(Number.isFinite);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "spark", role: "img" });
  if (numbers.length < 2) {
    picture.setAttribute("aria-label", "no curve yet");
    return picture;
  }
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const x = (i) => 2 + (i * (WIDTH - 6)) / (numbers.length - 1);
  const y = (value) => (high === low ? HEIGHT / 2 : HEIGHT - 3 - ((value - low) / (high - low)) * (HEIGHT - 6));
  const points = numbers.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  const last = numbers.length - 1;
  picture.setAttribute(
    "aria-label",
    `${name || "curve"} from ${numbers[0].toPrecision(3)} to ${numbers[last].toPrecision(3)}`,
  );
  picture.append(
    svg("polyline", { points }),
    svg("circle", { cx: x(last).toFixed(1), cy: y(numbers[last]).toFixed(1), r: 2 }),
  );
  return picture;
}
