"""reproduce goes on after a failure and says so; the report stands alone; publish refuses what is not a result."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared_utils import publish, report, reproduce, runs
from shared_utils.cli import UserError
from shared_utils.runs import ROOT

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A root folder with one experiment of two runs, and where its runs go."""
    home = tmp_path / "house" / "toy"
    home.mkdir(parents=True)
    declared = [
        {
            "name": "train",
            "script": "train.py",
            "args": ["--text", "two words"],
            "quick": [],
            "minutes": 1,
            "headline": "accuracy {accuracy:.1%}",
            "first_page": True,
        },
        {"name": "wide", "script": "train.py", "args": ["--width", "9"], "quick": ["--width", "2"], "minutes": 2}
        | {"headline": "{accuracy:.1%}"},
    ]
    about = {"title": "A toy & more", "question": "Does <it> work?", "runs": declared}
    (home / "experiment.json").write_text(json.dumps(about))
    (tmp_path / "house" / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    readme = (
        "<!-- runs -->old<!-- /runs -->\n<!-- table train rows: step | p:.2f -->\n<!-- /table -->\n"
        "It is <!-- value train {accuracy:.1%} --><!-- /value --> right."
    )
    (home / "README.md").write_text(readme)
    for module in (reproduce, publish, report, runs):
        monkeypatch.setattr(module, "ROOT", tmp_path / "house")
    return tmp_path / "house"


def finished_run(folder, quick=False, accuracy=0.5, flags="--text 'two words' --out 'my runs/x'"):
    folder.mkdir(parents=True)
    about = {
        "command": f"python toy/train.py {flags}",
        "quick": quick,
        "seconds": 61.0,
        "machine": "M, 2 cores",
    }
    rows = [{"step": "a", "p": None}, {"step": "b|c", "p": 0.0312}]
    metrics = {"accuracy": accuracy, "rows": rows, "run": {**about, "commit": "abc", "dataset": "mnist"}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "stale.png").write_bytes(PNG)  # of an earlier run: older than config.json
    os.utime(folder / "stale.png", (0, 0))
    (folder / "config.json").write_text("{}")
    (folder / "curve.png").write_bytes(PNG)
    (folder / "best.npz").write_bytes(b"weights stay here")


def test_flags_of_a_declared_run(house, tmp_path):
    train, wide = reproduce.declared_runs("toy")
    assert train.argv(tmp_path, quick=False) == ["--text", "two words", "--runs-dir", str(tmp_path)]
    assert train.argv(Path("runs"), quick=False) == ["--text", "two words"]
    assert wide.argv(tmp_path, quick=False)[:2] == ["--width", "9"]
    quick = wide.argv(tmp_path, quick=True)
    assert quick[:3] == ["--width", "2", "--quick"]
    assert quick[-2:] == ["--out", str(tmp_path / "toy" / "wide")]


def test_what_an_experiment_reads_is_made_before_it(house):
    for name, after in (("a", ["toy"]), ("b", []), ("c", ["a", "b"])):
        (house / name).mkdir()
        (house / name / "experiment.json").write_text(json.dumps({"after": after}))
    assert reproduce.in_order(["c"]) == ["b", "toy", "a", "c"]
    assert reproduce.in_order(["toy", "b"]) == ["toy", "b"]
    assert reproduce.in_order(reproduce.experiments()) == ["toy", "b", "a", "c"]


class Child:
    """In place of an experiment's process: it ends at the third look."""

    def __init__(self):
        self.looks, self.returncode, self.killed = 0, None, False

    def poll(self):
        self.looks += 1
        self.returncode = 7 if self.looks == 3 else None
        return self.returncode

    def wait(self, timeout):
        raise subprocess.TimeoutExpired("child", timeout)

    def kill(self):
        self.killed = True


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_so_many_folders_are_under_way_and_none_before_what_it_reads_has_ended(house, at_once):
    reads = {"a": ["toy"], "b": [], "c": ["a", "b"], "toy": []}
    for name in "abc":
        (house / name).mkdir()
        (house / name / "experiment.json").write_text(json.dumps({"after": reads[name]}))
    children, most = {}, 0

    def start(name):
        nonlocal most
        assert all(children[other].returncode == 7 for other in reads[name])
        children[name] = Child()
        most = max(most, sum(child.returncode is None for child in children.values()))
        return children[name]

    assert reproduce.begin_and_wait(["c"], at_once, start) == dict.fromkeys(reads, 7)
    assert most == min(at_once, 2)


def test_ctrl_c_leaves_no_process_behind(house):
    def interrupted():
        raise KeyboardInterrupt  # as the signal does, which a shell's background jobs ignore

    child = Child()
    child.poll = interrupted
    with pytest.raises(KeyboardInterrupt):
        reproduce.begin_and_wait(["toy"], 1, lambda name: child)
    assert child.killed


def test_runs_in_an_argument_is_the_folder_of_all_runs(tmp_path):
    flags = ("--ckpt", "{runs}/toy/train/best.pth")
    run = reproduce.Declared("toy", "eval", "eval.py", flags, (), minutes=1, headline="", first_page=False)
    assert run.argv(tmp_path, quick=False)[:2] == ["--ckpt", f"{tmp_path}/toy/train/best.pth"]
    assert "--ckpt" not in run.argv(tmp_path, quick=True)


def test_publishing_copies_metrics_and_figures_and_fills_the_readmes(house, tmp_path):
    finished_run(tmp_path / "runs" / "toy" / "train")
    (house / "toy" / "results" / "train").mkdir(parents=True)
    (house / "toy" / "results" / "train" / "old.png").touch()  # of the run published before
    assert publish.publish("toy", tmp_path / "runs") == ["train"]
    copied = sorted(p.name for p in (house / "toy" / "results" / "train").iterdir())
    assert copied == ["curve.png", "metrics.json"]
    text = publish.render(house / "toy" / "README.md")
    assert (
        "| accuracy 50.0% | `python toy/train.py --text 'two words'` | mnist | 1 min 1 s | M, 2 cores | abc |" in text
    )
    assert "old" not in text
    assert "| a | – |\n| b\\|c | 0.03 |" in text
    assert "<!-- value train {accuracy:.1%} -->50.0%<!-- /value -->" in text
    finished_run(tmp_path / "runs" / "toy" / "wide", accuracy=0.25, flags="--width 9")
    publish.publish("toy", tmp_path / "runs")
    first_page = publish.render(house / "README.md")
    assert first_page.count("[toy](toy)") == 1
    assert "accuracy 50.0%" in first_page
    text = publish.render(house / "toy" / "README.md")
    assert "| 25.0% | `python toy/train.py --width 9 --out runs/toy/wide` |" in text
    (house / "toy" / "README.md").write_text(text)
    assert publish.render(house / "toy" / "README.md") == text
    (house / "toy" / "results" / "train" / "metrics.json").write_text(
        (house / "toy" / "results" / "train" / "metrics.json").read_text().replace("0.5", "0.75")
    )
    assert publish.render(house / "toy" / "README.md") != text


def test_publishing_refuses_what_is_not_a_result(house, tmp_path):
    runs_dir = tmp_path / "runs"
    with pytest.raises(UserError, match="no finished run"):
        publish.publish("toy", runs_dir)
    finished_run(runs_dir / "toy" / "train")
    with pytest.raises(UserError, match="declares no run other"):
        publish.publish("toy", runs_dir, ["other"])
    with pytest.raises(UserError, match="cannot read"):
        publish.publish("toy", runs_dir, ["wide"])
    finished_run(runs_dir / "toy" / "wide", quick=True)
    with pytest.raises(UserError, match="quick run"):
        publish.publish("toy", runs_dir)
    shutil.rmtree(runs_dir / "toy" / "wide")
    finished_run(runs_dir / "toy" / "wide", flags="--width 8")
    with pytest.raises(UserError, match=r"was made by `python toy/train.py --width 8`; declared is .* --width 9"):
        publish.publish("toy", runs_dir)
    with pytest.raises(UserError, match=r"was made by `python toy/train.py --width 8`"):
        publish.publish("toy", runs_dir, ["wide"])
    (runs_dir / "toy" / "train" / "curve.png").write_bytes(b"x" * 300_001)
    with pytest.raises(UserError, match="300"):
        publish.publish("toy", runs_dir, ["train"])
    assert not (house / "toy" / "results").exists()


def test_a_marker_that_cannot_be_filled_is_named(house, tmp_path):
    finished_run(tmp_path / "runs" / "toy" / "train")
    publish.publish("toy", tmp_path / "runs")
    (house / "toy" / "README.md").write_text("<!-- value train {loss:.1f} --><!-- /value -->")
    with pytest.raises(UserError, match=r"value train \{loss:.1f\}.*KeyError"):
        publish.render(house / "toy" / "README.md")


def test_the_report_stands_alone(house, tmp_path):
    finished_run(tmp_path / "runs" / "toy" / "train")
    (tmp_path / "runs" / "toy" / "outcomes.json").write_text(json.dumps({"wide": {"error": "it <broke>"}}))
    finished_run(tmp_path / "runs" / "toy" / "wide")  # an old result, which the failure makes void
    report.write_report(tmp_path / "report.html", tmp_path / "runs", ["toy"])
    page = (tmp_path / "report.html").read_text()
    assert "A toy &amp; more" in page
    assert "Does &lt;it&gt; work?" in page
    assert "it &lt;broke&gt;" in page
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


@pytest.mark.slow
def test_a_failure_ends_that_run_alone_and_the_command_with_1(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    busy = tmp_path / "runs" / "mnist_svm_gabor" / "ablation"
    busy.mkdir(parents=True)
    command = [sys.executable, "-m", "shared_utils.reproduce", "--quick", "--only", "mnist_svm_gabor"]
    command += ["--runs-dir", str(tmp_path / "runs"), "--report", str(tmp_path / "report.html")]
    with (busy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("failed: mnist_svm_gabor/ablation: another run is writing")
    lines = ended.stdout.splitlines()
    assert sum(line.endswith("s  ok") for line in lines) == len(reproduce.declared_runs("mnist_svm_gabor")) - 1
    assert "another run is writing" in (tmp_path / "report.html").read_text()


def test_the_report_survives_metrics_of_another_version(house, tmp_path):
    finished_run(tmp_path / "runs" / "toy" / "train")
    (tmp_path / "runs" / "toy" / "train" / "metrics.json").write_text(
        (tmp_path / "runs" / "toy" / "train" / "metrics.json").read_text().replace("accuracy", "exactness")
    )
    report.write_report(tmp_path / "report.html", tmp_path / "runs", ["toy"])
    assert "another version" in (tmp_path / "report.html").read_text()


TOY = """import pathlib, sys
from shared_utils.cli import make_parser, UserError
from shared_utils.runs import start_run

def build_parser():
    parser = make_parser("python toy/train.py", dataset=None, device=False)
    parser.add_argument("--text")
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    return parser

def main(argv):
    args = build_parser().parse_args(argv)
    run = start_run(args)
    run.log(width=args.width, resumed=args.resume)
    if args.width == 9 and not (pathlib.Path(args.runs_dir) / "may").exists():
        raise UserError("it broke")
    run.finish({"accuracy": args.width, "rows": len(run.history())})
"""


def test_what_is_finished_is_left_out_and_what_was_stopped_goes_on(house, tmp_path, monkeypatch, capsys):
    (house / "toy" / "__init__.py").touch()
    (house / "toy" / "train.py").write_text(TOY)
    monkeypatch.syspath_prepend(house)

    def here(command, env):  # in place of a process
        status = 1 if reproduce.main(command[3:]) else 0
        return SimpleNamespace(returncode=status, poll=lambda: status)

    processes = SimpleNamespace(Popen=here, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(reproduce, "subprocess", processes)
    monkeypatch.setattr(runs, "commit", lambda: "abc")
    folder = tmp_path / "runs"
    flags = ["--runs-dir", str(folder), "--report", str(tmp_path / "report.html")]
    assert list(reproduce.main([*flags, "--resume"])) == ["toy/wide"]  # nothing there: all of it is made
    said = capsys.readouterr().out
    assert "runs to make: 2, about 0.1 hours" in said
    assert "finished before" not in said
    first = (folder / "toy" / "train" / "metrics.json").read_text()
    (folder / "may").touch()
    assert reproduce.main([*flags, "--resume"]) == {}
    said = capsys.readouterr().out
    assert "runs to make: 1," in said
    assert re.search(r"train +finished before", said)
    assert (folder / "toy" / "train" / "metrics.json").read_text() == first
    wide = runs.read_json(folder / "toy" / "wide" / "metrics.json")
    assert wide["rows"] == 2  # it went on with its history
    assert "--resume" not in wide["run"]["command"]
    assert reproduce.main(flags) == {}  # without --resume all of it is made again
    assert runs.read_json(folder / "toy" / "wide" / "metrics.json")["rows"] == 1
    config = folder / "toy" / "wide" / "config.json"
    config.write_text(config.read_text().replace("--width 9", "--width 8"))
    (folder / "toy" / "wide" / "metrics.json").unlink()
    assert reproduce.main([*flags, "--resume"]) == {}  # what another command had begun begins anew
    assert runs.read_json(folder / "toy" / "wide" / "metrics.json")["rows"] == 1
    outcomes = runs.read_json(folder / "toy" / "outcomes.json")
    outcomes["train"]["error"] = "what it reads was missing"  # it left an older result where it was
    runs.write_json(folder / "toy" / "outcomes.json", outcomes)
    capsys.readouterr()
    assert reproduce.main([*flags, "--resume"]) == {}
    said = capsys.readouterr().out
    assert "runs to make: 1," in said
    assert re.search(r"wide +finished before", said)


def test_an_unknown_experiment_is_named():
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--only", "no_such_folder"])
    assert stop.value.code == 2
