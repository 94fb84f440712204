#!/usr/bin/env bash
# h2load on the unary path: framed GetTask and SubmitTask requests over many streams.
set -euo pipefail
: "${ADDR:=127.0.0.1:7070}"
body=$(mktemp)
trap 'rm -f "$body"' EXIT

load() {
  local answer
  answer=$(h2load -n "$2" -c 4 -m 16 -d "$body" -H 'content-type: application/grpc' -H 'te: trailers' \
    "http://$ADDR/baton.v1.TaskService/$1")
  grep -E '^(finished|requests|status codes|time for request)' <<<"$answer"
  grep -q "^requests: $2 total, $2 started, $2 done, $2 succeeded, 0 failed" <<<"$answer"
  grep -q "^status codes: $2 2xx" <<<"$answer"
}

# A frame is a zero byte, four bytes of length, and the message.
# GetTask { task_id: 36 characters } of a task that does not exist.
printf '\000\000\000\000\046\012\044018f0000-0000-7000-8000-000000000000' >"$body"
load GetTask 5000
# SubmitTask { spec { model: "bench/h2" } }.
printf '\000\000\000\000\014\012\012\012\010bench/h2' >"$body"
load SubmitTask 1000
