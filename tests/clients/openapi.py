"""The description of the API is OpenAPI 3.1, by another implementation's validator."""

import json
import sys
import urllib.request

from openapi_spec_validator import OpenAPIV31SpecValidator

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7070"
with urllib.request.urlopen(f"http://{address}/openapi.json", timeout=20) as answer:
    document = json.load(answer)

problems = list(OpenAPIV31SpecValidator(document).iter_errors())
for problem in problems[:20]:
    print(list(problem.absolute_path), problem.message)
assert not problems, f"{len(problems)} problems"
operations = [operation for path in document["paths"].values() for operation in path.values()]
assert len(operations) >= 25, len(operations)
assert all(operation["description"] for operation in operations), "an operation without a comment"
print(f"openapi: {len(operations)} operations, {len(document['components']['schemas'])} schemas")
