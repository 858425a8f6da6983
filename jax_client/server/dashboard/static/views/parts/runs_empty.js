// What does a newcomer see? A script of a dozen lines that trains a model and shows up here.

import { button, h } from "../../core/dom.js";
import { copy } from "../../core/toast.js";

const SCRIPT = `import jax_client
from jax_client import types

model = "MODEL"
service = jax_client.ServiceClient()
client = service.create_lora_training_client(model, rank=8).result()
tokens = client.get_tokenizer().encode("The keeper counts ships, not days.")
inputs = {"target_tokens": tokens[1:], "weights": [1.0] * len(tokens[1:])}
prompt = types.ModelInput.from_ints(tokens[:-1])
data = [types.Datum(model_input=prompt, loss_fn_inputs=inputs)] * 4
for step in range(30):
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
print(client.save_state("first").result().path)`;

/** Return the page of a state directory without runs. */
export function noRuns(state) {
  const script = SCRIPT.replace("MODEL", state?.playground?.models?.[0] ?? "HuggingFaceTB/SmolLM2-135M-Instruct");
  return h(
    "section",
    { class: "empty" },
    h("h1", {}, "No runs yet"),
    h(
      "p",
      {},
      "This page shows every run in ",
      h("code", {}, state?.home ?? "the state directory"),
      ". Save these lines as ",
      h("code", {}, "first.py"),
      ", run them beside it, and the curve appears here within a second.",
    ),
    h(
      "div",
      { class: "code" },
      h("pre", { tabIndex: 0 }, script),
      button("Copy", () => copy(script, "Script"), { class: "strong" }),
    ),
    h(
      "p",
      { class: "muted" },
      "The first step compiles its programs, which takes up to a minute; the line above says so while it does.",
    ),
  );
}
