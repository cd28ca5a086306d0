"""MODEL: shapes, causality, attention against a naive twin. Run alone: pytest tests/test_04_model.py"""

import math

import numpy as np
import pytest
import reference
import torch

import train_gpt
from train_gpt import GPT, SettingError, Settings

TINY = {"RECIPE": "smoke", "VOCAB_SIZE": "50", "MODEL_DIM": "32", "NUM_HEADS": "4", "NUM_KV_HEADS": "2"}


def make_model(seed=0, **changes):
    """A tiny model whose zero-initialised matrices are random too, so that every path carries something."""
    torch.manual_seed(seed)
    model = GPT(Settings.from_env(TINY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


# As the submissions' logs state them; pr834's are pr779's and its gate head, 512 * 7 + 7.
COUNTS = {"baseline": 17_059_912, "pr890": 33_055_836, "pr810": 25_254_992, "pr779": 33_317_980}
COUNTS |= {"pr834": 33_321_571, "pr864": 26_744_007}


@pytest.mark.parametrize("recipe", COUNTS)
def test_recipes_have_their_submissions_parameters(recipe):
    with torch.device("meta"):
        model = GPT(Settings.from_env({"RECIPE": recipe}))
        wider = GPT(Settings.from_env({"RECIPE": "pr864", "BIGRAM_VOCAB_SIZE": "1536"}))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[recipe]
    assert sum(parameter.numel() for parameter in wider.parameters()) == 26_809_543


def test_baseline_has_the_contests_parameters():
    model = GPT(Settings())
    names = set(dict(model.named_parameters()))
    block = ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight", "attn.proj.weight", "attn.q_gain")
    block += ("mlp.fc.weight", "mlp.proj.weight", "attn_scale", "mlp_scale", "resid_mix")
    assert names == {"tok_emb.weight", "skip_weights"} | {f"blocks.{i}.{n}" for i in range(9) for n in block}


@pytest.mark.parametrize("changes", [{}, {"TIE_EMBEDDINGS": "0"}, {"NUM_KV_HEADS": "4"}, {"NUM_LAYERS": "1"}])
def test_shapes(changes):
    settings = Settings.from_env(TINY | changes)
    ids = torch.randint(0, 50, (3, 11))
    model = GPT(settings)
    logits = model.logits(ids)
    assert logits.shape == (3, 11, 50)
    assert logits.dtype == torch.float32
    assert model.logits(ids, 4).equal(logits[:, -4:])
    assert logits.abs().max() <= settings.logit_softcap


def test_softcap():
    capped, plain = make_model(LOGIT_SOFTCAP="3"), make_model(LOGIT_SOFTCAP="0")
    ids = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(capped.logits(ids), 3 * torch.tanh(plain.logits(ids) / 3))
    assert plain.logits(ids).abs().max() > 3


def test_initial_weights():
    model = GPT(Settings())
    assert model.tok_emb.weight.std().item() == pytest.approx(0.005, rel=0.02)
    for block in model.blocks:
        assert block.attn.proj.weight.abs().max() == 0
        assert block.mlp.proj.weight.abs().max() == 0
        assert block.attn.c_q.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)
        assert block.attn.q_gain.tolist() == [1.5] * 8
        assert block.resid_mix.tolist() == [[1.0] * 512, [0.0] * 512]


def test_loss_is_the_mean_cross_entropy():
    model = make_model()
    ids = torch.randint(0, 50, (2, 9))
    logp = model.logits(ids[:, :-1]).log_softmax(-1)
    expected = -sum(logp[b, t, ids[b, t + 1]] for b in range(2) for t in range(8)) / 16
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"NUM_KV_HEADS": "4", "NUM_LAYERS": "5", "TIE_EMBEDDINGS": "0"}])
def test_no_position_sees_a_later_token(changes):
    model = make_model(**changes)
    ids = torch.randint(0, 50, (1, 24))
    before = model.logits(ids)
    for t in (1, 2, 11, 23):
        changed = ids.clone()
        changed[0, t:] = (changed[0, t:] + 1 + torch.arange(24 - t)) % 50
        after = model.logits(changed)
        assert after[:, :t].equal(before[:, :t])
        assert not after[:, t:].equal(before[:, t:])


def test_causality_check_catches_a_model_that_peeks(monkeypatch):
    original = train_gpt.F.scaled_dot_product_attention

    def peek(q, k, v, is_causal, enable_gqa):
        return original(q, k, v, is_causal=False, enable_gqa=enable_gqa)

    monkeypatch.setattr(train_gpt.F, "scaled_dot_product_attention", peek)
    with pytest.raises(AssertionError):
        test_no_position_sees_a_later_token({})


def test_rotary_is_complex_rotation():
    x = torch.randn(1, 1, 7, 10, dtype=torch.float64)
    rotary = train_gpt.rotary_tables(9, 10, 10_000.0)
    got = train_gpt.apply_rotary(x, rotary)[0, 0].numpy()
    # The contest turns clockwise (x1 cos + x2 sin, x2 cos - x1 sin): the conjugate of counter-clockwise.
    np.testing.assert_allclose(got, reference.rotate(x[0, 0].numpy(), 10_000.0), atol=1e-6)


@pytest.mark.parametrize("kv_heads", ["1", "2", "4"])
def test_attention_against_a_naive_twin(kv_heads):
    model = make_model(NUM_KV_HEADS=kv_heads)
    layer = model.blocks[1].attn
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    heads = {
        name: getattr(layer, name)(x)[0].view(9, -1, 8).transpose(0, 1) for name in ("c_q", "c_k", "c_v")
    }
    q = train_gpt.apply_rotary(train_gpt.rms_norm(heads["c_q"]), model.rotary)
    k = train_gpt.apply_rotary(train_gpt.rms_norm(heads["c_k"]), model.rotary)
    q = (q * layer.q_gain[:, None, None]).detach().numpy()
    y = reference.attention(q, k.detach().numpy(), heads["c_v"].detach().numpy())
    expected = y.transpose(1, 0, 2).reshape(9, 32) @ layer.proj.weight.detach().numpy().T
    got, values = layer(x, model.rotary)
    np.testing.assert_allclose(got[0].detach().numpy(), expected, atol=1e-9)
    assert values.equal(layer.c_v(x))


PARTS = {
    "baseline": {},
    "bigram xor": {"BIGRAM_VOCAB_SIZE": "37", "BIGRAM_DIM": "5"},
    "bigram linear": {"BIGRAM_VOCAB_SIZE": "37", "BIGRAM_DIM": "5", "BIGRAM_HASH": "linear"},
    "bigram of one row": {"BIGRAM_VOCAB_SIZE": "1", "BIGRAM_HASH": "linear"},
    "smear half": {"SMEAR_GATE": "half"},
    "smear twentieth": {"SMEAR_GATE": "twentieth"},
    "value embedding": {"VE_LAYERS": "0,2", "VE_DIM": "6"},
    "value residual": {"VALUE_RESIDUAL": "1", "NUM_LAYERS": "4"},
    "value residual and embedding": {"VALUE_RESIDUAL": "1", "VE_LAYERS": "0,1"},
    "gated attention": {"GATED_ATTN": "1"},
    "exclusive": {"XSA_LAST_N": "2"},
    "exclusive, all heads own": {"XSA_LAST_N": "3", "NUM_KV_HEADS": "4"},
    "exclusive, one value": {"XSA_LAST_N": "1", "NUM_KV_HEADS": "1"},
    "partial rotary": {"ROPE_DIMS": "4"},
    "rotary beyond its length": {"ROPE_DIMS": "6", "ROPE_NTK_LENGTH": "7", "TRAIN_SEQ_LEN": "16"},
    "norm scale": {"LN_SCALE": "norm"},
    "branch scale": {"LN_SCALE": "branch"},
    "leaky": {"MLP_ACTIVATION": "leaky2", "MLP_MULT": "1.3"},
    "longer encoder": {"UNET_LONGER_HALF": "encoder", "NUM_LAYERS": "5"},
    "longer decoder": {"NUM_LAYERS": "5"},
    "pre-enrichment": {"PRE_ENRICH_DIM": "20", "SMEAR_GATE": "twentieth", "BIGRAM_VOCAB_SIZE": "9"},
    "token gate": {"DTG_ENABLED": "1"},
}
PARTS["everything"] = {k: v for changes in PARTS.values() for k, v in changes.items() if k != "NUM_KV_HEADS"}
for recipe in ("pr890", "pr810", "pr864"):  # at a width that one can wait for
    PARTS[recipe] = {"RECIPE": recipe, "MODEL_DIM": "96", "TRAIN_SEQ_LEN": "16", "EVAL_STRIDE": "16"}
    PARTS[recipe] |= {"TRAIN_BATCH_TOKENS": "512", "NUM_HEADS": "8", "ROPE_DIMS": "12"}
    PARTS[recipe] |= {"NUM_KV_HEADS": "4", "ROPE_NTK_LENGTH": "9"}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_against_a_slow_twin(part):
    """The whole model in float64 NumPy, one position after the other (reference.py), at 16 random tokens."""
    settings = Settings.from_env(TINY | {"TRAIN_SEQ_LEN": "16", "EVAL_STRIDE": "8"} | PARTS[part])
    model = make_model(**{"TRAIN_SEQ_LEN": "16", "EVAL_STRIDE": "8"} | PARTS[part])
    ids = torch.randint(0, 50, (2, 16))
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for got, sequence in zip(model.logits(ids), ids.numpy(), strict=True):
        want = reference.model_logits(weights, settings, sequence)
        np.testing.assert_allclose(got.detach().numpy(), want, atol=2e-4 if "rotary" in part else 2e-5)


@pytest.mark.parametrize("part", [part for part in PARTS if part != "baseline"])
def test_every_part_keeps_causality(part):
    test_no_position_sees_a_later_token(PARTS[part] | {"TRAIN_SEQ_LEN": "32", "EVAL_STRIDE": "8"})


SINGLE = [part for part in PARTS if part not in ("baseline", "bigram of one row") and part[:2] != "pr"]


@pytest.mark.parametrize("part", [*SINGLE, "pre-enrichment"])
def test_the_twin_notices_a_part_left_out(part):
    """Sabotage: the twin without the part computes something else."""
    model = make_model(**{"TRAIN_SEQ_LEN": "16", "EVAL_STRIDE": "8"} | PARTS[part])
    plain = {name: PARTS[part][name] for name in ("NUM_LAYERS", "NUM_KV_HEADS") if name in PARTS[part]}
    plain |= {"UNET_LONGER_HALF": "encoder"} if part == "longer decoder" else {}
    settings = Settings.from_env(TINY | {"TRAIN_SEQ_LEN": "16", "EVAL_STRIDE": "8"} | plain)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    ids = torch.randint(0, 50, (1, 16))
    want = reference.model_logits(weights, settings, ids[0].numpy())
    assert abs(model.logits(ids)[0].detach().numpy() - want).max() > 1e-4


def test_rotary_table_goes_by_the_longest_window():
    """Training and scoring windows of different length share the table of the longer."""
    changes = {"TRAIN_SEQ_LEN": "16", "EVAL_SEQ_LEN": "32", "EVAL_STRIDE": "8", "ROPE_NTK_LENGTH": "8"}
    both, short = make_model(**changes), make_model(**changes | {"EVAL_SEQ_LEN": "16"})
    long = make_model(**changes | {"TRAIN_SEQ_LEN": "32", "EVAL_SEQ_LEN": "16"})
    ids = torch.randint(0, 50, (1, 32))
    assert both.logits(ids).equal(long.logits(ids))
    assert both.logits(ids[:, :16]).equal(both.logits(ids)[:, :16])
    assert not both.logits(ids[:, :16]).equal(short.logits(ids[:, :16]))


def test_bigram_hash_by_hand():
    ids = torch.tensor([[7, 3, 3], [0, 1, 0]])
    expected = [[10, ((36313 * 3) ^ (27191 * 7)) % 10, ((36313 * 3) ^ (27191 * 3)) % 10]]
    assert train_gpt.bigram_indices(ids, 11, "xor")[:1].tolist() == expected
    expected = [[0, 1, 92821 % 11]]
    assert train_gpt.bigram_indices(ids, 11, "linear")[1:].tolist() == expected


def test_multi_token_heads_add_the_loss_of_targets_further_ahead():
    model = make_model(MTP_NUM_HEADS="2", MTP_LOSS_WEIGHT="0.3", LOGIT_SOFTCAP="0")
    plain = make_model(LOGIT_SOFTCAP="0")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "mtp" not in k})
    ids = torch.randint(0, 50, (2, 9))
    x, extra = model.hidden(ids[:, :-1]), 0.0
    for k in range(2):
        logp = (x @ model.mtp_heads[k].weight.T).log_softmax(-1)
        losses = [-logp[b, t, ids[b, t + 2 + k]] for b in range(2) for t in range(7 - k)]
        extra += 0.3 / 2 * sum(losses) / len(losses)
    expected = plain(ids[:, :-1], ids[:, 1:]) + extra
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.logits(ids).equal(plain.logits(ids))


def test_gate_head_starts_with_the_neural_price_and_adds_its_loss():
    """The loss of #834's gate by plain loops; nothing changes where no ratios are handed over."""
    gated = {"GATE_HEAD": "1", "PSEUDO": "pr834", "LOGIT_SOFTCAP": "9"}
    fresh, bare = (train_gpt.GPT(Settings.from_env(TINY | changes)) for changes in (gated, {}))
    assert fresh.gate_head.weight.abs().max() == 0
    assert fresh.gate_head.bias.tolist() == [2.0] + 6 * [0.0]
    assert set(dict(fresh.named_parameters())) - set(dict(bare.named_parameters())) == {
        "gate_head.weight",
        "gate_head.bias",
    }
    assert all(
        train_gpt.parameter_role(n, p) == "scalar" for n, p in fresh.named_parameters() if "gate_head" in n
    )
    model = make_model(**gated)
    ids = torch.randint(0, 50, (2, 9))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    ratios = torch.rand(2, 8, 6, dtype=torch.float64)
    ratios[torch.rand(2, 8, 6) < 0.4] = -1.0
    beside = train_gpt.pseudo_logits(model)
    logits, gate = beside(inputs).split((50, 7), dim=-1)
    assert logits.equal(model.logits(inputs))
    assert gate.dtype == torch.float32
    assert beside(inputs, 3)[..., 50:].equal(gate[:, -3:])
    expected = 0.0
    for b in range(2):
        for t in range(8):
            experts = [logits[b, t].softmax(-1)[targets[b, t]].item(), *ratios[b, t].tolist()]
            known = [0] + [n for n in range(1, 7) if experts[n] >= 0]
            exponents = {n: np.exp(gate[b, t, n].item()) for n in known}
            weights = {n: 0.95 * x / sum(exponents.values()) + 0.05 * (n == 0) for n, x in exponents.items()}
            expected -= np.log(sum(weights[n] * experts[n] for n in known)) / 16
    plain, mixed = model(inputs, targets), model(inputs, targets, ratios)
    assert (mixed - plain).item() == pytest.approx(0.1 * expected, rel=1e-5)
    (mixed - plain).backward()
    assert model.blocks[0].attn.c_q.weight.grad.abs().max() > 0
    assert model.gate_head.bias.grad.abs().max() > 0


def test_initial_values_of_the_parts():
    settings = Settings.from_env({"RECIPE": "pr890", "NUM_LAYERS": "2", "VE_LAYERS": "1", "XSA_LAST_N": "0"})
    model = GPT(settings)
    assert model.bigram.embed.weight.abs().max() == 0
    assert model.bigram.scale.item() == pytest.approx(0.05)
    assert model.ve_shared.embed.weight.std().item() == pytest.approx(0.01, rel=0.05)
    for matrix, size in (
        (model.blocks[0].attn.c_q, 1),
        (model.blocks[1].mlp.fc, 1),
        (model.bigram.proj, 0.5),
        (model.ve_shared.proj, 0.5),
    ):
        values = torch.linalg.svdvals(matrix.weight)
        torch.testing.assert_close(values, torch.full_like(values, size), rtol=1e-4, atol=0)
    assert model.smear_gate.sigmoid().mean() == 0.5
    model = GPT(Settings.from_env({"RECIPE": "pr810", "NUM_LAYERS": "1", "XSA_LAST_N": "0"}))
    values = torch.linalg.svdvals(model.tok_emb.weight)
    torch.testing.assert_close(values, values[0] / torch.arange(1, 513) ** 0.5, rtol=1e-3, atol=0)
    assert model.bigram.embed.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.bigram.scale is None
    assert model.smear_gate.sigmoid().mean().item() == pytest.approx(0.0474, abs=1e-4)


def test_gates_start_open():
    model = GPT(Settings.from_env(TINY | {"GATED_ATTN": "1", "DTG_ENABLED": "1"}))
    x = torch.randn(3, 32)
    assert torch.sigmoid(model.blocks[0].attn.attn_gate(x)).mean().item() == pytest.approx(0.982, abs=1e-3)
    assert torch.sigmoid(model.blocks[0].dtg_gate(x)).mean().item() == pytest.approx(0.881, abs=1e-3)


def test_grouped_queries_equal_repeated_heads():
    grouped = make_model(NUM_KV_HEADS="2")
    full = make_model(NUM_KV_HEADS="4")
    weights = grouped.state_dict()
    for name in list(weights):
        if ".c_k." in name or ".c_v." in name:
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)
    ids = torch.randint(0, 50, (2, 16))
    torch.testing.assert_close(full.logits(ids), grouped.logits(ids), rtol=0, atol=1e-12)


def test_skips_connect_first_and_last_blocks():
    """Without its skip weights a model of 5 blocks computes something else; one of 1 block has none."""
    model = make_model(NUM_LAYERS="5")
    assert model.skip_weights.shape == (2, 32)
    ids = torch.randint(0, 50, (1, 8))
    before = model.logits(ids)
    with torch.no_grad():
        model.skip_weights[0].zero_()
    assert not model.logits(ids).equal(before)
    assert make_model(NUM_LAYERS="1").skip_weights.shape == (0, 32)


def test_roles_of_the_parts():
    with torch.device("meta"):
        model = GPT(Settings.from_env({"RECIPE": "pr864", "VE_LAYERS": "9", "PRE_ENRICH_DIM": "8"}))
    roles = {name: train_gpt.parameter_role(name, parameter) for name, parameter in model.named_parameters()}
    assert roles["bigram.embed.weight"] == roles["ve_shared.embed.weight"] == "lookup"
    assert roles["bigram.proj.weight"] == roles["ve_shared.proj.weight"] == "projection"
    assert roles["pre_enrich.0.weight"] == roles["blocks.3.mlp.proj.weight"] == "matrix"
    scalars = ("bigram.scale", "blocks.0.attn.attn_gate.weight", "blocks.0.attn.attn_gate.bias", "smear_gate")
    assert {roles[name] for name in scalars} == {"scalar"}


def test_parameter_roles():
    model = GPT(Settings.from_env(TINY | {"TIE_EMBEDDINGS": "0"}))
    roles = {name: train_gpt.parameter_role(name, parameter) for name, parameter in model.named_parameters()}
    assert {name for name, role in roles.items() if role == "embedding"} == {"tok_emb.weight"}
    assert {name for name, role in roles.items() if role == "head"} == {"lm_head.weight"}
    matrices = {name.rsplit(".", 2)[1] for name, role in roles.items() if role == "matrix"}
    assert matrices == {"c_q", "c_k", "c_v", "proj", "fc"}
    scalars = {name.split(".")[-1] for name, role in roles.items() if role == "scalar"}
    assert scalars == {"attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights"}


class Lines:
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def test_attention_choice_on_cpu(process):
    for choice in ("auto", "sdpa"):
        log = Lines()
        train_gpt.select_attention(Settings.from_env({"ATTENTION": choice}), process, log)
        assert log.lines == ["attention:sdpa reason:PyTorch picks its kernel"]
    with pytest.raises(SettingError, match=r"ATTENTION=fa4 does not work here .*there is no CUDA device"):
        train_gpt.select_attention(Settings.from_env({"ATTENTION": "fa4"}), process, Lines())


class FakeDevice:
    """Says CUDA where it is asked, and puts tensors on the CPU: the choice among kernels runs anywhere."""

    class Name(str):
        type = "cuda"

    def __init__(self):
        self.device = FakeDevice.Name("cpu")


def switch_to(monkeypatch, activate):
    """Let `activate` take the place of torch's switch of kernels; None stands for switching back."""
    back = lambda: activate(None)  # noqa: E731
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", back, raising=False)


def test_attention_falls_back_and_says_why(monkeypatch):
    tried = []

    def activate(name):
        tried.append((name, torch.backends.cuda.cudnn_sdp_enabled()))
        if name == "FA3":
            raise ModuleNotFoundError("no flash_attn_interface")

    switch_to(monkeypatch, activate)
    log = Lines()
    train_gpt.select_attention(Settings.from_env(TINY), FakeDevice(), log)
    assert tried == [("FA3", False), (None, False), ("FA4", False)]
    assert log.lines == ["attention:fa4 reason:agrees with PyTorch's own kernel"]
    with pytest.raises(SettingError, match=r"ATTENTION=fa3 does not work here .*no flash_attn_interface"):
        train_gpt.select_attention(Settings.from_env(TINY | {"ATTENTION": "fa3"}), FakeDevice(), Lines())
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_kernel_comparison_refuses_a_wrong_kernel(monkeypatch, wrong):
    original = train_gpt.F.scaled_dot_product_attention
    state = {"name": None}
    switch_to(monkeypatch, lambda name: state.update(name=name))
    settings, log = Settings.from_env(TINY | {"ATTENTION": "fa3"}), Lines()
    train_gpt.select_attention(settings, FakeDevice(), log)
    assert state["name"] == "FA3"
    assert log.lines == ["attention:fa3 reason:agrees with PyTorch's own kernel"]
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    state["name"] = None

    def attention(q, k, v, **keywords):
        output = original(q, k, v, **keywords)
        if state["name"] is None:
            return output
        broken = {"output": 1.05 * output, "nan": output * math.nan}
        return broken.get(wrong, original(q, k.detach(), v, **keywords) + 0 * k.sum())

    monkeypatch.setattr(train_gpt.F, "scaled_dot_product_attention", attention)
    with pytest.raises(SettingError, match="RuntimeError: differs from PyTorch's kernel"):
        train_gpt.select_attention(settings, FakeDevice(), Lines())
    assert state["name"] is None
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_torch_without_other_kernels_is_no_obstacle(monkeypatch):
    """Where torch lacks the switch the comparison fails, is undone as far as it went, and the log says so."""
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl", raising=False)
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl", raising=False)
    log = Lines()
    train_gpt.select_attention(Settings.from_env(TINY), FakeDevice(), log)
    assert log.lines[0].startswith("attention:sdpa reason:fa3: AttributeError")
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
def test_bfloat16_on_cuda_is_close_to_float32_on_cpu():
    torch.manual_seed(0)
    model = GPT(Settings.from_env(TINY))
    ids = torch.randint(0, 50, (2, 24))
    expected = model.logits(ids)
    process = train_gpt.Process(0, 1, torch.device("cuda"))
    with process.precision():
        got = model.cuda().logits(ids.cuda()).cpu()
    assert (got - expected).norm() / expected.norm() < 0.03
