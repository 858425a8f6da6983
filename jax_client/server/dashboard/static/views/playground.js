// What does the model say now? A prompt or a chat, several samples, each token in the colour of its probability.

import { add, button, field, h, put, say } from "../core/dom.js";
import { get, post } from "../core/api.js";
import { number, span, title } from "../core/format.js";
import { store } from "../core/store.js";
import { copy, toast } from "../core/toast.js";
import { pythonOf } from "./parts/python.js";
import { inspector, legend, tokenList } from "./parts/tokens.js";

// The form stays as it was while other views are open.
const kept = {
  mode: "chat",
  messages: [{ role: "user", content: "" }],
  prompt: "",
  a: null,
  b: "",
  num_samples: 2,
  max_tokens: 96,
  temperature: 0.7,
  top_p: 1,
  top_k: -1,
  seed: "",
  alternatives: 5,
};
const NUMBERS = [
  ["num_samples", "Samples", 1, 16, 1],
  ["max_tokens", "Most tokens", 1, 4096, 1],
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_p", "Top p", 0.01, 1, 0.01],
  ["top_k", "Top k", -1, 100_000, 1],
  ["seed", "Seed", 0, 2 ** 31 - 1, 1],
  ["alternatives", "Alternatives", 0, 10, 1],
];

export function open(root, argument, query) {
  const view = new Playground(root);
  view.load(query.get("path"));
  return {
    title: () => "playground",
    news: (kind) => kind === "state" && view.tellWhether(),
    close: () => view.stop?.abort(),
    keys: { i: ["write", () => view.focus()] },
  };
}

class Playground {
  constructor(root) {
    this.sources = [];
    this.why = h("p", { class: "wait", hidden: true });
    this.pickA = h("select", {
      onchange: () => {
        kept.a = this.pickA.value;
      },
    });
    this.pickB = h("select", {
      onchange: () => {
        kept.b = this.pickB.value;
      },
    });
    this.inputs = h("div", { class: "inputs" });
    this.mode = h(
      "div",
      { class: "choice", role: "group", "aria-label": "Kind of prompt" },
      [
        ["chat", "Chat"],
        ["prompt", "Prompt"],
      ].map(([mode, label]) =>
        button(
          label,
          () => {
            kept.mode = mode;
            this.showInputs();
          },
          { dataset: { mode } },
        ),
      ),
    );
    this.numbers = NUMBERS.map(([name, label, min, max, step]) => {
      const input = h("input", {
        type: "number",
        min,
        max,
        step,
        value: kept[name],
        placeholder: name === "seed" ? "none" : "",
        oninput: () => {
          kept[name] = input.value === "" ? "" : Number(input.value);
        },
      });
      return field(label, input);
    });
    this.run = h("button", { type: "submit", class: "strong" }, "Sample");
    this.form = h(
      "form",
      {
        class: "play-form",
        onsubmit: (event) => {
          event.preventDefault();
          this.sample();
        },
        onkeydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && this.form.requestSubmit(),
      },
      h("div", { class: "pair" }, field("Model or checkpoint", this.pickA), field("Beside it", this.pickB)),
      this.mode,
      this.inputs,
      h("div", { class: "numbers" }, this.numbers),
      h(
        "div",
        { class: "tools" },
        this.run,
        button("Copy as Python", () => this.python()),
        h("span", { class: "muted" }, "Ctrl Enter samples"),
      ),
    );
    this.colours = h(
      "select",
      { "aria-label": "Colours", onchange: () => this.showAnswers() },
      h("option", { value: "logprob" }, "own probability"),
      h("option", { value: "difference" }, "difference to the other"),
    );
    this.status = h("p", { class: "muted", role: "status" });
    this.answers = h("div", { class: "answers" });
    this.look = inspector();
    this.legend = h("div", { class: "legend-holder" });
    add(root, [
      h("h1", { class: "offscreen" }, "Playground"),
      h(
        "div",
        { class: "play" },
        h("section", { "aria-label": "Prompt" }, this.why, this.form),
        h(
          "section",
          { "aria-label": "Answers", class: "play-out" },
          this.status,
          this.legend,
          this.answers,
          this.look.element,
        ),
      ),
    ]);
    this.showInputs();
    this.tellWhether();
  }

  async load(path) {
    let checkpoints = [];
    try {
      checkpoints = (await get("/checkpoints", { limit: 500 })).checkpoints;
    } catch (error) {
      toast(error.message, { bad: true });
    }
    const usable = checkpoints
      .filter((row) => row.kind !== "export")
      .sort((a, b) => (b.created ?? 0) - (a.created ?? 0));
    this.sources = [
      ...(store.state?.playground?.models ?? []).map((model) => ({
        key: `model ${model}`,
        label: `base · ${model}`,
        model,
        path: null,
      })),
      ...usable.map((row) => {
        const run = store.runs.get(row.run);
        return {
          key: row.path,
          label: `${title(run ?? { run: row.run })} · ${row.name}${row.step ? ` · step ${row.step}` : ""} (${row.kind})`,
          model: run?.model ?? null,
          path: row.path,
        };
      }),
    ];
    if (path) kept.a = path;
    if (!this.sources.some((source) => source.key === kept.a)) kept.a = this.sources[0]?.key ?? null;
    put(
      this.pickA,
      this.sources.map((source) => h("option", { value: source.key, selected: source.key === kept.a }, source.label)),
    );
    put(
      this.pickB,
      h("option", { value: "" }, "nothing"),
      this.sources.map((source) => h("option", { value: source.key, selected: source.key === kept.b }, source.label)),
    );
    this.tellWhether();
  }

  tellWhether() {
    const able = store.state?.playground ?? {};
    this.why.hidden = able.available !== false;
    say(this.why, able.reason ?? "No model can be loaded here.");
    this.run.disabled = able.available === false;
  }

  focus() {
    this.inputs.querySelector("textarea:last-of-type")?.focus();
  }

  showInputs() {
    for (const each of this.mode.children) each.setAttribute("aria-pressed", String(each.dataset.mode === kept.mode));
    if (kept.mode === "prompt") {
      const area = h("textarea", {
        rows: 6,
        value: kept.prompt,
        oninput: () => {
          kept.prompt = area.value;
        },
      });
      put(this.inputs, field("Prompt, as it is", area));
      return;
    }
    const lines = kept.messages.map((message, i) => {
      const role = h(
        "select",
        {
          "aria-label": `Role of message ${i + 1}`,
          onchange: () => {
            message.role = role.value;
          },
        },
        ["system", "user", "assistant"].map((each) => h("option", { selected: each === message.role }, each)),
      );
      const area = h("textarea", {
        rows: message.role === "user" ? 3 : 2,
        value: message.content,
        "aria-label": `Message ${i + 1}`,
        placeholder: i ? "" : "Ask something",
        oninput: () => {
          message.content = area.value;
        },
      });
      return h(
        "div",
        { class: "message" },
        role,
        area,
        kept.messages.length > 1
          ? button(
              "×",
              () => {
                kept.messages.splice(i, 1);
                this.showInputs();
              },
              { class: "plain", "aria-label": `Remove message ${i + 1}` },
            )
          : null,
      );
    });
    put(
      this.inputs,
      lines,
      button("Add a message", () => {
        kept.messages.push({ role: kept.messages.at(-1)?.role === "user" ? "assistant" : "user", content: "" });
        this.showInputs();
        this.focus();
      }),
    );
  }

  /** Return what is asked, of a source. */
  request(source) {
    const asked =
      kept.mode === "chat"
        ? { messages: kept.messages.filter((message) => message.content || message.role !== "system") }
        : { prompt: kept.prompt };
    const settings = Object.fromEntries(
      NUMBERS.map(([name]) => [name, kept[name]]).filter(([, value]) => value !== ""),
    );
    return { path: source.path, model: source.model, ...asked, ...settings };
  }

  chosen() {
    return [kept.a, kept.b]
      .filter(Boolean)
      .map((key) => this.sources.find((source) => source.key === key))
      .filter(Boolean);
  }

  async sample() {
    const sources = this.chosen();
    if (!sources.length) return toast("There is neither a model nor a checkpoint to ask.", { bad: true });
    this.stop?.abort();
    this.stop = new AbortController();
    const { signal } = this.stop;
    this.run.disabled = true;
    const began = Date.now();
    const tick = setInterval(
      () => say(this.status, `Sampling, ${span((Date.now() - began) / 1000)}. ${this.compiling()}`),
      1000,
    );
    say(this.status, "Sampling…");
    if (matchMedia("(max-width: 860px)").matches) this.status.scrollIntoView({ block: "start" });
    try {
      // One after the other: they share a device, and the first answer shows as soon as it is there.
      const results = [];
      for (const source of sources) {
        results.push({
          source,
          answer: await post("/playground/sample", this.request(source), { signal }),
          others: [],
        });
        this.results = results;
        this.showAnswers();
      }
      if (results.length === 2) await this.scoreEachOther(results, signal);
      say(
        this.status,
        `${span(results.reduce((sum, { answer }) => sum + (answer.seconds ?? 0), 0))} for ${results.reduce((sum, { answer }) => sum + answer.samples.reduce((n, sample) => n + sample.tokens.length, 0), 0)} tokens`,
      );
      this.showAnswers();
    } catch (error) {
      if (error.name !== "AbortError") say(this.status, error.message);
    } finally {
      clearInterval(tick);
      this.tellWhether();
    }
  }

  compiling() {
    const running = (store.device?.engines ?? []).flatMap((engine) => engine.health?.compiling ?? [])[0];
    return running
      ? `Compiling ${running.program} (${running.shapes}) for ${span(running.seconds)}; the next answer will not wait for it.`
      : "The first answer of a model waits for loading and compiling.";
  }

  async scoreEachOther(results, signal) {
    for (const [mine, other] of [
      [0, 1],
      [1, 0],
    ]) {
      const { path, model } = results[other].source;
      const { prompt, samples } = results[mine].answer;
      for (const [i, sample] of samples.entries()) {
        const scored = await post(
          "/playground/score",
          { path, model, prompt_ids: prompt.map((token) => token.id), ids: sample.tokens.map((token) => token.id) },
          { signal },
        );
        results[mine].others[i] = scored.tokens.map((token) => token.logprob);
      }
    }
  }

  showAnswers() {
    const results = this.results ?? [];
    const both = results.length === 2 && results.every(({ others, answer }) => others.length === answer.samples.length);
    const by = both ? this.colours.value : "logprob";
    put(this.legend, results.length ? [both ? this.colours : null, legend(by)] : null);
    this.answers.classList.toggle("two", results.length === 2);
    this.look.clear();
    put(
      this.answers,
      results.map(({ source, answer, others }) =>
        h(
          "div",
          { class: "answer" },
          h("h2", {}, source.label),
          answer.prompt?.length
            ? h(
                "details",
                { class: "rest" },
                h("summary", {}, `Prompt, ${answer.prompt.length} tokens`),
                tokenList(answer.prompt, { look: this.look, label: "Prompt tokens" }),
              )
            : null,
          answer.samples.map((sample, i) =>
            h(
              "article",
              { class: "sample" },
              h(
                "div",
                { class: "line" },
                h("b", {}, `${i + 1}`),
                h(
                  "span",
                  { class: "muted num" },
                  `${sample.tokens.length} tokens · mean logprob ${number(mean(sample.tokens.map((token) => token.logprob)), 3)}${both ? ` · other ${number(mean(others[i]), 3)}` : ""} · stopped: ${sample.stop_reason ?? ""}`,
                ),
                button("Copy", () => copy(sample.text, "Text"), { class: "plain" }),
                kept.mode === "chat"
                  ? button(
                      "Continue from here",
                      () => {
                        kept.messages.push({ role: "assistant", content: sample.text }, { role: "user", content: "" });
                        this.showInputs();
                        this.focus();
                      },
                      { class: "plain" },
                    )
                  : null,
              ),
              tokenList(sample.tokens, {
                look: this.look,
                others: both ? others[i] : null,
                by,
                label: `Tokens of sample ${i + 1}`,
              }),
            ),
          ),
        ),
      ),
    );
  }

  python() {
    const [source] = this.chosen();
    if (source) copy(pythonOf(this.request(source)), "Python");
  }
}

const mean = (values) => (values?.length ? values.reduce((a, b) => a + (b ?? 0), 0) / values.length : NaN);
