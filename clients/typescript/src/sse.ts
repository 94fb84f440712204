// Server-sent events, as the HTML standard reads them.

/** One event. */
export interface ServerSentEvent {
  /** Its kind; `message` where the stream does not say. */
  readonly event: string;
  /** Its data, lines joined by newlines. */
  readonly data: string;
  /** The last id that the stream gave, empty before the first. */
  readonly id: string;
}

/** Reads events out of pieces that may break anywhere. */
export class SseDecoder {
  #text = new TextDecoder();
  /** Begin of a line whose end has not come. */
  #rest = "";
  /** Whether a newline that comes first belongs to the return before it. */
  #afterReturn = false;
  #data: string[] = [];
  #event = "";
  #id = "";

  /** The events that are complete with this piece. A comment completes none. */
  push(piece: Uint8Array): ServerSentEvent[] {
    let text = this.#text.decode(piece, { stream: true });
    if (this.#afterReturn && text !== "") {
      if (text.startsWith("\n")) text = text.slice(1);
      this.#afterReturn = false;
    }
    if (text.endsWith("\r")) this.#afterReturn = true;
    const lines = (this.#rest + text).split(/\r\n|\n|\r/);
    this.#rest = lines.pop() ?? "";
    const events: ServerSentEvent[] = [];
    for (const line of lines) this.#line(line, events);
    return events;
  }

  #line(line: string, events: ServerSentEvent[]): void {
    if (line === "") {
      if (this.#data.length > 0) {
        events.push({ event: this.#event || "message", data: this.#data.join("\n"), id: this.#id });
      }
      this.#data = [];
      this.#event = "";
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    switch (field) {
      case "data":
        this.#data.push(value);
        break;
      case "event":
        this.#event = value;
        break;
      case "id":
        if (!value.includes("\0")) this.#id = value;
        break;
      // Comments have no field; `retry` is for clients that do not choose their waits.
    }
  }
}
