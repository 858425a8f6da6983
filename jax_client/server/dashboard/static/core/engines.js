// Which engines are shown? Those of the server's process; without any, what open runs recorded of theirs last.

import { store } from "./store.js";
import { title } from "./format.js";

const STALE_SECONDS = 120;

/** Return engines as the server describes them; `recorded` is the row of the run that a made one comes from. */
export function engines() {
  const own = store.device?.engines ?? [];
  return own.length
    ? own
    : Object.entries(store.device?.points ?? {})
        .map(([run, point]) => made(run, point))
        .filter(Boolean);
}

function made(run, point) {
  const row = store.runs.get(run);
  const metrics = point.metrics ?? {};
  if (!row || Date.now() / 1000 - (point.time ?? 0) > STALE_SECONDS * 30) return null;
  const memory = {};
  for (const [name, value] of Object.entries(metrics))
    if (name.startsWith("memory_bytes/")) memory[name.slice(13)] = value;
  return {
    recorded: row,
    time: point.time,
    model: { name: row.model ?? title(row) },
    device: { kind: row.host ?? "device", count: null },
    memory_bytes: memory,
    sampling: {
      rows_running: metrics["sampler/rows_running"],
      rows_waiting: metrics["sampler/rows_waiting"],
      occupancy: metrics["sampler/occupancy:mean"],
      prompt_tokens: metrics["sampler/prompt_tokens:sum"],
      prompt_tokens_cached: metrics["sampler/prompt_tokens_cached:sum"],
    },
    training: { tokens_per_second: row.tokens_per_second },
    health: { state: row.state === "live" ? "recorded" : row.state, waiting: null, compiling: [] },
  };
}

/** Return the sum of an engine's memory in use: the kinds that are bytes of the device now. */
export function inUse(memory = {}) {
  return ["weights", "adapters", "optimizer", "gradients", "cache", "decode_weights"].reduce(
    (sum, kind) => sum + (memory[kind] ?? 0),
    0,
  );
}
