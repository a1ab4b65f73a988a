"""A batch decodes as whole passes do one by one; rows that end leave without disturbing the others."""

from itertools import pairwise

import pytest
import torch
from watching import fails_at

from decoding.loop import DROP_FRACTION, decode
from decoding.row_sampler import NOT_FINITE
from support.errors import InputError
from support.tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

PROMPTS = [[256, 5, 6, 7], [256], [256, 30, 31, 32, 33, 34], [256, 5, 6, 9], [256, 77, 78]]
LONG_PROMPTS = [[256, *range(length)] for length in (3, 11, 8, 7, 14)]
END = VOCAB_SIZE - 1
SLIDING = {
    **{name: {"sliding_window": 8} for name in ("mistral", "gemma2", "phi3", "starcoder2", "mixtral")},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"window_size": 8},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


def greedy(logits, rows, step):
    """The most probable token but END, which only `ending` chooses."""
    return logits[:, :END].argmax(-1)


def ending(at, steps=None):
    """Choose greedily, but END for row -> step of `at`; note in `steps` the rows of each step."""

    def choose(logits, rows, step):
        if steps is not None:
            steps.append(rows.tolist())
        chosen = greedy(logits, rows, step)
        return torch.where(torch.tensor([at.get(row) == step for row in rows.tolist()]), END, chosen)

    return choose


@torch.inference_mode()
def one_by_one(model, prompts, n_steps):
    """Greedy decoding by whole passes, without a cache or padding."""
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        for step in range(n_steps):
            chosen = greedy(model(tokens, use_cache=False).logits[:, -1], None, step)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def check_decoding(model, prompts, n_steps, at=None, **options):
    """Decode a batch whose rows end at row -> step of `at` as whole passes do one by one."""
    expected, at = one_by_one(model, prompts, n_steps), at or {}
    assert len(set(map(tuple, expected))) > 1
    found = decode(model, prompts, ending(at), n_steps, {END}, **options)
    assert found == [new[: at.get(row, n_steps)] for row, new in enumerate(expected)]


@pytest.mark.parametrize("at", [{}, {0: 2, 1: 0, 3: 4}])
def test_a_batch_decodes_as_whole_passes_one_by_one(model, at):
    check_decoding(model, PROMPTS, 7, at)


@pytest.mark.parametrize("at", [{}, {0: 0, 1: 2, 4: 1}])
def test_rows_with_equal_keys_decode_as_whole_passes_one_by_one(model, at):
    check_decoding(model, [PROMPTS[row] for row in (4, 2, 4, 2, 2)], 5, at, row_keys=[1, 0, 1, 0, 0])


@pytest.mark.parametrize("at", [{}, {0: 2, 1: 6, 3: 13}])
@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_shorter_than_the_text_is_respected(name, at):
    check_decoding(tiny_model(name, **SLIDING[name]), LONG_PROMPTS, 16, at)


@pytest.mark.parametrize("window", [29, 30, 31, 32])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mistral"])
def test_a_sliding_window_about_as_long_as_the_text_is_respected(name, window):
    """The longest text has 15 + 16 positions, of which the last is not read."""
    check_decoding(tiny_model(name, **{**SLIDING[name], "sliding_window": window}), LONG_PROMPTS, 16)


@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "gpt_neo"])
def test_the_window_of_these_checks_matters(name):
    settings = {key: 64 if isinstance(value, int) else value for key, value in SLIDING[name].items()}
    wide, narrow = (tiny_model(name, **options) for options in (settings, SLIDING[name]))
    assert decode(wide, LONG_PROMPTS, greedy, 16) != decode(narrow, LONG_PROMPTS, greedy, 16)


@pytest.mark.parametrize("pad_id", [0, 5, 258])
def test_neither_the_padding_token_nor_its_amount_changes_a_row(model, pad_id):
    expected = decode(model, PROMPTS, greedy, 6)
    assert decode(model, PROMPTS, greedy, 6, pad_id=pad_id) == expected
    assert decode(model, [*PROMPTS, [256, *range(60)]], greedy, 6, pad_id=pad_id)[:-1] == expected


@pytest.mark.parametrize("n_rows", [1, 5, 8, 9, 20])
def test_rows_are_dropped_once_an_eighth_has_ended_and_the_hooks_are_told_which_stay(llama, n_rows):
    prompts = [[256, row, row + 1] for row in range(n_rows)]
    at = {row: 2 + row // 2 for row in range(0, n_rows, 3)}
    steps, changes = [], []
    note = {"on_rows_change": lambda rows: changes.append(rows.tolist())}
    decode(llama, prompts, ending(at, steps), 12, {END}, **note)
    in_batch = [steps[0], *(now for before, now in pairwise(steps) if now != before)]
    assert steps[0] == list(range(n_rows))
    assert changes == in_batch[1:]
    for step, rows in enumerate(steps):
        left = [row for row in range(n_rows) if at.get(row, 12) >= step]
        assert rows == sorted(rows)
        assert set(left) <= set(rows)
        assert (len(rows) - len(left)) * DROP_FRACTION < max(1, len(rows))


@pytest.mark.parametrize("last", [0, 3])
def test_decoding_stops_when_all_rows_have_ended(llama, last):
    steps, at = [], {row: min(row, last) for row in range(5)}
    found = decode(llama, PROMPTS, ending(at, steps), 50, {END})
    assert len(steps) == last + 1
    assert [len(new) for new in found] == list(at.values())


def test_any_of_several_tokens_ends_a_row_and_is_left_out(llama):
    free = decode(llama, PROMPTS, greedy, 8)
    ends = {free[0][3], free[2][5]}
    for new, whole in zip(decode(llama, PROMPTS, greedy, 8, ends), free, strict=True):
        cut = next((place for place, token in enumerate(whole) if token in ends), 8)
        assert new == whole[:cut]


def test_logits_that_are_not_finite_are_rejected_in_rows_that_have_not_ended(llama):
    def choose(logits, rows, step):
        return torch.where((rows == 1) & (step == 3), NOT_FINITE, ending({1: at})(logits, rows, step))

    at = 2
    assert decode(llama, PROMPTS * 2, choose, 6, {END})[1] == decode(llama, PROMPTS, greedy, 2)[1]
    at = None
    with pytest.raises(InputError, match="not finite; lower alpha"):
        decode(llama, PROMPTS * 2, choose, 6, {END})


def test_prompts_of_rows_with_equal_keys_are_read_once_and_the_rows_go_their_own_ways():
    def choose(logits, rows, step):
        return (logits + 3 * torch.sin(rows[:, None] + torch.arange(VOCAB_SIZE))).argmax(-1)

    model, repeated, changes = tiny_model(), [PROMPTS[row] for row in (3, 0, 3, 2, 0, 3)], []
    n_rows = fails_at(model, lambda *asked: False)
    note = {"on_rows_change": lambda rows: changes.append(rows.tolist())}
    found = decode(model, repeated, choose, 5, row_keys="abacba", **note)
    assert n_rows == [3, 6, 6, 6, 6]
    assert changes == [[0, 1, 3], [0, 1, 2, 3, 4, 5]]
    assert found == decode(model, repeated, choose, 5)
    assert n_rows[5:] == [6] * 5
    assert found[0] != found[2]


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHER_STATES = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {
        **EXPERTS,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "deepseek_v3": {
        **EXPERTS,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
    },
}


@pytest.mark.parametrize("name", OTHER_STATES)
def test_models_with_other_states_than_plain_keys_and_values(name, monkeypatch):
    """Convolutions, linear attention, layers that share keys, values shorter than keys."""
    monkeypatch.setitem(ARCHITECTURES, name, {**SHAPE, **OTHER_STATES[name]})
    prompts = [PROMPTS[row] for row in (4, 2, 4, 2, 2, 1)]
    check_decoding(tiny_model(name), prompts, 6, {0: 0, 1: 2, 4: 1}, row_keys="ababbc")
