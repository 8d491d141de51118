// Which bytes of an item are there, as a bar.

import { bytes, count, percent, spans } from "./format.js";
import { set } from "./dom.js";

const COLUMNS = 256;
/** Where the size is not known, this part of the bar lies behind the last byte. */
const BEYOND = 0.1;
/** What divisions leave of a column that is full or empty. One byte is more, up to 256 TB. */
const ROUNDING = 1e-12;

/** How much of each column is covered, from 0 to 1. */
export function columns(ranges, size) {
  const covered = new Float64Array(COLUMNS);
  const width = size / COLUMNS;
  for (const [start, end] of ranges) {
    const first = Math.min(COLUMNS - 1, Math.floor(start / width));
    const last = Math.min(COLUMNS - 1, Math.ceil(end / width) - 1);
    for (let column = first; column <= last; column++) {
      const part = Math.min(end, (column + 1) * width) - Math.max(start, column * width);
      covered[column] += part / width;
    }
  }
  return covered;
}

/** One path for all columns of which `holds`, runs of them as one rectangle. */
function path(covered, holds) {
  let drawn = "";
  for (let column = 0, start = -1; column <= COLUMNS; column++) {
    const inside = column < COLUMNS && holds(covered[column]);
    if (inside && start < 0) start = column;
    if (!inside && start >= 0) {
      drawn += `M${start} 0h${column - start}v1h${start - column}z`;
      start = -1;
    }
  }
  return drawn;
}

/** Draw a request, and say it in words too. */
export function draw(svg, request) {
  const known = request.size !== null;
  const end = request.ranges.at(-1)?.[1] ?? 0;
  const size = known ? request.size : end / (1 - BEYOND);
  const covered = size ? columns(request.ranges, size) : new Float64Array(COLUMNS).fill(known);
  const [received, partial, beyond] = svg.children;
  set(svg, "viewBox", `0 0 ${COLUMNS} 1`);
  set(svg, "preserveAspectRatio", "none");
  set(received, "d", path(covered, (part) => part >= 1 - ROUNDING));
  set(partial, "d", path(covered, (part) => part > ROUNDING && part < 1 - ROUNDING));
  const from = Math.ceil(COLUMNS * (size ? end / size : 0));
  set(beyond, "d", known ? "" : `M${from} 0H${COLUMNS}V1H${from}z`);
  set(svg, "aria-label", words(request));
}

export function words(request) {
  const received = bytes(request.received);
  const gaps = request.gaps === 1 ? "1 missing range" : `${count(request.gaps)} missing ranges`;
  const missing = request.gaps
    ? `${gaps}: ${spans(request.missing, request.gaps, 2)}`
    : "nothing missing";
  return request.size === null
    ? `${received} received of an item of unknown size, ${missing}`
    : `${percent(request.received, request.size)} received, ${missing}`;
}
