// The page: one view of the open requests, and everything else that a snapshot says.

import { draw as drawChart } from "./chart.js";
import { Details } from "./details.js";
import { $, clone, fieldsOf, foreign, keyed, make, put, set } from "./dom.js";
import { Feed } from "./feed.js";
import { bytes, count, duration, moment, percent, rate, seen, spans } from "./format.js";
import { draw as drawRanges } from "./ranges.js";

/** Seconds without a new byte after which a request counts as stalled. */
const STALLED = 30;
/** The most recent failures and dead letters that a snapshot holds. */
const FAILURES = 200;
const DEAD_LETTERS = 100;
/** Milliseconds that typing has to pause for before it is searched. */
const TYPING = 150;

const view = { find: "", sort: "oldest", offset: 0, limit: 25 };
let snapshot = null;
/** The consumer's clock less ours, in ms, where that is more than the way of a snapshot. */
let skew = 0;
const SKEW_LEAST = 1000;

const now = () => Date.now() + skew;
const ago = (at) => duration((now() - at) / 1000);

// ---- the feed

let due = false;
/** What was searched for and not answered yet. */
let sought = null;

/** Draw before the next paint, however much arrives until then; never in a hidden tab. */
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    draw();
  });
}

const feed = new Feed((heard) => {
  const fresh = heard.now - Date.now();
  if (Math.abs(fresh - skew) > SKEW_LEAST) skew = fresh;
  tellFailures(snapshot, heard);
  snapshot = heard;
  $("requests").removeAttribute("aria-busy");
  const { matching, total } = heard.requests;
  if (sought) say(`${count(matching)} of ${count(total)} requests found.`);
  sought = null;
  if (view.offset > lastOffset()) look({ offset: lastOffset() });
  redraw();
}, redraw);

const details = new Details(() => snapshot, now, (at) => at - skew);

function say(text) {
  $("said").textContent = text;
}

/** Failures that were shown. */
const known = new Set();

/** What a reader of the screen must hear of; all else waits until it is looked for. */
function tellFailures(before, heard) {
  // Those of a worker that was silent for a moment come again, and are not new.
  const fresh = heard.failures.filter((failure) => !known.has(keyOfResult(failure)));
  for (const failure of fresh) known.add(keyOfResult(failure));
  if (before === null || before.started_at !== heard.started_at) return;
  if (fresh.length) {
    const [{ request, error }] = fresh;
    const one = `Request ${request} failed: ${seen(error?.message ?? "")}`;
    say(fresh.length === 1 ? one : `${fresh.length} requests failed. ${one}`);
  }
}

// ---- the view

function look(change) {
  Object.assign(view, change);
  const query = new URLSearchParams(view);
  const address = new URLSearchParams();
  for (const name of ["find", "sort", "limit"])
    if (view[name] !== VIEW[name]) address.set(name, view[name]);
  history.replaceState(null, "", address.size ? `?${address}` : location.pathname);
  set($("requests"), "aria-busy", "true");
  feed.open(query);
}

const VIEW = { ...view };

function begin() {
  const address = new URLSearchParams(location.search);
  view.find = address.get("find")?.slice(0, $("find").maxLength) ?? view.find;
  for (const name of ["sort", "limit"]) {
    const wanted = address.get(name);
    if ([...$(name).options].some((option) => option.value === wanted)) view[name] = wanted;
    $(name).value = view[name];
  }
  view.limit = Number(view.limit);
  $("find").value = view.find;

  let typing;
  $("find").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      sought = $("find").value.trim();
      look({ find: sought, offset: 0 });
    }, TYPING);
  });
  $("tools").addEventListener("submit", (event) => event.preventDefault());
  $("sort").addEventListener("change", () => look({ sort: $("sort").value, offset: 0 }));
  $("limit").addEventListener("change", () =>
    look({ limit: Number($("limit").value), offset: 0 }),
  );
  const step = (button, target) =>
    $(button).addEventListener("click", () => {
      if ($(button).getAttribute("aria-disabled") === "false") look({ offset: target() });
    });
  step("pager-first", () => 0);
  step("pager-previous", () => Math.max(0, view.offset - view.limit));
  step("pager-next", () => view.offset + view.limit);
  step("pager-last", () => lastOffset());

  // A click anywhere in a row opens it; the button in it is for the keyboard.
  for (const list of ["requests", "partitions", "troubles"])
    $(list).addEventListener("click", (event) => {
      const request = event.target.closest("[data-request]")?.dataset.request;
      if (request && getSelection().isCollapsed) details.open(request, event.target);
    });
  $("chart-table").closest("details").addEventListener("toggle", redraw);

  const theme = $("theme");
  theme.value = document.documentElement.dataset.theme ?? "";
  theme.addEventListener("change", () => {
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
    try {
      localStorage.setItem("splitferry-theme", theme.value);
    } catch {
      // It holds for this page, then.
    }
  });

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) feed.close();
    else feed.open();
  });
  // Ages go on while nothing else does.
  setInterval(() => document.hidden || redraw(), 1000);
  look({});
}

const lastOffset = () =>
  Math.max(0, Math.ceil(snapshot.requests.matching / view.limit) - 1) * view.limit;

// ---- drawing

function draw() {
  drawConnection();
  if (snapshot === null) return;
  drawAbout();
  drawTroubles();
  drawChart(snapshot.throughput, feed.state === "live" ? now() : snapshot.now);
  drawFigures();
  drawRequests();
  drawPartitions();
  drawOutcomes();
  details.draw();
}

let told = "";

function drawConnection() {
  const { state, since } = feed;
  const phase = snapshot?.phase ?? "";
  const stopping = state === "live" && phase !== "running" && phase !== "";
  set($("connection"), "data-state", stopping ? "stopping" : state);
  const text = {
    connecting: "connecting",
    live: phase ? `live, ${phase}` : "live",
    lost: `reconnecting since ${moment(since)}`,
  }[state];
  put($("connection-text"), text);
  const lost = $("lost");
  lost.hidden = state !== "lost";
  document.documentElement.classList.toggle("stale", state === "lost");
  if (state === "lost") {
    const of = snapshot ? ` What is shown is of ${moment(snapshot.now - skew)}.` : "";
    const causes = "it has stopped, cannot be reached, or has too many pages watching.";
    put(lost, `The consumer does not answer since ${moment(since)}: ${causes}${of}`);
  }
  const word = state === "lost" ? "The consumer does not answer." : `Connection: ${text}.`;
  if (told !== word && state !== "connecting") {
    if (told || state === "lost") say(word);
    told = word;
  }
  if (snapshot) {
    const open = `${count(snapshot.requests.total)} open, ${seen(snapshot.group)}`;
    const title = `${state === "lost" ? "✕ " : ""}${open} – splitferry`;
    if (document.title !== title) document.title = title;
  }
}

function drawAbout() {
  const { topics } = snapshot;
  foreign($("group"), snapshot.group);
  put($("topics"), `· ${topics.splits} → ${topics.results} · ${snapshot.version}`);
  const facts = [
    `process ${snapshot.pid} on ${snapshot.host}${workers()}`,
    `since ${moment(snapshot.started_at - skew)}`,
    `dead letters go to ${topics.dead_letters}`,
    `root ${snapshot.root}`,
  ];
  keyed($("about"), facts, (fact) => fact.split(" ")[0], () => make("span"), foreign);
}

/** The processes of those who do the work, where they are several. */
function workers() {
  const each = snapshot.workers.map(({ worker, pid }) => `${worker} is ${pid ?? "–"}`);
  return each.length ? ` (worker ${each.join(", ")})` : "";
}

const brief = (text) => (text.length > 80 ? `${text.slice(0, 80)}…` : text);

/** Everything that an operator should look at, worst first. */
function troubles() {
  const found = [];
  for (const { worker, missing } of snapshot.workers)
    if (missing !== null)
      found.push({
        level: "bad",
        key: `missing ${worker}`,
        text: `Worker ${worker} is missing: ${missing}. Others take its partitions.`,
      });
  for (const { partition, state, reason } of snapshot.partitions)
    if (state === "refused")
      found.push({
        level: "bad",
        key: `refused ${partition}`,
        text: `Partition ${partition} is refused: ${reason}`,
      });
  const { free, reserve } = snapshot.disk;
  if (free !== null && free <= reserve)
    found.push({
      level: "bad",
      key: "disk",
      text:
        `The disk has ${bytes(free)} left, and ${bytes(reserve)} stay free: ` +
        "files wait, and fail at the write time-out.",
    });
  for (const { partition, holder } of snapshot.partitions) {
    if (holder?.state !== "open" || (now() - holder.active_at) / 1000 < STALLED) continue;
    const name = `${holder.request} (${brief(holder.unique_id)})`;
    found.push({
      level: "warn",
      key: `stalled ${partition}`,
      request: holder.request,
      text:
        `Partition ${partition}: W waits at ${count(holder.first)} for request ${name}, ` +
        `which got no new bytes for ${ago(holder.active_at)}.`,
    });
  }
  return found;
}

function drawTroubles() {
  const found = troubles();
  $("attention").hidden = found.length === 0;
  keyed(
    $("troubles"),
    found,
    ({ key }) => key,
    () => {
      const text = make("bdi");
      return make("li", {}, text, " ", make("button", { type: "button" }, "Details"));
    },
    (item, { level, text, request }) => {
      set(item, "class", level);
      foreign(item.firstElementChild, text);
      item.lastElementChild.hidden = !request;
      item.lastElementChild.dataset.request = request ?? "";
    },
  );
}

function drawFigures() {
  const { requests, partitions, failures, dead_letters, flow, disk } = snapshot;
  const lag = partitions.reduce((sum, partition) => sum + (partition.lag ?? 0), 0);
  put($("figure-open"), count(requests.total));
  put($("figure-lag"), count(lag));
  const least = ({ length }, most) => count(length) + (length < most ? "" : "+");
  put($("figure-failures"), least(failures, FAILURES));
  put($("figure-dead"), least(dead_letters, DEAD_LETTERS));
  put($("figure-flight"), bytes(flow.in_flight));
  put($("figure-disk"), disk.free === null ? "–" : bytes(disk.free));
  put($("figure-partitions"), `in ${count(partitions.length)} partitions`);
  const last = (at) => (at === undefined ? "" : `last at ${moment(at - skew)}`);
  put($("figure-failed"), last(failures[0]?.finished_at));
  put($("figure-died"), last(dead_letters[0]?.at));
  put($("figure-high"), `reading pauses at ${bytes(flow.high)}`);
  put($("figure-reserve"), `${bytes(disk.reserve)} stay free`);
  $("figure-failures").classList.toggle("bad", failures.length > 0);
  $("figure-dead").classList.toggle("bad", dead_letters.length > 0);
  $("figure-disk").classList.toggle("bad", disk.free !== null && disk.free <= disk.reserve);
}

function drawRequests() {
  const { total, matching, offset, shown } = snapshot.requests;
  keyed(
    $("requests"),
    shown,
    ({ request, partition, first }) => `${request} ${partition} ${first}`,
    () => clone($("request-template")),
    drawRequest,
    $("requests-heading"),
  );
  const empty = $("requests-empty");
  empty.hidden = shown.length > 0;
  put(empty, view.find ? "No open request has this in its ids." : "No request is open.");
  const range = shown.length
    ? `${count(offset + 1)} to ${count(offset + shown.length)} of ${count(matching)}`
    : "0";
  put($("pager-text"), view.find ? `${range} found, ${count(total)} open` : `${range} open`);
  const able = (button, is) => set($(button), "aria-disabled", String(!is));
  able("pager-first", view.offset > 0);
  able("pager-previous", view.offset > 0);
  able("pager-next", view.offset < lastOffset());
  able("pager-last", view.offset < lastOffset());
}

const missing = (request) =>
  request.gaps ? `missing ${spans(request.missing, request.gaps, 2)}` : "nothing missing";

function drawRequest(row, request) {
  const field = fieldsOf(row);
  row.dataset.request = request.request;
  foreign(field.name, request.unique_id);
  set(field.name, "title", seen(request.unique_id));
  put(field.id, `${request.request} · partition ${request.partition}`);
  drawRanges(row.querySelector("svg"), request);
  put(field.missing, missing(request));
  const { size, received } = request;
  const whole = size === null ? "unknown size" : `${bytes(size)}, ${percent(received, size)}`;
  put(field.received, bytes(received));
  put(field.total, `of ${whole}`);
  const quiet = (now() - request.active_at) / 1000;
  const stalled = request.state === "open" && quiet >= STALLED;
  put(field.rate, stalled ? "stalled" : rate(request.rate));
  put(field.quiet, stalled ? `for ${duration(quiet)}` : "");
  field.rate.classList.toggle("warn", stalled);
  put(field.remaining, request.remaining === null ? "–" : duration(request.remaining));
  put(field.state, request.state);
  // A file goes to its unique id below the root; what else there is to say is in the details.
  put(field.target, request.block === "mem" ? "to memory" : "to a file");
}

function drawPartitions() {
  keyed(
    $("partitions"),
    snapshot.partitions,
    ({ partition }) => partition,
    () => clone($("partition-template")),
    (row, partition) => {
      const field = fieldsOf(row);
      const number = (value) => (value === null ? "–" : count(value));
      put(field.number, String(partition.partition));
      put(field.worker, partition.worker === null ? "" : `worker ${partition.worker}`);
      put(field.state, partition.state);
      set(field.state, "data-state", partition.state);
      foreign(field.reason, partition.reason ?? "");
      put(field.watermark, number(partition.watermark));
      put(field.end, number(partition.end));
      put(field.lag, number(partition.lag));
      put(field.open, number(partition.open));
      const { holder } = partition;
      field.nobody.hidden = holder !== null;
      field.holder.hidden = field.since.hidden = holder === null;
      row.dataset.request = holder?.request ?? "";
      if (holder === null) return;
      put(field.request, holder.request);
      foreign(field.name, holder.unique_id);
      const since = `since ${moment(holder.since - skew)} (${ago(holder.since)})`;
      put(field.since, `${since} · ${missing(holder)}`);
    },
  );
  const empty = $("partitions-empty");
  empty.hidden = snapshot.partitions.length > 0;
  put(empty, "The group has assigned no partition to this consumer.");
}

const keyOfResult = ({ request, partition, finished_at }) =>
  `${request} ${partition} ${finished_at}`;

function drawOutcomes() {
  drawEvents("failures", snapshot.failures, keyOfResult, (field, result) => {
    drawResult(field, result);
    foreign(field.reason, result.error ? `${result.error.code}: ${result.error.message}` : "");
  });
  drawEvents("results", snapshot.results, keyOfResult, drawResult);
  drawEvents(
    "dead",
    snapshot.dead_letters,
    ({ partition, offset, at }) => `${partition} ${offset} ${at}`,
    (field, letter) => {
      put(field.status, letter.error);
      set(field.status, "data-state", "failed");
      put(field.id, `partition ${letter.partition} at ${count(letter.offset)}`);
      put(field.size, bytes(letter.size));
      foreign(field.name, letter.request ?? letter.key ?? "");
      foreign(field.reason, letter.message);
      drawTime(field.time, letter.at);
    },
  );
}

function drawEvents(list, items, keyOf, update) {
  $(list).hidden = items.length === 0;
  $(`${list}-empty`).hidden = items.length > 0;
  keyed(
    $(list),
    items,
    keyOf,
    () => clone($("event-template")),
    (item, event) => update(fieldsOf(item), event),
  );
}

function drawResult(field, result) {
  put(field.status, result.status);
  set(field.status, "data-state", result.status);
  put(field.id, `${result.request} · version ${result.version} · partition ${result.partition}`);
  put(field.size, result.size === null ? "" : bytes(result.size));
  foreign(field.name, result.unique_id);
  drawTime(field.time, result.finished_at);
}

function drawTime(node, at) {
  put(node, moment(at - skew));
  set(node, "datetime", new Date(at).toISOString());
}

begin();
