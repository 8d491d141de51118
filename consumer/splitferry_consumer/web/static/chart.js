// Bytes a second over the last minutes.

import { $, make, put, set } from "./dom.js";
import { bytes, count, moment, rate } from "./format.js";

const SECONDS = 300;
const STEP = 30;

/** The least power of two at or above a rate: a round number of bytes in any unit. */
const ceiling = (most) => 2 ** Math.ceil(Math.log2(Math.max(1024, most)));

export function draw(throughput, now) {
  const perSecond = new Float64Array(SECONDS);
  const results = new Float64Array(SECONDS);
  for (const { at, bytes: moved, results: told } of throughput) {
    const second = SECONDS - 1 - Math.floor((now - at) / 1000);
    if (second < 0 || second >= SECONDS) continue;
    perSecond[second] += moved;
    results[second] += told;
  }
  // The second that runs is not whole yet.
  const current = mean(perSecond.subarray(SECONDS - 6, SECONDS - 1));
  const top = ceiling(Math.max(...perSecond));
  const line = [...perSecond.subarray(0, SECONDS - 1)]
    .map((value, second) => `${second} ${(100 - (99 * value) / top).toFixed(2)}`)
    .join("L");
  const [, area, stroke] = $("chart").children;
  set(area, "d", `M0 100L${line}V100z`);
  set(stroke, "d", `M${line}`);
  put($("chart-top"), rate(top));
  put($("chart-middle"), rate(top / 2));
  put($("throughput-now"), rate(current));
  const total = perSecond.reduce((sum, value) => sum + value, 0);
  const told = results.reduce((sum, value) => sum + value, 0);
  put($("throughput-sum"), `${bytes(total)} and ${count(told)} results in 5 min`);
  set(
    $("chart"),
    "aria-label",
    `Throughput of the last 5 minutes: now ${rate(current)}, mean ${rate(total / SECONDS)}, ` +
      `most ${rate(Math.max(...perSecond))}`,
  );
  if ($("chart-table").closest("details").open) table(perSecond, results, now);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function table(perSecond, results, now) {
  const rows = [];
  for (let end = SECONDS; end > 0; end -= STEP) {
    const moved = perSecond.subarray(end - STEP, end).reduce((sum, value) => sum + value, 0);
    const told = results.subarray(end - STEP, end).reduce((sum, value) => sum + value, 0);
    const cells = [bytes(moved), rate(moved / STEP), count(told)];
    rows.push(
      make(
        "tr",
        {},
        make("th", { scope: "row" }, moment(now - (SECONDS - end) * 1000)),
        ...cells.map((cell) => make("td", { class: "number" }, cell)),
      ),
    );
  }
  $("chart-table").replaceChildren(...rows);
}
