"""Scores visits while their observations arrive: JSON lines, Kafka, or HL7 over MLLP.

By default JSON lines come from stdin and results go to stdout: ``tail -f feed.jsonl | python stream_processor.py``.
With --state, a file keeps the accepted observations, so that a restart continues where the last run ended. At SIGTERM,
the accepted observations are scored and the open visits are saved.

    processor = StreamProcessor("models/best_model_config.json", "models/best_model.pkl")
    processor.add_observation({"visit_id": 1, "client": "A", ...})
    if processor.should_predict(1):
        result = processor.predict_visit(1)
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from common.command_line import DONE, SOME_FAILED, log, make_parser, number, read_site_codes, run, spare_the_loaded
from feature_pipeline import BadConfig
from monitoring.log import url_of
from serving.stream.alerts import AlertBook, AlertSinks
from serving.stream.feed import Feed, read_lines
from serving.stream.hl7_mapping import Hl7Mapping, read_hl7_mapping
from serving.stream.journal import Journal
from serving.stream.processor import NOW, StreamProcessor

__all__ = ["StreamProcessor", "main"]
DEFAULT_STATE = "data/stream_state.db"


def stream(arguments: argparse.Namespace) -> int:
    refuse_unused(arguments)
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        processor = StreamProcessor(
            arguments.config,
            arguments.model,
            arguments.min_observations,
            max_visits=arguments.max_visits,
            max_observations=arguments.max_observations,
            idle_hours=arguments.idle_hours,
            as_of=arguments.as_of,
            codes=read_site_codes(arguments.codes),
            prediction_log=url_of(arguments.monitor),
        )
        spare_the_loaded()
        book = AlertBook(arguments.cooldown_hours)
        sinks = AlertSinks(arguments.alerts, arguments.webhook)
        if arguments.kafka:
            from serving.stream.kafka import consume

            return SOME_FAILED if consume(processor, book, sinks, arguments, stop.is_set) else DONE
        state = arguments.state or (DEFAULT_STATE if arguments.mllp else None)
        feed = Feed(processor, book, sinks, Journal(state, arguments.durable) if state else None)
        try:
            if arguments.mllp:
                receive(feed, arguments.mllp, read_hl7_mapping(arguments.hl7), stop)
            else:
                read_lines(feed, sys.stdin.fileno(), stop.is_set)
        finally:
            feed.finish()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return SOME_FAILED if feed.failed else DONE


def refuse_unused(arguments: argparse.Namespace) -> None:
    """Raises `BadConfig` for options that would be silently without effect."""
    if arguments.hl7 and not arguments.mllp:
        raise BadConfig("--hl7 describes the messages of --mllp: give both options")
    if arguments.kafka:
        names = ("alerts", "webhook", "mllp", "hl7")
        unused = [f"--{name}" for name in names if getattr(arguments, name)]
        if unused:
            raise BadConfig(
                f"--kafka goes without {', '.join(unused)}: its observations and alerts are topics "
                "(--topic, --alerts-topic, --dropped-topic)"
            )


def receive(feed: Feed, address: tuple[str, int], mapping: Hl7Mapping, stop: threading.Event) -> None:
    """Serves MLLP until SIGTERM or SIGINT."""
    import asyncio

    from serving.stream.mllp import serve

    async def work() -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, ended.set)
        if stop.is_set():
            ended.set()
        started = lambda port: log.info("receiving HL7 over MLLP at port %d", port)  # noqa: E731
        await serve(feed, *address, ended, started, mapping)

    asyncio.run(work())


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` as a pair."""
    host, _, port = text.rpartition(":")
    if not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT, such as 127.0.0.1:2575")
    return host or "127.0.0.1", int(port)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "tail -f feed.jsonl | python stream_processor.py", "config", "model", "codes")
    parser.add_argument("--kafka", metavar="BROKERS", help="read from Kafka: HOST:PORT, several with commas between")
    parser.add_argument("--topic", default="observations", help="Kafka topic of the observations, keyed by visit")
    parser.add_argument("--out", default="predictions", metavar="TOPIC", help="Kafka topic of the results")
    parser.add_argument("--alerts-topic", default="sepsis-alerts", metavar="TOPIC", help="Kafka topic of the alerts")
    parser.add_argument(
        "--dropped-topic", default="sepsis-dropped", metavar="TOPIC", help="Kafka topic of visits no longer scored"
    )
    parser.add_argument("--group", default="sepsis-risk", metavar="NAME", help="consumers of one group share the work")
    parser.add_argument("--kafka-config", metavar="FILE", help="more settings of librdkafka, as JSON: TLS, passwords")
    parser.add_argument("--mllp", type=address, metavar="HOST:PORT", help="receive HL7 v2 ORU messages over MLLP")
    parser.add_argument("--hl7", metavar="FILE", help="JSON file for --mllp: fields of visit and client, zone, events")
    parser.add_argument(
        "--state",
        metavar="FILE",
        help=f"keeps accepted observations; with --mllp {DEFAULT_STATE}; with --kafka a restart reads less",
    )
    parser.add_argument("--durable", action="store_true", help="what --state keeps also survives a power cut")
    parser.add_argument("--alerts", metavar="FILE", help="append alerts as JSON lines; they are always logged")
    parser.add_argument("--webhook", metavar="URL", help="POST each alert there as JSON")
    parser.add_argument(
        "--cooldown-hours", type=number(float, 0), default=6.0, help="hours without a second alert of the same level"
    )
    parser.add_argument(
        "--min-observations", type=number(int, 1), default=5, help="a visit with fewer observations is not scored yet"
    )
    parser.add_argument(
        "--idle-hours",
        type=number(float, 0),
        default=48.0,
        help="a visit silent for so long is scored and dropped",
    )
    parser.add_argument(
        "--as-of",
        metavar="MOMENT",
        default=NOW,
        help="moment to score: 'now', 'last' (each visit's last observation, for replayed feeds), or an ISO 8601 time",
    )
    parser.add_argument("--max-visits", type=number(int, 1), default=100_000, help="most open visits")
    parser.add_argument("--max-observations", type=number(int, 10), default=50_000, help="most observations of a visit")
    parser.add_argument("--monitor", metavar="URL", help="URL of the prediction log, or 'off'; or SEPSIS_MONITOR_URL")
    return run(stream, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
