"""Which file may import what, what the files may not hold, and that every option says what it is for."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ("feature_pipeline", "common")
SHARED = ("serving.deployed", "serving.evidence", "serving.words", "serving.scored", "serving.fhir")
SERVING = (*SHARED, "monitoring.log", *CORE)
# every module of the project belongs to the room with the longest fitting name, and may import its own room besides
ROOMS = {
    "feature_pipeline": (),
    "common": ("feature_pipeline",),
    "sources": CORE,
    "monitoring": CORE,
    "monitoring.profile": CORE,
    "monitoring.writer": CORE,
    "monitoring.log": ("monitoring.profile", "monitoring.writer", *CORE),
    "monitoring.migrations": ("monitoring.log", *CORE),
    "training": ("sources", "monitoring.profile", *CORE),
    "evaluation": ("training.snapshots", "monitoring.log", *CORE),  # the log, for a silent trial
    "serving": (),
    "serving.deployed": ("serving.shadow", "monitoring.log", *CORE),
    "serving.shadow": ("monitoring.log", *CORE),
    "serving.evidence": ("monitoring.log", *CORE),
    "serving.words": CORE,
    "serving.scored": ("serving.words", *CORE),
    "serving.fhir": ("serving.scored", *CORE),
    "serving.api": SERVING,
    "serving.fhir_feed": SERVING,
    "serving.batch": SERVING,
    "serving.db": SERVING,
    "serving.stream": SERVING,
    # doors
    "prepare_data": ("sources", *CORE),
    "generate_features": ("training", *CORE),
    "train_best_model": ("training", *CORE),
    "run_tests": ("training", *CORE),
    "evaluate_model": ("evaluation", *CORE),
    "monitor": ("monitoring", *CORE),
    "api_server": ("serving.api", *CORE),
    "gunicorn.conf": ("serving.api", *CORE),
    "batch_processor": ("serving.batch", "monitoring.log", *CORE),  # the log's URL
    "db_predictor": ("serving.db", "serving.fhir_feed", "monitoring.log", *CORE),
    "stream_processor": ("serving.stream", "monitoring.log", *CORE),
}
REQUIREMENTS = {  # beside requirements.txt
    "serving.api": ("requirements-api.txt", "requirements-otel.txt"),
    "serving.fhir": ("requirements-fhir.txt",),
    "serving.fhir_feed": ("requirements-fhir.txt",),
    "api_server": ("requirements-api.txt",),
    "gunicorn.conf": ("requirements-api.txt",),
    "sources": ("requirements-prepare.txt",),
    "training": ("requirements-dask.txt",),
    "serving.db": ("requirements-database.txt",),
    "serving.stream": ("requirements-stream.txt",),
}
MOST_LINES = 500
LONGER = {"feature_pipeline.py", "sources/demo_cohort.py"}
MOST_DOORS = 12  # *.py files at the top level


def tracked_files() -> list[Path]:
    """The files under version control or about to be; outside of a checkout every file that is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not any(part[0] == "." for part in p.parts[1:])]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = tracked_files()
FREE = ("tests", "benchmarks", "examples")  # may import anything
MODULES = {
    module_name(path): path for path in FILES if path.suffix == ".py" and path.relative_to(ROOT).parts[0] not in FREE
}


TESTS = [path for path in FILES if path.suffix == ".py" and path.parent.name == "tests"]
PACKAGES = packages_distributions()


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def room_of(module: str) -> str | None:
    return max((room for room in ROOMS if within(module, (room,))), key=len, default=None)


def imports_of(path: Path) -> set[str]:
    """Everything a file imports, also inside functions: `a.b` for ``import a.b`` and ``from a import b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "no relative imports"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """The project's modules that `module` imports. A package whose module is imported does not count itself."""
    found = imports_of(MODULES[module]) & MODULES.keys() - {module}
    return {name for name in found if not any(within(other, (name,)) for other in found - {name})}


def top_names(imports: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in imports}


# ---------------------------------------------------------------------------------------------------- rooms


def test_every_module_is_in_a_room_and_every_room_has_a_module():
    assert {module for module in MODULES if room_of(module) is None} == set()
    assert ROOMS.keys() == set(map(room_of, MODULES))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_only_what_their_room_may(module):
    room = room_of(module)
    assert {name for name in own_imports(module) if not within(name, (room, *ROOMS[room]))} == set()


def required(*files: str) -> set[str]:
    """Names of the packages in requirements files, as the index spells them."""
    found = set()
    for line in "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files).splitlines():
        if line.startswith("-r "):
            found |= required(line[3:].strip())
        elif name := re.match(r"[A-Za-z0-9._-]+", line):
            found.add(re.sub(r"[-_.]+", "-", name[0]).lower())
    return found


def packages_of(path: Path) -> set[str]:
    """The packages that a file imports, neither Python's nor the project's."""
    own = {module.partition(".")[0] for module in MODULES} | set(FREE)
    names = top_names(imports_of(path)) - sys.stdlib_module_names - own - {path.stem for path in TESTS}
    return {re.sub(r"[-_.]+", "-", PACKAGES.get(name, [name])[0]).lower() for name in names}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_imported_package_is_required(module):
    assert packages_of(MODULES[module]) - required("requirements.txt", *REQUIREMENTS.get(room_of(module), ())) == set()


def test_every_package_that_tests_benchmarks_and_examples_import_is_required():
    paths = [path for path in FILES if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in FREE]
    known = required("requirements-test.txt") | required("requirements-cluster.txt")
    missing = {path.name: packages_of(path) - known for path in paths}
    assert {name: packages for name, packages in missing.items() if packages} == {}


def test_no_module_is_imported_in_a_circle():
    try:
        graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_are_short_and_doors_are_few():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
        if path.suffix in (".py", ".js") and path.relative_to(ROOT).parts[0] != "tests"
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES and name not in LONGER} == {}
    assert len([path for path in MODULES.values() if path.parent == ROOT]) <= MOST_DOORS


def test_serving_loads_no_training_library():
    for module in (
        name
        for name in MODULES
        if within(name, ("serving", "monitoring.log", "monitoring.profile", "monitoring.writer"))
    ):
        assert not top_names(imports_of(MODULES[module])) & {"sklearn", "lightgbm"}, module


def test_feature_pipeline_needs_numpy_pandas_joblib_and_nothing_that_knows_the_world():
    imports = imports_of(MODULES["feature_pipeline"])
    foreign = top_names(imports) - sys.stdlib_module_names - {"numpy", "pandas", "joblib"}
    assert not foreign
    barred = {"argparse", "os", "time", "socket", "urllib", "http", "random", "secrets", "subprocess", "logging"}
    assert not top_names(imports) & barred and "datetime.datetime" not in imports


def test_feature_pipeline_asks_neither_clock_nor_chance_nor_environment():
    tree = ast.parse(MODULES["feature_pipeline"].read_text(encoding="utf-8"))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"now", "utcnow", "today", "environ", "getenv", "random", "default_rng", "perf_counter"}


def test_importing_feature_pipeline_loads_no_model_library():
    code = (
        "import sys, feature_pipeline; print({'sklearn', 'lightgbm', 'flask', 'sqlalchemy'} & set(sys.modules) or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --------------------------------------------------------------------------------------------------- contents


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # an image, a parquet file


def test_no_file_names_a_machines_own_folders():
    folders = re.compile(r"(?<![\w.\]:/])/(?:work|home|root|Users)/\w")
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if folders.search(line)
    }
    assert not found


def test_no_data_files_lie_beside_the_scripts():
    kinds = {".csv", ".gz", ".parquet", ".pkl", ".psv", ".db", ".sqlite"}
    assert not sorted(path.name for path in FILES if path.parent == ROOT and path.suffix in kinds)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------------- help


def takes_arguments(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" and node.args.args for node in tree.body)


DOORS = [name for name, path in sorted(MODULES.items()) if path.parent == ROOT and takes_arguments(path)]
BENCHMARKS = [f"benchmarks.{p.stem}" for p in sorted((ROOT / "benchmarks").glob("*.py")) if takes_arguments(p)]
SCRIPTS = DOORS + BENCHMARKS


def help_of(script, capsys, monkeypatch, *command) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def options_of(text: str) -> dict[str, str]:
    """Each option or command of a help text with what is said of it."""
    said, current = {}, None
    for line in text.splitlines():
        if match := re.match(r"  {1,4}(-\S.*?|\{\S+\}|[a-z][\w-]*|[A-Z][A-Z_]+)(?:  +(\S.*))?$", line):
            current = match[1]
            said[current] = match[2] or ""
        elif current and re.match(r" {6,}\S", line):
            said[current] += " " + line.strip()
        else:
            current = None
    return said


def test_there_are_scripts():
    assert {"generate_features", "train_best_model", "run_tests", "prepare_data"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_option_with_what_it_is_for_and_an_example(script, capsys, monkeypatch):
    text = help_of(script, capsys, monkeypatch)
    before_example, marker, example = text.partition("example")
    assert marker and "python " in example
    commands = re.search(r"\{([\w,-]+)\} \.\.\.", text)
    texts = [before_example]
    if commands:
        texts += [help_of(script, capsys, monkeypatch, command) for command in commands[1].split(",")]
    for shown in texts:
        usage, _, listed = shown.partition("\n\n")
        said = options_of(listed.partition("options:")[2])
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", usage.replace("--help", ""))) - {"--"}
        assert named <= set(re.findall(r"--[a-z][\w-]*", " ".join(said)))
        assert not [
            option for option, help_text in said.items() if not re.sub(r"\(default: .*?\)", "", help_text).strip()
        ]


@pytest.mark.parametrize("script", DOORS)
def test_scripts_run_from_any_folder(script, tmp_path):
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--" in done.stdout and done.stderr == ""


ONE_AFTER_ANOTHER = """
import runpy, sys
path = list(sys.path)
for script in sys.argv[1:]:
    sys.path[:], sys.argv = [script.rpartition("/")[0], *path[1:]], [script, "--help"]
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]  # each script finds the project's folder itself
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, script
"""


def test_benchmarks_run_from_any_folder(tmp_path):
    """In one process, which loads the libraries once."""
    paths = [str(ROOT / f"{name.replace('.', '/')}.py") for name in BENCHMARKS]
    code = f"OWN = {sorted(top_names(set(MODULES)))!r}\n{ONE_AFTER_ANOTHER}"
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(paths) and done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_options_are_refused(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(["--no-such-option"])
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
