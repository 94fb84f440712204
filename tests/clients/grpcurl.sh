#!/usr/bin/env bash
# grpcurl, by reflection: lists, describes, checks health, submits and follows.
set -euo pipefail
: "${ADDR:=127.0.0.1:7070}"

grpcurl -plaintext "$ADDR" list | grep -q '^baton.v1.TaskService$'
grpcurl -plaintext "$ADDR" describe baton.v1.TaskService | grep -q SubmitTask
grpcurl -plaintext "$ADDR" grpc.health.v1.Health/Check | grep -q SERVING
answer=$(grpcurl -plaintext -d '{"spec": {"model": "baton/echo", "input": {"text": "hello from grpcurl"}}}' \
  "$ADDR" baton.v1.TaskService/SubmitTask)
task=$(grep -o '"taskId": *"[^"]*"' <<<"$answer" | head -1 | cut -d'"' -f4)
events=$(grpcurl -plaintext -d "{\"task_id\": \"$task\"}" "$ADDR" baton.v1.TaskService/StreamTask)
grep -q TASK_STATE_SUCCEEDED <<<"$events"
grpcurl -plaintext -d "{\"task_id\": \"$task\"}" "$ADDR" baton.v1.TaskService/GetTaskResult | grep -q 'hello from grpcurl'
echo "ok: submitted, followed and read $task"
