"""Scores visits over HTTP: JSON, FHIR R4, CDS Hooks, and a page for the browser.

For development: ``python api_server.py``. For production: ``gunicorn -w 4 -b 0.0.0.0:5000 api_server:app``, which reads
gunicorn.conf.py. Settings come from the environment (SEPSIS_CONFIG, SEPSIS_MODEL, SEPSIS_API_KEYS, ...; see
serving/api/settings.py) or from the options below. Without API keys, gunicorn answers only through a Unix socket, and
this script makes a key that is valid for one run.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from werkzeug.serving import make_server

from common.command_line import COULD_NOT_START, DONE, log, make_parser, number, run
from feature_pipeline import BadConfig
from serving.api.security import SCOPES, new_key
from serving.api.settings import Settings


def __getattr__(name: str) -> Any:
    """`app`, made when it is first asked for: importing this module starts and loads nothing."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serving.api.app import create_app
    from serving.api.records import plain_log

    plain_log()
    globals()["app"] = create_app()
    return globals()["app"]


def serve(arguments: argparse.Namespace) -> int:
    if arguments.new_key:
        key, line = new_key(arguments.new_key, arguments.scopes.split("+"), arguments.expires)
        # whatever the log's options are: it cannot be shown again
        print(f"the key, for the client (it is shown once): {key}", file=sys.stderr)
        print("the line for the file of SEPSIS_API_KEYS:", file=sys.stderr)
        print(line)
        return DONE
    from serving.api.app import create_app
    from serving.api.records import share_pseudonym_key
    from serving.api.service import NoModel

    settings = Settings.from_environment()
    given = {
        "config": arguments.config,
        "model": arguments.model,
        "codes": arguments.codes,
        "api_keys": arguments.api_keys,
        "monitor_url": arguments.monitor,
        "audit_log": arguments.audit_log,
    }
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    share_pseudonym_key()
    insecure = settings.insecure or arguments.insecure
    key = ""
    if not insecure and not settings.api_keys:  # a key for this run, as nothing else is said
        key, line = new_key("this-run")
        settings = replace(settings, api_keys=line)
    app = create_app(replace(settings, insecure=insecure))
    try:
        app.service.pipeline()  # a bad model is told here, not at the first request
    except NoModel:
        return COULD_NOT_START
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    v6 = ":" in arguments.host
    try:
        listener = socket.create_server(
            (arguments.host, arguments.port), family=socket.AF_INET6 if v6 else socket.AF_INET
        )
    except OSError as error:
        where = f"port {arguments.port} of {arguments.host}"
        raise BadConfig(f"{where} cannot be listened on ({error.strerror}); choose another with --port") from None
    with listener:
        host, port = f"[{arguments.host}]" if v6 else arguments.host, listener.getsockname()[1]
        log.info("http://%s:%d%s (for development; use gunicorn for production)", host, port, key and f"/#key={key}")
        make_server(arguments.host, port, app, threaded=True, fd=listener.fileno()).serve_forever()
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python api_server.py --port 5000", "config", "model", "codes")
    parser.set_defaults(config=None, model=None)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=number(int, 0, 65535), default=5000, help="port to listen on; 0: a free one")
    parser.add_argument("--api-keys", metavar="FILE", help="file of lines that --new-key prints; or SEPSIS_API_KEYS")
    parser.add_argument("--new-key", metavar="NAME", help="print an API key for this client, and exit")
    parser.add_argument(
        "--scopes", default="+".join(SCOPES), help="what the new key is for: score, metrics, or both joined by +"
    )
    parser.add_argument("--expires", default="", metavar="DATE", help="last day of the new key, such as 2027-12-31")
    parser.add_argument("--insecure", action="store_true", help="answer everybody, without keys; or SEPSIS_INSECURE=1")
    parser.add_argument(
        "--audit-log",
        metavar="FILE",
        help="who asked about which visit; - is stderr (default: data/audit.jsonl)",
    )
    parser.add_argument("--monitor", metavar="URL", help="URL of the prediction log, or 'off'; or SEPSIS_MONITOR_URL")
    return run(serve, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
