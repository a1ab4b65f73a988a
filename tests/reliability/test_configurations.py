"""Whatever stands in a configuration: it is valid, or refused in a line or two before anything is loaded."""

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment.config import ExperimentConfig, load_config
from experiment.figures import dose_figure, energy_figure, save_figure
from experiment.tables import markdown_table
from run_experiment import main
from support.errors import InputError

BASE = {"source_model": "a", "target_model": "b", "output_dir": "c", "layer_idx": 1}
TEXTS = {"positive_texts": ["a"], "negative_texts": ["b"]}
KEYS = [*ExperimentConfig.model_fields, "of tomorrow"]
NESTED = ["model", "max_workers", "bracket", "kind", "n_workers", "positive_texts", "description"]

odd_numbers = st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 1e308, 1e-300, float("nan"), float("inf")])
odd_texts = st.sampled_from(
    ["", " ", "auto", "~", "~/x", "a\0b", "\ud800", "$x^2$", "a\\b", "a\nb", "\u2028", "x" * 100_000, "none"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars | odd_numbers | odd_texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NESTED) | st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=2000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3))
def test_any_configuration_is_valid_or_refused_in_two_lines(changes):
    try:
        config = load_config(BASE | changes)
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) <= 2
        assert len(message) < 1_000
        message.encode()
    else:
        json.dumps(config.model_dump(), allow_nan=False).encode()
        assert load_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_seeds": 2**31}, "'n_seeds' is '2147483648': Input should be less than or equal to 10000"),
        ({"n_seeds": 10**5000}, "'n_seeds' is a int too large to show"),
        ({"n_training_samples": 10**12}, "less than or equal to 1000000000"),
        ({"lambda_values": [1e308]}, "less than or equal to 1000000000000000"),
        ({"lambda_values": [1e-300]}, "greater than or equal to 0.000000000001"),
        ({"lambda_values": [float("nan")]}, "lambda_values"),
        ({"output_dir": "a\0b"}, r"it holds the character '\\x00', which cannot be printed"),
        ({"neutral_text": "x" * 5000}, "at most 4096 characters"),
        ({"test_prompts": ["Good", "\ud800"]}, "test_prompts.1"),
        ({"personas": [""]}, "'personas.0' is '': expected a name"),
        ({"personas": ["formal", " "]}, "expected a name"),
        ({"personas": ["a\x07"]}, "cannot be printed"),
        ({"personas": ["a\nb"]}, "cannot be printed"),
        ({"personas": ["\ud800"]}, "personas.0"),
        ({"personas": ["x" * 100_000]}, "at most 100 characters"),
        (
            {"persona_datasets": {"\u2028x": {"positive_texts": ["a"], "negative_texts": ["b"]}}},
            "persona_datasets",
        ),
        ({"personas": ["é", "e\u0301"]}, "look the same; rename one"),
    ],
)
def test_a_slip_is_told_by_its_key(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(BASE | changes)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 50_000, "nested too deeply"),
        ('{"n_seeds": ' + "9" * 5_000 + "}", "is not JSON"),
        (
            '{"source_model": "a", "target_model": "b", "output_dir": "c", "n_seeds": NaN, "layer_idx": 1}',
            "n_seeds",
        ),
        ("", "is not JSON"),
        ("null", "expected a JSON object"),
    ],
    ids=["brackets", "braces", "digits", "NaN", "empty", "null"],
)
def test_a_file_that_cannot_be_used_ends_with_status_2(tmp_path, capsys, content, message):
    (tmp_path / "config.json").write_text(content)
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"source_model": "~/a", "target_model": "~/b", "output_dir": "~/c", "neutral_text": "~/d.txt"}
    config = load_config(BASE | paths)
    assert [getattr(config, key) for key in paths] == [
        str(tmp_path / name) for name in ("a", "b", "c", "d.txt")
    ]
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert load_config("~/config.json") == load_config(BASE)


NAMES = [
    "$x^2$",
    "a\\b",
    "_hidden",
    "a|b",
    "100 %",
    "{curly}",
    "活泼",
    "🙂",
    "\\frac{1}{0}$",
    "é ü",
    "#",
    "<b>",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_and_written_as_it_is(tmp_path, name):
    assert load_config(BASE | {"personas": [name]}).personas == [name]
    figure = energy_figure({name: {"r2": [0, 1], "vector": [1, 0.5], "activations": [1, 0.8]}})
    save_figure(figure, tmp_path / "energy.png", "check")
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown[0].strip().replace(r"\$", "$") == name
    point = {"perplexity_ratio": 1.2, "is_coherent": True}
    dose = {"persona": name, "method": "oracle", "alpha": 0.2, "curve": [{**point, "alpha": 0.1}]}
    save_figure(
        dose_figure({"bound": {"max_perplexity_ratio": 1.5}, "doses": [dose]}), tmp_path / "d.png", ""
    )
    table = markdown_table(("persona", "n"), [(name, "1")])
    assert table.splitlines()[2].replace(r"\|", "").count("|") == 3


def test_integers_are_limited_by_python_itself():
    """Else a number of thousands of digits would be read, and fill a page of the error."""
    assert sys.get_int_max_str_digits() <= 4300
