"""Models and tokenizers as users bring them: what would give a wrong number is handled or rejected."""

import json
from pathlib import Path

import peft
import pytest
import torch
from adapters import with_lora
from chat_models import saved
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForCausalLM,
    BlenderbotConfig,
    BlenderbotForCausalLM,
    ByT5Tokenizer,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from watching import logits

from activation_extractor import ActivationExtractor, paired_activations
from decoding.steering_hooks import active_steering
from evaluation import Evaluator, continuation_perplexities
from model_loading import load_model
from steered_generation import SteeredGenerator
from support.errors import InputError
from support.tiny_models import D_MODEL, VOCAB_SIZE, tiny_model, tiny_tokenizer
from texts.encoding import encode

TEXTS = ["Short.", "A longer text about nothing at all.", "Middle sized text."]
PROMPTS = ["Once upon a time", "Then", "The weather"]
OUTPUTS = [" it rained.", " nothing.", " is fair today."]


# Checkpoints


def with_changed_weights(folder, change):
    """Load a tiny model whose saved weights were changed."""
    path = Path(saved(tiny_model(), folder)) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return load_model(str(folder), device="cpu")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {f"language_model.{name}": value for name, value in weights.items()},
            r"39 missing \(lm_head.weight, .*39 that the model does not have \(language_model\.",
        ),
        (
            lambda weights: {name: weights[name] for name in weights if "layers.1.mlp" not in name},
            r"3 missing \(model\.layers\.1\.mlp",
        ),
        (
            lambda weights: weights | {"model.layers.4.mlp.up_proj.weight": torch.ones(64, 32)},
            r"1 that the model does not have \(model\.layers\.4",
        ),
        (
            lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"][:100].clone()},
            r"1 of another shape \(lm_head",
        ),
    ],
    ids=["a prefix", "a block is left out", "a block too many", "a smaller vocabulary"],
)
def test_weights_that_would_be_random_are_rejected(tmp_path, change, message):
    with pytest.raises(InputError, match=f"do not fit LlamaForCausalLM.*{message}") as caught:
        with_changed_weights(tmp_path, change)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("extra", ["vision_tower.layer.weight", "v_head.weight", "model.rotary_emb.inv_freq"])
def test_weights_of_something_beside_the_decoder_are_left_out(tmp_path, extra):
    loaded = with_changed_weights(tmp_path, lambda weights: weights | {extra: torch.ones(3)})
    assert torch.equal(logits(loaded), logits(tiny_model()))


def test_tied_weights_need_be_there_once(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    saved(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


OWN_CONFIG = {"auto_map": {"AutoConfig": "own_code.Own"}, "model_type": "own"}
OWN_CODE = {"auto_map": {"AutoModelForCausalLM": "own_code.Own"}}


@pytest.mark.parametrize(
    ("changes", "message", "is_trusted"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load a causal", False),
        ({"model_type": "of tomorrow"}, "of tomorrow", False),
        ({**OWN_CODE, "model_type": "own"}, "model type `own`", False),
        (OWN_CODE, "cannot load a causal .* not found .*: a_package_that_nobody_has", True),
        ({"num_hidden_layers": -1}, "do not fit LlamaForCausalLM", False),
        ({"hidden_size": "wide"}, "cannot load a causal", False),
    ],
    ids=["quantised", "unknown", "own code", "own code that lacks a package", "no layers", "wrong type"],
)
def test_what_transformers_cannot_load_is_an_error(tmp_path, changes, message, is_trusted):
    path = Path(saved(tiny_model(), tmp_path)) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "own_code.py").write_text("import a_package_that_nobody_has\n\n\nclass Own: ...\n")
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(tmp_path), device="cpu", trust_remote_code=is_trusted)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("missing packages:\n\n- one\n- two", "missing packages: - one"),
        ("one reason\nand its details", "one reason"),
        ("nothing follows:", "nothing follows:"),
        ("", "RuntimeError"),
    ],
)
def test_the_reason_of_a_library_is_shown_in_a_line(message, shown, tmp_path):
    saved(tiny_model(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN_CONFIG))
    (tmp_path / "own_code.py").write_text(f"raise RuntimeError({message!r})\n\n\nclass Own: ...\n")
    with pytest.raises(InputError) as caught:
        load_model(str(tmp_path), device="cpu", trust_remote_code=True)
    assert str(caught.value) == f"cannot load a causal language model from {str(tmp_path)!r}: {shown}"


def test_a_model_of_images_is_called_what_it_is(tmp_path):
    text = {"model_type": "llama", **tiny_model().config.to_diff_dict(), "num_hidden_layers": 1}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    with pytest.raises(InputError, match="it is a llava model of text and vision; save its language model"):
        load_model(saved(model, tmp_path), device="cpu")


# Adapters and other wrappings


def test_a_wrapped_model_is_read_steered_and_scored_with_its_adapter(tokenizer):
    wrapped, plain = with_lora(tiny_model()), tiny_model()
    merged = with_lora(tiny_model()).merge_and_unload()
    read, texts, scores = [], [], []
    for model in (wrapped, merged, plain):
        read.append(ActivationExtractor(model, tokenizer, 1).extract_batch(TEXTS))
        scores.append(continuation_perplexities(model, tokenizer, PROMPTS, OUTPUTS))
        with SteeredGenerator(model, tokenizer) as generator:
            generator.register_steering(1, torch.ones(D_MODEL), 2.0)
            texts.append(generator.generate_batch(PROMPTS, 8))
    assert torch.allclose(read[0], read[1], atol=1e-4)
    assert not torch.allclose(read[0], read[2], atol=1e-2)
    assert texts[0] == texts[1]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def dropping(model):
    """Leave one module alone in training mode, as Monte Carlo dropout does."""
    model.model.layers[2].self_attn.train()


def with_checkpoints(model):
    model.gradient_checkpointing_enable()
    model.train()


def compiled_inside(model):
    """Compile the inner forward, and run it once: what is compiled knows no hooks."""
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    logits(model)


def compiled_in_place(model):
    model.compile(backend="eager")
    logits(model)


@pytest.mark.parametrize(
    "prepare", [torch.nn.Module.train, dropping, with_checkpoints, compiled_inside, compiled_in_place]
)
def test_a_model_in_whatever_mode_is_read_steered_and_scored_as_a_plain_one(prepare, tokenizer):
    found = []
    for change in (lambda model: None, prepare):
        model = tiny_model(attention_dropout=0.5)
        change(model)
        modes = [module.training for module in model.modules()]
        with SteeredGenerator(model, tokenizer) as generator:
            rows = {1: torch.ones(len(PROMPTS), D_MODEL)}
            written = generator.generate_batch(PROMPTS, 8, steering_vectors=rows, alphas=[0.0, 2.0, 5.0])
            generator.register_steering(2, torch.ones(D_MODEL), 3.0)
            written += generator.generate_batch(PROMPTS, 8)
        read = ActivationExtractor(model, tokenizer, 1).extract_batch(TEXTS)
        scores = continuation_perplexities(model, tokenizer, PROMPTS, OUTPUTS)
        assert [module.training for module in model.modules()] == modes
        found.append((written, read, scores))
    (written, read, scores), others = found
    assert others[0] == written
    assert torch.allclose(others[1], read, atol=1e-5)
    assert others[2] == pytest.approx(scores, rel=1e-4)


def test_blocks_whose_hooks_are_never_called_are_an_error(tokenizer):
    model = tiny_model()
    block = model.model.layers[1]
    silent = {"__call__": lambda self, *inputs, **options: self.forward(*inputs, **options)}
    block.__class__ = type("Silent", (type(block),), silent)
    expected = "without calling the hook on block 1"
    with pytest.raises(InputError, match=expected):
        ActivationExtractor(model, tokenizer, 1).extract_batch(TEXTS)
    with SteeredGenerator(model, tokenizer) as generator:
        assert len(generator.generate_batch(PROMPTS, 4)) == len(PROMPTS)
        rows = {1: torch.ones(len(PROMPTS), D_MODEL)}
        with pytest.raises(InputError, match=expected):
            generator.generate_batch(PROMPTS, 4, steering_vectors=rows, alphas=[1.0] * len(PROMPTS))
        generator.register_steering(1, torch.ones(D_MODEL), 1.0)
        with pytest.raises(InputError, match=expected):
            generator.generate_batch(PROMPTS, 4)


@pytest.mark.parametrize("device", ["cuda:99", torch.device("cuda:99"), "nonsense"])
def test_a_device_that_is_not_here_is_one_line(device, llama, tokenizer):
    for made in (ActivationExtractor, SteeredGenerator):
        layer = {"layer_idx": 1} if made is ActivationExtractor else {}
        with pytest.raises(InputError, match=r"cannot be used here: .*; choose 'auto' or 'cpu'") as raised:
            made(llama, tokenizer, device=device, **layer)
        assert "\n" not in str(raised.value)


def test_the_folder_of_an_adapter_loads_with_its_base(tmp_path):
    base = saved(tiny_model(), tmp_path / "base")
    model, _ = load_model(base, device="cpu")
    wrapped = with_lora(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model(str(tmp_path / "adapter"), device="cpu")
    assert torch.allclose(logits(loaded), logits(wrapped), atol=1e-4)


@pytest.mark.parametrize("base", ["/nowhere/base", "nobody/has-this", "no name: at all"])
def test_an_adapter_without_its_base_names_it_and_the_file_that_names_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with_lora(tiny_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises(InputError, match="correct base_model_name_or_path there") as raised:
        load_model(str(tmp_path), device="cpu")
    assert f"{tmp_path / 'adapter_config.json'} names the base model {base!r}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_the_prompt_is_rejected(tokenizer):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(InputError, match="prompt-learning adapter"):
        ActivationExtractor(wrapped, tokenizer, 1)


def test_blocks_of_four_streams_are_rejected_by_name(tokenizer):
    sizes = {"vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size": 32}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 1, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    layers = {"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **layers, num_kv_shared_layers=0)).eval()
    with pytest.raises(InputError, match="several streams, as Gemma 3n's do"):
        ActivationExtractor(model, tokenizer, 1).extract("A text")


# Tokenizers


def ending(before="<bos> ", behind=" <eos>"):
    tokenizer = tiny_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>", "<unk>")]
    template = TemplateProcessing(single=f"{before}$A{behind}", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.mark.parametrize("behind", [" <eos>", " <unk> <eos>"])
def test_a_tokenizer_that_ends_its_texts_gives_what_one_without_gives(llama, tokenizer, behind):
    other = ending(behind=behind)
    assert other("a").input_ids != tokenizer("a").input_ids
    extractors = [ActivationExtractor(llama, each, 1) for each in (tokenizer, other)]
    for position in ("last", "mean"):
        read = [extractor.extract_batch(TEXTS, position) for extractor in extractors]
        assert torch.equal(*read)
    for positions in ("aligned", "last"):
        one, two = (next(paired_activations(each, extractors[0], TEXTS, positions)) for each in extractors)
        assert torch.equal(one.H_source[1], two.H_source[1])
        assert torch.equal(one.end, two.end)
    texts = [SteeredGenerator(llama, each).generate_batch(PROMPTS, 12) for each in (tokenizer, other)]
    assert texts[0] == texts[1]
    scores = [continuation_perplexities(llama, each, PROMPTS, OUTPUTS) for each in (tokenizer, other)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("before", ["<bos> ", "<unk> <bos> "])
def test_a_text_that_brings_its_bos_gets_no_second_one_and_keeps_its_eos(before):
    other = ending(before)
    (plain,) = encode(other, ["Then"])
    texts = ["<bos>Then", "<bos><bos>Then", "Then<bos>", "Then<eos>"]
    assert encode(other, texts) == [plain, plain, [*plain, 256], [*plain, 257]]


def test_a_pad_token_beyond_the_embeddings_pads_all_the_same(llama):
    tokenizer = tiny_tokenizer(with_pad=False)
    expected = SteeredGenerator(llama, tokenizer).generate_batch(PROMPTS, 8)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= VOCAB_SIZE
    assert SteeredGenerator(llama, tokenizer).generate_batch(PROMPTS, 8) == expected


def test_tokens_that_a_slow_tokenizer_lacks_have_no_text():
    """A model may have more embeddings than its tokenizer has tokens; a fast one leaves them out."""
    model = tiny_model(vocab_size=500)
    model.lm_head.weight.data[:400] = 0  # the tokenizer has 384
    model.lm_head.weight.data[400:] *= 100
    slow = ByT5Tokenizer()
    (written,) = SteeredGenerator(model, slow).generate_batch(["abc"], 4)
    assert (written.text, written.n_tokens) == ("", 4)


def test_a_token_without_embedding_is_rejected_by_name(llama):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[NEW]"])
    message = rf"text 1 holds token {VOCAB_SIZE} \('\[NEW\]'\), but the model has {VOCAB_SIZE} embeddings"
    texts = ["A text", "A [NEW] one"]
    for reject in (
        lambda: ActivationExtractor(llama, tokenizer, 1).extract_batch(texts),
        lambda: SteeredGenerator(llama, tokenizer).generate_batch(texts, 4),
        lambda: continuation_perplexities(llama, tokenizer, texts, OUTPUTS[:2]),
    ):
        with pytest.raises(InputError, match=message):
            reject()


# Steering that is still on


@pytest.fixture
def model_and_vector():
    return tiny_model(), torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)


def test_scores_of_a_steered_model_are_those_of_the_unsteered_one_and_leave_it_steered(
    model_and_vector, tokenizer
):
    model, vector = model_and_vector
    expected = continuation_perplexities(model, tokenizer, PROMPTS, OUTPUTS)
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(1, vector, 20.0)
        assert continuation_perplexities(model, tokenizer, PROMPTS, OUTPUTS) == expected
        single = Evaluator(model, tokenizer).evaluate_single(PROMPTS[0], OUTPUTS[0], "check")
        assert single.perplexity == pytest.approx(expected[0], rel=1e-5)
        with pytest.raises(TypeError):
            continuation_perplexities(model, tokenizer, PROMPTS, [1, 2, 3])
        assert len(active_steering(model)) == 1
        generator.set_alpha(0.0)
        assert not active_steering(model)


def test_reading_a_steered_model_is_rejected_unless_it_is_asked_for(model_and_vector, tokenizer):
    model, vector = model_and_vector
    extractor = ActivationExtractor(model, tokenizer, 1)
    expected = extractor.extract_batch(TEXTS)
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(1, vector, 20.0)
        with pytest.raises(InputError, match=r"steered at layer 1 \(alpha 20\).*read_steered=True"):
            extractor.extract_batch(TEXTS)
        asked = ActivationExtractor(model, tokenizer, 1, read_steered=True).extract_batch(TEXTS)
        assert torch.allclose(asked - expected, (20 * vector).expand_as(asked), atol=1e-3)
        generator.deactivate()
        assert torch.equal(extractor.extract_batch(TEXTS), expected)
    assert torch.equal(extractor.extract_batch(TEXTS), expected)


def test_two_generators_on_one_model_know_of_each_other(model_and_vector, tokenizer):
    model, vector = model_and_vector
    first, second = SteeredGenerator(model, tokenizer), SteeredGenerator(model, tokenizer)
    expected = second.generate_batch(PROMPTS, 8)
    first.register_steering(2, vector, 5.0)
    with pytest.raises(InputError, match=r"steered at layer 2 \(alpha 5\) by another SteeredGenerator"):
        second.generate_batch(PROMPTS, 8)
    assert first.generate_batch(PROMPTS, 8) != expected
    first.clear_steering()
    assert second.generate_batch(PROMPTS, 8) == expected


# Decoders that count padding


DECODER = {"vocab_size": VOCAB_SIZE, "d_model": 32, "encoder_layers": 3, "decoder_layers": 4}
DECODER |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("config", "model_class"), [(BartConfig, BartForCausalLM), (BlenderbotConfig, BlenderbotForCausalLM)]
)
def test_a_decoder_without_position_ids_writes_in_a_batch_what_it_writes_alone(
    config, model_class, tokenizer
):
    model = model_class(config(**DECODER)).eval()
    for name, parameter in model.named_parameters():
        if "embed_positions" in name:
            parameter.data *= 50  # so that a wrong position changes the text
    generator = SteeredGenerator(model, tokenizer)
    assert len(generator.blocks) == 4
    alone = [generator.generate(prompt, 8) for prompt in PROMPTS]
    assert [each.text for each in generator.generate_batch(PROMPTS, 8)] == alone
    assert len(set(alone)) == 3


# Vectors


@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.double])
def test_a_vector_may_be_a_list_or_an_array(llama, tokenizer, form):
    vector = torch.randn(D_MODEL)
    with SteeredGenerator(llama, tokenizer) as generator:
        for given in (vector, form(vector)):
            generator.register_steering(1, given, 3.0)
            assert torch.allclose(generator.added_vector(1), 3 * vector)
