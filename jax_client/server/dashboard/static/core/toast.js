// How does the page say what happened? In a bar at the bottom, politely, with what can be undone for as long as it can.

import { button, h } from "./dom.js";
import { span } from "./format.js";

const shelf = () => document.getElementById("toasts");

/** Show words for some seconds. */
export function toast(words, { bad = false, seconds = bad ? 12 : 5 } = {}) {
  const bar = h("div", { class: bad ? "toast bad" : "toast" }, h("span", {}, words));
  bar.append(button("×", () => bar.remove(), { class: "plain", "aria-label": "Dismiss" }));
  shelf().append(bar);
  setTimeout(() => bar.remove(), seconds * 1000);
  return bar;
}

/** Show words with an undo button until a unix time. */
export function undoable(words, until, undo) {
  const left = h("span", { class: "muted num", "aria-hidden": "true" });
  const bar = h("div", { class: "toast undo" }, h("span", {}, words), left);
  const end = () => {
    clearInterval(timer);
    bar.remove();
  };
  const tick = () => {
    const seconds = until - Date.now() / 1000;
    if (seconds <= 0) end();
    else left.textContent = span(seconds);
  };
  bar.append(
    button(
      "Undo",
      () => {
        end();
        undo();
      },
      { class: "strong" },
    ),
    button("×", end, { class: "plain", "aria-label": "Dismiss" }),
  );
  const timer = setInterval(tick, 1000);
  shelf().append(bar);
  tick();
  return end;
}

/** Copy text, and say so; where the browser refuses, show it to be copied by hand. */
export async function copy(text, noun = "Copied") {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${noun}: copied`);
  } catch {
    const area = h("textarea", { value: text, readOnly: true, class: "offscreen", "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    toast(done ? `${noun}: copied` : text, { seconds: done ? 5 : 30 });
  }
}
