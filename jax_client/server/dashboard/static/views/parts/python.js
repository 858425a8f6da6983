// How is the same answer had in Python? By these lines, with the same seed and settings.

/** Return a script that asks as the playground's request does. */
export function pythonOf({ path, model, messages, prompt, num_samples, max_tokens, temperature, top_p, top_k, seed }) {
  const text = (value) =>
    JSON.stringify(value).replace(/[\u007f-\u{10ffff}]/gu, (c) => {
      const code = c.codePointAt(0).toString(16);
      return code.length > 4 ? `\\U${code.padStart(8, "0")}` : `\\u${code.padStart(4, "0")}`;
    });
  const where = path ? `model_path=${text(path)}` : `base_model=${text(model)}`;
  const settings = Object.entries({ max_tokens, temperature, top_p, top_k, seed })
    .filter(([, value]) => value !== undefined && value !== "")
    .map(([name, value]) => `${name}=${value}`)
    .join(", ");
  const tokens = messages
    ? `messages = ${text(messages)}\ntokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)`
    : `tokens = tokenizer.encode(${text(prompt)})`;
  return `import jax_client
from jax_client import types

client = jax_client.ServiceClient().create_sampling_client(${where})
tokenizer = client.get_tokenizer()
${tokens}
answer = client.sample(
    prompt=types.ModelInput.from_ints(tokens),
    num_samples=${num_samples ?? 1},
    sampling_params=types.SamplingParams(${settings}),
).result()
for sequence in answer.sequences:
    print(tokenizer.decode(sequence.tokens))
`;
}
