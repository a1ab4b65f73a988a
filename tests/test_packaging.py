"""Lists of packages agree with each other; documents with their links, their limits and the code."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from chat_models import chatting
from packaging.requirements import Requirement

import model_loading
from experiment.config import load_config
from steered_generation import SteeredGenerator
from support.tiny_models import tiny_model
from texts import neutral_text

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("personas/*.md")])
LIMITS = {"README.md": 150, "METHODOLOGY.md": 420}  # lines
WIDEST = 160  # characters of a line, but for rows of tables and formulas


def pinned(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


def test_pins_lie_in_the_ranges_and_in_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    files = {
        "requirements.txt": [*project["dependencies"], *extras["dev"]],
        "requirements-ray.txt": extras["ray"],
    }
    for name, ranges in files.items():
        ranges, pins = {each.name: each.specifier for each in map(Requirement, ranges)}, pinned(name)
        assert ranges.keys() == pins.keys()
        for package, pin in pins.items():
            (version,) = pin.specifier
            assert ranges[package].contains(version.version), package
    assert pinned("requirements.txt").items() <= pinned("requirements.lock").items()


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_has_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.findall(r"^version: (.*)$", read("CITATION.cff"), re.M) == [version]


def code_blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), re.M | re.S)


def anchors(path):
    """Return the anchors of a document's headings, as pages show them."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            linked = path.parent / name if name else path
            assert linked.exists(), link
            assert not anchor or anchor in anchors(linked), link


@pytest.mark.parametrize("name", LIMITS)
def test_front_pages_are_short(name):
    lines = read(name).splitlines()
    assert len(lines) <= LIMITS[name]
    wide = [line for line in lines if len(line) > WIDEST and not line.startswith(("|", "    "))]
    assert not wide


def test_every_message_that_is_explained_is_one_of_the_code():
    table = read("METHODOLOGY.md").partition("| you see |")[2].partition("###")[0]
    sources = [
        path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".git")
    ]
    code = re.sub(r"\"\n\s*f?\"", "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    messages = re.findall(r"`([^`]+)`", "\n".join(row.split(" | ")[0] for row in table.splitlines()))
    assert len(messages) > 15
    for message in messages:
        parts = [part for part in re.split(r"\.\.\.|\b[NMKX]\b", message) if part.strip(" :,()'")]
        assert parts
        for part in parts:
            assert part.strip() in code, message


def test_the_example_of_a_transfer_runs_and_steers(monkeypatch, capsys):
    """The example with tiny models of as many blocks in the place of the packaged ones."""
    models = iter([tiny_model("llama", num_hidden_layers=10), tiny_model("gpt2", n_layer=16, n_embd=48)])
    passages = [
        neutral_text.NeutralText(f"Passage {number} of the town's history.", "x") for number in range(20)
    ]
    monkeypatch.setattr(model_loading, "load_model", lambda name: (next(models), chatting()))
    monkeypatch.setattr(neutral_text, "load_neutral_texts", lambda name, n_texts: passages)
    steered = []
    generate = SteeredGenerator.generate

    def spy(self, *arguments, **options):
        steered.append(self.added_vector(14).norm() / self.residual_norms[14])
        return generate(self, *arguments, **options)

    monkeypatch.setattr(SteeredGenerator, "generate", spy)
    (example,) = code_blocks("README.md", "python")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert steered == [pytest.approx(0.3, rel=1e-3)]


def test_the_configurations_of_the_readme_are_valid():
    models, persona = code_blocks("README.md", "json")
    assert load_config(json.loads(models)).alpha_values == "auto"
    named = {**json.loads(models), "personas": [], **json.loads(f"{{{persona}}}")}
    assert load_config(named).persona_names == ["pirate"]
