"""Any configuration ends in a valid one or in an InputError of one or two lines, never in a traceback."""

import json
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiment.config import (
    MOST_PERSONAS,
    AlphaSearchConfig,
    ExecutorConfig,
    ExperimentConfig,
    ExtractionConfig,
    JudgeConfig,
    PersonaDefinition,
    load_config,
)
from support.errors import InputError
from support.run_folder import RunFolder
from texts import personas
from texts.personas import load_persona

SMALL = {"source_model": "a", "target_model": "b", "output_dir": "c", "layer_idx": 3}
PAIR = {"positive_texts": ["YES", "OH"], "negative_texts": ["yes", "oh"]}
NESTED = {
    "alpha_search": AlphaSearchConfig,
    "executor": ExecutorConfig,
    "extraction": ExtractionConfig,
    "judge": JudgeConfig,
    "persona_datasets": PersonaDefinition,
}
KEYS = [(None, key) for key in sorted(ExperimentConfig.model_fields)]
KEYS += [(name, key) for name, model in NESTED.items() for key in sorted(model.model_fields)]

STRINGS = ["", "auto", "~nobody-of-that-name/x", "a" * 300, "x" * 100_000, "\0", "\ud800", "a\nb", "oracle"]
NUMBERS = [2**31, 2**32, 2**53, 2**64, -(2**63) - 1, 10**400, 0, -1, 1e308, 1e-300, 5e-324, -0.0]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
AWKWARD = [None, True, *STRINGS, *NUMBERS, 10**5000]
AWKWARD += [[], {}, [[]], [{}], {"": None}, {"x": []}, {"a": {"b": 1}}]

# Every character there is, surrogates, NUL and other control characters among them.
TEXT = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(STRINGS)
NUMBER = st.integers(-3, 40) | st.integers() | st.floats() | st.sampled_from(NUMBERS)
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def changed(config, inside, key, value, name="x"):
    """Return the configuration with a key changed, at the top or inside an object."""
    if inside is None:
        return {**config, key: value}
    content = {name: {**PAIR, key: value}} if inside == "persona_datasets" else {key: value}
    return {**config, inside: content}


@st.composite
def configurations(draw):
    """A small valid configuration with one to four keys changed, known ones or any."""
    config = dict(SMALL)
    for _ in range(draw(st.integers(1, 4))):
        inside, key = draw(st.sampled_from(KEYS) | st.tuples(st.none(), TEXT))
        config = changed(config, inside, key, draw(VALUE), draw(TEXT))
    return config


def outcome(config):
    """Return the configuration, or what the InputError says; anything else that is raised fails the test."""
    try:
        loaded = load_config(config)
        loaded.load_personas()
        loaded.load_test_prompts()
    except InputError as error:
        message = str(error)
        assert message.strip()
        assert len(message.splitlines()) <= 2, message
        assert len(message) < 2000, message
        message.encode()
        return message
    return loaded


few = partial(settings, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(("inside", "key"), KEYS)
def test_any_awkward_value_is_valid_or_an_error_that_names_its_key(inside, key):
    for value in AWKWARD:
        found = outcome(changed(SMALL, inside, key, value))
        if isinstance(found, str):
            assert key in found or key.replace("_", " ") in found


@few(max_examples=200)
@given(config=configurations())
@example(config={**SMALL, "personas": ["\ud800"]})
@example(config={**SMALL, "alpha_values": {"a": []}})
def test_any_values_for_some_keys_are_valid_or_an_error(config, tmp_path_factory):
    found, path = outcome(config), tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(config))
    assert isinstance(outcome(path), type(found))
    if isinstance(found, ExperimentConfig):
        written = json.dumps(found.model_dump(), ensure_ascii=False, allow_nan=False)
        path.write_text(written, encoding="utf-8")
        assert load_config(path) == found


@few(max_examples=100)
@given(content=st.binary(max_size=60) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_a_configuration_or_an_error(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    assert isinstance(outcome(path), str)


DEEP = '{"personas": ' + "[" * 100_000 + "]" * 100_000 + "}"
START = json.dumps(SMALL)[:-1]
MANY = [f"p{number}" for number in range(MOST_PERSONAS + 1)]  # more than a figure holds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{START}, "n_seeds": {2**31}}}', "'n_seeds' is 2147483648: .*10000; lower it"),
        (f'{START}, "n_seeds": 10000}}', "67,800,000 texts .* at most 10,000,000; lower n_seeds"),
        (f'{START}, "n_seeds": {"9" * 5000}}}', "number of thousands of digits"),
        (f'{START}, "lambda_values": [1e308]}}', "'lambda_values.0' is 1e\\+308: .*; lower it"),
        (json.dumps({**SMALL, "personas": MANY}), "101 personas, expected at most 100"),
        (json.dumps({**SMALL, "output_dir": "a\0b"}), "'output_dir' .*holds a NUL"),
        (json.dumps({**SMALL, "output_dir": "~nobody-of-that-name/x"}), "'output_dir' .*cannot be used"),
        (json.dumps({**SMALL, "source_model": "a" * 5000}), "'source_model' .*File name too long"),
        (f'{START}, "test_prompts": ["Fine", "Cut \\ud83d"]}}', "'test_prompts.1' .*lone surrogate"),
        (f'{START}, "personas": ["silly"], "personas": ["formal"]}}', "has the key 'personas' twice"),
        (f'{START}, "persona_datasets": {{"x": {{}}, "x": {{}}}}}}', "has the key 'x' twice in one object"),
        (DEEP, "nested too deeply"),
    ],
    ids=lambda value: value[-40:],
)
def test_absurd_values_are_an_error_before_anything_is_loaded(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 1


def test_values_within_each_other_are_an_error_in_a_dictionary_too():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, [[]] * 10**5):
        for key in ("n_seeds", "layer_idx", "lambda_values", "personas", "device_map", "judge"):
            assert isinstance(outcome({**SMALL, key: value}), str)


BAD_NAMES = {
    "": "nothing in it is visible",
    " \u3000": "nothing in it is visible",
    "\u200b": "nothing in it is visible",
    "x" * 101: "got 101, shorten it",
    "x" * 100_000: "got 100000, shorten it",
    "a\nb": r"character 2 is '\\n', leave it out",
    "a\0": r"character 2 is '\\x00'",
    "\x1b[2J": r"character 1 is '\\x1b'",
    "a\u2028b": r"character 2 is '\\u2028'",
    "a\u202eb": r"character 2 is '\\u202e'",
    "cut \ud83d": r"character 5 is '\\ud83d'",
}


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("where", ["personas", "persona_datasets"])
def test_a_name_that_breaks_a_line_is_an_error(name, where):
    value = [name] if where == "personas" else {name: PAIR}
    with pytest.raises(InputError, match=BAD_NAMES[name]) as caught:
        load_config({**SMALL, where: value})
    assert where in str(caught.value)
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 400
    assert len(str(caught.value).splitlines()) == 1


def test_other_names_are_allowed():
    names = ["$x_1$", "back\\slash", "a|b", "весёлый", "快乐", "\U0001f3f4\u200d\u2620\ufe0f", "{0} %s"]
    config = load_config({**SMALL, "personas": [], "persona_datasets": dict.fromkeys(names, PAIR)})
    assert config.persona_names == names


@pytest.mark.parametrize("pair", [("loud", "Loud"), ("\xe9", "e\u0301"), ("a b", " a  b")], ids=ascii)
def test_names_that_look_alike_are_an_error(pair):
    with pytest.raises(InputError, match="rename one") as caught:
        load_config({**SMALL, "persona_datasets": dict.fromkeys(pair, PAIR)})
    assert all(ascii(name) in str(caught.value) for name in pair)


def test_a_cut_emoji_in_a_persona_file_is_named_by_its_text(tmp_path, monkeypatch):
    content = json.loads((personas.PERSONA_FOLDER / "formal.json").read_text(encoding="utf-8"))
    content["extraction_pairs"][2]["positive"] += " \ud83d"
    (tmp_path / "formal.json").write_text(json.dumps(content))
    monkeypatch.setattr(personas, "PERSONA_FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"'formal': text 3 of .* holds a lone surrogate"):
        load_persona("formal")


def test_home_is_understood_for_the_configuration_and_the_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "output_dir": "~/run"}))
    config = load_config("~/config.json")
    assert RunFolder(config.output_dir).path == tmp_path / "run"
