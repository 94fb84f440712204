#!/usr/bin/env bash
# The calls of docs/http.md, with curl alone.
set -euo pipefail
base=http://$ADDR
post() { curl -fsS -H 'content-type: application/json' -d "$2" "$base$1"; }
field() { sed -n "s/.*\"$1\":\"\\([^\"]*\\)\".*/\\1/p" | head -1; }

task=$(post /v1/tasks '{"spec": {"model": "baton/echo", "input": {"text": "hello from curl"}, "labels": {"team": "demo"}}}' | field taskId)
[ -n "$task" ]
stream=$(curl -fsSN --max-time 20 "$base/v1/tasks/$task/stream")
grep -q '^event: attempt_started$' <<<"$stream"
grep -q '^event: ended$' <<<"$stream"
last=$(sed -n 's/^id: //p' <<<"$stream" | tail -1)
[ "$(curl -sS -o /dev/null -w '%{http_code}' -H "last-event-id: $last" "$base/v1/tasks/$task/stream")" = 204 ]
curl -fsSN -H 'accept: application/x-ndjson' "$base/v1/tasks/$task/stream" | tail -1 | grep -q '"ended"'
curl -fsS "$base/v1/tasks/$task" | grep -q TASK_STATE_SUCCEEDED
curl -fsSg "$base/v1/tasks?states=TASK_STATE_SUCCEEDED&labels[team]=demo&pageSize=10" | grep -q "$task"
curl -fsS "$base/v1/tasks/$task/result" | grep -q '"text"'
post "/v1/tasks/$task/cancel" '{"reason": "no longer needed"}' >/dev/null
token=$(post /v1/tokens "{\"taskId\": \"$task\"}" | field token)
curl -fsSN "$base/v1/tasks/$task/stream?access_token=$token" | grep -q '^event: ended$'
post /v1/tasks:run '{"spec": {"model": "baton/echo", "input": {"text": "run"}}}' | grep -q '^event: ended$'
[ "$(curl -sS -o /dev/null -w '%{http_code}' -d '{}' "$base/v1/tasks")" = 415 ]
echo "curl: task $task"
