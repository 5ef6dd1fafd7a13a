"""`HeadwiseParallel`: a module whose heads are spread over ranks, as a plan of `parallelize_module`.

The parameters become DTensors, and each rank computes its heads by `MultiHeadAttention.forward` with its shards of
them. The ranks' outputs are summed once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import Parameter

from fused_mha.backends.arguments import heads_of_a_longer_call
from fused_mha.module.arguments import check_are_tensors
from fused_mha.module.cache import KeyValueCache
from fused_mha.module.linear import linear
from fused_mha.module.multi_head_attention import MultiHeadAttention
from fused_mha.module.options import OWN_NAMES, ModuleOptions
from fused_mha.module.projections import is_stock
from fused_mha.parallel.groups import check_on_every_rank, described, group_of

_PROJECTIONS = ("q", "k", "v")
_WEIGHTS = tuple(f"{name}_proj_weight" for name in _PROJECTIONS)
# The dimension of each parameter that runs over the heads; None where every head has the same.
_HEADS_DIM = {
    **{f"{name}_proj_{part}": 0 for name in _PROJECTIONS for part in ("weight", "bias")},
    **dict.fromkeys(("sinks", "gate_proj_weight", "gate_proj_bias"), 0),
    **dict.fromkeys(("bias_k", "bias_v"), 2),
    **dict.fromkeys(("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias")),
}


class HeadwiseParallel(ParallelStyle):
    """A plan for `parallelize_module` that spreads the heads of a `MultiHeadAttention` over ranks.

    Every rank is given the same input and returns the same output. A forward sends one all-reduce of the output, and a
    backward one of the gradient of each tensor among query, key and value, which is one for self-attention (and the few
    numbers of ``qk_norm``). On each rank ``num_heads`` is that of its own heads, and a `KeyValueCache` made of the
    module afterwards keeps those alone.

    The parameters are sharded; FSDP2 may shard them further over another dimension of the mesh. ``state_dict`` has the
    names and shapes of the module on one device. It is put together by an all-gather, so call it on every rank.

    The plan takes no arguments.

    Raises:
        TypeError: when it is applied to what is no `MultiHeadAttention`: convert first.
        ValueError: the ranks do not divide ``num_heads`` and ``num_kv_heads``; the mesh has several dimensions; a
            projection is hooked, replaced or reparametrized.

    Examples:
        >>> plan = {"layers.*.self_attn": fused_mha.parallel.HeadwiseParallel()}
        >>> model = torch.distributed.tensor.parallel.parallelize_module(model, mesh["tensor"], plan)

    Source:
        Shoeybi et al., "Megatron-LM" (arXiv 1909.08053), section 3.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not MultiHeadAttention:
            raise TypeError(
                "HeadwiseParallel is for a fused_mha.MultiHeadAttention, which fused_mha.convert makes of torch's; got "
                f"{type(module).__name__}"
            )
        size, rank = dist.get_world_size(group_of(device_mesh)), device_mesh.get_local_rank()
        options = _all_options(module)
        for name, heads in (("num_heads", options.num_heads), ("num_kv_heads", options.num_kv_heads)):
            if heads % size:
                raise ValueError(f"{name} must be a multiple of the {size} ranks that share the heads; got {heads}")
        if not isinstance(module.out_proj, nn.Linear) or not is_stock(module.out_proj):
            raise ValueError("out_proj must be as the module was built, neither hooked nor replaced")
        own = module._parameters
        if (own.get("in_proj_weight") is None) == (own.get("q_proj_weight") is None):
            raise ValueError("the module must have its projections as it was built, neither pruned nor reparametrized")

        def sharded(parameter: Parameter | Tensor, dim: int | None) -> Parameter:
            placements = [Replicate() if dim is None else Shard(dim)]
            shard = distribute_tensor(parameter.detach(), device_mesh, placements, src_data_rank=self.src_data_rank)
            return Parameter(shard, requires_grad=parameter.requires_grad)

        for packed, part in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
            whole, own[packed] = own[packed], None
            for i, name in enumerate(f"{letter}_proj_{part}" for letter in _PROJECTIONS):
                if whole is not None:
                    own[name] = Parameter(whole.detach().split(options.rows())[i], requires_grad=whole.requires_grad)
                own.setdefault(name, None)
        for name in OWN_NAMES:  # which a module without options lacks
            own.setdefault(name, None)
        for name, dim in _HEADS_DIM.items():
            if (parameter := own.get(name)) is not None:
                own[name] = sharded(parameter, dim)
        of_out = module.out_proj._parameters
        for name, dim in (("weight", 1), ("bias", None)):
            if (parameter := of_out[name]) is not None:
                of_out[name] = sharded(parameter, dim)

        shards = _Shards(device_mesh, rank, size, options)
        module.num_heads, module.options = options.num_heads // size, shards.own_options()
        vars(module)["shards"], vars(module.out_proj)["mesh"] = shards, device_mesh
        module.__class__, module.out_proj.__class__ = _HeadShards, _SummedLinear
        return module


def _all_options(module: MultiHeadAttention) -> ModuleOptions:
    """Those of a module, also of one that has none beyond torch's."""
    if module.options is not None:
        return module.options
    H, D = module.num_heads, module.embed_dim // module.num_heads
    return ModuleOptions(module.embed_dim, H, H, D, D, None, None, False, None, None, None, False)


class _Shards(NamedTuple):
    """Which heads of the whole module are this rank's."""

    mesh: DeviceMesh
    rank: int
    size: int
    options: ModuleOptions  # of the whole module

    @property
    def first_head(self) -> int:
        return self.rank * self.options.num_heads // self.size

    def own_options(self) -> ModuleOptions:
        """Of a module of this rank's heads."""
        options, first = self.options, self.first_head
        heads = options.num_heads // self.size
        slopes = None if options.alibi_slopes is None else options.alibi_slopes[first : first + heads]
        return options._replace(num_heads=heads, num_kv_heads=options.num_kv_heads // self.size, alibi_slopes=slopes)

    def of_heads(self, attn_mask: Tensor, N: int) -> Tensor:
        """The part of a mask of all heads."""
        H, own = self.options.num_heads, self.options.num_heads // self.size
        if attn_mask.dim() == 3 and attn_mask.shape[0] == N * H:
            attn_mask = attn_mask.unflatten(0, (N, H))
        elif attn_mask.dim() != 4 or attn_mask.shape[1] != H:
            if attn_mask.dim() == 2 or (attn_mask.dim() == 4 and attn_mask.shape[1] == 1):
                return attn_mask
            raise RuntimeError(
                f"attn_mask must be one for all heads, or of all {H} heads of all ranks; got {tuple(attn_mask.shape)}"
            )
        return attn_mask[:, self.first_head : self.first_head + own]


class _HeadShards(MultiHeadAttention):
    """A module of this rank's heads, which is the whole module to checkpoints."""

    shards: _Shards

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `MultiHeadAttention.forward`; the same input on every rank gives the same output on every rank."""
        names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        defaults = {"is_causal": False, "need_weights": True, "average_attn_weights": True}
        call: dict[str, Any] = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if call.get("weights_of_heads") is not None:  # of which each rank would look among its own
            raise ValueError(
                "weights_of_heads must be None where heads are spread over ranks: average_attn_weights=False gives the "
                "weights of all heads"
            )
        taken: dict[int, Any] = {}

        def on_every_rank(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) not in taken:
                plain = x.redistribute(placements=[Replicate()]).to_local() if isinstance(x, DTensor) else x
                taken[id(x)] = _ToRanks.apply(plain, self.shards.mesh) if plain.requires_grad else plain
            return taken[id(x)]

        if self.shards.mesh.device_type == "cpu":
            self._compare_with_other_ranks({"query": query, "key": key, "value": value}, call)
        query, key, value = (on_every_rank(x) for x in (query, key, value))
        for name in ("key_padding_mask", "attn_mask"):
            call[name] = on_every_rank(call.get(name))
        if isinstance(call["attn_mask"], Tensor):
            N = query.shape[0 if self.batch_first else 1] if query.dim() == 3 else 1
            call["attn_mask"] = self.shards.of_heads(call["attn_mask"], N)
        own = self._own_parameters()
        self.__dict__.update(own)  # where they hide those of all ranks
        try:
            with heads_of_a_longer_call(self.shards.first_head, self.shards.options.num_heads):
                output, weights = super().forward(query, key, value, **call)
        finally:
            for name in own:
                del self.__dict__[name]
        if weights is not None:
            weights = self._weights_of_all(weights, call["average_attn_weights"])
        return output, weights

    def _compare_with_other_ranks(self, tensors: dict[str, Any], call: dict[str, Any]) -> None:
        """Raise on every rank if the calls differ; gloo would end the process where it sums tensors of two sizes."""
        others = {name: call.get(name) for name in ("key_padding_mask", "attn_mask", "positions")}
        flags = {name: call[name] for name in ("is_causal", "need_weights", "average_attn_weights")}
        if call.get("cache") is not None:
            flags["cache"] = self._described_cache(call["cache"])

        def check() -> str:
            check_are_tensors(**tensors)
            return described({**tensors, **others}, flags)

        check_on_every_rank(self.shards.mesh.get_group(), tensors["query"], "MultiHeadAttention", check)

    def _described_cache(self, cache: object) -> str:
        """What decides whether a call with it fails, and how many keys the call attends to."""
        if not isinstance(cache, KeyValueCache):
            return type(cache).__name__
        whose = "this module" if cache.is_of(self) else "another"
        return f"{cache} of {whose}, with {cache.lengths.tolist()} tokens"

    def _own_parameters(self) -> dict[str, Tensor]:
        """This rank's shards of the parameters, as `MultiHeadAttention.forward` reads them."""
        own: dict[str, Tensor] = {}
        for name, dim in _HEADS_DIM.items():
            parameter = self._parameters.get(name)
            if isinstance(parameter, DTensor):
                shard = parameter.to_local()
                own[name] = _ToRanks.apply(shard, self.shards.mesh) if dim is None else shard
        if "q_proj_bias" in own:
            # Times 1, so that each has a gradient in memory of its own: torch can't copy DTensors of other memory.
            own["in_proj_bias"] = torch.cat([own[f"{name}_proj_bias"] * 1.0 for name in _PROJECTIONS])
        return own

    def _weights_of_all(self, weights: Tensor, average: bool) -> Tensor:
        """The mean over all heads, or the weights of all of them."""
        if average:
            return _SumOfRanks.apply(weights / self.shards.size, self.shards.mesh)
        of_all = DTensor.from_local(weights, self.shards.mesh, [Shard(weights.dim() - 3)], run_check=False)
        return of_all.redistribute(placements=[Replicate()]).to_local()

    def extra_repr(self) -> str:
        """The options that are on, and which heads are here."""
        first, own = self.shards.first_head, self.num_heads
        heads = f"heads {first} to {first + own - 1} of {self.shards.options.num_heads}"
        return ", ".join(filter(None, (self.shards.options.described(), heads)))

    def reset_parameters(self) -> None:
        """Draw every parameter anew: under one seed on all ranks, the values of the module on one device."""
        options, (weight, bias) = self.shards.options, (self._parameters[f"q_proj_{x}"] for x in ("weight", "bias"))
        assert weight is not None
        whole = MultiHeadAttention(
            self.embed_dim,
            options.num_heads,
            bias=bias is not None,
            add_bias_kv=self._parameters.get("bias_k") is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            device=weight.device,
            dtype=weight.dtype,
            num_kv_heads=options.num_kv_heads,
            head_dim=options.head_dim,
            value_head_dim=options.value_head_dim,
            sinks=options.sinks,
            qk_norm=options.qk_norm,
            gate=options.gate,
        )
        self.load_state_dict(whole.state_dict())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        for part in ("weight", "bias"):
            names = [f"{prefix}{name}_proj_{part}" for name in _PROJECTIONS]
            if names[0] in own and (part == "bias" or self._qkv_same_embed_dim):
                whole = torch.cat([_whole(own.pop(name)) for name in names])
                own[f"{prefix}in_proj_{part}"] = _placed(whole, self._parameters[f"q_proj_{part}"], shard_rows=True)
        first = (  # as in the state_dict of torch's module
            f"{prefix}{name}" for name in ("in_proj_weight", *_WEIGHTS, "in_proj_bias")
        )
        for name in [*(name for name in first if name in own), *own]:
            if name in own:
                destination[name] = own.pop(name)

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
        missing: list[str] = []
        entries = dict(state_dict)
        packed = ("weight", "bias") if self._qkv_same_embed_dim else ("bias",)
        names = {f"{prefix}{name}_proj_{part}": f"{prefix}in_proj_{part}" for part in packed for name in _PROJECTIONS}
        for part in packed:
            whole = entries.get(f"{prefix}in_proj_{part}")
            if whole is None or self._parameters[f"q_proj_{part}"] is None:
                continue
            rows = self.shards.options.rows()
            if whole.shape[0] != sum(rows):
                shape = (sum(rows), *whole.shape[1:])
                error_msgs.append(f"{prefix}in_proj_{part} must have shape {shape}; got {tuple(whole.shape)}")
            del entries[f"{prefix}in_proj_{part}"]
            pieces = _whole(whole).split(rows) if whole.shape[0] == sum(rows) else (None,) * 3
            for name, piece in zip(_PROJECTIONS, pieces, strict=True):
                entries[f"{prefix}{name}_proj_{part}"] = (
                    self._parameters[f"{name}_proj_{part}"] if piece is None else piece
                )
        _place_entries(self, entries, prefix)
        super()._load_from_state_dict(entries, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(dict.fromkeys(names.get(name, name) for name in missing))


class _SummedLinear(NonDynamicallyQuantizableLinear):
    """A linear map of features that are spread over ranks: the sum of what each makes of its own."""

    mesh: DeviceMesh

    def forward(self, input: Tensor) -> Tensor:
        """(..., this rank's features) to (..., out), the same on every rank."""
        weight, bias = self.weight, self.bias
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        output = _SumOfRanks.apply(linear(input, own, None), self.mesh)
        if bias is None:
            return output
        return output + (bias.to_local() if isinstance(bias, DTensor) else bias)

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
        entries = dict(state_dict)
        _place_entries(self, entries, prefix)
        super()._load_from_state_dict(
            entries, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _placed(whole: Tensor, like: Any, shard_rows: bool = False) -> Tensor:
    """A tensor that every rank has, sharded as a parameter is, or by its rows over the same ranks; sends nothing."""
    mesh: DeviceMesh = like.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=[Shard(0)] * mesh.ndim if shard_rows else like.placements)


def _place_entries(module: nn.Module, entries: dict[str, Any], prefix: str) -> None:
    """Shard what a state_dict has for a module's sharded parameters."""
    for name, parameter in module._parameters.items():
        entry = entries.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(entry, Tensor) and entry.shape == parameter.shape:
            is_placed = isinstance(entry, DTensor) and entry.placements == parameter.placements
            entries[prefix + name] = entry if is_placed else _placed(_whole(entry), parameter)


class _ToRanks(torch.autograd.Function):
    """What each rank has; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.mesh), None


class _SumOfRanks(torch.autograd.Function):
    """The sum of what the ranks have; its gradient is that of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return _summed(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=mesh.get_group())
    return total
