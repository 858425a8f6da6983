// What does the server say? JSON of its routes; a refusal is an Error with the server's own words.

const BASE = "/dashboard/api";

export class Refusal extends Error {
  constructor(status, words) {
    super(words);
    this.status = status;
  }
}

/** Return the path of a run's route. */
export const ofRun = (run, rest = "") => `/runs/${encodeURIComponent(run)}${rest}`;

/** Return an address below the API with a query; null and undefined values are left out, those of lists repeated. */
export function address(path, query = {}) {
  const known = Object.entries(query)
    .flatMap(([name, value]) => [value].flat().map((each) => [name, each]))
    .filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(known).toString();
  return BASE + path + (text && `?${text}`);
}

export const get = (path, query, options) => ask(address(path, query), options);

export const post = (path, body, options = {}) =>
  ask(BASE + path, {
    ...options,
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });

async function ask(url, options = {}) {
  let answer;
  try {
    answer = await fetch(url, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer.");
  }
  if (answer.status === 401) {
    toLogin();
    throw new Refusal(401, "Logged out: the server asks for its key again.");
  }
  let body = null;
  try {
    body = await answer.json();
  } catch {
    throw new Refusal(answer.status, `The server answered ${answer.status} without JSON.`);
  }
  if (!answer.ok) throw new Refusal(answer.status, body.detail ?? `The server answered ${answer.status}.`);
  return body;
}

let leaving = false;

/** Leave for the login page, once; the view that was open is opened after it. */
export function toLogin() {
  if (leaving) return;
  leaving = true;
  location.reload();
}

/** Return all points of one metric of a run as columns; they come as CSV, which is a third of their JSON. */
export async function everyPoint(run, name) {
  const answer = await fetch(address(ofRun(run, "/series.csv"), { names: name }), { credentials: "same-origin" });
  if (!answer.ok) throw new Refusal(answer.status, `The server answered ${answer.status}.`);
  const columns = { kind: "step", step: [], time: [], tokens: [], value: [] };
  for (const line of (await answer.text()).split(/\r?\n/)) {
    const cells = line.split(",");
    const [step, time, value] = [cells[1], cells[2], cells[4]].map((cell) => (cell ? Number(cell) : NaN));
    if (cells.length !== 5 || !Number.isFinite(value) || !(Number.isFinite(step) || Number.isFinite(time)))
      continue; // the head, or a gap
    columns.kind = cells[0];
    columns.step.push(step);
    columns.time.push(time);
    columns.tokens.push(cells[3] ? Number(cells[3]) : NaN);
    columns.value.push(value);
  }
  return columns;
}
