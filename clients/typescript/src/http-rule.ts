// From a request message to an HTTP request, by the method's `google.api.http` annotation.

import {
  getOption,
  hasOption,
  toJson,
  type DescField,
  type DescMessage,
  type DescMethod,
  type JsonObject,
  type JsonValue,
  type Message,
} from "@bufbuild/protobuf";

import { invalid, errorOf } from "./errors.js";
import { http } from "./gen/google/api/annotations_pb.js";
import type { HttpRule } from "./gen/google/api/http_pb.js";

/** An HTTP request. */
export interface HttpRequest {
  /** Method, such as `GET`. */
  method: string;
  /** Path and query, beginning with a slash. */
  target: string;
  /** JSON of the body; unset when there is none. */
  body: string | undefined;
}

/** The HTTP request for a call. */
export function httpRequest(method: DescMethod, request: Message): HttpRequest {
  const json = toJson(method.input, request) as JsonObject;
  const rule = chooseRule(method, json);
  const { verb, template } = pattern(method, rule);
  const rest: JsonObject = { ...json };
  const path = template.replace(/\{([^}=]+)(?:=([^}]*))?\}/g, (_, name: string, shape: string | undefined) => {
    const field = fieldOf(method.input, name);
    const value = rest[field.jsonName];
    delete rest[field.jsonName];
    if (value === undefined || value === "") throw invalid(name, "must not be empty");
    return encodePath(String(value), shape);
  });
  if (rule.body === "*") return { method: verb, target: path, body: JSON.stringify(rest) };
  let body: string | undefined;
  if (rule.body !== "") {
    const field = fieldOf(method.input, rule.body);
    body = JSON.stringify(rest[field.jsonName] ?? null);
    delete rest[field.jsonName];
  }
  const query = new URLSearchParams();
  for (const field of method.input.fields) addToQuery(query, field.jsonName, field, rest[field.jsonName]);
  const text = query.toString();
  return { method: verb, target: text === "" ? path : `${path}?${text}`, body };
}

/** The first way to call the method that can express the request. */
function chooseRule(method: DescMethod, json: JsonObject): HttpRule {
  if (!hasOption(method, http)) {
    throw errorOf({
      code: "UNIMPLEMENTED",
      reason: "UNIMPLEMENTED",
      message: `${method.parent.typeName}.${method.name} cannot be called over HTTP`,
    });
  }
  const first = getOption(method, http);
  const rules = [first, ...first.additionalBindings];
  const fits = (rule: HttpRule) =>
    rule.body === "*" ||
    method.input.fields.every((field) => {
      const isLarge = field.fieldKind === "list" && field.listKind === "message";
      return !isLarge || json[field.jsonName] === undefined || rule.body === field.name;
    });
  return rules.find(fits) ?? first;
}

function pattern(method: DescMethod, rule: HttpRule): { verb: string; template: string } {
  const { case: verb, value } = rule.pattern;
  if (verb === "custom") return { verb: value.kind, template: value.path };
  if (verb === undefined) throw new TypeError(`${method.name} has a binding without a path`);
  return { verb: verb.toUpperCase(), template: value };
}

function fieldOf(message: DescMessage, name: string): DescField {
  const field = message.fields.find((field) => field.name === name);
  if (field === undefined) throw new TypeError(`${message.typeName} has no field ${name}`);
  return field;
}

/** A variable of one segment takes anything; one of several keeps its slashes. */
function encodePath(value: string, shape: string | undefined): string {
  if (shape === undefined || shape === "*") return encodeURIComponent(value);
  return value.split("/").map(encodeURIComponent).join("/");
}

function addToQuery(query: URLSearchParams, name: string, field: DescField, value: JsonValue | undefined): void {
  if (value === undefined || value === null) return;
  if (Array.isArray(value)) {
    for (const element of value) query.append(name, String(element));
  } else if (typeof value !== "object") {
    query.append(name, String(value));
  } else if (field.fieldKind === "map") {
    for (const [key, element] of Object.entries(value)) query.append(`${name}[${key}]`, String(element));
  } else if (field.fieldKind === "message") {
    for (const inner of field.message.fields) {
      addToQuery(query, `${name}.${inner.jsonName}`, inner, value[inner.jsonName]);
    }
  }
}
