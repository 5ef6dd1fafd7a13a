"""`convert` and `revert`: what they change, what they keep, what they leave alone, and what they report."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.nn.quantizable import MultiheadAttention as QuantizableMultiheadAttention
from torch.nn.utils import parametrize

import fused_mha
from calls import Doubled
from fused_mha.module.multi_head_attention import MultiHeadAttention, keep_forward_called
from fused_mha.testing.cases import Case

SCRIPT_IS_DEPRECATED = pytest.mark.filterwarnings("ignore:.torch.jit.script")


class Block(nn.Module):
    """Attention under two names of which one holds it deeper."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.MultiheadAttention(8, 4, bias=False)]))


class OwnAttention(nn.MultiheadAttention):
    """A user's subclass of torch's module."""


class OurSubclass(MultiHeadAttention):
    """A user's subclass of ours."""


def types(model):
    return [type(module) for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def our_hooks(module):
    return [hook for hook in module._forward_pre_hooks.values() if hook is keep_forward_called]


def parametrized(module):
    return parametrize.register_parametrization(module, "in_proj_weight", Doubled())


def with_own_forward(module):
    module.forward = lambda *args, **kwargs: None
    return module


class TestConvert:
    def test_changes_the_class_of_every_attention_in_place(self):
        model = Block()
        modules = list(model.modules())
        report = fused_mha.convert(model)
        assert report == fused_mha.ConversionReport(["first", "inner.1.0"], {})
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert types(model) == [MultiHeadAttention] * 2
        assert all(len(our_hooks(module)) == 1 for module in (model.first, model.inner[1][0]))

    def test_changes_the_root_itself(self):
        module = nn.MultiheadAttention(8, 2)
        assert fused_mha.convert(module).changed == [""]
        assert type(module) is MultiHeadAttention

    def test_keeps_the_parameters_as_objects_with_all_they_carry(self):
        module = nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=5, dtype=torch.float64)
        module.k_proj_weight.requires_grad_(False)
        module.out_proj.weight.grad = torch.ones(8, 8, dtype=torch.float64)
        before = dict(module.named_parameters())
        fused_mha.convert(module)
        after = dict(module.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert not module.k_proj_weight.requires_grad
        assert module.q_proj_weight.requires_grad
        assert torch.equal(module.out_proj.weight.grad, torch.ones(8, 8, dtype=torch.float64))

    def test_keeps_the_state_dict_and_its_order(self):
        model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fused_mha.convert(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    @pytest.mark.parametrize("training", [True, False])
    def test_keeps_mode_options_and_attributes_of_users(self, training):
        module = nn.MultiheadAttention(8, 2, dropout=0.25, add_zero_attn=True, batch_first=True).train(training)
        module.note = "mine"
        before = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        fused_mha.convert(module)
        assert {name: value for name, value in vars(module).items() if not name.startswith("_")} == before
        assert module.training is training

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_converted_module_runs_in_its_dtype(self, dtype):
        module = nn.MultiheadAttention(8, 2, dtype=dtype)
        fused_mha.convert(module)
        x = torch.randn(3, 1, 8).to(dtype)
        assert module(x, x, x)[0].dtype == dtype

    def test_keeps_hooks_and_their_handles(self):
        module, calls = nn.MultiheadAttention(8, 2), []
        handles = [
            module.register_forward_pre_hook(lambda *_: calls.append("pre")),
            module.register_forward_hook(lambda *_: calls.append("post")),
            module.register_full_backward_hook(lambda *_: calls.append("backward")),
            module.out_proj.register_forward_hook(lambda *_: calls.append("out_proj")),
        ]
        fused_mha.convert(module)
        x = torch.randn(3, 1, 8, requires_grad=True)
        module(x, x, x)[0].sum().backward()
        assert calls == ["pre", "out_proj", "post", "backward"]
        for handle in handles:
            handle.remove()
        calls.clear()
        module(x, x, x)[0].sum().backward()
        assert calls == []
        assert len(our_hooks(module)) == 1

    def test_tied_modules_stay_tied_and_are_reported_by_every_name(self):
        model = Block()
        model.tied = model.inner[1][0]
        assert fused_mha.convert(model).changed == ["first", "inner.1.0", "tied"]
        assert model.tied is model.inner[1][0]
        assert len(our_hooks(model.tied)) == 1

    def test_tied_parameters_stay_tied(self):
        model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
        model[1].in_proj_weight = model[0].in_proj_weight
        fused_mha.convert(model)
        assert model[1].in_proj_weight is model[0].in_proj_weight

    def test_references_held_elsewhere_see_the_change(self):
        model = Block()
        held = [model.first]
        fused_mha.convert(model)
        assert type(held[0]) is MultiHeadAttention
        assert held[0] is model.first

    def test_is_idempotent(self):
        model = Block()
        fused_mha.convert(model)
        assert fused_mha.convert(model) == fused_mha.ConversionReport([], {})
        assert len(our_hooks(model.first)) == 1

    def test_leaves_modules_built_as_ours_alone(self):
        model = nn.ModuleList([MultiHeadAttention(8, 2), OurSubclass(8, 2), nn.Linear(8, 8)])
        assert fused_mha.convert(model) == fused_mha.ConversionReport([], {})
        assert types(model) == [MultiHeadAttention, OurSubclass]


class TestSkipped:
    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (OwnAttention(8, 2), f"a subclass, {__name__}.OwnAttention: its own behaviour would be lost"),
            (
                QuantizableMultiheadAttention(8, 2),
                "a subclass, torch.ao.nn.quantizable.modules.activation.MultiheadAttention: "
                "its own behaviour would be lost",
            ),
            (
                parametrized(nn.MultiheadAttention(8, 2)),
                "a subclass, torch.nn.utils.parametrize.ParametrizedMultiheadAttention: "
                "its own behaviour would be lost",
            ),
            (with_own_forward(nn.MultiheadAttention(8, 2)), "its forward was replaced on the instance"),
        ],
        ids=["own subclass", "quantizable", "parametrized", "own forward"],
    )
    def test_is_left_alone_and_reported_with_the_reason(self, module, reason):
        own_type, hooks = type(module), dict(module._forward_pre_hooks)
        model = nn.ModuleDict({"other": module, "plain": nn.MultiheadAttention(8, 2)})
        assert fused_mha.convert(model) == fused_mha.ConversionReport(["plain"], {"other": reason})
        assert type(module) is own_type
        assert dict(module._forward_pre_hooks) == hooks

    @SCRIPT_IS_DEPRECATED
    def test_scripted_submodule_is_left_alone_and_reported(self):
        scripted = torch.jit.script(nn.MultiheadAttention(8, 2))
        model = nn.ModuleList([scripted, torch.jit.script(nn.Linear(8, 8)), nn.MultiheadAttention(8, 2)])
        report = fused_mha.convert(model)
        assert report == fused_mha.ConversionReport(
            ["2"], {"0": "compiled by torch.jit.script: convert before scripting"}
        )
        assert model[0] is scripted
        x = torch.randn(3, 1, 8)
        assert model[0](x, x, x)[0].shape == (3, 1, 8)

    def test_torchs_class_is_known_where_its_name_stands_for_ours(self, monkeypatch):
        model, theirs = Block(), nn.MultiheadAttention
        monkeypatch.setattr(nn, "MultiheadAttention", MultiHeadAttention)
        for change, kind in ((fused_mha.convert, MultiHeadAttention), (fused_mha.revert, theirs)):
            assert change(model).changed == ["first", "inner.1.0"]
            assert type(model.first) is type(model.inner[1][0]) is kind
        assert type(Case().build()[1]) is theirs

    def test_name_filter_selects_by_dotted_name(self):
        model, seen = Block(), []

        def name_filter(name):
            seen.append(name)
            return name.startswith("inner.")

        report = fused_mha.convert(model, name_filter=name_filter)
        assert report == fused_mha.ConversionReport(["inner.1.0"], {"first": "not selected by name_filter"})
        assert types(model) == [nn.MultiheadAttention, MultiHeadAttention]
        assert seen == ["first", "inner.1.0"]

    def test_name_filter_needs_one_name_of_a_tied_module(self):
        model = Block()
        model.tied = model.first
        report = fused_mha.convert(model, name_filter=lambda name: name == "tied")
        assert report.changed == ["first", "tied"]
        assert type(model.first) is MultiHeadAttention

    @pytest.mark.parametrize("function", [fused_mha.convert, fused_mha.revert])
    def test_failing_name_filter_leaves_the_model_untouched(self, function):
        model = Block()
        if function is fused_mha.revert:
            fused_mha.convert(model)
        before, hooks = types(model), len(our_hooks(model.first))

        def name_filter(name):
            if name == "inner.1.0":
                raise LookupError(name)
            return True

        with pytest.raises(LookupError, match=r"inner\.1\.0"):
            function(model, name_filter=name_filter)
        assert types(model) == before
        assert len(our_hooks(model.first)) == hooks

    def test_report_prints_a_line_for_each_name(self):
        model = nn.ModuleDict({"own": OwnAttention(8, 2), "plain": nn.MultiheadAttention(8, 2)})
        assert str(fused_mha.convert(model)) == (
            "changed 1, skipped 1\n"
            "  changed  plain\n"
            f"  skipped  own: a subclass, {__name__}.OwnAttention: its own behaviour would be lost"
        )
        assert str(fused_mha.convert(nn.MultiheadAttention(8, 2))) == "changed 1, skipped 0\n  changed  (root)"
        assert str(fused_mha.convert(nn.Linear(2, 2))) == "changed 0, skipped 0"

    @pytest.mark.parametrize("function", [fused_mha.convert, fused_mha.revert])
    @pytest.mark.parametrize(("model", "name"), [(None, "NoneType"), ([nn.Linear(2, 2)], "list"), (nn.Linear, "type")])
    def test_anything_but_a_module_is_a_type_error(self, function, model, name):
        with pytest.raises(TypeError, match=f"^model must be a torch.nn.Module; got {name}$"):
            function(model)


class TestRevert:
    def test_undoes_convert(self):
        model = Block()
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
        fused_mha.convert(model)
        assert fused_mha.revert(model) == fused_mha.ConversionReport(["first", "inner.1.0"], {})
        assert types(model) == [nn.MultiheadAttention] * 2
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks

    def test_turns_modules_built_as_ours_into_torchs(self):
        ours = MultiHeadAttention(8, 2, add_bias_kv=True, batch_first=True)
        parameters = dict(ours.named_parameters())
        x = torch.randn(2, 3, 8)
        assert fused_mha.revert(ours).changed == [""]
        assert type(ours) is nn.MultiheadAttention
        assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
        theirs = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours(x, x, x)[0], theirs(x, x, x)[0])

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("function", [fused_mha.convert, fused_mha.revert])
    def test_keeps_mode_options_hooks_and_what_is_frozen(self, function, training):
        built = nn.MultiheadAttention if function is fused_mha.convert else MultiHeadAttention
        options = {"dropout": 0.25, "add_zero_attn": True, "batch_first": True, "kdim": 6}
        module = built(8, 2, **options).train(training)
        module.note = "mine"
        module.out_proj.train(not training)
        module.q_proj_weight.requires_grad_(False)
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
        module.register_full_backward_pre_hook(lambda *_: None)
        module.register_state_dict_post_hook(lambda *_: None)
        module.register_load_state_dict_pre_hook(lambda *_: None)
        before = {name: copy.copy(x) for name, x in vars(module).items() if name != "_forward_pre_hooks"}
        function(module)
        assert {name: x for name, x in vars(module).items() if name != "_forward_pre_hooks"} == before
        assert module.out_proj.training is not training
        assert not module.q_proj_weight.requires_grad
        assert module.k_proj_weight.requires_grad

    def test_removes_our_hook_alone(self):
        module, calls = MultiHeadAttention(8, 2), []
        handle = module.register_forward_pre_hook(lambda *_: calls.append("pre"))
        fused_mha.revert(module)
        assert our_hooks(module) == []
        x = torch.randn(3, 1, 8)
        module(x, x, x)
        handle.remove()
        module(x, x, x)
        assert calls == ["pre"]

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            (OurSubclass(8, 2), "OurSubclass"),
            (parametrized(MultiHeadAttention(8, 2)), "ParametrizedMultiHeadAttention"),
        ],
        ids=["subclass", "parametrized"],
    )
    def test_subclass_of_ours_is_an_error_before_any_change(self, module, name):
        model = nn.ModuleDict({"first": MultiHeadAttention(8, 2), "second": module})
        with pytest.raises(ValueError, match=f"^second is a {name}, a subclass .* nothing was changed$"):
            fused_mha.revert(model)
        assert type(model["first"]) is MultiHeadAttention
        assert len(our_hooks(model["first"])) == 1

    def test_name_filter_leaves_out_what_cannot_be_reverted(self):
        model = nn.ModuleDict({"first": MultiHeadAttention(8, 2), "second": OurSubclass(8, 2)})
        assert fused_mha.revert(model, name_filter=lambda name: name == "first").changed == ["first"]
        assert types(model) == [nn.MultiheadAttention, OurSubclass]

    def test_leaves_torchs_modules_alone(self):
        model = nn.ModuleList([nn.MultiheadAttention(8, 2), OwnAttention(8, 2)])
        assert fused_mha.revert(model) == fused_mha.ConversionReport([], {})
        assert types(model) == [nn.MultiheadAttention, OwnAttention]


def test_revert_leaves_a_module_with_a_replaced_forward_alone():
    model = nn.Sequential(MultiHeadAttention(8, 2))
    model[0].forward = lambda *args, **kwargs: None
    report = fused_mha.revert(model)
    assert type(model[0]) is MultiHeadAttention
    assert report == ([], {"0": "its forward was replaced on the instance"})
