"""The page that `reproduce` writes: per experiment the question, the commands, the numbers and the figures.

Self-contained: figures are inlined, nothing comes from a network. It reads experiment.json and what the runs wrote.
"""

import base64
import html
from pathlib import Path

from shared_utils.runs import ROOT, figures, read_json, write_text

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #666; --back: #fff; --text: #111; --box: #f4f4f4; --bad: #a00; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #aaa; --back: #161616; --text: #eee; --box: #242424; --bad: #ff8080; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; background: var(--back);
  color: var(--text); }
h1 { font-size: 1.6rem; } h2 { border-top: 1px solid var(--line); padding-top: 1.2rem; margin-top: 2.5rem; }
h3 { margin-bottom: .3rem; }
pre { background: var(--box); padding: .6rem .8rem; overflow-x: auto; border-radius: 4px; font-size: .85rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .soft { color: var(--soft); font-size: .85rem; } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
nav a { margin-right: 1rem; white-space: nowrap; } a { color: inherit; }
"""


def write_report(path: Path, runs_dir: Path, experiments: list[str]) -> None:
    """Write the page about the runs of `experiments` below `runs_dir` to `path`."""
    links = "".join(f'<a href="#{name}">{name}</a>' for name in experiments)
    sections = "".join(_section(name, runs_dir) for name in experiments)
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Deep learning from first principles</title><style>{_STYLE}</style></head><body>"
        f"<h1>Deep learning from first principles</h1><nav>{links}</nav>{sections}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _section(experiment: str, runs_dir: Path) -> str:
    about = read_json(ROOT / experiment / "experiment.json")
    outcomes_file = runs_dir / experiment / "outcomes.json"
    outcomes = read_json(outcomes_file) if outcomes_file.exists() else {}
    runs = "".join(_run(run, runs_dir / experiment / run["name"], outcomes) for run in about["runs"])
    title, question = html.escape(about["title"]), html.escape(about["question"])
    return f'<h2 id="{experiment}">{title}</h2><p>{question}</p>{runs}'


def _run(run: dict, folder: Path, outcomes: dict) -> str:
    parts = [f"<h3>{html.escape(run['name'])}</h3>"]
    error = outcomes.get(run["name"], {}).get("error")
    if error or not (folder / "metrics.json").exists():
        error = error or "it was not run"
        return "".join(parts) + f'<p class="bad">No result: {html.escape(error)}</p>'
    metrics = read_json(folder / "metrics.json")
    try:
        parts.append(f"<p>{html.escape(run['headline'].format(**metrics))}</p>")
    except (KeyError, IndexError, TypeError, ValueError):  # metrics of an older version of the script
        parts.append('<p class="bad">Made by another version of the script; run it again.</p>')
    about = metrics.pop("run")
    data = f"{about['dataset']}, " if "dataset" in about else ""
    parts.append(f"<pre>{html.escape(about['command'])}</pre>")
    parts.append(
        f'<p class="soft">{html.escape(data)}{about["seconds"]:.1f} s on {html.escape(about["machine"])}, '
        f"commit {html.escape(about['commit'])}</p>"
    )
    for figure in figures(folder):
        inlined = base64.b64encode(figure.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{html.escape(figure.stem)}" src="data:image/png;base64,{inlined}">'
            f"<figcaption>{html.escape(figure.name)}</figcaption></figure>"
        )
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in _flat(metrics, "")
    )
    parts.append(f'<details><summary>metrics</summary><div class="wide"><table>{rows}</table></div></details>')
    return "".join(parts)


def _flat(value, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in _flat(item, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [row for i, item in enumerate(value) for row in _flat(item, f"{name}[{i}]")]
    if isinstance(value, list):
        return [(name, ", ".join(text for item in value for _, text in _flat(item, name)))]
    return [(name, f"{value:.5g}" if isinstance(value, float) else str(value))]
