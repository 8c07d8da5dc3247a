"""Which file may import what, what the files may not hold, and that every option says what it is for."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
TRAINING = {"generate_features", "train_best_model", "training_data", "candidates"}
SERVING = {"api_server", "batch_processor", "db_predictor", "stream_processor"} & MODULES.keys()
PACKAGES = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))}

# project modules that a module may import
MAY_IMPORT = {
    "feature_pipeline": set(),
    "demo_cohort": {"artifacts", "command_line"},
    "training_data": {"feature_pipeline", "demo_cohort"},
    "pseudonyms": {"feature_pipeline"},
    "pages": set(),
    "artifacts": set(),
    "units": {"feature_pipeline"},
    "command_line": {"feature_pipeline"},
    "prediction_log": {"feature_pipeline", "command_line", "pseudonyms"},
    "monitoring": {
        *("feature_pipeline", "artifacts", "command_line", "metrics", "pages", "prediction_log", "pseudonyms"),
        "training_data",  # reads labels
    },
}


def imports_of(path: Path) -> set[str]:
    """Everything a file imports, also inside functions: `a.b` for ``import a.b`` and ``from a import b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "no relative imports at the top level"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_names(imports: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in imports}


def files_of(module: str) -> list[Path]:
    """The file of a top-level module, and those of the folder that it is the door of (api_server: api/)."""
    folder = ROOT / module.partition("_")[0]
    return [MODULES[module], *(sorted(folder.rglob("*.py")) if folder.is_dir() else [])]


# -------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("module", sorted(MAY_IMPORT.keys() & MODULES.keys()))
def test_modules_import_no_more_of_the_project_than_they_may(module):
    assert top_names(imports_of(MODULES[module])) & MODULES.keys() <= MAY_IMPORT[module] | {module}


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


@pytest.mark.parametrize("script", sorted(SERVING))
def test_serving_scripts_import_neither_one_another_nor_training(script):
    for path in files_of(script):
        imported = top_names(imports_of(path))
        assert not imported & (SERVING - {script}), path.name
        assert not imported & (TRAINING | {"metrics", "training_report", "demo_cohort"}), path.name
        assert "sklearn" not in imported and "lightgbm" not in imported, path.name


def test_shared_modules_import_no_script():
    scripts = SERVING | {"generate_features", "train_best_model", "run_tests", "monitoring"}
    for module in MODULES.keys() - scripts - {"retraining"}:  # which is train_best_model.py's, and joins them
        assert not top_names(imports_of(MODULES[module])) & scripts, module


def test_importing_feature_pipeline_loads_no_model_library():
    code = (
        "import sys, feature_pipeline; print({'sklearn', 'lightgbm', 'flask', 'sqlalchemy'} & set(sys.modules) or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --------------------------------------------------------------------------------------------------- contents


def tracked_files() -> list[Path]:
    """The files under version control; outside of a checkout every file that is not hidden."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = [name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not any(part[0] == "." for part in p.parts[1:])]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # an image, a parquet file


def test_no_file_names_a_machines_own_folders():
    folders = re.compile(r"(?<![\w.\]:/])/(?:work|home|root|Users)/\w")
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if folders.search(line)
    }
    assert not found


def test_no_data_files_lie_beside_the_scripts():
    kinds = {".csv", ".gz", ".parquet", ".pkl", ".psv", ".db", ".sqlite"}
    assert not sorted(path.name for path in tracked_files() if path.parent == ROOT and path.suffix in kinds)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------------- help


def takes_arguments(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" and node.args.args for node in tree.body)


SCRIPTS = [name for name, path in sorted(MODULES.items()) if takes_arguments(path)]
SCRIPTS += [f"benchmarks.{p.stem}" for p in sorted((ROOT / "benchmarks").glob("*.py")) if takes_arguments(p)]


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
    assert {"generate_features", "train_best_model", "run_tests", "import_physionet2019"} <= set(SCRIPTS)


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_any_folder(script, tmp_path):
    command = [sys.executable, str(ROOT / f"{script.replace('.', '/')}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_options_are_refused(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(["--no-such-option"])
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
