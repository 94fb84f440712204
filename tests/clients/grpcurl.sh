#!/usr/bin/env bash
# grpcurl, by reflection: lists, describes, checks health, submits and follows.
set -euo pipefail
: "${ADDR:=127.0.0.1:7070}"

grep -q '^baton.v1.TaskService$' <<<"$(grpcurl -plaintext "$ADDR" list)"
grep -q SubmitTask <<<"$(grpcurl -plaintext "$ADDR" describe baton.v1.TaskService)"
grep -q SERVING <<<"$(grpcurl -plaintext "$ADDR" grpc.health.v1.Health/Check)"
answer=$(grpcurl -plaintext -d '{"spec": {"model": "baton/echo", "input": {"text": "hello from grpcurl"}}}' \
  "$ADDR" baton.v1.TaskService/SubmitTask)
task=$(grep -o '"taskId": *"[^"]*"' <<<"$answer" | head -1 | cut -d'"' -f4)
events=$(grpcurl -plaintext -d "{\"task_id\": \"$task\"}" "$ADDR" baton.v1.TaskService/StreamTask)
grep -q TASK_STATE_SUCCEEDED <<<"$events"
result=$(grpcurl -plaintext -d "{\"task_id\": \"$task\"}" "$ADDR" baton.v1.TaskService/GetTaskResult)
grep -q 'hello from grpcurl' <<<"$result"
echo "ok: submitted, followed and read $task"
