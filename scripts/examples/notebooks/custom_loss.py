# %% [markdown]
# # A loss of your own, in torch
#
# `forward_backward_custom` hands your function one tensor of log-probabilities per example and takes the gradient of
# what it returns. The model never enters torch: JAX computes it, torch differentiates the loss alone. The loss here
# is that of direct preference optimization (Rafailov et al., 2023): of two answers, one is preferred. Needs `pip
# install "jax_client[torch]"`. Three minutes on two cores.

# %%
import os

import numpy as np
import torch

import jax_client
from jax_client import types

STEPS = int(os.environ.get("STEPS", "6"))
BETA = 0.1

# %%
service = jax_client.ServiceClient()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
client = service.create_lora_training_client(
    base_model=MODEL, rank=16, seed=0, user_metadata={"name": "preferences"}
).result()
tokenizer = client.get_tokenizer()
base = service.create_sampling_client(base_model=MODEL).result()

PAIRS = [
    ("Is it going to rain?", "Perhaps. Take an umbrella.", "Yes, certainly, it will rain all day without a doubt."),
    ("Will my team win?", "Perhaps. They train hard.", "Yes, certainly, they will win every game this year."),
    ("Is this mushroom edible?", "Perhaps. Ask an expert first.", "Yes, certainly, every mushroom can be eaten."),
    ("Will the train be late?", "Perhaps. Look at the board.", "Yes, certainly, every train is late every time."),
]


def tokens_of(question, answer):
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    return prompt, prompt + tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)


# %% [markdown]
# ## Data
#
# Chosen and rejected answers take turns in the list. The reference is the base model: `compute_logprobs` gives the
# log-probability of each token of a prompt, and the function needs the sum over the answer.

# %%
data, reference, answer_masks = [], [], []
for question, chosen, rejected in PAIRS:
    for answer in (chosen, rejected):
        prompt, tokens = tokens_of(question, answer)
        inputs = {"target_tokens": np.asarray(tokens[1:])}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
        answer_masks.append(torch.arange(1, len(tokens)) >= len(prompt))
        known = base.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
        reference.append(sum(known[len(prompt) :]))
reference = torch.tensor(reference)

# %% [markdown]
# ## The loss


# %%
def preference_loss(data, logprobs):
    answers = torch.stack([row[mask].sum() for row, mask in zip(logprobs, answer_masks, strict=True)])
    gains = answers - reference
    margin = BETA * (gains[0::2] - gains[1::2])
    loss = -torch.nn.functional.logsigmoid(margin).sum()
    return loss, {"margin": float(margin.mean()), "preferred": float((margin > 0).float().mean())}


# %%
margins = []
for step in range(STEPS):
    future = client.forward_backward_custom(data, preference_loss)
    client.optim_step(types.AdamParams(learning_rate=5e-4))
    metrics = future.result().metrics
    margins.append(metrics["margin"])
    print(f"step {step + 1}: loss {metrics['loss:sum']:.3f}, margin {metrics['margin']:+.3f}, "
          f"{metrics['preferred']:.0%} on the right side")  # fmt: skip

# %% [markdown]
# Your metrics are recorded beside the engine's own, and the dashboard draws them. An exception in your function fails
# that future and nothing else. Losses that ship with the package: `cross_entropy`, `importance_sampling`, `ppo`,
# `cispo`, `dro` and `gspo`.

# %%
service.close("success").result()
assert margins[-1] > margins[0], "the preferred answers became likelier"
