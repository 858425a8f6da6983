// What does the hardware do? Rates, the time's and the memory's parts, hosts and samplers, and every compile with why.

import { add, h, put, svg } from "../core/dom.js";
import { ago, bytes, count, moment, number, percent, span, title } from "../core/format.js";
import { engines } from "../core/engines.js";
import { store } from "../core/store.js";

const MEMORY = {
  weights: "weights",
  adapters: "adapters",
  optimizer: "optimizer",
  gradients: "gradients",
  cache: "key/value cache",
  decode_weights: "weights for decoding",
  available: "free",
};
const TIME = { queue_seconds: "queue", host_seconds: "host", compile_seconds: "compiling", device_seconds: "device" };

export function open(root) {
  const body = h("div", { class: "device" });
  add(root, [h("h1", { class: "offscreen" }, "Device"), body]);
  let shown = "";
  function show() {
    const device = store.device ?? {};
    const key = JSON.stringify(device);
    if (key === shown) return;
    shown = key;
    const folded = new Set([...body.querySelectorAll("details[open]")].map((each) => each.dataset.of));
    const shownEngines = engines();
    put(
      body,
      shownEngines.length ? shownEngines.map(engineCard) : noEngine(),
      device.engines?.length ? pointsTable(device) : null,
      compileTable(device, device.engines ?? []),
    );
    for (const each of body.querySelectorAll("details")) each.open ||= folded.has(each.dataset.of);
  }
  show();
  return { title: () => "device", news: (kind) => (kind === "device" || kind === "state") && show() };
}

function noEngine() {
  return h(
    "section",
    { class: "empty small" },
    h("h2", {}, "No model is loaded in this process"),
    h(
      "p",
      {},
      "A training process records its device with every step; the server shows its own as soon as a client has loaded a model.",
    ),
  );
}

function engineCard(engine) {
  const { training = {}, sampling = {}, memory_bytes: memory = {}, health = {}, device = {}, model = {} } = engine;
  const rate = engine.matmul_flops_per_second;
  const formula = `useful FLOPs per token × tokens per second of device time ÷ the measured matmul rate = ${number(training.useful_flops_per_token)} × ${number(training.tokens_per_second)} ÷ ${number(rate)} per second. Padding and recomputation do not count as useful.`;
  const sampled = samplingSpeed(engine);
  const tiles = [
    ["train", count(training.tokens_per_second), "tokens/s on device"],
    ["sample", count(sampled), "tokens/s, newest"],
    ["of the matmul rate", percent(training.matmul_fraction, 1), "how it is counted", formula],
    [
      "queue",
      number(health.waiting ?? sampling.rows_waiting),
      health.waiting === null ? "samples wait" : `${sampling.rows_waiting ?? 0} samples wait`,
    ],
    [
      "occupancy",
      percent(sampling.decode_slots === 0 ? NaN : sampling.occupancy),
      `${sampling.rows_running ?? 0} samples run`,
    ],
    ["padding", percent(training.padding_waste), "of computed tokens"],
    [
      "prefix hits",
      percent(sampling.prompt_tokens ? sampling.prompt_tokens_cached / sampling.prompt_tokens : NaN),
      "of prompt tokens",
    ],
  ];
  return h(
    "section",
    { class: "card" },
    h(
      "div",
      { class: "line" },
      h("h2", {}, model.name ?? "model"),
      h(
        "span",
        {
          class: `state ${["stuck", "dead"].includes(health.state) ? "crashed" : health.state === "idle" ? "done" : "live"}`,
        },
        health.state ?? "unknown",
      ),
      h(
        "span",
        { class: "muted" },
        [
          `${device.kind ?? "device"}${device.count ? ` × ${device.count}` : ""}`,
          engine.dtype,
          mesh(engine.mesh),
          engine.max_context ? `context ${count(engine.max_context)}` : "",
        ]
          .filter(Boolean)
          .join(" · "),
      ),
    ),
    engine.recorded
      ? h(
          "p",
          { class: "muted" },
          "As the run ",
          h("a", { href: `#/run/${encodeURIComponent(engine.recorded.run)}` }, title(engine.recorded)),
          ` recorded it, ${ago(engine.time)}. Its process is not this one.`,
        )
      : null,
    (health.compiling ?? []).map((each) =>
      h(
        "p",
        { class: "wait" },
        h("b", {}, `Compiling ${each.program}`),
        ` (${each.shapes}), ${span(each.seconds)} so far. `,
        each.cause === "background"
          ? "It runs beside other work; nothing waits for it."
          : "A request waits for it; later starts take it from the cache.",
      ),
    ),
    h(
      "dl",
      { class: "tiles" },
      tiles
        .filter(([, value]) => !engine.recorded || value !== "–")
        .map(([name, value, under, hint]) =>
          h(
            "div",
            hint ? { tabIndex: 0, class: "hint" } : {},
            h("dt", {}, name),
            h("dd", { class: "num" }, value),
            h("dd", { class: "muted" }, under, hint ? h("span", { class: "tip" }, hint) : null),
          ),
        ),
    ),
    h(
      "div",
      { class: "pair" },
      engine.recorded
        ? null
        : stack(
            "Time of training",
            Object.entries(TIME).map(([key, name]) => [name, training[key] ?? 0]),
            span,
          ),
      stack(
        "Memory",
        Object.entries(MEMORY).map(([key, name]) => [name, memory[key] ?? 0]),
        bytes,
      ),
    ),
    hosts(
      "Hosts",
      (health.hosts ?? engine.hosts ?? []).filter((host) => host.role !== "sampler"),
    ),
    hosts("Sampler replicas", engine.samplers ?? (health.hosts ?? []).filter((host) => host.role === "sampler")),
  );
}

const mesh = (axes = {}) =>
  Object.entries(axes)
    .filter(([, n]) => n > 1)
    .map(([axis, n]) => `${axis}=${n}`)
    .join(" ");

const before = new Map();
/** Return the sampled tokens per second between the two newest figures of an engine. */
function samplingSpeed(engine) {
  const name = engine.model?.name ?? "";
  const [tokens, now] = [engine.sampling?.sampled_tokens ?? 0, Date.now() / 1000];
  const kept = before.get(name);
  if (!kept || tokens < kept.tokens) before.set(name, { tokens, now, speed: NaN });
  else if (now - kept.now > 0.8) before.set(name, { tokens, now, speed: (tokens - kept.tokens) / (now - kept.now) });
  return before.get(name).speed;
}

/** Return parts of a whole as a bar and as a list with their figures. */
function stack(label, parts, show) {
  const known = parts.filter(([, value]) => value > 0);
  const total = known.reduce((sum, [, value]) => sum + value, 0);
  const bar = svg("svg", {
    viewBox: "0 0 1000 18",
    preserveAspectRatio: "none",
    class: "stack",
    role: "img",
    "aria-label": `${label}: ${known.map(([name, value]) => `${name} ${show(value)}`).join(", ")}`,
  });
  let x = 0;
  known.forEach(([name, value]) => {
    const width = (value / (total || 1)) * 1000;
    bar.append(
      svg("rect", {
        x,
        y: 0,
        width: Math.max(0, width - 2),
        height: 18,
        class: name === "free" ? "part free" : `part part-${order(parts, name)}`,
      }),
    );
    x += width;
  });
  return h(
    "div",
    { class: "stacked" },
    h("h3", {}, label, total ? h("span", { class: "muted num" }, ` ${show(total)}`) : null),
    total ? bar : h("p", { class: "muted" }, "nothing yet"),
    h(
      "ul",
      { class: "legend" },
      known.map(([name, value]) =>
        h(
          "li",
          {},
          h("span", {
            class: name === "free" ? "swatch free" : `swatch part-${order(parts, name)}`,
            "aria-hidden": "true",
          }),
          name,
          " ",
          h("b", { class: "num" }, show(value)),
          h("span", { class: "muted num" }, ` ${percent(value / total)}`),
        ),
      ),
    ),
  );
}

const order = (parts, name) => (parts.findIndex(([each]) => each === name) % 6) + 1;

function hosts(label, list) {
  if (!list.length) return null;
  const rows = list.map((host) =>
    h(
      "tr",
      {},
      [
        host.number ?? host.host ?? "",
        host.host ?? "",
        h(
          "span",
          { class: `state ${host.state === "ready" ? "live" : "crashed"}`, title: host.lost_because ?? "" },
          `${host.state === "ready" ? "●" : "✕"} ${host.state}`,
        ),
        host.device || host.role || "",
        host.rows ?? "",
        host.sampled_tokens === undefined ? "" : count(host.sampled_tokens),
        host.prefix_hits === undefined ? "" : count(host.prefix_hits),
        host.lost_because ?? "",
      ].map((value) => h("td", {}, value)),
    ),
  );
  return table(label, ["#", "host", "state", "device", "samples", "sampled", "prefix hits", "why"], rows, true);
}

function compileTable(device, engines) {
  const own = engines.flatMap((engine) =>
    (engine.compiled ?? []).map((each) => ({ ...each, time: each.ended_at, run: null })),
  );
  const events = (device.compiles ?? []).map((each) => ({
    ...(each.details ?? {}),
    time: each.time,
    run: each.run,
    step: each.step,
  }));
  const seen = new Set();
  const list = [...own, ...events]
    .filter((each) => {
      const key = `${each.program} ${each.shapes} ${Math.round(each.time ?? 0)}`;
      return !seen.has(key) && seen.add(key);
    })
    .sort((a, b) => (b.time ?? 0) - (a.time ?? 0));
  if (!list.length) return null;
  const rows = list
    .slice(0, 100)
    .map((each) =>
      h(
        "tr",
        {},
        h("td", {}, each.program ?? ""),
        h("td", { class: "id" }, each.shapes ?? ""),
        h("td", { class: "num" }, span(each.seconds)),
        h("td", {}, each.cause ?? ""),
        h("td", {}, each.cached ? "from the cache" : "compiled"),
        h("td", { class: "num" }, each.bytes ? bytes(each.bytes) : ""),
        h("td", {}, each.run ? title(store.runs.get(each.run) ?? { run: each.run }) : ""),
        h("td", { class: "muted num" }, moment(each.time)),
      ),
    );
  const seconds = list.reduce((sum, each) => sum + (each.seconds ?? 0), 0);
  return table(
    `Compiles (${list.length}, ${span(seconds)})`,
    ["program", "shapes", "seconds", "why", "how", "buffers", "run", "when"],
    rows,
    list.length < 30,
  );
}

function pointsTable(device) {
  const points = Object.entries(device.points ?? {});
  if (!points.length) return null;
  const of = (point, name) => (point.metrics ?? point)[name];
  const rows = points.slice(0, 50).map(([run, point]) => {
    const memory = Object.entries(point.metrics ?? {})
      .filter(([name]) => name.startsWith("memory_bytes/") && !/available|per_token/.test(name))
      .reduce((sum, [, value]) => sum + value, 0);
    return h(
      "tr",
      {},
      h("td", {}, h("a", { href: `#/run/${encodeURIComponent(run)}` }, title(store.runs.get(run) ?? { run }))),
      h("td", { class: "num" }, bytes(memory || NaN)),
      h("td", { class: "num" }, bytes(of(point, "memory_bytes/available"))),
      h("td", { class: "num" }, number(of(point, "sampler/rows_running"))),
      h("td", { class: "num" }, number(of(point, "sampler/rows_waiting"))),
      h("td", { class: "num" }, percent(of(point, "sampler/occupancy:mean"))),
      h("td", { class: "muted num" }, moment(point.time)),
    );
  });
  return table(
    "Newest figures by run",
    ["run", "in use", "free", "samples run", "wait", "occupancy", "when"],
    rows,
    true,
  );
}

function table(label, heads, rows, isOpen) {
  return h(
    "details",
    { class: "card rest", open: isOpen, dataset: { of: label.split(" (")[0] } },
    h("summary", {}, label),
    h(
      "div",
      { class: "scroll", tabIndex: 0, role: "group", "aria-label": label },
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            heads.map((head) => h("th", { scope: "col" }, head)),
          ),
        ),
        h("tbody", {}, rows),
      ),
    ),
  );
}
