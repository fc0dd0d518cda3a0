"""Stock mixtures of experts on sadmoe's kernels."""

import copy
from types import SimpleNamespace

import pytest
import sadmoe  # noqa: F401  (registers)
import torch
import torch.nn.functional as F
from tiny_models import tokens
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from versions import transformers_before

transformers = pytest.importorskip("transformers")

from sadmoe.flops import count_flops
from sadmoe.hf import experts
from sadmoe.hf.experts import OLDEST, experts_forward, set_experts_tau
from transformers.integrations.moe import use_experts_implementation

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "pad_token_id": 0, "num_experts_per_tok": 3,
}  # fmt: skip
QWEN = SIZES | {"moe_intermediate_size": 20, "intermediate_size": 20, "num_experts": 8}
ALONE = f"before {OLDEST} transformers computes experts itself"
runs_others = pytest.mark.skipif(transformers_before(OLDEST), reason=ALONE)
MODELS = {
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        SIZES | {"intermediate_size": 20, "num_local_experts": 8},
    ),
    "qwen2": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN | {"shared_expert_intermediate_size": 20}),
    "qwen3": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN | {"norm_topk_prob": True}),
}


def stock(name: str) -> nn.Module:
    model, config, sizes = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    made.set_experts_implementation("eager")
    return made


def on_sadmoe(model: nn.Module, tau: float | None = None) -> nn.Module:
    if transformers_before(OLDEST):
        pytest.skip(ALONE)
    model = copy.deepcopy(model)
    if tau is None:
        model.set_experts_implementation("sadmoe")
    else:
        set_experts_tau(model, tau)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_experts_cost_what_they_compute(name):
    dense = stock(name)
    wanted = count_flops(dense, tokens())  # and the activations, which are few
    grouped = copy.deepcopy(dense)
    grouped.set_experts_implementation("grouped_mm")
    for model in (on_sadmoe(dense), grouped):
        assert count_flops(model, tokens()) == pytest.approx(wanted, rel=0.03)
    assert count_flops(on_sadmoe(dense, 0.9), tokens()) < 0.98 * wanted


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokens()).logits


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_model_does(name):
    model = stock(name)
    ours = on_sadmoe(model)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(on_sadmoe(model, 0.0)), logits(model), rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**tokens(), **settings), model.generate(**tokens(), **settings))


@pytest.mark.parametrize("name", MODELS)
def test_so_are_its_gradients(name):
    model = stock(name)
    ours, batch = on_sadmoe(model), tokens()
    for one in (model, ours):
        one(**batch, labels=batch["input_ids"]).loss.backward()
    for (key, p), q in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=key)


@runs_others
def test_a_model_can_be_loaded_for_it(tmp_path):
    model = stock("mixtral")
    model.save_pretrained(tmp_path)
    ours = type(model).from_pretrained(tmp_path, experts_implementation="sadmoe")
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)


@runs_others
def test_tau_drops_experts_of_small_weight_and_scales_up_the_rest():
    model = stock("mixtral")
    experts = next(m for m in model.modules() if hasattr(m, "down_proj"))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3], [7, 6, 5]])
    weights = torch.tensor(
        [[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [0.7, 0.2, 0.1], [0.2, 0.2, 0.2]]
    )
    set_experts_tau(model, 0.4)
    kept = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
    scaled = weights * kept * (weights.sum(1) / (weights * kept).sum(1)).unsqueeze(1)
    with torch.no_grad():
        found = experts(x, index, weights)
        experts.config._experts_implementation = "eager"
        torch.testing.assert_close(found, experts(x, index, scaled), rtol=1e-4, atol=1e-5)


@runs_others
def test_a_token_without_weights_gets_nothing():
    model = stock("mixtral")
    experts = next(m for m in model.modules() if hasattr(m, "down_proj"))
    set_experts_tau(model, 0.4)
    with torch.no_grad():
        assert not experts(torch.randn(1, 24), torch.tensor([[0, 1, 2]]), torch.zeros(1, 3)).any()


@runs_others
def test_tau_needs_all_experts_of_a_token_on_one_device():
    model = stock("mixtral")
    next(m for m in model.modules() if hasattr(m, "down_proj"))._is_expert_parallel = True
    set_experts_tau(model, 0.0)
    with pytest.raises(NotImplementedError, match=r"on several devices.*: use tau = 0"):
        set_experts_tau(model, 0.4)


@runs_others
def test_a_model_whose_config_splits_experts_is_refused_too():
    model = stock("mixtral")
    model.config.distributed_config = SimpleNamespace(enable_expert_parallel=True)
    with pytest.raises(NotImplementedError, match=r"on several devices.*: use tau = 0"):
        set_experts_tau(model, 0.4)
    assert model.config._experts_implementation == "eager"


class Mine(transformers.MixtralForCausalLM):
    """In whose file transformers finds no experts to switch."""


@runs_others
def test_a_subclass_of_a_stock_model_runs_on_sadmoe_too(monkeypatch):
    monkeypatch.setattr(Mine, "_can_set_experts_implementation_cached_value", None, raising=False)
    model = stock("mixtral")
    mine = Mine(model.config).eval()
    mine.load_state_dict(model.state_dict())
    set_experts_tau(mine, 0.9)
    assert torch.equal(logits(mine), logits(on_sadmoe(model, tau=0.9)))
    assert not torch.allclose(logits(mine), logits(model), rtol=1e-3)
    mine.config._experts_implementation = "eager"
    assert torch.equal(logits(mine), logits(model))


def test_what_tau_drops_is_not_computed():
    from torch.utils.flop_counter import FlopCounterMode

    model = stock("mixtral")
    counts = []
    for tau in (0.0, 0.6, 1.0):
        ours = on_sadmoe(model, tau)
        with FlopCounterMode(display=False) as count:
            logits(ours)
        counts.append(sum(v for k, v in count.get_flop_counts()["Global"].items() if "sadmoe" in str(k)))
    assert counts[0] > counts[1] > counts[2]
    assert counts[0] == 3 * counts[2]  # of three experts the first


def test_no_tokens_give_no_rows():
    model = on_sadmoe(stock("mixtral"))
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    d = model.config.hidden_size
    none = torch.zeros(0, 2, dtype=torch.long)
    with torch.no_grad():
        assert experts(torch.zeros(0, d), none, torch.zeros(0, 2)).shape == (0, d)


def test_the_way_back_and_forth(tmp_path):
    model = stock("mixtral")
    ours = on_sadmoe(model, 1.0)
    at_one = logits(ours)
    assert not torch.allclose(at_one, logits(model))
    ours.set_experts_implementation("eager")
    assert torch.equal(logits(ours), logits(model))
    assert not any(isinstance(value, Tensor | tuple) for m in ours.modules() for value in vars(m).values()), (
        "nothing of ours is copied or saved with it"
    )
    ours.set_experts_implementation("sadmoe")
    assert torch.equal(logits(ours), at_one), "tau acts again"
    ours.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, experts_implementation="sadmoe").eval()
    torch.testing.assert_close(logits(again), logits(model))


@runs_others
def test_copies_of_the_weights_are_let_go_when_asked_and_in_training():
    model = on_sadmoe(stock("mixtral"))
    wanted = logits(model)
    layers = [m for m in model.modules() if m in experts._kept]
    assert len(layers) == 2
    model.set_experts_implementation("eager")
    experts.release_experts(model)
    assert not any(m in experts._kept for m in layers)
    model.set_experts_implementation("sadmoe")
    assert torch.equal(logits(model), wanted)
    model(**tokens()).logits.sum().backward()
    assert not any(m in experts._kept for m in layers)


@runs_others
def test_no_copies_are_kept_of_weights_that_are_brought_for_a_call():
    accelerate = pytest.importorskip("accelerate")
    model = on_sadmoe(stock("mixtral"))
    wanted = logits(model)
    experts.release_experts(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(model), wanted)
    assert not any(m in experts._kept for m in model.modules())


@runs_others
def test_tau_finds_a_model_inside_a_module_of_one_s_own():
    inside = stock("mixtral")
    wanted = logits(on_sadmoe(copy.deepcopy(inside), 1.0))
    set_experts_tau(nn.ModuleDict({"model": inside}), 1.0)
    assert torch.equal(logits(inside), wanted)


def test_another_activation_is_noticed():
    model = stock("mixtral")
    ours = on_sadmoe(model)
    logits(ours)
    for one in (model, ours):
        for layer in one.model.layers:
            layer.mlp.experts.act_fn = nn.ReLU()
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    ours.model.layers[0].mlp.experts.act_fn = nn.Tanh()
    with pytest.raises(NotImplementedError, match="an activation or a gating of its own"):
        logits(ours)


def test_weights_that_change_are_noticed():
    model = stock("mixtral")
    ours = on_sadmoe(model)
    logits(ours)  # keeps the weights in its layout
    for one in (model, ours):
        with torch.no_grad():
            one.model.layers[0].mlp.experts.down_proj.mul_(2.0)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(ours).bfloat16()
    torch.testing.assert_close(logits(twin).float(), logits(model), rtol=0.1, atol=0.3)


def test_weights_that_an_adapter_makes_anew_are_noticed_wherever_they_lie(monkeypatch):
    model = stock("mixtral")
    experts = next(module for module in model.modules() if hasattr(module, "down_proj"))
    experts.__dict__["config"] = SimpleNamespace(_experts_implementation="sadmoe")
    monkeypatch.setattr("sadmoe.hf.experts._some_of", lambda weight: [])  # as on CUDA
    monkeypatch.setattr(
        Tensor, "data_ptr", lambda self: 0
    )  # and as if the allocator gave the same place again
    base = experts.down_proj.detach()
    del experts.down_proj
    x, index, weights = torch.randn(3, 24), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    with torch.no_grad():
        found = []
        for factor in (1.0, 2.0):
            experts.down_proj = base * factor
            found.append(experts_forward(experts, x, index, weights))
    torch.testing.assert_close(found[1], 2 * found[0])


@pytest.mark.parametrize("which", [slice(None), 1])
def test_weights_that_change_behind_torch_s_back_are_noticed(which):
    model = stock("mixtral")
    ours = on_sadmoe(model)
    logits(ours)
    for one in (model, ours):
        one.model.layers[0].mlp.experts.down_proj.data[which].mul_(2.0)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_every_expert_is_looked_at_for_changes(count):
    weight = torch.zeros(count, 5, 7)
    before = experts._some_of(weight)
    assert 2 * count <= len(before) <= 2 * max(experts.SEEN, 2 * count)
    for e in range(count):
        changed = weight.clone()
        changed[e] = 1
        assert experts._some_of(changed) != before


def test_inference_mode_and_bfloat16():
    model = stock("qwen3").bfloat16()
    ours = on_sadmoe(model)
    with torch.inference_mode():
        found, expected = ours(**tokens()).logits, model(**tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_a_call_in_inference_mode_leaves_nothing_that_gradients_cannot_pass():
    model = on_sadmoe(stock("mixtral")).requires_grad_(False)  # as with adapters beside the experts
    embedded = model.get_input_embeddings()(tokens()["input_ids"])
    with torch.inference_mode():
        expected = model(inputs_embeds=embedded).logits
    found = model(inputs_embeds=embedded.clone().requires_grad_()).logits
    assert torch.equal(found, expected)
    found.sum().backward()


@pytest.mark.parametrize("run_before", [True, False])
def test_it_compiles_without_a_graph_break(run_before):
    if not run_before and TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("an older torch cannot trace what finds the activation, and needs a call before")
    model = on_sadmoe(stock("mixtral"))
    torch._dynamo.reset()
    with torch.no_grad():
        if run_before:
            model(**tokens())
        traced = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(traced(**tokens()).logits, logits(model))


class Experts(nn.Module):
    """All that the decorator knows: biases, a norm after, ungated, transposed, interleaved."""

    def __init__(self, config: SimpleNamespace, gate: bool, transposed: bool):
        super().__init__()
        self.num_experts, d, s = 4, 10, 6
        wide = 2 * s if gate else s
        shapes = {"gate_up_proj" if gate else "up_proj": (4, wide, d), "down_proj": (4, d, s)}
        for name, (e, out, inner) in shapes.items():
            shape = (e, inner, out) if transposed else (e, out, inner)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(e, out)))
        self.post_expert_norm = nn.LayerNorm(d)
        self.act_fn = nn.SiLU()

    def forward(self, x, index, weights):
        raise AssertionError("not asked for")


@pytest.mark.skipif(transformers_before("5.15"), reason="its decorator knows fewer layouts")
@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_every_layout(gate, transposed, concatenated):
    torch.manual_seed(0)
    kind = use_experts_implementation(
        type("E", (Experts,), {}), is_concatenated=concatenated, is_transposed=transposed, has_bias=True, has_gate=gate,
        has_post_expert_norm=True,
    )  # fmt: skip
    experts = kind(SimpleNamespace(_experts_implementation="sadmoe"), gate, transposed)
    x, weights = torch.randn(5, 10), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [2, 3], [1, 4], [4, 4], [3, 0]])  # 4: elsewhere
    expected = torch.zeros(5, 10)
    name = "gate_up_proj" if gate else "up_proj"
    for t in range(5):
        for k in range(2):
            e = int(index[t, k])
            if e == 4:
                continue
            first, down = getattr(experts, name)[e], experts.down_proj[e]
            first, down = (first.t(), down.t()) if transposed else (first, down)
            h = F.linear(x[t], first, getattr(experts, f"{name}_bias")[e])
            if gate:
                g, u = h.chunk(2) if concatenated else (h[::2], h[1::2])
                h = F.silu(g) * u
            else:
                h = F.silu(h)
            y = experts.post_expert_norm(F.linear(h, down, experts.down_proj_bias[e]))
            expected[t] += weights[t, k] * y
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_say_less_of_themselves():
    model = stock("mixtral")
    expected = logits(model)
    silent = ("has_gate", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel")
    for module in model.modules():
        for name in silent:
            module.__dict__.pop(name, None)
    assert torch.allclose(logits(on_sadmoe(model)), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(on_sadmoe(model, tau=0.9)), expected)


def test_wrong_settings_are_named():
    model = stock("mixtral")
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\] .* got 1.5"):
        set_experts_tau(model, 1.5)
    with pytest.raises(ValueError, match="has no layer whose experts can be run by others"):
        set_experts_tau(nn.Linear(2, 2), 0.5)


def test_an_older_transformers_is_named(monkeypatch):
    model = stock("mixtral")
    monkeypatch.setattr(transformers, "__version__", "5.6.2")
    with pytest.raises(NotImplementedError, match=r"transformers 5.6.2 lets nobody.*'transformers>=5.7'"):
        set_experts_tau(model, 0.5)
    assert model.config._experts_implementation == "eager"


def test_experts_with_a_gating_of_their_own_are_refused():
    config = transformers.GptOssConfig(
        **(SIZES | {"intermediate_size": 20, "num_local_experts": 4, "head_dim": 6})
    )
    model = transformers.GptOssForCausalLM(config).eval()
    before = model.config._experts_implementation
    with pytest.raises(NotImplementedError, match="a gating of its own"):
        set_experts_tau(model, 0.1)
    assert model.config._experts_implementation == before
    experts = next(m for m in model.modules() if hasattr(m, "down_proj"))
    with pytest.raises(NotImplementedError, match="GptOssExperts"):
        experts_forward(experts, torch.zeros(1, 24), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
