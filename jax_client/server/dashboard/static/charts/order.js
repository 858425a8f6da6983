// Which charts come first? Those that tell whether a run is healthy, in the order people ask; the rest is folded.

const FIRST = [
  ["loss", /^(loss:mean|.*\bloss\/?mean|train_mean_nll|.*\bnll\b.*)$/i],
  ["reward", /(^|[/_])reward(s)?([/_](mean|total|avg))?(:mean)?$/i],
  ["kl", /(^|[/_])kl\b|kl_sample_train|(^|[/_])kl_/i],
  ["grad", /^grad_norm|(^|[/_])grad(ient)?_norm/i],
  ["lr", /^(learning_rate|lr|optim\/lr|.*[/_]learning_rate)(:mean)?$/i],
  ["speed", /^tokens_per_second|(^|[/_])tokens_per_(s|sec|second)\b/i],
];
const MOST_OF_A_KIND = 2;
// What the recorder itself calls them: where one of these is there, others of its kind say the same or less.
const OWN = new Set(["loss:mean", "grad_norm:mean", "learning_rate:mean", "tokens_per_second:mean"]);
// In the places that are left of two rows.
const FILL = ["update_norm:mean", "sampler/occupancy:mean", "device_seconds:sum", "padding_waste:mean"];
const LEAST = 6;

/** Return {first, rest}: the names of charts to show, and those to fold away, sorted. */
export function arrange(names) {
  const left = new Set(names.filter((name) => !/^tokens:sum$/.test(name)));
  if (left.has("loss:mean")) left.delete("loss:sum");
  const first = [];
  for (const [, pattern] of FIRST) {
    const found = [...left]
      .filter((name) => pattern.test(name))
      .sort((a, b) => a.length - b.length || a.localeCompare(b));
    const own = found.filter((name) => OWN.has(name));
    for (const name of own.length ? own : found.slice(0, MOST_OF_A_KIND)) {
      first.push(name);
      left.delete(name);
    }
  }
  for (const name of FILL) {
    if (first.length < LEAST && left.delete(name)) first.push(name);
  }
  const rest = [...left].sort();
  if (!first.length) first.push(...rest.splice(0, LEAST));
  return { first, rest };
}
