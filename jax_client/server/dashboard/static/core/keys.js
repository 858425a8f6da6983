// What do keys do? `g` and a letter opens a view, `/` searches, `?` shows them all; a view adds its own.

import { button, h } from "./dom.js";

export const VIEWS = [
  ["runs", "Runs", "r"],
  ["device", "Device", "d"],
  ["checkpoints", "Checkpoints", "k"],
  ["playground", "Playground", "p"],
  ["compare", "Compare", "c"],
  ["rollouts", "Rollouts", "o"],
];

let own = {};
let waiting = 0;

/** Set the keys of the open view: {key: [what it does, function]}. */
export const setKeys = (keys) => {
  own = keys;
};

function typing(target) {
  return (
    target.isContentEditable ||
    (/^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) && !/^(checkbox|button)$/.test(target.type))
  );
}

export function installKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.key === "Escape" && typing(event.target)) return event.target.blur();
    if (typing(event.target) || document.querySelector("dialog[open]")) return;
    if (Date.now() < waiting) {
      waiting = 0;
      const view = VIEWS.find(([, , key]) => key === event.key);
      if (view) {
        event.preventDefault();
        location.hash = `#/${view[0]}`;
        return;
      }
    }
    if (event.key === "g") waiting = Date.now() + 1500;
    else if (event.key === "?") help();
    else if (event.key === "/") search(event);
    else if (own[event.key]) {
      event.preventDefault();
      own[event.key][1](event);
    }
  });
}

function search(event) {
  const box = document.querySelector("main input[type=search]");
  if (!box) location.hash = "#/runs";
  event.preventDefault();
  (box ?? document.querySelector("main"))?.focus();
}

/** Show the keys. */
export function help() {
  const lines = [
    ["/", "search"],
    ["?", "this help"],
    ...VIEWS.map(([, label, key]) => [`g ${key}`, label]),
    ...Object.entries(own).map(([key, [words]]) => [key.replace("Arrow", ""), words]),
    ["Esc", "leave a field, close this"],
  ];
  const box = h(
    "dialog",
    { class: "help", "aria-label": "Keys", onclose: () => box.remove() },
    h("h2", {}, "Keys"),
    h(
      "dl",
      {},
      lines.map(([key, words]) =>
        h(
          "div",
          {},
          h(
            "dt",
            {},
            key.split(" ").map((k) => h("kbd", {}, k)),
          ),
          h("dd", {}, words),
        ),
      ),
    ),
    h(
      "form",
      { method: "dialog" },
      button("Close", () => box.close(), { class: "strong" }),
    ),
  );
  document.body.append(box);
  box.showModal();
}

/** Move the focus among elements: the next one by `by`, or the first. */
export function move(elements, by) {
  const list = [...elements];
  const at = list.findIndex(
    (element) => element === document.activeElement || element.closest("tr, li")?.contains(document.activeElement),
  );
  const next = list[at < 0 ? (by > 0 ? 0 : list.length - 1) : Math.min(list.length - 1, Math.max(0, at + by))];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}
