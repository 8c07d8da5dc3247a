"""A FHIR R4 server for tests, written from the specification: search, paging, versions, conditional create, SMART
Backend Services; and faults. Its clock is the test's."""

import json
import threading
import uuid
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import jwt


class FhirServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, now, jwks=None, client_id="sepsis-risk"):
        self.now, self.jwks, self.client_id = now, jwks, client_id
        self.resources = {}  # (type, id): versions, the newest last; None is a deletion
        self.asked = []  # (method, path and query, headers)
        self.faults = []  # (method, type, status, headers), each used once
        self.before = {}  # (method, type): called once before it is answered
        self.tokens, self.used = set(), set()
        self.pages = {}
        self.page_size, self.circular, self.page_twice = 500, False, False
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base = f"http://127.0.0.1:{self.server_port}/fhir"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()

    def put(self, resource):
        """Stores a resource as a user of the server would."""
        key = resource["resourceType"], resource.setdefault("id", uuid.uuid4().hex)
        versions = self.resources.setdefault(key, [])
        updated = datetime.fromtimestamp(self.now(), UTC).isoformat(timespec="milliseconds")
        versions.append({**resource, "meta": {"versionId": str(len(versions) + 1), "lastUpdated": updated}})
        return versions[-1]

    def delete(self, kind, number):
        self.resources[kind, number].append(None)

    def all(self, kind):
        return [versions[-1] for (k, _), versions in self.resources.items() if k == kind and versions[-1]]

    def search(self, kind, given):
        def has(resource):
            for name, value in given:
                wanted = value.split(",")
                if name == "_id":
                    fits = resource["id"] in wanted
                elif name == "status":
                    fits = resource["status"] in wanted
                elif name == "encounter":
                    fits = resource.get("encounter", {}).get("reference", "") in wanted
                elif name == "identifier":
                    fits = value in {f"{i['system']}|{i['value']}" for i in resource.get("identifier", [])}
                elif name == "_lastUpdated":
                    assert value.startswith("ge")
                    updated = datetime.fromisoformat(resource["meta"]["lastUpdated"])
                    fits = updated >= datetime.fromisoformat(value[2:])
                elif name == "class":
                    fits = resource.get("class", {}).get("code") in wanted
                else:
                    assert name == "_count", f"this server does not know {name}"
                    fits = True
                if not fits:
                    return False
            return True

        return [resource for resource in self.all(kind) if has(resource)]


class _Handler(BaseHTTPRequestHandler):
    def answer(self, status, body=None, **headers):
        content = json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/fhir+json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def date_time_string(self, timestamp=None):
        return formatdate(self.server.now(), usegmt=True)

    def log_message(self, *_):
        pass

    def outcome(self, status, code, **headers):
        issue = {"severity": "error", "code": code}
        self.answer(status, {"resourceType": "OperationOutcome", "issue": [issue]}, **headers)

    def handle_one(self):
        server, method = self.server, self.command
        parts = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts.path == "/token":
            return self.token(content)
        if parts.path == "/fhir/.well-known/smart-configuration":
            return self.answer(200, {"token_endpoint": f"http://127.0.0.1:{server.server_port}/token"})
        kind, _, number = parts.path.removeprefix("/fhir").strip("/").partition("/")
        server.asked.append((method, self.path, dict(self.headers.items())))
        if (happens := server.before.pop((method, kind), None)) is not None:
            happens()
        for fault in server.faults:
            if fault[:2] == (method, kind):
                server.faults.remove(fault)
                return self.outcome(fault[2], "transient", **fault[3])
        if (
            server.jwks is not None
            and self.headers.get("Authorization", "").removeprefix("Bearer ") not in server.tokens
        ):
            return self.outcome(401, "login")
        if not kind:
            return self.page(parse_qs(parts.query)["page"][0])
        return getattr(self, f"on_{method}")(kind, number, parts.query, json.loads(content) if content else None)

    do_GET = do_POST = do_PUT = handle_one

    def on_GET(self, kind, number, query, _):
        if number:
            versions = self.server.resources.get((kind, number))
            if not versions or versions[-1] is None:
                return self.outcome(410 if versions else 404, "not-found")
            return self.answer(200, versions[-1], ETag=f'W/"{versions[-1]["meta"]["versionId"]}"')
        found, size = self.server.search(kind, parse_qsl(query)), self.server.page_size
        pages = [found[i : i + size] for i in range(0, len(found), size)] or [[]]
        if self.server.page_twice:
            pages = [page for page in pages for _ in range(2)]
        keys = [uuid.uuid4().hex for _ in pages]
        for i, (key, page) in enumerate(zip(keys, pages, strict=True)):
            following = keys[0] if self.server.circular else keys[i + 1] if i + 1 < len(keys) else None
            links = (
                [{"relation": "next", "url": f"{self.server.base}?{urlencode({'page': following})}"}]
                if following
                else []
            )
            entries = [{"fullUrl": f"{self.server.base}/{kind}/{r['id']}", "resource": r} for r in page]
            self.server.pages[key] = {"resourceType": "Bundle", "type": "searchset", "link": links, "entry": entries}
        return self.page(keys[0])

    def page(self, key):
        self.answer(200, self.server.pages[key])

    def on_POST(self, kind, _, __, resource):
        condition = self.headers.get("If-None-Exist")
        if condition and (found := self.server.search(kind, parse_qsl(condition))):
            return self.answer(200, found[0])
        stored = self.server.put({name: value for name, value in resource.items() if name != "id"})
        location = f"{self.server.base}/{kind}/{stored['id']}/_history/{stored['meta']['versionId']}"
        return self.answer(201, stored, Location=location, ETag=f'W/"{stored["meta"]["versionId"]}"')

    def on_PUT(self, kind, number, _, resource):
        assert resource["id"] == number
        versions = self.server.resources.get((kind, number))
        if not versions or versions[-1] is None:
            return self.outcome(410 if versions else 404, "deleted")
        given = self.headers.get("If-Match")
        if given and given != f'W/"{versions[-1]["meta"]["versionId"]}"':
            return self.outcome(412, "conflict")
        stored = self.server.put(resource)
        return self.answer(200, stored, ETag=f'W/"{stored["meta"]["versionId"]}"')

    def token(self, content):
        """SMART Backend Services, "Obtain access token", with every check that the standard asks of a server."""
        form = {name: value[0] for name, value in parse_qs(content.decode()).items()}
        assert form["grant_type"] == "client_credentials" and form["scope"]
        assert form["client_assertion_type"] == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
        header = jwt.get_unverified_header(form["client_assertion"])
        assert header["typ"] == "JWT" and header["alg"] in ("RS384", "ES384")
        try:
            (key,) = [jwt.PyJWK(key, header["alg"]) for key in self.server.jwks["keys"] if key["kid"] == header["kid"]]
            claims = jwt.decode(
                form["client_assertion"],
                key,
                algorithms=[header["alg"]],
                audience=f"http://127.0.0.1:{self.server.server_port}/token",
                issuer=self.server.client_id,
                options={"require": ["iss", "sub", "aud", "exp", "jti"], "verify_exp": False, "verify_iat": False},
            )
        except jwt.PyJWTError:
            return self.answer(401, {"error": "invalid_client"})
        assert claims["sub"] == claims["iss"] and claims["jti"] not in self.server.used
        assert self.server.now() < claims["exp"] <= self.server.now() + 300
        self.server.used.add(claims["jti"])
        token = uuid.uuid4().hex
        self.server.tokens.add(token)
        return self.answer(
            200, {"access_token": token, "token_type": "bearer", "expires_in": 300, "scope": form["scope"]}
        )
