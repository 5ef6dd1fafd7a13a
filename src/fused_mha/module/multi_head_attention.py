"""`MultiHeadAttention`: the drop-in for `torch.nn.MultiheadAttention`; parameters, initialisation, forward.

Users build it, `convert` turns torch's modules into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.activation import MultiheadAttention as TorchAttention
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import Parameter

from fused_mha.core.heads import QKNorm
from fused_mha.core.inputs import Window, check_dropout
from fused_mha.core.memory import PLAIN_OR_NONE
from fused_mha.module import decoding, loading, nested, one_call, projections, steps
from fused_mha.module import options as module_options
from fused_mha.module.arguments import ModuleArguments, check_are_tensors, check_module_inputs
from fused_mha.module.cache import KeyValueCache
from fused_mha.module.options import ModuleOptions
from fused_mha.module.quantization import QConfig
from fused_mha.module.rotary import RotaryEmbedding


def keep_forward_called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: where there is one, `nn.TransformerEncoderLayer` calls our forward."""


def ensure_forward_hook(module: nn.Module) -> None:
    """Register `keep_forward_called` on ``module`` once."""
    if keep_forward_called not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(keep_forward_called)


def remove_forward_hook(module: nn.Module) -> None:
    """Remove `keep_forward_called` from ``module``; every other hook stays."""
    for handle_id, hook in list(module._forward_pre_hooks.items()):
        if hook is keep_forward_called:
            del module._forward_pre_hooks[handle_id]


class MultiHeadAttention(TorchAttention):
    """Multi-head attention: softmax(Q K^T / sqrt(head_dim) + masks) V per head, projected in and out.

    A drop-in for `torch.nn.MultiheadAttention`: the same arguments, parameters, ``state_dict``, initial values under
    one seed and results. It subclasses torch's module so that libraries which test for its type recognise it. What
    differs by intent: rows that are masked everywhere give ``out_proj.bias`` and never NaN; ``is_causal=True`` needs no
    mask; hooks and replaced projections take effect in every mode; masks of any floating dtype and broadcastable 4-D
    masks are taken. The drop-in table of the documentation lists everything.

    What stands after ``dtype`` torch's module does not have. With all of it off the module is torch's, checkpoints and
    initial values included; "Options and cache" in the documentation has each with its parameters.

    Args:
        embed_dim: E, size of the query, the output and, without ``head_dim``, all heads together.
        num_heads: H; divides ``embed_dim``, unless ``head_dim`` is given.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        add_bias_kv: append a learned key and value to every sequence.
        add_zero_attn: append a key and a value of zeros to every sequence.
        kdim: size of the key's features; ``embed_dim`` if None.
        vdim: size of the value's features; ``embed_dim`` if None.
        batch_first: 3-D inputs and outputs are (N, L, E), not (L, N, E).
        device: where the parameters are made.
        dtype: of the parameters.
        num_kv_heads: H_kv, heads of key and value, each read by H / H_kv heads of the query; H if None.
        head_dim: D, components of a head of query and key; E / H if None.
        value_head_dim: D_v, components of a head of the value; D if None.
        window: (left, right), how many keys before and after its own position a query sees; None is no limit.
        softcap: bound c of the scores: c * tanh(score / c), before the masks.
        sinks: a learned logit for each head, ``sinks``, that takes probability and gives no value.
        rope: a `RotaryEmbedding` that turns queries and keys by their positions; for self-attention.
        qk_norm: norm of each head of queries and keys, with learned scales: ``"rms"``, ``"layer"`` or ``"l2"``.
        alibi: take slope * distance from the scores: True for the usual slopes of each head, or (H) slopes.
        gate: multiply the heads by sigmoid(query W^T + b) before ``out_proj``.

    Raises:
        ValueError: ``embed_dim`` or ``num_heads`` is not positive, or an option is out of its range.
        AssertionError: ``num_heads`` does not divide ``embed_dim``.
        TypeError: an option is of a wrong type.

    Examples:
        >>> attention = fused_mha.MultiHeadAttention(embed_dim=16, num_heads=4, batch_first=True)
        >>> x = torch.randn(2, 5, 16)
        >>> output, weights = attention(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]))

    Source:
        Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.2.2; `torch.nn.MultiheadAttention`.
    """

    qconfig = QConfig()
    options: ModuleOptions | None = None  # of an instance that has some
    context: Callable[..., tuple[Tensor, Tensor | None]] | None = None  # by `parallel.context_parallel`
    q_norm_weight: Parameter | None
    q_norm_bias: Parameter | None
    k_norm_weight: Parameter | None
    k_norm_bias: Parameter | None
    sinks: Parameter | None
    gate_proj_weight: Parameter | None
    gate_proj_bias: Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        rope: RotaryEmbedding | None = None,
        qk_norm: QKNorm | None = None,
        alibi: bool | Tensor | Sequence[float] = False,
        gate: bool = False,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                f"embed_dim and num_heads must be greater than 0, got embed_dim={embed_dim} and num_heads={num_heads} "
                "instead"
            )
        if head_dim is None and embed_dim % num_heads != 0:
            raise AssertionError(
                f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        options = module_options.checked(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            window=window,
            softcap=softcap,
            sinks=sinks,
            rope=rope,
            qk_norm=qk_norm,
            alibi=alibi,
            gate=gate,
        )
        nn.Module.__init__(self)  # torch's own constructor would draw the initial values a first time
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads if options is None else options.head_dim
        of_query, of_key, of_value = rows = (embed_dim,) * 3 if options is None else options.rows()
        merged = embed_dim if options is None else num_heads * options.value_head_dim

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        # `state_dict` lists the parameters in the order in which they are registered here.
        if self._qkv_same_embed_dim:
            self.in_proj_weight = parameter(sum(rows), embed_dim)
            self.register_parameter("q_proj_weight", None)
            self.register_parameter("k_proj_weight", None)
            self.register_parameter("v_proj_weight", None)
        else:
            self.q_proj_weight = parameter(of_query, embed_dim)
            self.k_proj_weight = parameter(of_key, self.kdim)
            self.v_proj_weight = parameter(of_value, self.vdim)
            self.register_parameter("in_proj_weight", None)
        if bias:
            self.in_proj_bias = parameter(sum(rows))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = NonDynamicallyQuantizableLinear(merged, embed_dim, bias=bias, device=device, dtype=dtype)
        if add_bias_kv:
            self.bias_k = parameter(1, 1, of_key)
            self.bias_v = parameter(1, 1, of_value)
        else:
            self.bias_k = self.bias_v = None
        self.add_zero_attn = add_zero_attn
        if options is not None:
            self.options, self._version = options, loading.VERSION
            module_options.register(self, options, bias, device, dtype)

        self._reset_parameters()
        ensure_forward_hook(self)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does: under one seed, the same values.

        For modules made on the meta device: ``module.to_empty(device="cpu").reset_parameters()``.
        """
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        # In the order in which torch draws.
        if self._qkv_same_embed_dim:
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            nn.init.xavier_uniform_(self.q_proj_weight)
            nn.init.xavier_uniform_(self.k_proj_weight)
            nn.init.xavier_uniform_(self.v_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.bias_k is not None:
            nn.init.xavier_normal_(self.bias_k)
        if self.bias_v is not None:
            nn.init.xavier_normal_(self.bias_v)
        if self.options is not None:
            module_options.reset(self, self.options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        ensure_forward_hook(self)

    def extra_repr(self) -> str:
        """The options that are on."""
        return "" if self.options is None else self.options.described()

    def __prepare_scriptable__(self) -> TorchAttention:
        """What `torch.jit.script` compiles: torch's module on the same parameters."""
        if self.options is not None:
            raise ValueError(
                "torch.jit.script compiles torch.nn.MultiheadAttention in the place of fused_mha.MultiHeadAttention, "
                f"which has no {self.options.described()}: use torch.compile or torch.export"
            )
        warnings.warn(
            "torch.jit.script puts torch.nn.MultiheadAttention in the place of fused_mha.MultiHeadAttention, in the "
            "script and in the model that it was given. Script a copy.deepcopy of the model, or call "
            "fused_mha.convert(model) again.",
            stacklevel=2,
        )
        stock = TorchAttention.__new__(TorchAttention)
        stock.__dict__ = dict(self.__dict__)
        stock._forward_pre_hooks = self._forward_pre_hooks.copy()
        remove_forward_hook(stock)
        return stock

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters, as `nn.Module.load_state_dict`, but a state_dict that does not fit changes nothing.

        Args:
            state_dict: parameters by name.
            strict: require exactly this module's names.
            assign: put the given tensors in the place of the parameters, not only their values.

        Returns:
            The missing and the unexpected keys.

        Raises:
            RuntimeError: names (if ``strict``) or shapes do not fit; the text says which.
        """
        with loading.all_or_nothing(self):  # torch reports what does not fit after it has loaded the rest
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.options is not None:
            lacking = loading.may_lack(state_dict, prefix, local_metadata.get("version"))
            missing_keys[:] = [key for key in missing_keys if key not in lacking]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        weights_of_heads: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        N batch, L query length, S key length, E ``embed_dim``. In a mask True means *ignore*.

        Args:
            query: (L, E), (L, N, E) or, with ``batch_first``, (N, L, E).
            key: (S, kdim), (S, N, kdim) or (N, S, kdim).
            value: (S, vdim), (S, N, vdim) or (N, S, vdim).
            key_padding_mask: (N, S), or (S) unbatched; bool (True = ignore) or float (added to the scores). A key that
                it hides is never read, not even if it is NaN.
            need_weights: return the attention weights too.
            attn_mask: (L, S), (N * num_heads, L, S) or (N|1, num_heads|1, L|1, S); bool (True = ignore) or float.
            average_attn_weights: the weights' mean over the heads, not the weights of each.
            is_causal: hide the keys after each query's own position, counted from the first (top left). Applies
                together with the masks and needs none.
            positions: (L) or (N, L), of an integer dtype, which ``rope`` turns query and key by, negative ones the
                other way; if None, counted from 0, or from the cache's length on.
            cache: a `KeyValueCache` of this module, whose keys and values are attended to before those of the call,
                which it then keeps too. Causality, window and ALiBi are aligned at the bottom right, ``attn_mask``
                and the weights have columns for all tokens so far, ``key_padding_mask``, bool, for the new ones.
            weights_of_heads: heads, each once, such as ``(0, 3)``, whose weights alone are returned, in this order and
                at a price in proportion; with ``average_attn_weights=False`` or ``need_weights=False``.

        Returns:
            The output, of query's layout and contiguous, and the weights after dropout or None: (N, L, S'), or
            (N, num_heads, L, S') per head, (N, n, L, S') of n heads that were named, without N if unbatched; S' = S
            plus one for each of ``add_bias_kv`` and ``add_zero_attn``.

        Raises:
            AssertionError: ranks, embedding sizes, mask types or ``key_padding_mask``'s shape do not fit.
            RuntimeError: ``attn_mask``'s shape does not fit; batch sizes, dtypes or devices disagree; key and value
                both have one wrong size beside a packed weight.
            ValueError: ``dropout`` is outside [0, 1] in training; ``key`` is not ``query`` in a module with ``rope``;
                ``positions`` without ``rope`` or of a wrong shape; a ``cache`` that is not of this module or call;
                ``weights_of_heads`` that are empty, name a head twice, or stand beside averaged weights.
            IndexError: ``weights_of_heads`` has a head that is not there.
            AttributeError: ``query``, ``key`` or ``value`` is no tensor.
            TypeError: a mask is no tensor, ``num_heads`` no int, ``positions`` not of integers, ``weights_of_heads``
                no sequence of ints, or ``key_padding_mask`` not bool beside a cache.

        Source:
            `torch.nn.MultiheadAttention.forward`.
        """
        given = (query, key, value, key_padding_mask, attn_mask)
        if not PLAIN_OR_NONE.issuperset(map(type, given)) or query is None or key is None or value is None:
            if any(isinstance(x, fx.Proxy) for x in given):
                own = {"positions": positions, "cache": cache, "weights_of_heads": weights_of_heads}
                return self._traced_call(
                    *(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal),
                    **{name: x for name, x in own.items() if x is not None},
                )
            if self.context is None:  # which has to let every rank know
                check_are_tensors(query, key, value)
        arguments = ModuleArguments(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        if self.context is not None:
            return self.context(self, arguments, positions, cache, weights_of_heads)
        if query.is_nested or key.is_nested or value.is_nested:
            if positions is not None or cache is not None:
                name = "positions" if cache is None else "cache"
                raise ValueError(f"{name} must be None with nested tensors, whose positions are counted from 0")
            return self._forward_nested(arguments, weights_of_heads)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # which cannot ask what recordable asks
            arguments = projections.recordable(arguments)
        if cache is not None and weights_of_heads is None:
            return decoding.forward(self, arguments, positions, cache)
        if not (self.options is positions is cache is weights_of_heads is None):
            return steps.with_options(self, arguments, positions, cache, weights_of_heads)
        small = one_call.small(self, arguments)
        if small is not None and (result := small.serve()) is not None:
            return result
        kept = one_call.kept(self, arguments)
        if kept is not None and kept.served is not None:
            return one_call.serve(kept, kept.served)
        N, is_batched, dropout_p = self._checked(arguments)
        result = one_call.forward(self, arguments, dropout_p, small=small)
        if result is not None:
            return result
        if kept is not None:
            with torch.no_grad():  # what is saved here, no backward would take
                projected = steps.project(self, arguments, is_batched)
                inputs = steps.attention_inputs(self, arguments, N, projected, dropout_p)
            served = one_call.keep(kept, self, inputs)
            if served is not None:
                return one_call.serve(kept, served)
        projected = steps.project(self, arguments, is_batched)
        inputs = steps.attention_inputs(self, arguments, N, projected, dropout_p)
        return steps.finish(self, inputs, projected.embedded, is_batched)

    def _forward_nested(
        self, arguments: ModuleArguments, weights_of_heads: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        if nested.is_padded(self, arguments, arguments.need_weights or weights_of_heads is not None):
            padded, repack_both = nested.padded(self, arguments)
            return repack_both(*MultiHeadAttention.forward(self, *padded, weights_of_heads=weights_of_heads))
        packed = nested.packed(self, arguments)
        offsets = (packed.cu_seqlens_q, packed.cu_seqlens_k)
        if self.options is None:
            _, _, dropout_p = self._checked(packed.arguments)
            result = one_call.forward(self, packed.arguments, dropout_p, offsets)
            if result is not None:
                return packed.repack(result[0]), None
        output, _ = steps.with_options(self, packed.arguments, offsets=offsets)
        return packed.repack(output), None

    def _checked(self, arguments: ModuleArguments) -> tuple[int, bool, float]:
        """Check what `forward` is called with; N, whether the input is batched, and the probability of dropout."""
        weight = self.in_proj_weight
        N, is_batched = check_module_inputs(
            arguments,
            embed_dim=self.embed_dim,
            kdim=self.kdim,
            vdim=self.vdim,
            num_heads=self.num_heads,
            batch_first=self.batch_first,
            weight=self.q_proj_weight if weight is None else weight,
        )
        dropout_p = self.dropout if self.training else 0.0
        check_dropout(dropout_p)
        return N, is_batched, dropout_p

    def _traced_call(self, *args: Any, **kwargs: Any) -> Any:
        """Stand as one leaf in a `torch.fx` graph, as torch's module does."""
        hooks = [*self._forward_hooks.values(), *self._forward_pre_hooks.values()]
        if any(hook is not keep_forward_called for hook in hooks):
            raise TraceError(
                f"{type(self).__name__} has forward hooks, which a torch.fx graph would run twice: remove them, trace, "
                "and register them on the traced module"
            )
        tracer: Any = next(argument.tracer for argument in (*args, *kwargs.values()) if isinstance(argument, fx.Proxy))
        if self is getattr(tracer, "root", None):
            raise TraceError(
                f"{type(self).__name__} is a leaf of torch.fx graphs, so it can't be the root of one: trace the model "
                "that holds it"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
