# %% [markdown]
# # On-policy distillation: a long prompt becomes weights
#
# The teacher is the model with a system prompt; the student is the same model without it. The student answers, the
# teacher says how likely each token of that answer is to it, and each token's advantage is the teacher's
# log-probability less the student's. Minimising this is minimising the reverse KL divergence on what the student
# itself says. Four minutes on two cores.

# %%
import os

import numpy as np

import jax_client
from jax_client import types

ROUNDS = int(os.environ.get("STEPS", "5"))
SYSTEM = "Answer with one very short sentence of at most six words. Never write more."
QUESTIONS = (
    "What is a river?", "Why do birds sing?", "What does a baker do?", "What is music?", "What is snow?",
    "What is a bridge?", "Why do people travel?", "What is a garden?",
)  # fmt: skip

# %%
service = jax_client.ServiceClient()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
client = service.create_lora_training_client(
    base_model=MODEL, rank=16, seed=0, user_metadata={"name": "distillation"}
).result()
tokenizer = client.get_tokenizer()
teacher = service.create_sampling_client(base_model=MODEL).result()


def prompt_of(question, *, system):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


# %% [markdown]
# ## One round
#
# All requests of a kind are in flight together; the engine puts them into one batch.


# %%
def one_round(number):
    student = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=24, temperature=1.0, seed=number)
    prompts = [prompt_of(question, system="You are a helpful assistant.") for question in QUESTIONS]
    sampled = [student.sample(types.ModelInput.from_ints(prompt), 4, params) for prompt in prompts]
    answers = [
        (question, prompt, sequence)
        for question, prompt, future in zip(QUESTIONS, prompts, sampled, strict=True)
        for sequence in future.result().sequences
    ]
    instructed = [prompt_of(question, system=SYSTEM) for question, _, _ in answers]
    scores = [
        teacher.compute_logprobs(types.ModelInput.from_ints(prompt + sequence.tokens))
        for prompt, (_, _, sequence) in zip(instructed, answers, strict=True)
    ]
    data, gaps = [], []
    for prompt_with_system, (_, prompt, sequence), score in zip(instructed, answers, scores, strict=True):
        teachers = np.asarray(score.result()[len(prompt_with_system) :], np.float32)
        students = np.asarray(sequence.logprobs, np.float32)
        gaps.append(float((students - teachers).mean()))
        masked = [0.0] * (len(prompt) - 1)
        inputs = {
            "target_tokens": np.asarray(prompt[1:] + sequence.tokens),
            "logprobs": np.asarray(masked + sequence.logprobs, np.float32),
            "advantages": np.asarray(masked + (teachers - students).tolist(), np.float32),
        }
        whole = types.ModelInput.from_ints(prompt + sequence.tokens[:-1])
        data.append(types.Datum(model_input=whole, loss_fn_inputs=inputs))
    client.forward_backward(data, "importance_sampling")
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    words = [len(tokenizer.decode(s.tokens, skip_special_tokens=True).split()) for _, _, s in answers]
    return float(np.mean(gaps)), float(np.mean(words))


history = []
for number in range(ROUNDS):
    history.append(one_round(number))
    gap, words = history[-1]
    jax_client.log({"reverse_kl": gap, "words": words})
    print(f"round {number + 1}: {gap:.2f} nats per token from the teacher, {words:.1f} words an answer")

# %% [markdown]
# A larger teacher is one more line: `service.create_sampling_client(base_model=...)` of any model with the same
# tokens, or `model_path=...` of a run of yours.

# %%
service.close("success").result()
assert all(np.isfinite(gap) for gap, _ in history)
