"""MODEL: shapes, causality, attention against a naive twin. Run alone: pytest tests/test_04_model.py"""

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


def test_baseline_has_the_contests_parameters():
    model = GPT(Settings())
    assert sum(parameter.numel() for parameter in model.parameters()) == 17_059_912
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
    cos, sin = train_gpt.rotary_tables(9, 10, 10_000.0)
    got = train_gpt.apply_rotary(x, cos, sin)[0, 0].numpy()
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
    q = train_gpt.apply_rotary(train_gpt.rms_norm(heads["c_q"]), model.cos, model.sin)
    k = train_gpt.apply_rotary(train_gpt.rms_norm(heads["c_k"]), model.cos, model.sin)
    q = (q * layer.q_gain[:, None, None]).detach().numpy()
    y = reference.attention(q, k.detach().numpy(), heads["c_v"].detach().numpy())
    expected = y.transpose(1, 0, 2).reshape(9, 32) @ layer.proj.weight.detach().numpy().T
    np.testing.assert_allclose(layer(x, model.cos, model.sin)[0].detach().numpy(), expected, atol=1e-9)


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


class FakeCuda:
    """A process that says CUDA, so that the choice among kernels runs on any machine."""

    device = torch.device("cuda")


def test_attention_falls_back_and_says_why(monkeypatch):
    tried = []

    def try_kernel(name, settings, process):
        tried.append(name)
        if name == "fa3":
            raise ModuleNotFoundError("no flash_attn_interface")

    monkeypatch.setattr(train_gpt, "try_attention_kernel", try_kernel)
    log = Lines()
    train_gpt.select_attention(Settings(), FakeCuda(), log)
    assert tried == ["fa3", "fa4"]
    assert log.lines == ["attention:fa4 reason:agrees with PyTorch's own kernel"]
    with pytest.raises(SettingError, match=r"ATTENTION=fa3 does not work here .*no flash_attn_interface"):
        train_gpt.select_attention(Settings.from_env({"ATTENTION": "fa3"}), FakeCuda(), Lines())


class FakeDevice:
    """Says CUDA where it is asked, and puts tensors on the CPU."""

    class Name(str):
        type = "cuda"

    def __init__(self):
        self.device = FakeDevice.Name("cpu")


def test_kernel_comparison_refuses_a_wrong_kernel(monkeypatch):
    original = train_gpt.F.scaled_dot_product_attention
    state = {"name": None}
    monkeypatch.setattr(
        torch.nn.attention,
        "activate_flash_attention_impl",
        lambda name: state.update(name=name),
        raising=False,
    )
    device = FakeDevice()
    train_gpt.try_attention_kernel("fa3", Settings.from_env(TINY), device)
    assert state["name"] == "FA3"
    state["name"] = None

    def wrong(*args, **keywords):
        output = original(*args, **keywords)
        return output if state["name"] is None else 1.05 * output

    monkeypatch.setattr(train_gpt.F, "scaled_dot_product_attention", wrong)
    with pytest.raises(RuntimeError, match="differs from PyTorch's kernel"):
        train_gpt.try_attention_kernel("fa3", Settings.from_env(TINY), device)
    torch.backends.cuda.enable_cudnn_sdp(True)


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
