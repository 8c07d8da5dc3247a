// Renders /openapi.json for reading.
import { make } from "/static/dom.js";

const spec = await (await fetch("/openapi.json")).json();
document.getElementById("about").textContent = spec.info.description;

const resolve = (schema) => (schema.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema);

function shape(given, depth = 0) {
  const schema = resolve(given);
  if (depth > 4) return "…";
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const pad = "  ".repeat(depth + 1);
  if (schema.type === "array") return `[ ${shape(schema.items, depth)}, … ]`;
  if (schema.type === "object" && schema.properties) {
    const required = new Set(schema.required || []);
    const lines = Object.entries(schema.properties).map(
      ([name, part]) => `${pad}"${name}"${required.has(name) ? "" : "?"}: ${shape(part, depth + 1)}`);
    return `{\n${lines.join(",\n")}\n${"  ".repeat(depth)}}`;
  }
  return [schema.type ?? "any"].flat().join(" | ");
}

const operations = document.getElementById("operations");
for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const box = make("article", {}, make("h2", {}, make("code", {}, `${method.toUpperCase()} ${path}`)),
      make("p", {}, [operation.summary, operation.description].filter(Boolean).join(". ")));
    for (const option of operation.parameters || []) {
      box.append(make("p", {}, make("code", {}, `?${option.name}=`), ` ${option.description}${option.schema.maximum ? ` (0 to ${option.schema.maximum})` : ""}`));
    }
    if (operation.requestBody) {
      const [kind, body] = Object.entries(operation.requestBody.content)[0];
      box.append(make("h3", {}, `Request: ${kind}`), make("pre", {}, shape(body.schema)));
    }
    const rows = Object.entries(operation.responses).map(([status, answer]) =>
      make("tr", {}, make("th", { scope: "row" }, status), make("td", {}, answer.description)));
    box.append(make("h3", {}, "Answers"), make("table", {}, make("tbody", {}, ...rows)));
    const good = Object.entries(operation.responses["200"].content)[0];
    box.append(make("details", {}, make("summary", {}, `Form of the answer (${good[0]})`),
      make("pre", {}, shape(good[1].schema))));
    operations.append(box);
  }
}
