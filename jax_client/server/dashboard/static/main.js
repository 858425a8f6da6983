// What does the page show? The view that the address names, below a line on the device and one on the newest run.

import { button, h, put, say } from "./core/dom.js";
import { toLogin } from "./core/api.js";
import { ago, bytes, moment, span } from "./core/format.js";
import { help, installKeys, setKeys, VIEWS } from "./core/keys.js";
import { listen, refresh, runs, store, watch } from "./core/store.js";
import { engines, inUse } from "./core/engines.js";
import { nowLine, pageTitle } from "./views/parts/now.js";
import { installTheme } from "./core/theme.js";

const main = document.querySelector("main");
let open = null;
let opening = 0;

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // as someone typed it
  }
}

/** Return [view, argument, query] of the address. */
function where() {
  const [path, query = ""] = (location.hash.slice(2) || "runs").split("?");
  const [view, ...rest] = path.split("/");
  const known = view === "run" || VIEWS.some(([name]) => name === view);
  return [known ? view : "runs", rest.map(decoded).join("/"), new URLSearchParams(query)];
}

async function route() {
  const mine = ++opening;
  const [view, argument, query] = where();
  const module = await import(`./views/${view}.js`);
  if (mine !== opening) return;
  open?.close?.();
  open = null;
  setKeys({});
  put(main);
  main.dataset.view = view;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.dataset.view === (view === "run" ? "runs" : view);
    if (here) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else link.removeAttribute("aria-current");
  }
  if (view !== "run") watch(null, null);
  open = module.open(main, argument, query);
  setKeys(open.keys ?? {});
  scrollTo(0, 0);
  frame();
}

function frame() {
  document.title = pageTitle(open?.title?.());
  topLine();
  nowLine(document.getElementById("now"), where()[1]);
}

function topLine() {
  const shown = engines();
  const parts = shown.slice(0, 2).map((engine) => {
    const { device = {}, memory_bytes: memory = {}, health = {} } = engine;
    const free = memory.available;
    const used = inUse(memory);
    const compiling = health.compiling ?? [];
    const meter =
      Number.isFinite(free) && used + free > 0
        ? h("meter", { min: 0, max: 1, value: used / (used + free), "aria-label": "Memory in use" })
        : null;
    return h(
      "span",
      { class: "engine", title: engine.model?.name ?? "" },
      h("b", {}, `${device.kind ?? device.platform ?? "device"}${device.count > 1 ? ` × ${device.count}` : ""}`),
      h("span", {}, "memory ", bytes(used), meter),
      h("span", {}, health.waiting === null ? "" : `queue ${health.waiting ?? 0}`),
      compiling.length
        ? h("span", { class: "busy" }, `compiling ${compiling[0].program} ${span(compiling[0].seconds)}`)
        : null,
      ["stuck", "dead"].includes(health.state) ? h("span", { class: "badge bad" }, health.state) : null,
    );
  });
  if (!shown.length) parts.push(h("span", { class: "muted" }, store.loaded ? "no engine in this process" : "…"));
  const line = document.getElementById("device-line");
  const key = JSON.stringify(shown.slice(0, 2).map((e) => [e.device, e.memory_bytes, e.health]));
  if (line.dataset.key !== key) {
    line.dataset.key = key;
    put(line, parts);
  }
}

function linkLine() {
  const bar = document.getElementById("link");
  bar.hidden = store.connected;
  document.body.classList.toggle("stale", !store.connected);
  if (!store.connected)
    say(
      bar,
      `No answer from the server. What you see is from ${ago(store.heard)} (${moment(store.heard)}); the page tries to reach it again.`,
    );
}

function installFrame() {
  const nav = document.querySelector("nav");
  put(
    nav,
    VIEWS.map(([view, label, key]) => h("a", { href: `#/${view}`, dataset: { view }, title: `g ${key}` }, label)),
  );
  put(
    document.getElementById("tools"),
    button("?", help, { class: "plain", "aria-label": "Keys", title: "Keys (?)" }),
    installTheme(() => open?.themed?.()),
  );
  installKeys();
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  addEventListener("hashchange", route);
  setInterval(() => {
    linkLine();
    for (const element of document.querySelectorAll("[data-time]")) say(element, ago(Number(element.dataset.time)));
    nowLine(document.getElementById("now"), where()[1]);
  }, 1000);
}

listen((kind, data) => {
  if (kind === "link") linkLine();
  open?.news?.(kind, data);
  if (kind === "runs" || kind === "device" || kind === "state") frame();
});

async function boot() {
  installFrame();
  try {
    await refresh();
  } catch (error) {
    if (error.status === 401) return toLogin();
    put(
      main,
      h(
        "div",
        { class: "empty" },
        h("h1", {}, "The server gave no answer"),
        h("p", {}, error.message),
        button("Try again", () => location.reload(), { class: "strong" }),
      ),
    );
    return;
  }
  await route();
  performance.mark("dashboard-ready");
}

window.dashboardBench = async (...args) => (await import("./charts/bench.js")).bench(...args);
window.dashboardRuns = () => runs().length;
boot();
