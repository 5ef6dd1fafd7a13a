"""`torch.ao.quantization` on a model that holds `MultiHeadAttention`: it says that the module stays in float."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.nn.quantizable import MultiheadAttention as QuantizableAttention

import fused_mha
from fused_mha import MultiHeadAttention

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning"),
]
LEFT_IN_FLOAT = r"does not quantize fused_mha\.MultiHeadAttention, but leaves it in float: call fused_mha\.revert"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(8, 2)
        self.linear = nn.Linear(8, 8)
        self.qconfig = quantization.default_qconfig


def test_preparing_a_model_warns():
    with pytest.warns(UserWarning, match=LEFT_IN_FLOAT):
        prepared = quantization.prepare(Model())
    assert type(prepared.attention) is MultiHeadAttention


def test_a_reverted_model_is_quantized_without_a_warning():
    model = Model()
    fused_mha.revert(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LEFT_IN_FLOAT}")
        assert type(quantization.prepare(model).attention) is QuantizableAttention


def test_a_module_that_is_to_stay_in_float_does_not_warn():
    model = Model()
    model.attention.qconfig = None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LEFT_IN_FLOAT}")
        quantization.prepare(model)


def test_qconfig_is_otherwise_a_plain_attribute():
    module = MultiHeadAttention(8, 2)
    assert not hasattr(module, "qconfig")
    with pytest.warns(UserWarning, match=LEFT_IN_FLOAT):
        module.qconfig = "int8"
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same.qconfig == "int8"
        del same.qconfig
        assert not hasattr(same, "qconfig")
    x = torch.randn(3, 1, 8)
    assert module(x, x, x)[0].shape == x.shape
