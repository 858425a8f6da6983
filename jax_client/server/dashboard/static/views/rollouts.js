// What did the model do in training? The groups of samples of a log directory, each with its reward's parts.

import { add, button, h, put, say } from "../core/dom.js";
import { get, ofRun } from "../core/api.js";
import { number, title } from "../core/format.js";
import { runs, store } from "../core/store.js";
import { toast } from "../core/toast.js";

const PAGE = 20;

export function open(root, argument, query) {
  const logs = runs(true).filter((row) => row.source === "log");
  const run = argument || logs[0]?.run;
  const list = h("div", { class: "groups" });
  const state = { offset: Number(query.get("offset")) || 0, total: 0 };
  const found = h("span", { class: "muted num", role: "status" });
  const back = button("Earlier", () => turn(-PAGE));
  const on = button("Later", () => turn(PAGE));
  const pick = h(
    "select",
    {
      "aria-label": "Log directory",
      onchange: () => {
        location.hash = `#/rollouts/${encodeURIComponent(pick.value)}`;
      },
    },
    [...new Set([...logs.map((row) => row.run), run].filter(Boolean))].map((id) =>
      h("option", { value: id, selected: id === run }, title(store.runs.get(id) ?? { run: id })),
    ),
  );
  let closed = false;

  async function load() {
    try {
      const sent = await get(ofRun(run, "/rollouts"), { offset: state.offset, limit: PAGE });
      if (closed) return;
      state.total = sent.total;
      put(
        list,
        sent.groups.length
          ? sent.groups.map(group)
          : h(
              "p",
              { class: "muted" },
              "This log has no rollout files. The cookbook writes them with its rollout summaries on.",
            ),
      );
      say(
        found,
        sent.total ? `groups ${state.offset + 1} to ${Math.min(sent.total, state.offset + PAGE)} of ${sent.total}` : "",
      );
      back.disabled = state.offset === 0;
      on.disabled = state.offset + PAGE >= sent.total;
    } catch (error) {
      if (!closed) put(list, h("p", { class: "muted" }, error.message));
    }
  }
  function turn(by) {
    state.offset = Math.max(0, state.offset + by);
    load().catch((error) => toast(error.message, { bad: true }));
  }
  if (!run) {
    add(root, [
      h(
        "section",
        { class: "empty small" },
        h("h1", {}, "No rollouts"),
        h(
          "p",
          {},
          "Start the dashboard with ",
          h("code", {}, "--logs DIR"),
          " to read the metrics and rollout files of your loops, those of the cookbook among them.",
        ),
      ),
    ]);
    return { title: () => "rollouts" };
  }
  add(root, [
    h("h1", { class: "offscreen" }, "Rollouts"),
    h("div", { class: "tools" }, pick, back, on, found, h("a", { href: `#/run/${encodeURIComponent(run)}` }, "curves")),
    list,
  ]);
  load();
  return {
    title: () => "rollouts",
    close: () => {
      closed = true;
    },
    keys: {
      j: ["later groups", () => on.disabled || on.click()],
      k: ["earlier groups", () => back.disabled || back.click()],
    },
  };
}

function group({ step, prompt, samples = [] }) {
  const rewards = samples.map((sample) => sample.reward).filter(Number.isFinite);
  const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : NaN;
  const best = Math.max(...rewards);
  return h(
    "details",
    { class: "card rollout", open: true },
    h(
      "summary",
      {},
      h("b", {}, `step ${number(step)}`),
      h("span", { class: "num" }, ` reward ${number(mean)} · ${samples.length} samples`),
    ),
    prompt ? h("pre", { class: "prompt", tabIndex: 0, "aria-label": "Prompt" }, prompt) : null,
    h(
      "div",
      { class: "samples" },
      samples.map((sample) =>
        h(
          "article",
          { class: "sample" },
          h(
            "div",
            { class: "line" },
            h(
              "span",
              { class: sample.reward === best && rewards.length > 1 ? "badge good" : "badge" },
              `reward ${number(sample.reward)}`,
            ),
            sample.advantage === null || sample.advantage === undefined
              ? null
              : h(
                  "span",
                  { class: "badge" },
                  `advantage ${sample.advantage > 0 ? "+" : ""}${number(sample.advantage)}`,
                ),
            Number.isFinite(sample.tokens) ? h("span", { class: "muted num" }, `${sample.tokens} tokens`) : null,
          ),
          h("pre", { tabIndex: 0, "aria-label": "Sample" }, sample.text ?? ""),
          sample.parts && Object.keys(sample.parts).length
            ? h(
                "dl",
                { class: "parts" },
                Object.entries(sample.parts).map(([name, value]) =>
                  h("div", {}, h("dt", {}, name), h("dd", { class: "num" }, number(value))),
                ),
              )
            : null,
        ),
      ),
    ),
  );
}
