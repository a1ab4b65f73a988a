"""What a run reads is loaded and checked before anything is written, and never changes."""

import pytest
from chat_models import TEMPLATE, chatting
from tiny_runs import LOUD
from transformers import AutoTokenizer

from experiment.config import load_config
from experiment.inputs import configured, load_inputs, read_personas
from experiment.models import SIDES
from support.errors import InputError
from support.tiny_models import N_LAYERS, tiny_model
from texts.encoding import encode
from texts.personas import load_prompts

BAND = {"source_layer_idx": [3, 1, 2], "target_layer_idx": [3, 0, 1]}


@pytest.fixture(scope="module")
def settings(tiny):
    return {**tiny, "output_dir": "out"}


@pytest.fixture(scope="module")
def chat_settings(settings, band):
    """The same with a target that has a chat template."""
    return {**settings, "target_model": band["target_model"]}


@pytest.fixture(scope="module")
def inputs(settings):
    return load_inputs(load_config({**settings, **BAND}))


def loaded(settings, **changes):
    return load_inputs(load_config({**settings, **changes}))


def test_a_band_is_ordered_by_target_layer_read_at_its_middle_and_not_changed_by_another(inputs):
    assert inputs.at_pairs([(0, 2)]).layer_pairs == ((0, 2),)
    assert [side.extractor.layer_idx for side in inputs.at_pairs([(0, 2)]).sides] == [0, 2]
    assert inputs.layer_pairs == ((1, 0), (2, 1), (3, 3))
    assert (inputs.middle_pair, inputs.target_layers) == ((2, 1), [0, 1, 3])
    assert [side.extractor.layer_idx for side in inputs.sides] == [2, 1]
    with pytest.raises(InputError, match=f"0 to {N_LAYERS - 1}"):
        inputs.at_pairs([(0, N_LAYERS)])


def test_a_map_is_learnt_from_styled_responses_of_a_chat_target_else_from_neutral_text(
    settings, chat_settings
):
    for given, chosen in ((settings, "neutral_text"), (chat_settings, "styled_responses")):
        automatic, named = (loaded(given, mapping_data=choice) for choice in ("auto", chosen))
        assert automatic.config == named.config
        assert automatic.neutral_questions == named.neutral_questions
        assert automatic.neutral_styles == named.neutral_styles
        assert bool(automatic.neutral_questions) == (chosen == "styled_responses")


def test_more_neutral_texts_begin_with_those_of_the_run(inputs):
    assert inputs.more_texts(70)[:60] == list(inputs.neutral_texts)


def test_neutral_text_holds_no_persona_text(settings, inputs):
    first, *others = inputs.neutral_texts
    leaky = {"positive_texts": [first.text], "negative_texts": ["no"]}
    found = loaded(settings, persona_datasets={"leaky": leaky}).neutral_texts
    assert first not in found
    assert set(others) < set(found)


def test_whose_labelled_texts_score_a_persona_is_said(settings, caplog):
    own = {f"labelled_{side}_texts": [f"{side} {n}" for n in range(10)] for side in ("positive", "negative")}
    datasets = {"formal": LOUD, "silly": {**LOUD, **own}, "loud": LOUD}
    (note,) = loaded(settings, persona_datasets=datasets).notes
    assert note.startswith("persona 'formal' is given without labelled texts: those of the shipped persona")
    assert note in caplog.text


@pytest.mark.parametrize("text", [load_prompts("test")[0], load_prompts("test_questions")[0]])
@pytest.mark.parametrize("place", ["positive_texts", "questions", "instruction"])
def test_a_persona_text_that_holds_a_test_prompt_is_an_error(settings, text, place):
    value = [{"pos": text, "neg": "Whisper."}] if place == "instruction" else [text]
    definition = {**LOUD, "instruction": [{"pos": "a", "neg": "b"}], "questions": ["Who?"], place: value}
    with pytest.raises(InputError, match="'x' has 1 texts that share words with a test prompt"):
        read_personas(load_config({**settings, "persona_datasets": {"x": definition}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_training_samples": 10, "n_folds": 11}, "n_folds is 11 but the neutral texts come from 10"),
        ({"max_new_tokens": 1000}, "max_new_tokens"),
        ({"top_k": 10_000_000}, "top_k"),
        ({"system_prompt": "Be kind."}, "system_prompt is of use where the target is shown a chat template"),
        ({"mapping_data": "responses"}, "'responses' asks a chat model, but neither model is one"),
        ({"chat_template_kwargs": {"tone": "dry"}}, "'tone', which is in no chat template that this run"),
        ({"source_prompt_format": "chat"}, "tokenizer of the source model has no chat template"),
        ({"layer_idx": "auto", "source_layer_idx": None, "search_target_layers": [9]}, "0 to 3"),
    ],
    ids=str,
)
def test_what_a_later_phase_would_reject_is_an_error_at_once(settings, change, message):
    if "layer_idx" in change:
        change = {**change, "target_layer_idx": None}
    with pytest.raises(InputError, match=message):
        loaded(settings, **change)


def test_templates_are_told_their_variables_and_the_runs_day(chat_settings, tmp_path):
    tiny_model("gpt2", seed=1, n_embd=48).save_pretrained(tmp_path)
    chatting("{{ tone or 'no tone' }}, {{ strftime_now('%Y') }}: " + TEMPLATE).save_pretrained(tmp_path)
    settings = {**chat_settings, "target_model": str(tmp_path)}
    variables = {"chat_template_kwargs": {"tone": "dry"}, "chat_template_date": "2031-05-01"}
    for found, said in ((loaded(settings), "no tone, 2026"), (loaded(settings, **variables), "dry, 2031")):
        assert found.prompting.prompt("target", "Why?").startswith(said)


def test_a_tokenizer_without_offsets_gives_pairs_at_last_tokens(settings, llama, slow_tokenizer, caplog):
    slow = {"source": (llama, slow_tokenizer)}
    found = load_inputs(load_config(settings), slow)
    assert found.mapping_positions == "last"
    assert "source: its tokenizer gives no character offsets: mapping_positions is 'last'" in caplog.text
    assert loaded(settings).mapping_positions == "aligned"
    with pytest.raises(InputError, match=r"the source's tokenizer .* use mapping_positions 'last'"):
        load_inputs(load_config({**settings, "mapping_positions": "aligned"}), slow)


def test_texts_of_a_persona_are_words(settings):
    spelt = {**LOUD, "positive_texts": ["It is <eos> so.", "YES."], "negative_texts": ["a", "b"]}
    found = loaded(
        settings, persona_datasets={"spelt": spelt}, test_prompts=["What <bos> is"], n_test_prompts=1
    )
    (persona,) = found.personas
    shown = [*persona.positive_texts, *(found.prompting.prompt(side, "What <bos> is") for side in SIDES)]
    for ids in encode(found.source.tokenizer, shown):
        assert max(ids[1:]) < 256


def test_without_a_hub_all_lines_that_need_it_are_named(settings, monkeypatch):
    def offline(*names, **options):
        raise OSError("We couldn't connect to 'https://hub' to load the files.\nCheck your connection")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(InputError, match=r"load the files\. The hub is needed for ") as caught:
        loaded(settings, source_model="some/model", target_model="other/model")
    assert '"source_model": "some/model", "target_model": "other/model"; a model may be' in str(caught.value)
    with pytest.raises(InputError, match='needed for "target_model": "other/model"; a model'):
        loaded(settings, target_model="other/model")


def test_a_map_from_responses_needs_as_many_questions_as_folds_that_no_test_asks(chat_settings):
    change = {"mapping_data": "responses", "n_training_samples": 10, "n_folds": 11}
    with pytest.raises(InputError, match=r"n_folds is 11, but .* responses to 10 questions"):
        loaded(chat_settings, **change)
    asked = load_prompts("neutral_questions")
    found = loaded(chat_settings, mapping_data="responses", test_prompts=asked[:7], n_test_prompts=7)
    assert found.neutral_questions == tuple(asked[7:])
    assert (found.neutral_styles, found.mapping_texts) == ((), ())  # until they are collected


def test_neutral_styles_that_are_a_personas_are_left_out(chat_settings):
    personas = {"loud": LOUD, "robot": LOUD}
    found = loaded(chat_settings, mapping_data="styled_responses", persona_datasets=personas).neutral_styles
    assert found == tuple(style for style in load_prompts("neutral_styles") if "robot" not in style)


def test_loaded_models_need_no_names_and_stay_in_this_process(settings, llama, tokenizer):
    unnamed = {key: value for key, value in settings.items() if key != "source_model"}
    config, given = configured(unnamed, (llama, tokenizer), None)
    assert config.source_model == "a loaded llama"
    assert load_inputs(config, given).source.model is llama
    with pytest.raises(InputError, match="leave out the executor 'ray'"):
        configured({**unnamed, "executor": {"kind": "ray"}}, (llama, tokenizer), None)
