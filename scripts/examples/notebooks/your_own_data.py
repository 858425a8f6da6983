# %% [markdown]
# # Supervised fine-tuning on your own JSONL
#
# Take a file of conversations, hold a part of it back, train, and watch the loss on what the model has not seen: it
# says when to stop. Then export the adapter for other tools. Four minutes on two cores.

# %%
import json
import os
import tempfile
from pathlib import Path

import numpy as np

import jax_client
from jax_client import types

EPOCHS = int(os.environ.get("STEPS", "3"))

# %% [markdown]
# ## A file
#
# Put the path of your own file here. The cell writes a small one: questions of a fictitious help desk.

# %%
folder = Path(tempfile.mkdtemp())
DATA = folder / "help_desk.jsonl"
devices = ["printer", "scanner", "router", "projector", "tablet", "headset", "camera", "keyboard"]
faults = {
    "does not start": "hold the {} button for ten seconds, then plug it in",
    "is too slow": "close what you do not use on the {} and start it anew",
    "lost its settings": "load the {} profile from the shelf server",
    "makes a noise": "put the {} on the felt mat and call Mira",
}
with DATA.open("w") as file:
    for device in devices:
        for fault, cure in faults.items():
            question = {"role": "user", "content": f"My {device} {fault}."}
            answer = {"role": "assistant", "content": f"Desk 7: {cure.format(device)}. Ticket closed."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")

# %% [markdown]
# ## Examples
#
# `weights` decides what is learned: 1 for the tokens of the answer, and of the mark that ends it; 0 for the rest.

# %%
service = jax_client.ServiceClient()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
client = service.create_lora_training_client(
    base_model=MODEL, rank=16, seed=0, user_metadata={"name": "help desk"}
).result()
tokenizer = client.get_tokenizer()


def prompt_of(messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def datum_of(messages):
    prompt = prompt_of(messages[:-1])
    answer = tokenizer.encode(messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)
    tokens, weights = prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)
    inputs = {"target_tokens": np.asarray(tokens[1:]), "weights": np.asarray(weights[1:], np.float32)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


conversations = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()]
shuffled = np.random.default_rng(1).permutation(len(conversations))
held_back = [datum_of(conversations[i]) for i in shuffled[:8]]
training = [datum_of(conversations[i]) for i in shuffled[8:]]


def scored(data):
    return sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data)


# %% [markdown]
# ## Train and evaluate
#
# `forward` computes the loss without a gradient: that of the examples held back, once an epoch.


# %%
def evaluate():
    return client.forward(held_back, "cross_entropy").result().metrics["loss:sum"] / scored(held_back)


history = [evaluate()]
print(f"before: {history[0]:.3f} nats per token, on what is held back")
order = np.random.default_rng(2)
for epoch in range(EPOCHS):
    batches = np.array_split(order.permutation(len(training)), 3)
    flying = []
    for batch in batches:
        examples = [training[i] for i in batch]
        flying.append((client.forward_backward(examples, "cross_entropy"), scored(examples)))
        client.optim_step(types.AdamParams(learning_rate=2e-3))
    losses = [future.result().metrics["loss:sum"] / tokens for future, tokens in flying]
    history.append(evaluate())
    print(f"epoch {epoch + 1}: training {np.mean(losses):.3f}, held back {history[-1]:.3f}")

# %% [markdown]
# ## Before and after

# %%
weights = client.save_weights_for_sampler("help-desk").result().path
question = [{"role": "user", "content": "My projector lost its settings."}]
prompt = types.ModelInput.from_ints(prompt_of(question))
for name, sampler in (
    ("before", service.create_sampling_client(base_model=MODEL).result()),
    ("after", service.create_sampling_client(model_path=weights).result()),
):
    (answer,) = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=40, temperature=0.0)).result().sequences
    print(f"{name}: {tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()}")

# %% [markdown]
# ## Take it with you
#
# `jax_client checkpoint export PATH --for peft --output DIR` writes the adapter as PEFT, vLLM and others read it;
# `--format merged` writes a whole model.

# %%
print(f"jax_client checkpoint export {weights} --for peft --output help-desk")
service.close("success").result()
assert history[-1] < history[0], "what was held back became likelier"
