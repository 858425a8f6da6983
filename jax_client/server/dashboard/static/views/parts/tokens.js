// How are tokens shown? In the colour of their probability or of a difference; one of them in full, with alternatives.

import { h, put } from "../../core/dom.js";
import { number, percent } from "../../core/format.js";

// A token of a class is at least this likely; the rarest have none.
const LIKELY = [0.9, 0.5, 0.2, 0.05];
const APART = [0.1, 0.5, 2]; // nats between two models

const rarity = (logprob) =>
  Number.isFinite(logprob) ? `lp-${LIKELY.filter((p) => Math.exp(logprob) < p).length}` : "lp-none";
function apart(mine, other) {
  const gap = mine - other;
  if (!Number.isFinite(gap)) return "lp-none";
  const size = APART.filter((limit) => Math.abs(gap) >= limit).length;
  return size ? `${gap > 0 ? "more" : "less"}-${size}` : "lp-0";
}

// What is seen of a token: line breaks have a sign, and so has nothing.
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵\n"));
const spoken = (text) =>
  text.trim() === "" ? JSON.stringify(text).replaceAll("\\n", "line break").replaceAll(" ", "space") : null;

/** Return tokens as a list that arrow keys walk through. others: logprobs of another model, for by="difference". */
export function tokenList(tokens, { look, others = null, by = "logprob", label }) {
  const list = h("div", { class: "tokens", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
  const items = tokens.map((token, i) => {
    const kind = by === "difference" && others ? apart(token.logprob, others[i]) : rarity(token.logprob);
    const item = h(
      "span",
      {
        class: `token ${kind}`,
        role: "option",
        tabIndex: i ? -1 : 0,
        "aria-selected": "false",
        "aria-label": spoken(token.text),
      },
      visible(token.text),
    );
    const show = () => {
      look.show(token, others?.[i]);
      list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
      item.setAttribute("aria-selected", "true");
    };
    item.addEventListener("mouseenter", show);
    item.addEventListener("focus", show);
    return item;
  });
  list.addEventListener("keydown", (event) => {
    const at = items.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: items.length - 1 }[event.key];
    if (to === undefined || at < 0 || !items[to]) return;
    event.preventDefault();
    items[at].tabIndex = -1;
    items[to].tabIndex = 0;
    items[to].focus();
  });
  return put(list, items);
}

/** Return {element, show(token, other), clear()}: the place where one token is told in full. */
export function inspector() {
  const hint = "Point at a token, or walk with the arrow keys: its rank and what else could have come.";
  const element = h("aside", { class: "inspector", "aria-live": "polite", "aria-label": "Token" });
  const clear = () => put(element, h("p", { class: "muted" }, hint));
  clear();
  const line = (text, logprob, mine) => {
    const meter = h("meter", { min: 0, max: 1, value: Math.exp(logprob) || 0, "aria-hidden": "true" });
    return h(
      "tr",
      { class: mine ? "mine" : "" },
      h("td", {}, h("code", {}, JSON.stringify(text))),
      h("td", { class: "num" }, percent(Math.exp(logprob), 1)),
      h("td", { class: "num" }, number(logprob, 3)),
      h("td", {}, meter),
    );
  };
  return {
    element,
    clear,
    show(token, other) {
      const alternatives = token.alternatives ?? [];
      put(
        element,
        h(
          "p",
          {},
          h("code", { class: "big" }, JSON.stringify(token.text)),
          h("span", { class: "muted num" }, ` id ${token.id}`),
          token.rank === null || token.rank === undefined ? "" : ` · rank ${token.rank}`,
          Number.isFinite(other)
            ? h(
                "span",
                { class: "num" },
                ` · the other ${percent(Math.exp(other), 1)} (difference ${token.logprob - other > 0 ? "+" : ""}${number(token.logprob - other, 3)})`,
              )
            : null,
        ),
        h(
          "table",
          { class: "plain" },
          h(
            "tbody",
            {},
            line(token.text, token.logprob, true),
            alternatives.filter((each) => each.id !== token.id).map((each) => line(each.text, each.logprob, false)),
          ),
        ),
      );
    },
  };
}

/** Return what the colours mean. */
export function legend(by) {
  const sample = (kind, words) => h("li", {}, h("span", { class: `token ${kind}` }, words));
  return h(
    "ul",
    {
      class: "legend",
      "aria-label": by === "difference" ? "Likelier with the other model, or with this one" : "Probability",
    },
    by === "difference"
      ? [
          sample("less-3", "likelier there: 2 nats"),
          sample("less-2", "0.5"),
          sample("less-1", "0.1"),
          sample("lp-0", "alike"),
          sample("more-1", "0.1"),
          sample("more-2", "0.5"),
          sample("more-3", "likelier here: 2 nats"),
        ]
      : [
          sample("lp-0", "≥ 90 %"),
          sample("lp-1", "≥ 50 %"),
          sample("lp-2", "≥ 20 %"),
          sample("lp-3", "≥ 5 %"),
          sample("lp-4", "rarer"),
        ],
  );
}
