"""The house keeps its own rules: who imports whom, what is declared, what the READMEs say."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shared_utils import publish, reproduce
from shared_utils.runs import ROOT

EXPERIMENTS = reproduce.experiments()
SOURCES = sorted(
    p for p in ROOT.rglob("*.py") if not {".venv", "runs", "data", "build"} & set(p.relative_to(ROOT).parts)
)
SCRIPTS = [p for p in SOURCES if p.parent.name in EXPERIMENTS and "def build_parser" in p.read_text(encoding="utf-8")]
READMES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md")])
PROVIDED = {
    "PIL": "matplotlib",
    "umap": "umap-learn",
    "scipy": "scikit-learn",
    "joblib": "scikit-learn",
    "threadpoolctl": "scikit-learn",
    "sklearn": "scikit-learn",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """The first part of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are full paths"
            found.add(node.module.split(".")[0])
    return found


def commands(readme: Path) -> list[str]:
    """Each `python …` line of the README's code blocks, continued lines joined."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if re.match(r"\s*(\$ )?python ", line)]


def inline_commands(readme: Path) -> list[str]:
    """Each `python folder/script.py …` and `script.py --flag …` of the README's sentences and tables."""
    prose = re.sub(r"```.*?```", "", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"`(?:python )?([\w/]+\.py(?: [^`]+| ?))`", prose.replace("\n", " "))
    folder = readme.parent.relative_to(ROOT)
    return [f"python {one if '/' in one.split()[0] else folder / one}" for one in found if " -" in one]


def test_there_is_something_to_test():
    assert EXPERIMENTS
    assert SCRIPTS
    assert commands(ROOT / "README.md")
    assert inline_commands(ROOT / "cnn_cifar" / "README.md")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_arrows_point_one_way(path):
    home = path.relative_to(ROOT).parts[0]
    allowed = {"tests": {*EXPERIMENTS, "shared_utils"}, "shared_utils": {"shared_utils"}}.get(
        home, {home, "shared_utils"}
    )
    assert imports(path) & {*EXPERIMENTS, "shared_utils", "tests"} <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_import_is_declared(path):
    declared = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    outside = imports(path) - set(sys.stdlib_module_names) - {*EXPERIMENTS, "shared_utils"}
    assert {PROVIDED.get(name, name) for name in outside} <= declared


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_too_long_or_shadows_a_module(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    taken = {
        *sys.stdlib_module_names,
        "numpy",
        "torch",
        "sklearn",
        "matplotlib",
        "tqdm",
        "tokenizers",
        "umap",
        "pytest",
    }
    assert path.stem not in taken


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_unsafe_is_loaded(path):
    text = path.read_text(encoding="utf-8")
    if path.name in ("test_repo.py", "test_shared_utils.py"):
        return
    for pattern in ("import pickle", "allow_pickle=True", "weights_only=False", "yaml.load", "joblib.load", "eval("):
        assert pattern not in text.replace(".eval(", "")


def test_every_experiment_is_a_package_with_readme_runs_and_tests():
    for name in EXPERIMENTS:
        for needed in (f"{name}/__init__.py", f"{name}/README.md", f"tests/test_{name}.py"):
            assert (ROOT / needed).is_file(), needed


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_a_script_says_its_command_and_what_it_writes(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python {relative(path)}" in doc
    assert re.search(r"^Writes ", doc, re.MULTILINE)
    parser = importlib.import_module(f"{path.parent.name}.{path.stem}").build_parser()
    assert (parser.experiment, parser.script) == (path.parent.name, path.stem)


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_every_script_is_declared(path):
    assert path.name in {run.script for run in reproduce.declared_runs(path.parent.name)}


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_help_shows_every_flag_with_a_word(path):
    parser = importlib.import_module(f"{path.parent.name}.{path.stem}").build_parser()
    assert "usage:" in parser.format_help()
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_every_command_in_a_readme_parses(readme):
    for command in commands(readme) + inline_commands(readme):
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "-m":
            if words[1].startswith("shared_utils."):
                importlib.import_module(words[1]).build_parser().parse_args(words[2:])
            continue
        script = Path(words[0])
        assert (ROOT / script).is_file(), command
        importlib.import_module(".".join(script.with_suffix("").parts)).build_parser().parse_args(words[1:])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_readme_has_the_command_of_every_run(name):
    written = [shlex.split(command, comments=True) for command in commands(ROOT / name / "README.md")]
    for run in reproduce.declared_runs(name):
        assert shlex.split(run.command(Path("runs"), quick=False)) in written, run.name


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_every_link_in_a_readme_leads_somewhere(readme):
    for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (readme.parent / target).exists(), target


@pytest.mark.parametrize("readme", publish.readmes(), ids=relative)
def test_the_numbers_in_a_readme_are_those_of_the_published_metrics(readme):
    assert publish.render(readme) == readme.read_text(encoding="utf-8")


def test_published_results_are_real_runs_and_small_figures():
    for path in ROOT.glob("*/results/*/metrics.json"):
        about = publish.read_json(path)["run"]
        assert not about["quick"], path
        declared = {run.name for run in reproduce.declared_runs(path.parent.parent.parent.name)}
        assert path.parent.name in declared, path
    for path in ROOT.glob("*/results/*/*.png"):
        assert path.stat().st_size <= publish.MAX_FIGURE_BYTES, path


def test_no_data_is_committed():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    suffixes = (".pth", ".npz", ".npy", ".pkl", ".gz", ".xz", "-ubyte", ".txt", ".csv")
    assert [name for name in listed if name.endswith(suffixes)] in ([], ["requirements.txt"])
