# %% [markdown]
# # Reinforcement learning with a reward that a program can check
#
# The model adds two numbers; a right sum earns 1, anything else 0. No judge, no labels. A few supervised steps first
# show the form of an answer, else the reward would be 0 for ever. Five minutes on two cores.

# %%
import os
import random

import numpy as np
from matplotlib import pyplot

import jax_client
from jax_client import types

ROUNDS = int(os.environ.get("STEPS", "6"))
GROUP, PROMPTS = 8, 8

# %%
service = jax_client.ServiceClient()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
client = service.create_lora_training_client(base_model=MODEL, rank=16, seed=0, user_metadata={"name": "sums"}).result()
tokenizer = client.get_tokenizer()
order = random.Random(0)


def prompt_of(question):
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def problem():
    a, b = order.randint(0, 20), order.randint(0, 20)
    return f"What is {a} + {b}?", str(a + b)


# %% [markdown]
# ## The form of an answer
#
# Twelve supervised steps on right sums: enough to answer with a number, not enough to add.

# %%
for _ in range(12):
    data = []
    for _ in range(16):
        question, right = problem()
        prompt, answer = prompt_of(question), tokenizer.encode(right + "<|im_end|>", add_special_tokens=False)
        tokens = prompt + answer
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
        inputs = {"target_tokens": np.asarray(tokens[1:]), "weights": np.asarray(weights, np.float32)}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    supervised = client.forward_backward(data, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-3))
print(f"loss of the last batch: {supervised.result().metrics['loss:sum'] / 16:.2f} nats per answer")

# %% [markdown]
# ## Rounds
#
# Each round publishes the newest weights, samples a group of answers to every question, and compares each answer with
# its group: the advantage is its reward less the group's mean. `importance_sampling` weighs the gradient with the
# ratio of the trainer's probability to the sampler's. `kl_sample_train:mean` tells how well the two agree; it should
# be tiny.

# %%
rewards = []
for round_ in range(ROUNDS):
    sampler = client.save_weights_and_get_sampling_client().result()
    asked = [problem() for _ in range(PROMPTS)]
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=round_)
    futures = [sampler.sample(types.ModelInput.from_ints(prompt_of(q)), GROUP, params) for q, _ in asked]
    data, earned = [], []
    for (question, right), future in zip(asked, futures, strict=True):
        prompt, sequences = prompt_of(question), future.result().sequences
        texts = [tokenizer.decode(s.tokens, skip_special_tokens=True).strip() for s in sequences]
        group = np.array([float(text == right) for text in texts])
        earned += group.tolist()
        for sequence, advantage in zip(sequences, group - group.mean(), strict=True):
            if advantage == 0.0:
                continue  # teaches nothing
            masked, count = len(prompt) - 1, len(sequence.tokens)
            inputs = {
                "target_tokens": np.asarray(prompt[1:] + sequence.tokens),
                "logprobs": np.asarray([0.0] * masked + sequence.logprobs, np.float32),
                "advantages": np.asarray([0.0] * masked + [advantage] * count, np.float32),
            }
            whole = types.ModelInput.from_ints(prompt + sequence.tokens[:-1])
            data.append(types.Datum(model_input=whole, loss_fn_inputs=inputs))
    rewards.append(float(np.mean(earned)))
    gap = float("nan")
    if data:
        forward_backward = client.forward_backward(data, "importance_sampling")
        client.optim_step(types.AdamParams(learning_rate=5e-4)).result()
        gap = forward_backward.result().metrics["kl_sample_train:mean"]
    print(f"round {round_ + 1}: reward {rewards[-1]:.2f}, trainer and sampler {gap:.1e} nats apart")
    jax_client.log({"reward": rewards[-1]})

# %%
pyplot.figure(figsize=(6, 3))
pyplot.plot(rewards, marker=".")
pyplot.xlabel("round")
pyplot.ylabel("share of right sums")
pyplot.show()

# %% [markdown]
# `jax_client.log` put the reward beside what the engine records; `jax_client dashboard` draws both.

# %%
service.close("success").result()
assert all(0.0 <= reward <= 1.0 for reward in rewards)
