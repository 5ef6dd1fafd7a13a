"""The faults of several processes; `faults` joins them."""

from fault import GENERIC, PACKAGE, Fault

RING = PACKAGE + "parallel/ring.py"
RING_TESTS = "tests/parallel/test_ring.py"
HEADS_TESTS = "tests/parallel/test_tensor.py"

FAULTS = [
    # Several processes.
    Fault(
        "ring: a row's sum does not follow its log-sum-exp",
        RING,
        "torch.where(is_taken, stats[1] / of_new, total / of_former)",
        "torch.where(is_taken, stats[1], total)",
        RING_TESTS,
    ),
    Fault(
        "ring: rows that have seen no key are NaN",
        RING,
        "((x - merged).exp_().masked_fill_(is_empty, 0.0) for x in (all_lse, lse))",
        "((x - merged).exp_() for x in (all_lse, lse))",
        RING_TESTS,
    ),
    Fault(
        "ring: sinks are in every part of the keys",
        RING,
        "sinks=sinks if block.keys[0] == 0 else None,",
        "sinks=sinks,",
        RING_TESTS,
    ),
    Fault(
        "ring: the gradients of keys do not come home",
        RING,
        "at_home = [grad.add_(away) for grad, away in zip(at_home, following.received(), strict=True)]",
        "following.received()",
        RING_TESTS,
    ),
    Fault(
        "ring: the chunks' places do not reach dropout",
        RING,
        "schema.placed_seed(seed[:2], block.first_query, block.first_key, *self.heads)",
        "schema.placed_seed(seed[:2], block.first_query, 0, *self.heads)",
        RING_TESTS,
    ),
    Fault(
        "ring: a small block's deltas are its own",
        GENERIC + "backward_plan.h",
        "sees_all_keys(chunks == 1 && !call.grad_lse.data),",
        "sees_all_keys(chunks == 1),",
        RING_TESTS,
    ),
    Fault(
        "context: rope counts from 0 on every rank",
        PACKAGE + "parallel/context.py",
        "positions = positions_of(rank, size, length, query.device)",
        "positions = None",
        "tests/parallel/test_context.py",
    ),
    Fault(
        "heads: a shared norm's gradient is of one rank's heads",
        PACKAGE + "parallel/tensor.py",
        "own[name] = _ToRanks.apply(shard, self.shards.mesh) if dim is None else shard",
        "own[name] = shard",
        HEADS_TESTS,
    ),
    Fault(
        "heads: every rank drops as the first",
        PACKAGE + "parallel/tensor.py",
        "with heads_of_a_longer_call(self.shards.first_head, self.shards.options.num_heads):",
        "with heads_of_a_longer_call(0, self.shards.options.num_heads):",
        HEADS_TESTS,
    ),
    Fault(
        "heads: slopes of the first heads on every rank",
        PACKAGE + "parallel/tensor.py",
        "options.alibi_slopes[first : first + heads]",
        "options.alibi_slopes[:heads]",
        HEADS_TESTS,
    ),
]
