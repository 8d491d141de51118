// Figures and foreign text, as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const grouped = new Intl.NumberFormat("en");
const time = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const dateAndTime = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export const count = (number) => grouped.format(number);

export function bytes(number) {
  let unit = 0;
  while (number >= 1023.95 && unit < UNITS.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return unit ? `${number.toFixed(1)} ${UNITS[unit]}` : `${Math.round(number)} B`;
}

export const rate = (bytesPerSecond) => `${bytes(bytesPerSecond)}/s`;

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** A moment in Unix ms: the time of day, with the date when it was not today. */
export function moment(at) {
  const then = new Date(at);
  const today = then.toDateString() === new Date().toDateString();
  return (today ? time : dateAndTime).format(then);
}

/** The part of a whole in per cent. Never 100 before all is there, never 0 once something is. */
export function percent(part, whole) {
  if (part >= whole) return "100 %";
  return `${Math.min(99.9, Math.max(part ? 0.1 : 0, (100 * part) / whole)).toFixed(1)} %`;
}

/** A half-open range of bytes; by its exact first byte where rounding would hide it. */
export function span([start, end]) {
  if (end === null) return `from ${bytes(start)} on`;
  return bytes(start) === bytes(end)
    ? `${bytes(end - start)} at byte ${count(start)}`
    : `${bytes(start)} to ${bytes(end)}`;
}

/** The first few of `gaps` missing ranges, in words. */
export function spans(ranges, gaps, most) {
  const told = ranges.slice(0, most).map(span).join(", ");
  const more = gaps - Math.min(most, ranges.length);
  return more > 0 ? `${told} and ${count(more)} more` : told;
}

// What a reader could not see, or what would turn the text around it: controls, separators of
// lines, marks and overrides of direction, tags. The joiner of emoji is let through.
const UNSEEN = [
  "\\p{Cc}\\p{Zl}\\p{Zp}\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180e",
  "\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb",
  "\\u{e0000}-\\u{e0fff}",
].join("");
const PIECES = new RegExp(`([${UNSEEN}])`, "u");

const named = (character) =>
  `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Foreign text in turns: as it is, and the name of a character that cannot be seen. */
export const pieces = (text) =>
  text.split(PIECES).map((piece, index) => (index % 2 ? named(piece) : piece));

/** The same as one text, for attributes. */
export const seen = (text) =>
  pieces(text)
    .map((piece, index) => (index % 2 ? `⟨${piece}⟩` : piece))
    .join("");
