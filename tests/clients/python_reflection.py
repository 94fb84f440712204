"""Python grpcio without generated code: messages come from the server's reflection.

Submits under one request id twice, follows the stream to its end, cancels, and reads the typed
details of an error and the health of each service.
"""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7070"
channel = grpc.insecure_channel(address)
database = ProtoReflectionDescriptorDatabase(channel)
pool = DescriptorPool(database)
services = database.get_services()
assert "baton.v1.TaskService" in services, services
tasks = pool.FindServiceByName("baton.v1.TaskService")


def call(name, request):
    """Calls a method of TaskService; returns its answers as dicts."""
    method = tasks.methods_by_name[name]
    answer_type = GetMessageClass(method.output_type)
    message = ParseDict(request, GetMessageClass(method.input_type)(), descriptor_pool=pool)
    path = f"/baton.v1.TaskService/{name}"
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    stub = kind(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer_type.FromString,
    )
    answer = stub(message, timeout=20)
    if method.server_streaming:
        return [MessageToDict(one, descriptor_pool=pool) for one in answer]
    return MessageToDict(answer, descriptor_pool=pool)


spec = {"model": "baton/echo", "input": {"text": "hello from python"}}
request_id = f"python-{address}"
first = call("SubmitTask", {"spec": spec, "requestId": request_id})["task"]["taskId"]
again = call("SubmitTask", {"spec": spec, "requestId": request_id})["task"]["taskId"]
assert first == again, "one request id, two tasks"

events = call("StreamTask", {"taskId": first})
sequences = [int(event["sequence"]) for event in events]
assert sequences == list(range(1, len(events) + 1)), sequences
assert events[-1]["ended"]["state"] == "TASK_STATE_SUCCEEDED", events[-1]
text = "".join(event["token"]["text"] for event in events if "token" in event)
assert "hello from python" in text, text
assert call("GetTask", {"taskId": first})["state"] == "TASK_STATE_SUCCEEDED"

waiting = call("SubmitTask", {"spec": {"model": "nobody/serves-this"}})["task"]["taskId"]
assert call("CancelTask", {"taskId": waiting})["state"] == "TASK_STATE_CANCELLED"

try:
    call("SubmitTask", {"spec": {"model": "no slash"}})
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    metadata = {key: value for key, value in error.trailing_metadata()}
    assert b"google.rpc.BadRequest" in metadata["grpc-status-details-bin"], metadata
else:
    raise AssertionError("a malformed model was accepted")

health = health_pb2_grpc.HealthStub(channel)
for service in ["", "baton.v1.TaskService", "baton.v1.RunnerService"]:
    answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
print(f"ok: submitted, followed and read {first}")
