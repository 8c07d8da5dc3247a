"""README and docs from top to bottom, as a new user reads them: every command and all Python, with their output.

``bash`` must succeed. In ``console``, lines after ``$`` are run, and the lines below are what they print. ``python`` is
run. ``shell`` is not: it needs a broker or other data, or it is run elsewhere. Times, model versions and ports differ
from run to run. Other numbers may differ by a twentieth, because another processor or library rounds differently. If
that chooses another winner of the search, it is enough that the commands succeed. ``README_REWRITE=1`` writes what was
printed into the documents instead of comparing, so that all output is of one run.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("data", "training", "versions", "serving", "streams", "monitoring", "operations")  # in reading order
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
BLOCK = re.compile(r"```(bash|console|python)\n(.*?)```", re.DOTALL)
VERSION = re.compile(r"\b\d{8}_\d{6}\b")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00|[\d.]+ (?:ms|s|min)\b")
VARYING = re.compile(rf"{VERSION.pattern}|{TIME.pattern}|fingerprint: \w+|visit [0-9a-f]{{16}}")
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?")
HERE = {"python3 -m venv .venv", ".venv/bin/pip install -q -r requirements.txt"}  # this environment serves


class Reader:
    """A user with a copy of the project, who runs the commands in order and keeps what later ones need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.versions: dict[str, str] = {}  # model version in the documents: model version here
        self.services: list[subprocess.Popen] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SEPSIS_", "PYTEST_"))}
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment |= {"PYTHONUNBUFFERED": "1", "LOGNAME": "analyst"}

    def run(self, command: str) -> str:
        """What the command prints on either stream. It must succeed."""
        command = VERSION.sub(lambda found: self.versions.get(found[0], found[0]), command)
        command = re.sub(r"(localhost|127\.0\.0\.1):5000\b", rf"\1:{self.port}", command).partition("  #")[0]
        if command.endswith("&"):
            return self.serve(command.rstrip("& "))
        name = command.removeprefix("export ").partition("=")[0] if command.startswith("export ") else None
        whole = f'{command} && printf %s "${name}"' if name else command
        options = {"cwd": self.folder, "env": self.environment, "text": True, "timeout": 900}
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", whole], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        if name:
            self.environment[name] = done.stdout
            return ""
        return done.stdout

    def serve(self, command: str) -> str:
        self.stop()
        log = (self.folder / "service.log").open("w")
        self.services.append(
            subprocess.Popen(["env", *command.split()], cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        )
        log.close()
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5).close()
                return ""
            except OSError:
                assert self.services[-1].poll() is None, (self.folder / "service.log").read_text()
                time.sleep(0.1)
        raise AssertionError("the service does not get ready")

    def stop(self) -> None:
        while self.services:
            service = self.services.pop()
            service.terminate()
            service.wait(timeout=60)

    def learn_versions(self, shown: str, printed: str) -> None:
        self.versions |= dict(zip(VERSION.findall(shown), VERSION.findall(printed), strict=False))


def commands(block: str):
    """(command, the output that is shown) of a console block."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown.strip("\n")


def difference(shown: str, printed: str) -> str | None:
    """The first lines that differ by more than what varies, or None."""
    shown_lines, printed_lines = (VARYING.sub("~", text).splitlines() for text in (shown, printed))
    for one, two in zip(shown_lines, printed_lines, strict=False):
        numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (one, two)]
        same_words = NUMBER.sub("#", one).split() == NUMBER.sub("#", two).split()
        if not same_words or numbers[0] != pytest.approx(numbers[1], rel=0.05, abs=0.005):
            return f"shown: {one}\nprinted: {two}"
    if len(shown_lines) != len(printed_lines):
        return f"shown: {len(shown_lines)} lines, printed:\n{printed}"
    return None


@pytest.fixture
def reader(tmp_path):
    folder = tmp_path / "sepsis-risk"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    reader = Reader(folder)
    yield reader
    reader.stop()


@pytest.mark.slow
def test_every_command_prints_what_the_documents_show(reader):
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    differences = [different for path in DOCUMENTS for different in follow(reader, path, texts)]
    if os.environ.get("README_REWRITE"):
        for path, text in texts.items():
            for shown, here in reader.versions.items():  # in the commands
                text = text.replace(shown, here)
            path.write_text(text, encoding="utf-8")
        return
    summary = (reader.folder / "models" / "optimization_summary.txt").read_text(encoding="utf-8")
    if re.search(r"^Winner: .*$", summary, re.MULTILINE)[0] in "".join(texts.values()):
        assert not differences, "\n\n".join(differences)


def follow(reader, path, texts):
    """Runs what a document tells to run; yields the differences, or puts what was printed into its text."""
    for language, block in BLOCK.findall(texts[path]):
        if language == "bash":
            parts = [part for part in block.strip().split(" && ") if part not in HERE]
            reader.run(" && ".join(parts).replace(".venv/bin/python", "python"))
        elif language == "python":
            (reader.folder / "block.py").write_text(block)
            reader.run("python block.py")
        for command, shown in commands(block) if language == "console" else ():
            printed = reader.run(command).strip("\n")
            reader.learn_versions(shown, printed)
            different = difference(shown, printed)
            if printed != shown and os.environ.get("README_REWRITE"):
                old = f"$ {command}\n{shown}\n" if shown else f"$ {command}\n"
                assert texts[path].count(old) == 1, command
                texts[path] = texts[path].replace(old, f"$ {command}\n{printed}\n" if printed else old)
            elif different:
                yield f"{path.name}: $ {command}\n{different}"


def test_a_difference_is_seen():
    assert difference("scored 20 visits in 0.1 s", "scored 20 visits in 3.4 s") is None
    assert difference("Model 20261124_005656: 0.9040", "Model 20261124_005701: 0.9041") is None
    assert difference("20 visits", "21 visits, one empty")
    assert difference("ROC AUC 0.90", "ROC AUC 0.80")
    assert difference("one\ntwo", "one")
