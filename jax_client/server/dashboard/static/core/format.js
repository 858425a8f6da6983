// How is a value shown? Rounded, with a unit, and a dash where it is unknown.

export const DASH = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Return a number with about `digits` significant digits. */
export function number(value, digits = 4) {
  if (!known(value)) return DASH;
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en-US");
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace("e+", "e");
  const after = Math.max(0, digits - 1 - Math.floor(Math.log10(size || 1)));
  return value.toLocaleString("en-US", { maximumFractionDigits: Math.min(after, 6) });
}

/** Return a count: 950, 12.3k, 4.56M. */
export function count(value) {
  if (!known(value)) return DASH;
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(value) >= size) return trimmed(value / size) + unit;
  }
  return trimmed(value);
}

/** Return bytes: 512 B, 1.50 GiB. */
export function bytes(value) {
  if (!known(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  for (let size = Math.abs(value); size >= 1024 && power < units.length - 1; size /= 1024) power++;
  return `${power ? trimmed(value / 1024 ** power) : value} ${units[power]}`;
}

const trimmed = (value) => String(Number(value.toPrecision(3)));

/** Return a time span: 45 s, 12 min, 3 h 10. */
export function span(seconds) {
  if (!known(seconds)) return DASH;
  const s = Math.max(0, seconds);
  if (s < 1) return s === 0 ? "0 s" : `${s < 0.001 ? s.toExponential(1) : Number(s.toPrecision(2))} s`;
  if (s < 90) return `${s < 10 ? Number(s.toPrecision(2)) : Math.round(s)} s`;
  if (s < 90 * 60) return `${Math.round(s / 60)} min`;
  const hours = Math.floor(s / 3600);
  if (hours < 48) return `${hours} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")}`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Return how long ago a unix time was. */
export function ago(time, now = Date.now() / 1000) {
  if (!known(time)) return DASH;
  const passed = now - time;
  if (passed < -1) return `in ${span(-passed)}`;
  return passed < 2 ? "now" : `${span(Math.round(passed))} ago`;
}

/** Return a unix time in the reader's own zone, in full. */
export function moment(time) {
  if (!known(time)) return "unknown";
  return new Date(time * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
}

/** Return a unix time in few letters: the time of today, else the day too. */
export function clock(time, seconds = true) {
  if (!known(time)) return DASH;
  const date = new Date(time * 1000);
  const hours = date.toLocaleTimeString(undefined, {
    hour: "2-digit",
    minute: "2-digit",
    second: seconds ? "2-digit" : undefined,
    hourCycle: "h23",
  });
  return date.toDateString() === new Date().toDateString() ? hours : `${day(time)} ${hours}`;
}

/** Return the day of a unix time: Nov 29. */
export const day = (time) => new Date(time * 1000).toLocaleDateString(undefined, { month: "short", day: "numeric" });

export const percent = (value, digits = 0) => (known(value) ? `${(value * 100).toFixed(digits)} %` : DASH);

/** Return the address of a view that compares runs. */
export const compared = (ids) => `#/compare?${ids.map((id) => `runs=${encodeURIComponent(id)}`).join("&")}`;

const METRICS = {
  "loss:mean": "Loss per token",
  "loss:sum": "Loss, sum",
  "tokens:sum": "Tokens with a loss",
  "grad_norm:mean": "Gradient norm",
  "learning_rate:mean": "Learning rate",
  "tokens_per_second:mean": "Tokens per second",
  "kl_sample_train:mean": "KL, sampler to trainer",
  "update_norm:mean": "Update norm",
  "ratio:mean": "Policy ratio",
  "padding_waste:mean": "Padding, share",
  "host_share:mean": "Host time, share",
  "input_tokens:sum": "Input tokens",
  "queue_seconds:sum": "Queue, s",
  "host_seconds:sum": "Host, s",
  "compile_seconds:sum": "Compiling, s",
  "device_seconds:sum": "Device, s",
  "sampler/occupancy:mean": "Sampler occupancy",
};

/** Return the title of a metric. */
export const metric = (name) => METRICS[name] ?? name;

/** Return a run's name for people. */
export const title = (row) => row.name || row.run;
