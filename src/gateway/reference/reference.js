"use strict";

// Draws the operations of openapi.json and calls them from the page.

const make = (name, props = {}, ...children) => {
  const element = Object.assign(document.createElement(name), props);
  element.append(...children);
  return element;
};

const resolve = (api, node) => {
  while (node && node.$ref) node = node.$ref.slice(2).split("/").reduce((at, key) => at[key], api);
  return node ?? {};
};

// A value that fits the schema, for the body's first draft.
const sample = (api, schema, depth = 0) => {
  schema = resolve(api, schema);
  if (schema.examples) return schema.examples[0];
  if (schema.enum) return schema.enum[1] ?? schema.enum[0];
  if (schema.anyOf) return sample(api, schema.anyOf[0], depth);
  if (schema.type === "array") return depth > 2 ? [] : [sample(api, schema.items, depth + 1)];
  if (schema.type === "object") {
    if (depth > 2) return {};
    const entries = Object.entries(schema.properties ?? {});
    return Object.fromEntries(entries.map(([key, value]) => [key, sample(api, value, depth + 1)]));
  }
  if (schema.type === "boolean") return false;
  if (schema.type === "integer" || schema.type === "number") return 0;
  if (schema.format === "date-time") return new Date(0).toISOString();
  if (schema.pattern) return "0";
  return "";
};

// Names and types of a schema's properties, as text.
const outline = (api, schema, indent = "", depth = 0) => {
  schema = resolve(api, schema);
  if (schema.type === "array") return `list of ${outline(api, schema.items, indent, depth)}`;
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.anyOf) return schema.anyOf.map((one) => outline(api, one, indent, depth)).join(" | ");
  if (schema.type !== "object" || !schema.properties || depth > 3) return schema.format ?? schema.type ?? "any";
  const lines = Object.entries(schema.properties).map(([key, value]) => {
    const about = value.description ? `  // ${value.description}` : "";
    return `${indent}  ${key}: ${outline(api, value, indent + "  ", depth + 1)}${about}`;
  });
  return `{\n${lines.join("\n")}\n${indent}}`;
};

const call = async (method, path, operation, fields, text, output, signal) => {
  const query = new URLSearchParams();
  const headers = {};
  for (const [parameter, input] of fields) {
    if (!input.value) continue;
    if (parameter.in === "path") path = path.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
    else if (parameter.in === "header") headers[parameter.name] = input.value;
    else if (parameter.style === "deepObject")
      for (const pair of input.value.split(",")) {
        const [key, ...value] = pair.split("=");
        query.append(`${parameter.name}[${key}]`, value.join("="));
      }
    else for (const value of input.value.split(",")) query.append(parameter.name, value);
  }
  const credential = document.getElementById("credential").value;
  if (credential) headers.authorization = `Bearer ${credential}`;
  if (operation.requestBody) headers["content-type"] = "application/json";
  const url = query.size ? `${path}?${query}` : path;
  output.textContent = `${method} ${url}\n`;
  const response = await fetch(url, { method, headers, signal, body: operation.requestBody ? text : undefined });
  output.textContent += `${response.status} ${response.statusText}\n`;
  for (const name of ["x-correlation-id", "retry-after"])
    if (response.headers.has(name)) output.textContent += `${name}: ${response.headers.get(name)}\n`;
  output.textContent += "\n";
  if (!response.body) return;
  const kind = response.headers.get("content-type") ?? "";
  if (kind.startsWith("application/json")) {
    output.textContent += JSON.stringify(await response.json(), null, 2);
    return;
  }
  for (let reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) break;
    output.textContent += value;
    output.scrollTop = output.scrollHeight;
  }
};

const draw = (api, path, method, operation) => {
  const head = make("summary", {},
    make("span", { className: "method", textContent: method }),
    make("code", { textContent: path }),
    make("span", { className: "about", textContent: operation.summary }));
  const block = make("details", {}, head);
  const fill = () => {
    const body = make("div", { className: "body" }, make("p", { textContent: operation.description }));
    const fields = [];
    if (operation.parameters.length) {
      const table = make("table", {}, make("tr", {},
        ...["name", "in", "value", ""].map((text) => make("th", { textContent: text }))));
      for (const parameter of operation.parameters) {
        const input = make("input", { ariaLabel: parameter.name, placeholder: parameter.style ? "key=value,…" : "" });
        fields.push([parameter, input]);
        table.append(make("tr", {},
          make("td", {}, make("code", { textContent: parameter.name })),
          make("td", { textContent: parameter.in }),
          make("td", {}, input),
          make("td", { textContent: parameter.description ?? "" })));
      }
      body.append(table);
    }
    const text = make("textarea", { ariaLabel: "body", spellcheck: false });
    if (operation.requestBody) {
      const schema = operation.requestBody.content["application/json"].schema;
      text.value = JSON.stringify(sample(api, schema), null, 2);
      body.append(make("h3", { textContent: "Body" }), text,
        make("details", {}, make("summary", { textContent: "Fields" }), make("pre", { textContent: outline(api, schema) })));
    }
    const output = make("pre", { hidden: true });
    let running = null;
    const stop = make("button", { textContent: "Stop", disabled: true, onclick: () => running?.abort() });
    const send = make("button", { textContent: "Send" });
    send.onclick = async () => {
      running = new AbortController();
      output.hidden = false;
      send.disabled = !(stop.disabled = false);
      try {
        await call(method, path, operation, fields, text.value, output, running.signal);
      } catch (error) {
        output.textContent += `\n${error.message}`;
      } finally {
        send.disabled = !(stop.disabled = true);
      }
    };
    body.append(send, stop, output);
    for (const [status, response] of Object.entries(operation.responses)) {
      const { description, content } = resolve(api, response);
      const item = make("details", {}, make("summary", { textContent: `${status} ${description}` }));
      if (content?.["application/json"]) item.append(make("pre", { textContent: outline(api, content["application/json"].schema) }));
      body.append(item);
    }
    block.append(body);
  };
  block.addEventListener("toggle", fill, { once: true });
  block.dataset.text = `${method} ${path} ${operation.summary}`.toLowerCase();
  return block;
};

const start = async () => {
  const api = await (await fetch("/openapi.json")).json();
  const main = document.getElementById("operations");
  main.textContent = "";
  for (const tag of api.tags) {
    const section = make("section", {}, make("h2", { textContent: tag.name }), make("p", { textContent: tag.description }));
    for (const [path, operations] of Object.entries(api.paths))
      for (const [method, operation] of Object.entries(operations))
        if (operation.tags.includes(tag.name)) section.append(draw(api, path, method.toUpperCase(), operation));
    main.append(section);
  }
  document.getElementById("filter").oninput = (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const block of main.querySelectorAll("section > details")) block.hidden = !block.dataset.text.includes(wanted);
  };
};

start().catch((error) => (document.getElementById("operations").textContent = `openapi.json: ${error.message}`));
