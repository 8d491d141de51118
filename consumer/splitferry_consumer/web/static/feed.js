// The stream of snapshots: reconnects by itself, and knows when nobody is at the other end.

/** Milliseconds without a word after which it is asked whether the consumer still answers. */
const SILENCE = 5000;
const ANSWER = 3000;
const AGAIN = 1000;

export class Feed {
  /** `heard` gets each snapshot; `changed` is called when the state below is another one. */
  constructor(heard, changed) {
    this.heard = heard;
    this.changed = changed;
    /** "connecting", "live", or "lost". */
    this.state = "connecting";
    /** When the consumer was last heard, in Unix ms. */
    this.since = Date.now();
    this.query = "";
  }

  /** Follow a view, in place of the one before; a hidden page waits until it is shown. */
  open(query = this.query) {
    this.query = query;
    this.close();
    if (document.hidden) return;
    const source = new EventSource(`events?${query}`);
    source.addEventListener("status", (event) => {
      this.#alive();
      this.heard(JSON.parse(event.data));
    });
    source.addEventListener("error", () => this.#lose());
    this.source = source;
    this.#listen();
  }

  close() {
    this.source?.close();
    this.source = null;
    clearTimeout(this.timer);
  }

  #become(state) {
    if (this.state === state) return;
    this.state = state;
    this.changed();
  }

  #alive() {
    this.since = Date.now();
    this.#become("live");
    this.#listen();
  }

  #listen() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#ask(), SILENCE);
  }

  /** Silence is usual while nothing moves; but a frozen process is as silent. */
  async #ask() {
    const { source } = this;
    try {
      await fetch("healthz", { cache: "no-store", signal: AbortSignal.timeout(ANSWER) });
      if (source === this.source && source.readyState === EventSource.OPEN) this.#alive();
      else if (source === this.source) this.#lose();
    } catch {
      if (source === this.source) this.#lose();
    }
  }

  /** Not left to the browser: it gives up on some answers, and waits for ever on a dead line. */
  #lose() {
    this.close();
    this.#become("lost");
    this.timer = setTimeout(() => this.open(), AGAIN);
  }
}
