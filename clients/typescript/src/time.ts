// Time and chance, so that tests move the one and choose the other.

import { create } from "@bufbuild/protobuf";
import { DurationSchema, timestampFromMs, type Duration, type Timestamp } from "@bufbuild/protobuf/wkt";

import { invalid } from "./errors.js";

/** A length of time: milliseconds, or a text such as `"500ms"`, `"30s"`, `"2m"`, `"1h"`, `"7d"`. */
export type TimeSpan = number | `${number}${"ms" | "s" | "m" | "h" | "d"}`;

const UNITS: Record<string, number> = { ms: 1, s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** Milliseconds of a length of time; `field` is named when it is malformed. */
export function spanMs(field: string, span: TimeSpan): number {
  const match = typeof span === "string" ? /^(\d+(?:\.\d+)?)(ms|s|m|h|d)$/.exec(span) : undefined;
  const ms = match ? Number(match[1]) * (UNITS[match[2] ?? ""] ?? NaN) : span;
  if (typeof ms !== "number" || !Number.isFinite(ms) || ms < 0) {
    throw invalid(field, `is ${String(span)}: write milliseconds, or a text such as "30s" or "2m"`);
  }
  return ms;
}

/** A length of time as a message. */
export function durationOf(field: string, span: TimeSpan): Duration {
  const ms = spanMs(field, span);
  const seconds = Math.floor(ms / 1_000);
  return create(DurationSchema, { seconds: BigInt(seconds), nanos: Math.round((ms - seconds * 1_000) * 1e6) });
}

/** A moment: a date, or a length of time from now. */
export function momentOf(field: string, moment: Date | TimeSpan): Timestamp {
  const ms = moment instanceof Date ? moment.getTime() : Date.now() + spanMs(field, moment);
  if (!Number.isFinite(ms)) throw invalid(field, "is no valid date");
  return timestampFromMs(Math.round(ms));
}

/** What moves and what is random. */
export interface Clock {
  /** Milliseconds since some moment; never goes back. */
  now(): number;
  /** Calls back after that many milliseconds; the answer stops that. */
  after(ms: number, done: () => void): () => void;
  /** A number from 0 up to 1. */
  random(): number;
}

/** The real one. */
export const systemClock: Clock = {
  now: () => performance.now(),
  after(ms, done) {
    // A longer time would overflow and come at once.
    const timer = setTimeout(done, Math.min(ms, 2 ** 31 - 1));
    return () => clearTimeout(timer);
  },
  random: () => Math.random(),
};

/** Waits; rejects with the signal's reason when that aborts. */
export function sleep(clock: Clock, ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason);
    const leave = () => {
      stop();
      reject(signal.reason);
    };
    const stop = clock.after(ms, () => {
      signal.removeEventListener("abort", leave);
      resolve();
    });
    signal.addEventListener("abort", leave, { once: true });
  });
}

/** First bound of a wait, in milliseconds. */
const FIRST_BOUND = 100;
/** Last bound of a wait. */
const LAST_BOUND = 5_000;

/**
 * Milliseconds to wait before a repetition: anything up to a bound that doubles
 * with each failure (full jitter), so that clients do not come back together.
 * Where the server said when, not before that.
 */
export function backoffMs(clock: Clock, nFailures: number, retryAfterMs?: number): number {
  const bound = Math.min(LAST_BOUND, FIRST_BOUND * 2 ** Math.min(nFailures, 16));
  const wait = clock.random() * bound;
  return retryAfterMs === undefined ? wait : retryAfterMs + wait;
}
