// Pasted text to observations: JSON, or CSV with quotes; comma, semicolon or tab between fields.
export function parseObservations(text) {
  const start = text.trimStart(); // also without a byte order mark
  if (start.startsWith("[") || start.startsWith("{")) {
    const value = JSON.parse(exact(start));
    if (!Array.isArray(value)) throw new Error("the JSON is not a list of observations");
    return value;
  }
  const rows = parseCsv(text);
  if (rows.length < 2) throw new Error("no observations: a header and at least one line are needed");
  const header = rows[0].map((name) => name.trim());
  if (!header.includes("visit_id")) throw new Error("the first line must be a header with visit_id, client, observation_date, observation_type_code, observation_value");
  return rows.slice(1).map((row) => Object.fromEntries(header.map((name, i) => [name, row[i] ?? ""])));
}

// long whole numbers as texts: as numbers they would be rounded, and two visits become one
const exact = (json) => json.replace(/"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g, (token) => (/^-?\d{16,}$/.test(token) ? `"${token}"` : token));

function parseCsv(text) {
  const first = text.slice(0, text.indexOf("\n") + 1 || text.length);
  const separator = [",", ";", "\t"].map((c) => [first.split(c).length, c]).sort((a, b) => b[0] - a[0])[0][1];
  const rows = [];
  let row = [], field = "", quoted = false;
  const end = () => { row.push(field); field = ""; };
  for (let i = text.charCodeAt(0) === 0xfeff ? 1 : 0; i < text.length; i++) {
    const c = text[i];
    if (quoted) {
      if (c === '"' && text[i + 1] === '"') { field += c; i++; }
      else if (c === '"') quoted = false;
      else field += c;
    } else if (c === '"' && field === "") quoted = true;
    else if (c === separator) end();
    else if (c === "\n") { end(); if (row.some((cell) => cell !== "")) rows.push(row); row = []; }
    else if (c !== "\r") field += c;
  }
  end();
  if (row.some((cell) => cell !== "")) rows.push(row);
  return rows;
}

export const visitKey = (row) => JSON.stringify([String(row.client).trim(), String(row.visit_id).trim()]);
