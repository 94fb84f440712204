#!/usr/bin/env bash
# Requests made from the description of the API, valid and not: no 5xx, and every answer is one that the
# description has. The seed changes with every run and is printed; a failure says how to repeat it.
set -euo pipefail
: "${ADDR:=127.0.0.1:7070}"
checks=not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance
checks+=,response_schema_conformance,unsupported_method
# It keeps what it saw in the directory where it runs.
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
said=$place/said
if ! "$1" run "http://$ADDR/openapi.json" --checks "$checks" --phases examples,coverage,fuzzing \
  --max-time 60 --max-examples 20 --request-timeout 10 --continue-on-failure --no-shrink --no-color \
  --warnings off ${SEED:+--seed "$SEED"} >"$said" 2>&1; then
  cat "$said"
  exit 1
fi
grep -E '^ +(Selected|Tested):|generated|^Seed' "$said"
