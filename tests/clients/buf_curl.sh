#!/usr/bin/env bash
# buf curl, by reflection: lists, submits, follows to the end, reads an error's details.
set -euo pipefail
: "${ADDR:=127.0.0.1:7070}"
call() { buf curl --http2-prior-knowledge --protocol grpc "http://$ADDR/baton.v1.$1" -d "$2"; }

methods=$(buf curl --http2-prior-knowledge --protocol grpc --list-methods "http://$ADDR")
grep -q baton.v1.TaskService/SubmitTask <<<"$methods"
answer=$(call TaskService/SubmitTask '{"spec": {"model": "baton/echo", "input": {"text": "hello from buf"}}}')
task=$(grep -o '"taskId": *"[^"]*"' <<<"$answer" | head -1 | cut -d'"' -f4)
events=$(call TaskService/StreamTask "{\"taskId\": \"$task\"}")
grep -q '"ended"' <<<"$events"
grep -q TASK_STATE_SUCCEEDED <<<"$events"
text=$(call TaskService/GetTaskResult "{\"taskId\": \"$task\"}")
grep -q 'hello from buf' <<<"$text"
if refusal=$(call TaskService/GetTask '{"taskId": "018f0000-0000-7000-8000-000000000000"}' 2>&1); then
  echo "a task that does not exist was returned: $refusal"
  exit 1
fi
grep -q not_found <<<"$refusal"
grep -q ErrorInfo <<<"$refusal"
# The same over the protocols of browsers, in HTTP/1.1.
for protocol in connect grpcweb; do
  other() { buf curl --schema proto --protocol $protocol "http://$ADDR/baton.v1.$1" -d "$2"; }
  [ "$(other TaskService/GetTaskResult "{\"taskId\": \"$task\"}")" = "$text" ]
  [ "$(other TaskService/StreamTask "{\"taskId\": \"$task\"}")" = "$events" ]
  if refusal=$(other TaskService/GetTask '{"taskId": "018f0000-0000-7000-8000-000000000000"}' 2>&1); then
    echo "$protocol: a task that does not exist was returned: $refusal"
    exit 1
  fi
  grep -q not_found <<<"$refusal"
done
echo "ok: submitted, followed and read $task"
