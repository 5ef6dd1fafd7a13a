"""Modules with options inside torch: compilers, export, tracing, autocast, derivatives, copies, encoder layers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import MultiHeadAttention
from options_oracle import EVERYTHING, OPTIONS, E, H, as_function, module_with

CONFIGS = OPTIONS | {"everything": EVERYTHING}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(function, module, x):
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    output, weights = function(leaf, leaf, leaf, is_causal=True)
    (output.square().sum() + weights.square().sum()).backward()
    return output.detach(), weights.detach(), leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)


@pytest.mark.thorough(one_in=3)
@every_config
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_module_gives_the_same_at_any_length(config):
    module = module_with(**config)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for length in (5, 7, 8):
        x = draw(2, length, E)
        torch.testing.assert_close(
            loss_and_gradients(compiled, module, x), loss_and_gradients(module, module, x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_module_takes_positions_without_recompiling():
    module = module_with(**EVERYTHING)
    x = draw(2, 5, E)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for first in (0, 3, 100):
        positions = torch.arange(5) + first
        torch.testing.assert_close(
            compiled(x, x, x, positions=positions), module(x, x, x, positions=positions), rtol=1e-4, atol=1e-5
        )
    assert counter.frame_count == 1


@every_config
def test_an_exported_module_gives_the_same_at_any_length(config):
    module, x = module_with(**config).eval(), draw(2, 6, E)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({1: length},) * 3
    program = torch.export.export(module, (x, x, x), dynamic_shapes=shapes).module()
    for size in (6, 9):
        x = draw(2, size, E)
        torch.testing.assert_close(program(x, x, x), module(x, x, x), rtol=1e-4, atol=1e-5)


@pytest.mark.thorough(one_in=3)
@every_config
def test_second_derivatives_are_those_of_numbers(config):
    module = module_with(torch.float64, **config)
    x = draw(1, 3, E).double().requires_grad_()
    names = [name for name, _ in module.named_parameters() if "norm" in name or "gate" in name or name == "bias"]
    parameters = [module.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def function(x, *values):
        given = dict(zip(names, values, strict=True))
        return as_function(module, is_causal=True)({**dict(module.named_parameters()), **given}, x, x, x)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_what_the_lower_precision_gives(config, dtype):
    module, x = module_with(**config), draw(2, 5, E)
    low = copy.deepcopy(module).to(dtype)
    narrow = x.to(dtype)
    expected = low(narrow, narrow, narrow, is_causal=True)[0]
    with torch.autocast("cpu", dtype=dtype):
        output = module(x, x, x, is_causal=True)[0]
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)


@every_config
def test_a_function_of_the_parameters_has_transforms(config):
    module, x = module_with(**config), draw(3, 2, 5, E)
    parameters = dict(module.named_parameters())

    def output(parameters, x):
        return torch.func.functional_call(module, parameters, (x, x, x))[0]

    together = torch.func.vmap(output, (None, 0))(parameters, x)
    torch.testing.assert_close(together, torch.stack([output(parameters, row) for row in x]))
    gradients = torch.func.grad(lambda p: output(p, x[0]).square().sum())(parameters)
    output(parameters, x[0]).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


def _save_and_load(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_config
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), _save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_computes_the_same(config, duplicate):
    module, x = module_with(**config), draw(2, 5, E)
    expected = module(x, x, x)
    twin = duplicate(module)
    assert twin.options == module.options
    assert repr(twin) == repr(module)
    torch.testing.assert_close(twin(x, x, x), expected, rtol=0, atol=0)


@every_config
def test_a_module_made_on_the_meta_device_is_initialised_by_reset_parameters(config):
    torch.manual_seed(3)
    expected = MultiHeadAttention(E, H, **config)
    module = MultiHeadAttention(E, H, **config, device="meta")
    meta = torch.empty(2, 5, E, device="meta")
    assert module(meta, meta, meta)[0].shape == (2, 5, E)
    module.to_empty(device="cpu")
    torch.manual_seed(3)
    module.reset_parameters()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    x = draw(2, 5, E)
    assert torch.equal(module(x, x, x)[0], expected(x, x, x)[0])


@pytest.mark.parametrize(
    "config", [{"rope": OPTIONS["rotary half"]["rope"]}, {"window": (1, 0)}], ids=["rope", "window"]
)
def test_options_without_parameters_leave_initial_values_and_state_dict(config):
    torch.manual_seed(3)
    expected = nn.MultiheadAttention(E, H).state_dict()
    torch.manual_seed(3)
    module = MultiHeadAttention(E, H, **config)
    assert list(module.state_dict()) == list(expected)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_an_option_that_is_torchs_own_size_is_no_option():
    module = MultiHeadAttention(E, H, num_kv_heads=H, head_dim=E // H, value_head_dim=E // H, window=(None, None))
    assert module.options is None
    assert set(vars(module)) == set(vars(nn.MultiheadAttention(E, H)))


def test_l2_scores_begin_at_ten():
    module = MultiHeadAttention(E, 1, qk_norm="l2", bias=False)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(E).repeat(3, 1))
    x = torch.eye(E)[:2]  # of products 1 and 0
    weights = module(x, x, x)[1]
    torch.testing.assert_close(weights, torch.softmax(10.0 * torch.eye(2), -1))


@every_config
def test_a_hidden_key_reaches_no_output_and_no_gradient(config):
    module, x = module_with(**config), draw(2, 5, E)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    expected = module(x, x, x, key_padding_mask=padding)[0]
    x[1, 3:] = float("nan")
    x.requires_grad_()
    output = module(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(output[~padding], expected[~padding])
    output[~padding].sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    assert bool(x.grad[~padding].isfinite().all())


def test_slopes_first_seen_in_inference_mode_serve_training():
    module, x = module_with(alibi=[0.123, 0.0, 1.0, 0.5]), draw(2, 5, E)
    with torch.inference_mode():
        module(x, x, x)
    for need_weights in (True, False):
        module(x, x, x, need_weights=need_weights)[0].sum().backward()
    assert bool(module.in_proj_weight.grad.any())


@every_config
def test_dropout_drops_weights(config):
    module = module_with(**config, dropout=1.0)
    x = draw(2, 5, E)
    module.out_proj.bias.data.zero_()
    assert not module(x, x, x)[0].any()
    assert module.eval()(x, x, x)[0].any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_layer_takes_a_module_with_options_in_every_mode():
    layer = nn.TransformerEncoderLayer(E, H, dim_feedforward=16, dropout=0.0, batch_first=True)
    layer.self_attn = module_with(**EVERYTHING)
    encoder = nn.TransformerEncoder(layer, 2)
    x = draw(2, 5, E)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    expected = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        output = encoder.eval()(x, src_key_padding_mask=padding)  # as a nested tensor
    torch.testing.assert_close(output[~padding], expected[~padding])
    assert not output[padding].any()


def test_a_traced_model_keeps_positions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module_with(**EVERYTHING)

        def forward(self, x, positions):
            return self.attention(x, x, x, need_weights=False, positions=positions)[0]

    model, x, positions = Model(), draw(2, 5, E), torch.arange(5) * 7
    assert torch.equal(torch.fx.symbolic_trace(model)(x, positions), model(x, positions))


def test_a_module_with_options_is_not_reverted_and_nothing_changes():
    model = nn.ModuleList([MultiHeadAttention(E, H), MultiHeadAttention(E, H, window=(1, 0), sinks=False)])
    with pytest.raises(ValueError, match=r"^1 has options that .* can't express, window=\(1, 0\); nothing was changed"):
        fused_mha.revert(model)
    assert all(type(module) is MultiHeadAttention for module in model)
    assert fused_mha.revert(model, name_filter=lambda name: name == "0").changed == ["0"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_a_module_with_options_is_not_scripted():
    with pytest.raises(ValueError, match=r"torch\.jit\.script compiles .* which has no qk_norm='rms': use torch"):
        torch.jit.script(MultiHeadAttention(E, H, qk_norm="rms"))


def test_the_explanation_says_why_no_one_call_serves():
    module, x = module_with(num_kv_heads=2, gate=True), draw(2, 5, E)
    explanation = fused_mha.explain(module, x)
    assert explanation.chosen == "cpu"
    assert explanation.projections.endswith("apart from the attention: one call serves no num_kv_heads=2, gate=True")
    module = module_with(rope=OPTIONS["rotary half"]["rope"])
    assert fused_mha.explain(module, x, positions=torch.arange(5)).chosen == "cpu"
    with pytest.raises(ValueError, match="positions must have shape"):
        fused_mha.explain(module, x, positions=torch.arange(4))


def test_rope_takes_views_of_one_sequence():
    module, x = module_with(torch.float64, **OPTIONS["rotary half"]), draw(2, 11, E).double()
    expected = module(x, x, x)[0]
    torch.testing.assert_close(module(x[:], x[:], x[:])[0], expected)
    program = torch.export.export(module, (x[:], x[:], x[:]), strict=False).module()
    torch.testing.assert_close(program(x, x, x)[0], expected)
