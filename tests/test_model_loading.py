"""Decoder blocks are found, only causal models load, and a fingerprint notices a changed model."""

import shutil

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from watching import logits

from activation_extractor import ActivationExtractor
from evaluation import continuation_perplexities
from model_loading import (
    blocks_in_base,
    context_length,
    d_model,
    decoder_blocks,
    filler_token_id,
    is_causal,
    load_model,
    model_fingerprint,
    n_layers,
    pad_token_id,
    pad_tokens,
    resolve_device,
    resolve_dtype,
)
from steered_generation import SteeredGenerator, steering_error
from support.errors import InputError
from support.package_cache import CACHE_VARIABLE
from support.tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    D_MODEL,
    N_LAYERS,
    VOCAB_SIZE,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def folder(model_folders, tmp_path):
    """A copy of a saved model that a test may damage."""
    return shutil.copytree(model_folders["source"], tmp_path / "model")


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_every_architecture_is_causal_and_states_depth_width_and_context(model, tokenizer):
    assert is_causal(model)
    assert n_layers(model) == N_LAYERS
    assert d_model(model) == D_MODEL
    assert context_length(model, tokenizer) == CONTEXT


def test_decoder_blocks_are_the_list_that_runs_in_order(model):
    ran = []
    blocks = decoder_blocks(model)
    handles = [block.register_forward_hook(lambda block, *_: ran.append(block)) for block in blocks]
    logits(model)
    for handle in handles:
        handle.remove()
    assert ran == list(blocks)


def test_the_place_of_the_blocks_in_the_base_model_is_told_without_weights(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    place = blocks_in_base(str(tmp_path))
    assert model.base_model.get_submodule(place) is decoder_blocks(model)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(InputError, match="cannot tell the modules of"):
        blocks_in_base(str(tmp_path))


@pytest.mark.parametrize(
    ("stated", "tokenizer_limit", "expected"),
    [
        (64, CONTEXT, 64),
        (1024, CONTEXT, CONTEXT),
        (64, int(1e30), 64),
        (4096, int(1e30), 4096),
        (None, int(1e30), 2048),
    ],
)
def test_context_is_the_lower_limit_or_2048_without_one(stated, tokenizer_limit, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = tokenizer_limit
    model = tiny_model(max_position_embeddings=stated) if stated else tiny_model("bloom")
    assert context_length(model, tokenizer) == expected


def linears():
    """A list of modules as long as that of the blocks."""
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(N_LAYERS))


def test_several_or_no_possible_block_lists_are_rejected_unless_a_path_is_given():
    model = tiny_model()
    model.other = linears()
    with pytest.raises(InputError, match=r'model\.layers, other.*"source_block_path"'):
        decoder_blocks(model)
    assert decoder_blocks(model, "model.layers") is model.model.layers
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match=r'7 decoder blocks.*no list of that length.*"source_block_path"'):
        decoder_blocks(model)


def test_lists_of_a_vision_tower_or_inside_the_blocks_are_ignored():
    """A mixture may have as many experts as blocks."""
    model = tiny_model()
    model.vision_tower = linears()
    for block in model.model.layers:
        block.experts = linears()
    assert decoder_blocks(model) is model.model.layers


@pytest.mark.parametrize(
    ("block_path", "message"),
    [
        ("model.nowhere", "model.nowhere"),
        ("lm_head", "is a Linear"),
        ("model.layers.0", "expected the Modul"),
    ],
)
def test_a_block_path_without_a_list_is_rejected(llama, block_path, message):
    with pytest.raises(InputError, match=message):
        decoder_blocks(llama, block_path)


def test_a_local_folder_loads_as_it_was_saved(model_folders):
    model, tokenizer = load_model(model_folders["source"], device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert tokenizer("Naïve café, 100 %").input_ids == tiny_tokenizer()("Naïve café, 100 %").input_ids


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("auto", torch.float32)]
)
def test_a_model_loads_in_the_stated_dtype(model_folders, dtype, expected):
    assert load_model(model_folders["target"], device="cpu", dtype=dtype)[0].dtype == expected


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (BertForMaskedLM, BertConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4)),
        (T5ForConditionalGeneration, T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
    ],
)
def test_a_model_that_is_not_causal_is_rejected(tmp_path, architecture, config):
    config.vocab_size = VOCAB_SIZE
    with pytest.raises(InputError, match="not a causal language model"):
        load_model(save(architecture(config), tmp_path), device="cpu")


def test_a_model_whose_logits_are_not_finite_is_an_input_error(tmp_path):
    """Gemma-3 in float16 is one. The message must not deny that it is causal."""
    model = tiny_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="finite"):
        load_model(save(model, tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.gguf", "no such GGUF file"),
        ("not a model!", "not a packaged model .*a local folder, a GGUF file or a hub id"),
        ("one/two/three", "not a packaged model"),
        ("", "no config.json"),
    ],
)
def test_a_source_that_names_nothing_is_rejected(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_model(source)


def remove(folder, pattern):
    for path in folder.glob(pattern):
        path.unlink()


def truncate(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:100])


CANNOT = "cannot load a causal language model from"


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (remove, "config.json", r"has no config\.json"),
        (remove, "*.safetensors", CANNOT),
        (remove, "token*", CANNOT),
        (truncate, "config.json", CANNOT),
        (truncate, "tokenizer.json", CANNOT),
        (truncate, "model.safetensors", CANNOT),
    ],
)
def test_a_missing_or_truncated_file_in_a_folder_is_an_input_error(folder, damage, name, message):
    damage(folder, name)
    with pytest.raises(InputError, match=message):
        load_model(str(folder))


def test_a_damaged_gguf_file_is_an_input_error_and_leaves_no_cache_entry(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(InputError, match=r"model\.gguf"):
        load_model(str(tmp_path / "model.gguf"))
    assert not list(tmp_path.glob("cache/models/*-float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nonsense"}, "device 'nonsense' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"dtype": "int8"}, "'int8' is unknown; choose auto, fastest, float32, bfloat16, "),
        ({"device_map": "nonsense"}, CANNOT),
        ({"device_map": {"": "cpu", "model.layers.1": "disk"}}, CANNOT),
        ({"device_map": {"": "disk"}}, "leaves the embeddings .* on disk"),
        ({"revision": "main"}, "revision 'main' is for hub ids"),
        ({"quantization": "3bit"}, "quantization '3bit' is unknown"),
        ({"quantization": "8bit"}, "needs a CUDA device and the package bitsandbytes"),
        ({"quantization": "4bit"}, "needs a CUDA device and the package bitsandbytes"),
    ],
)
def test_options_that_cannot_be_used_are_rejected(model_folders, options, message):
    with pytest.raises(InputError, match=message):
        load_model(model_folders["source"], **{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("capability", "fastest"),
    [("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_device_and_dtype_follow_the_hardware(capability, fastest, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_dtype(name, cpu) for name in ("auto", "fastest")] == [torch.float32, fastest]
    assert resolve_dtype("auto", cuda) == resolve_dtype("fastest", cuda) == torch.bfloat16


def test_a_fingerprint_changes_with_weights_dtype_configuration_and_tokenizer_alone(model_folders, folder):
    """Where a model lies changes nothing."""
    first, (model, tokenizer) = (
        load_model(str(at), device="cpu") for at in (model_folders["source"], folder)
    )
    fingerprints = [model_fingerprint(*first)]
    assert model_fingerprint(model, tokenizer) == fingerprints[0]
    for parameter in model.parameters():
        parameter.data.mul_(1.001)
        fingerprints.append(model_fingerprint(model, tokenizer))
    model.config.rms_norm_eps *= 2
    fingerprints.append(model_fingerprint(model, tokenizer))
    fingerprints.append(model_fingerprint(model.to(torch.bfloat16), tokenizer))
    tokenizer.add_tokens(["Naïve"])
    fingerprints.append(model_fingerprint(model, tokenizer))
    assert len(set(fingerprints)) == len(fingerprints) == 4 + len(list(model.parameters()))


@pytest.mark.parametrize(
    ("side", "expected", "mask"),
    [
        ("left", [[5, 5, 7], [1, 2, 3], [5, 4, 5]], [[0, 0, 1], [1, 1, 1], [0, 1, 1]]),
        ("right", [[7, 5, 5], [1, 2, 3], [4, 5, 5]], [[1, 0, 0], [1, 1, 1], [1, 1, 0]]),
    ],
)
def test_tokens_are_padded_on_the_stated_side_and_the_mask_knows_real_ones(side, expected, mask):
    tokens, attention_mask = pad_tokens([[7], [1, 2, 3], [4, 5]], 5, side, torch.device("cpu"))
    assert tokens.tolist() == expected
    assert attention_mask.tolist() == mask
    assert tokens.dtype == attention_mask.dtype == torch.int64


def test_padding_falls_back_to_the_end_token_and_then_to_0():
    bare, model = tiny_tokenizer(with_pad=False), tiny_model()
    assert pad_token_id(tiny_tokenizer(), model) == 258
    assert pad_token_id(bare, model) == bare.eos_token_id == 257
    bare.eos_token = None
    assert pad_token_id(bare, model) == 0


def partly_on_disk(model):
    """Device map: the odd blocks on disk, all else on the CPU."""
    blocks, modules = decoder_blocks(model), dict(model.named_modules())
    (above,) = (name for name, module in modules.items() if module is blocks)
    others = (name for name in modules if not above.startswith(name) and not name.startswith(above))
    places = {f"{above}.{i}": "disk" if i % 2 else "cpu" for i in range(len(blocks))}
    return dict.fromkeys(others, "cpu") | places


def weights_elsewhere(model):
    return [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text", "phi3", "bloom", "mixtral"])
def offloaded(request, tmp_path_factory):
    """A model that was loaded whole, and the same with blocks on disk."""
    made, folder = tiny_model(request.param), tmp_path_factory.mktemp("offloaded")
    path = save(made, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder / "cache"))
        model, _ = load_model(path, device="cpu", device_map=partly_on_disk(made))
        yield load_model(path, device="cpu")[0], model


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_a_device_map_onto_one_device_changes_nothing(model_folders, device_map):
    plain, tokenizer = load_model(model_folders["target"], device="cpu")
    mapped, _ = load_model(model_folders["target"], device="cpu", device_map=device_map)
    assert not mapped.training
    assert torch.equal(logits(mapped), logits(plain))
    assert model_fingerprint(mapped, tokenizer) == model_fingerprint(plain, tokenizer)


def test_blocks_on_disk_change_no_logits_no_perplexities_and_no_fingerprint(offloaded, tokenizer):
    plain, model = offloaded
    elsewhere = weights_elsewhere(model)
    assert elsewhere
    assert torch.equal(logits(model), logits(plain))
    texts = ["The sea is", "Then"], [" blue and wide.", " it rains"]
    found, expected = (continuation_perplexities(m, tokenizer, *texts) for m in (model, plain))
    assert found == pytest.approx(expected, rel=1e-5)
    for _ in range(2):
        assert model_fingerprint(model, tokenizer) == model_fingerprint(plain, tokenizer)
    assert weights_elsewhere(model) == elsewhere


@pytest.mark.parametrize("layer_idx", [0, 1, N_LAYERS - 1])
def test_blocks_on_disk_are_read_and_steered_as_any(offloaded, tokenizer, layer_idx):
    plain, model = offloaded
    texts = ["The sea", "Then it rains on the roof"]
    read, expected = (
        ActivationExtractor(m, tokenizer, layer_idx).extract_batch(texts) for m in (model, plain)
    )
    assert torch.equal(read, expected)
    vector = torch.randn(D_MODEL)
    rows = {"steering_vectors": {layer_idx: vector.expand(2, -1)}, "alphas": [2.0, 0.0]}
    written = []
    for m in (plain, model):
        with SteeredGenerator(m, tokenizer) as generator:
            written.append(generator.generate_batch(texts, 8, **rows))
            generator.register_steering(layer_idx, vector, alpha=2.0)
            written[-1] += generator.generate_batch(texts, 8)
            read_block = ActivationExtractor(m, tokenizer, layer_idx, read_steered=True).extract
            assert steering_error(generator, layer_idx, texts[0], read_block) < 1e-5
    assert written[0] == written[1]
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_models_with_blocks_on_disk_keep_their_own_weights(name, tmp_path):
    """The mixture's experts are put together when it loads, so that they are written anew."""
    plain = [tiny_model(name, seed=seed) for seed in (0, 1)]
    loaded = []
    for seed, model in enumerate(plain):
        path = save(model, tmp_path / str(seed))
        loaded.append(load_model(path, device="cpu", device_map=partly_on_disk(model))[0])
    for expected, found in zip(plain, loaded, strict=True):
        assert torch.allclose(logits(found), logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad_token_id", [0, 1, 258, None])
def test_without_a_mask_filling_is_no_padding_token_of_the_model(pad_token_id):
    """Transformers would warn of that one."""
    model = tiny_model()
    model.config.pad_token_id = pad_token_id
    assert filler_token_id(model) in {0, 1} - {pad_token_id}
