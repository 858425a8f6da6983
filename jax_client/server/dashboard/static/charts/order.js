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

/** Return {first, rest}: the names of charts to show, and those to fold away, sorted. */
export function arrange(names) {
  const left = new Set(names.filter((name) => !/^tokens:sum$/.test(name)));
  if (left.has("loss:mean")) left.delete("loss:sum");
  const first = [];
  for (const [, pattern] of FIRST) {
    const found = [...left].filter((name) => pattern.test(name)).sort((a, b) => a.length - b.length || a.localeCompare(b));
    for (const name of found.slice(0, MOST_OF_A_KIND)) {
      first.push(name);
      left.delete(name);
    }
  }
  const rest = [...left].sort();
  while (first.length < 4 && rest.length) first.push(rest.shift());
  return { first, rest };
}

/** Return whether a name is better drawn with a log axis. */
export const oftenLog = (name) => /^(grad_norm)/.test(name);
