// One request whole, and the way to end it.

import { $, foreign, make, put, set } from "./dom.js";
import { bytes, count, duration, moment, rate } from "./format.js";
import { draw as drawRanges } from "./ranges.js";

/** Milliseconds between two looks at an open request. */
const EVERY = 1500;
/** Ranges that are listed; the rest is in the JSON. */
const LISTED = 500;

export class Details {
  /** `here` turns a moment of the consumer's clock into one of ours. */
  constructor(snapshot, now, here) {
    this.snapshot = snapshot;
    this.now = now;
    this.here = here;
    this.id = null;
    this.request = null;
    $("details-close").addEventListener("click", () => $("details").close());
    $("details").addEventListener("close", () => this.#closed());
    // The backdrop belongs to the dialog; what is in it does not.
    $("details").addEventListener("click", (event) => {
      if (event.target === $("details")) $("details").close();
    });
    $("abort-ask").addEventListener("click", () => this.#ask(true));
    $("abort-keep").addEventListener("click", () => this.#ask(false));
    $("abort").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#abort();
    });
  }

  open(id, opener) {
    this.id = id;
    this.opening = Symbol(id);
    this.request = null;
    this.opener = opener.closest("button") ?? opener.closest("tr")?.querySelector("button");
    this.ended = this.unread = false;
    this.#note("");
    this.#ask(false);
    $("abort-reason").value = "";
    put($("details-id"), id);
    $("details-facts").replaceChildren();
    put($("details-missing"), "");
    put($("details-received"), "");
    set($("details-json"), "href", this.#address);
    $("details").showModal();
    this.#follow(this.opening);
  }

  #closed() {
    this.id = this.opening = null;
    clearTimeout(this.timer);
    (this.opener?.isConnected ? this.opener : $("requests-heading")).focus();
  }

  /** Look again and again, until this opening of the dialog is over or the request is. */
  async #follow(opening) {
    if (!document.hidden) await this.#load(opening);
    if (opening === this.opening && !this.ended)
      this.timer = setTimeout(() => this.#follow(opening), EVERY);
  }

  async #load(opening) {
    try {
      const answer = await fetch(this.#address, { cache: "no-store" });
      const request = answer.ok ? await answer.json() : null;
      if (opening !== this.opening) return;
      if (answer.status === 404) return this.#end();
      if (!answer.ok) throw new Error(`the consumer answers ${answer.status}`);
      this.request = request;
      if (this.unread) this.#note("");
      this.unread = false;
      this.draw();
    } catch (error) {
      if (opening !== this.opening) return;
      this.unread = true;
      this.#note(`The request cannot be read: ${error.message}`, "bad");
    }
  }

  get #address() {
    return `requests/${encodeURIComponent(this.id)}`;
  }

  /** It is not open any more; what became of it may be among the results. */
  #end() {
    this.ended = true;
    this.#ask(false);
    this.draw();
  }

  draw() {
    if (this.id === null) return;
    const { actions, results } = this.snapshot();
    $("abort-ask").hidden = !actions || this.ended || !$("abort").hidden;
    if (this.ended) {
      const result = results.find(({ request }) => request === this.id);
      const reason = result?.error ? `: ${result.error.message}` : "";
      this.#note(
        result ? `It has ended: ${result.status}${reason}` : "It is not open here any more.",
        result && result.status !== "completed" ? "bad" : "",
      );
    }
    if (this.request) this.#drawRequest(this.request);
  }

  #drawRequest(request) {
    drawRanges($("details-bar"), request);
    const whole = request.size === null ? "unknown" : count(request.size);
    const facts = [
      ["Unique id", request.unique_id],
      ["Version", request.version],
      ["Kind", request.block === "mem" ? "memory" : "file"],
      ["Received", `${count(request.received)} of ${whole} bytes`],
      ...(this.ended
        ? []
        : [
            ["Rate", rate(request.rate)],
            ["Remaining", request.remaining === null ? "unknown" : duration(request.remaining)],
            ["State", request.state],
          ]),
      ["Target", request.target ?? "none yet"],
      ["Opened", `${moment(this.here(request.opened_at))}, ${this.#ago(request.opened_at)} ago`],
      ["Last new bytes", `${moment(this.here(request.active_at))}, ${this.#ago(request.active_at)} ago`],
      ["Log", `partition ${request.partition}, first split at offset ${count(request.first)}`],
      ...Object.entries(request.labels).map(([name, value]) => [`Label ${name}`, value]),
    ];
    const list = $("details-facts");
    if (list.children.length !== facts.length)
      list.replaceChildren(
        ...facts.map(() => make("div", {}, make("dt"), make("dd", {}, make("bdi")))),
      );
    facts.forEach(([name, value], index) => {
      const [term, description] = list.children[index].children;
      foreign(term, name);
      foreign(description.firstElementChild, value);
    });
    put($("details-missing"), listed(request.missing, request.gaps, "none"));
    put($("details-received"), listed(request.ranges, request.ranges.length, "none"));
  }

  #ago(at) {
    return duration((this.now() - at) / 1000);
  }

  #note(text, level = "") {
    const note = $("details-note");
    note.hidden = text === "";
    set(note, "class", `notice ${level}`);
    foreign(note, text);
  }

  #ask(open) {
    $("abort").hidden = !open;
    $("abort-ask").hidden = open || !this.snapshot()?.actions || this.ended;
    if (open) $("abort-reason").focus();
  }

  async #abort() {
    const { opening } = this;
    const reason = $("abort-reason").value.trim();
    this.#ask(false);
    this.#note("Aborting …");
    let text = "The abort record is written; the result comes with the next transaction.";
    let level = "";
    try {
      const { token } = this.snapshot();
      const answer = await fetch(`${this.#address}/abort`, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Splitferry-Token": token },
        body: JSON.stringify({ reason }),
      });
      if (!answer.ok) throw new Error(await answer.text());
    } catch (error) {
      text = `Not confirmed: ${error.message}`;
      level = "bad";
    }
    if (opening === this.opening && !this.ended) this.#note(text, level);
  }
}

function listed(ranges, total, none) {
  if (!ranges.length) return none;
  const lines = ranges
    .slice(0, LISTED)
    .map(([start, end]) =>
      end === null
        ? `${count(start)} on`
        : `${count(start)} to ${count(end)} (${bytes(end - start)})`,
    );
  const more = total - lines.length;
  if (more > 0) lines.push(`… and ${count(more)} more`);
  return lines.join("\n");
}
