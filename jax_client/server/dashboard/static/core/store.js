// What does the page know? The server's state, its runs and devices, kept current by one stream of events.

import { address, get, toLogin } from "./api.js";

const SILENT_SECONDS = 20; // the server comments every 15 s, which a page cannot see: after this long we ask
const listeners = new Set();

export const store = {
  state: null,
  runs: new Map(),
  total: 0,
  archived: false, // whether there are runs that only the archive has
  device: null,
  connected: true,
  heard: Date.now() / 1000,
  loaded: false,
};

/** Call `listener(kind, data)` on news: "runs", "points", "device", "state", "link". Return what ends it. */
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function tell(kind, data) {
  for (const listener of [...listeners]) {
    try {
      listener(kind, data);
    } catch (error) {
      console.error(error);
    }
  }
}

/** Return the runs, newest activity first; archived ones only if asked for. */
export function runs(archived = false) {
  const shown = [...store.runs.values()].filter((row) => archived || !row.archived);
  return shown.sort((a, b) => (b.updated ?? 0) - (a.updated ?? 0));
}

/** Return the newest run that is live, or else open. */
export const newest = () => runs().find((row) => row.state === "live") ?? runs().find((row) => row.state === "idle");

let archivedToo = false;

/** Load everything that is not a run's own. */
export async function refresh(archived = archivedToo) {
  archivedToo = archived;
  const [state, listed, device] = await Promise.all([
    get("/state"),
    get("/runs", { limit: 1000, archived: archived ? 1 : 0 }),
    get("/device").catch(() => null),
  ]);
  store.state = state;
  store.runs = new Map(listed.runs.map((row) => [row.run, row]));
  store.total = listed.total;
  store.archived = !listed.total && !archived && (await get("/runs", { limit: 1, archived: 1 })).total > 0;
  if (device) store.device = device;
  store.loaded = true;
  hear();
  for (const kind of ["state", "runs", "device"]) tell(kind, null);
}

function hear() {
  store.heard = Date.now() / 1000;
  link(true);
}

function link(connected) {
  if (store.connected === connected) return;
  store.connected = connected;
  tell("link", connected);
}

/** Put a row in the place of the one the page has, and say so. */
export function replace(row) {
  store.runs.set(row.run, row);
  tell("runs", [row]);
}

let source = null;
let watched = { run: null, since: null };
let retry = null;
let failures = 0;

/** Follow one run's points from a cursor, or none; the stream is opened anew. */
export function watch(run = null, since = null) {
  if (source && run === watched.run && since === watched.since) return;
  watched = { run, since };
  if (!resting) open();
}

function open() {
  clearTimeout(retry);
  source?.close();
  source = new EventSource(address("/stream", watched));
  const mine = source;
  source.onopen = async () => {
    const back = !store.connected || failures > 0;
    failures = 0;
    hear();
    if (back) await refresh().catch(() => {});
  };
  source.onerror = () => mine === source && lost();
  const on = (kind, take) =>
    source.addEventListener(kind, (event) => {
      if (mine !== source) return;
      hear();
      take(JSON.parse(event.data));
    });
  on("runs", (data) => {
    for (const row of data.runs) store.runs.set(row.run, row);
    for (const run of data.gone ?? []) store.runs.delete(run);
    tell("runs", data.runs);
  });
  on("points", (data) => {
    watched.since = data.next ?? watched.since;
    tell("points", data);
  });
  on("device", (data) => {
    store.device = { ...store.device, ...data };
    tell("device", data);
  });
}

async function lost() {
  failures++;
  const closed = source.readyState === EventSource.CLOSED; // refused; the browser tries again by itself otherwise
  await probe();
  if (!closed) return;
  clearTimeout(retry);
  retry = setTimeout(open, Math.min(10_000, 500 * 2 ** failures));
}

async function probe() {
  const end = new AbortController();
  const timer = setTimeout(() => end.abort(), 5000);
  try {
    const answer = await fetch(address("/state"), { credentials: "same-origin", signal: end.signal });
    if (answer.status === 401) toLogin();
    else if (answer.ok) hear();
    else link(false);
  } catch {
    link(false);
  } finally {
    clearTimeout(timer);
  }
}

setInterval(() => {
  if (!document.hidden && source && Date.now() / 1000 - store.heard > SILENT_SECONDS) probe();
}, 5000);

// A browser has six connections to a server, and each stream holds one: a page that is not looked at gives its own
// back, and asks now and then, so that its title still tells of alerts.
const HIDDEN_SECONDS = 20;
const ASK_SECONDS = 30;
let resting = null;
let soon = null;

document.addEventListener("visibilitychange", () => {
  clearTimeout(soon);
  if (document.hidden) {
    soon = setTimeout(rest, HIDDEN_SECONDS * 1000);
  } else if (resting) {
    clearInterval(resting);
    resting = null;
    open();
    refresh().catch(probe);
  } else if (source) probe();
});

function rest() {
  source?.close();
  source = null;
  clearTimeout(retry);
  resting = setInterval(() => refresh().catch(probe), ASK_SECONDS * 1000);
}
