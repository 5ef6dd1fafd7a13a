// The operators of ops/module.py on the CPU: a whole module's forward as one call of the C ABI, and its gradients step by
// step. torch_operators.cpp registers them.
#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "torch_operators.h"

namespace fused_mha {
namespace {

constexpr double SMALL_WORK = 1 << 23;  // multiply-adds that one thread does in a tenth of a millisecond

// A call of a whole module, as ops/module.py describes it. Tensors are taken as they are given; `prepare` makes views of
// them: sequences (N, length, E), masks with all their dimensions, biases by heads.
struct ModuleCall {
    enum { QUERY, KEY, VALUE, IN_WEIGHT, QUERY_WEIGHT, KEY_WEIGHT, VALUE_WEIGHT, IN_BIAS, OUT_WEIGHT, OUT_BIAS, BIAS_K, BIAS_V,
           ATTN_MASK, KEY_PADDING_MASK, SEED, CU_SEQLENS_Q, CU_SEQLENS_K, TENSORS };
    static constexpr int DIFFERENTIABLE = BIAS_V + 1;

    Tensor tensors[TENSORS];
    fused_mha_tensor views[TENSORS];
    bool batch_first, is_causal, adds_zero_attn, needs_weights, averages, is_batched;
    int64_t H;
    double dropout_p, scale;
    int64_t dtype, N, L, S, E, D;

    explicit ModuleCall(Arguments& arguments) {
        for (int i = 0; i < TENSORS; ++i)
            tensors[i] = i == QUERY || i == OUT_WEIGHT ? arguments.tensor() : arguments.optional_tensor();
        batch_first = arguments.boolean();
        H = arguments.integer();
        is_causal = arguments.boolean();
        adds_zero_attn = arguments.boolean();
        dropout_p = arguments.number();
        scale = arguments.number();
        needs_weights = arguments.boolean();
        averages = arguments.boolean();
    }

    void prepare() {
        for (int i = 0; i < TENSORS; ++i) {
            if (i <= VALUE || i == ATTN_MASK)
                make_last_contiguous(tensors[i]);
            else
                make_contiguous(tensors[i]);
            views[i] = tensors[i].fields();
        }
        if (!tensors[VALUE] && !tensors[IN_WEIGHT]) fail("value may be absent with a packed in_weight alone");
        if (!tensors[KEY] && tensors[VALUE]) fail("key may be absent with value alone");
        const int64_t rank = tensors[QUERY].sizes().count;
        is_batched = rank == 3;
        for (int i = QUERY; i <= VALUE; ++i) {
            if (!tensors[i]) {
                views[i] = views[i - 1];
                continue;
            }
            if (tensors[i].sizes().count != rank || rank < 2 || rank > 3) fail("query, key and value must be 2-D or 3-D alike");
            views[i] = sequences(views[i]);
            for (const int64_t size : views[i].size)
                if (size == 0) fail("query, key and value must not be empty");
        }
        dtype = views[QUERY].dtype;
        N = views[QUERY].size[0], L = views[QUERY].size[1], S = views[KEY].size[1], E = views[QUERY].size[2];
        if (H < 1 || E < H || E % H) fail("num_heads must divide the embedding size");
        D = E / H;
        if (!views[IN_WEIGHT].data && !(views[QUERY_WEIGHT].data && views[KEY_WEIGHT].data && views[VALUE_WEIGHT].data))
            fail("either in_weight or all of query_weight, key_weight and value_weight must be given");
        for (const int i : {BIAS_K, BIAS_V})
            if (views[i].data) {
                if (views[i].size[2] != E || views[i].size[0] * views[i].size[1] != 1) fail("bias_k and bias_v must be (1, 1, E)");
                views[i] = {views[i].data, views[i].dtype, views[i].bytes, {H, D, 1, 1}, {D, 1, 0, 0}};
            }
        fused_mha_tensor& padding = views[KEY_PADDING_MASK];
        if (padding.data && tensors[KEY_PADDING_MASK].sizes().count == 1)
            padding = {padding.data, padding.dtype, padding.bytes, {1, padding.size[0], 1, 1}, {0, padding.stride[0], 0, 0}};
    }

    // As (N, length, size).
    fused_mha_tensor sequences(fused_mha_tensor t) const {
        if (!is_batched) return as_sequence(t);
        if (!batch_first) {
            std::swap(t.size[0], t.size[1]);
            std::swap(t.stride[0], t.stride[1]);
        }
        return t;
    }

    Tensor like(int i) const { return Tensor::empty(tensors[i].sizes(), dtype); }

    // The weights' tensor, and its gradient's, in four dimensions or three.
    Sizes weights_sizes() const {
        const int64_t columns = S + (views[BIAS_K].data ? 1 : 0) + (adds_zero_attn ? 1 : 0);
        if (is_batched) return averages ? Sizes{N, L, columns} : Sizes{N, H, L, columns};
        return averages ? Sizes{L, columns} : Sizes{H, L, columns};
    }
    fused_mha_tensor weights_view(fused_mha_tensor t) const {
        if (is_batched || !t.data) return t;
        return {t.data, t.dtype, t.bytes, {1, t.size[0], t.size[1], t.size[2]}, {0, t.stride[0], t.stride[1], t.stride[2]}};
    }

    // Which of query, key and value one product makes.
    struct Range {
        int first, end;
        int64_t offset, length;  // where its result begins among the projections, and the sequences' length
        int64_t columns(int64_t E) const { return (end - first) * E; }
    };
    struct Ranges {
        Range ranges[3];
        int count;
        const Range* begin() const { return ranges; }
        const Range* end() const { return ranges + count; }
    };
    Ranges ranges() const {
        const int64_t of_query = N * L * E, of_key = N * S * E;
        if (tensors[VALUE]) return {{{0, 1, 0, L}, {1, 2, of_query, S}, {2, 3, of_query + of_key, S}}, 3};
        if (!tensors[KEY]) return {{{0, 3, 0, L}}, 1};
        return {{{0, 1, 0, L}, {1, 3, of_query, S}}, 2};
    }
    int64_t projections_size() const { return N * E * (L + 2 * S); }

    // Query, key or value (N, length, H, D) among the projections.
    fused_mha_tensor heads_of(const fused_mha_tensor& projections, int which) const {
        for (const Range& range : ranges())
            if (which < range.end) {
                const int64_t width = range.columns(E);
                const fused_mha_tensor t = part(projections, range.offset + (which - range.first) * E, {N, range.length, width});
                return {t.data, t.dtype, t.bytes, {N, range.length, H, D}, {range.length * width, width, D, 1}};
            }
        return {};
    }
    fused_mha_tensor heads_view(const fused_mha_tensor& t) const {
        return {t.data, t.dtype, t.bytes, {N, L, H, D}, {L * E, E, D, 1}};
    }

    // Multiply-adds, of so many rows at least that their products take longer than to read the weights.
    double work() const {
        const double of_query = double(std::max<int64_t>(N * L, 16)) * double(E), of_key = double(std::max<int64_t>(N * S, 16)) * double(E);
        return of_query * double(2 * E) + of_key * double(views[KEY].size[2] + views[VALUE].size[2]) + of_query * double(2 * S);
    }

    fused_mha_attention attention(const fused_mha_tensor& projections) const {
        fused_mha_attention a = {};
        if (projections.data) {
            a.query = heads_of(projections, 0);
            a.key = heads_of(projections, 1);
            a.value = heads_of(projections, 2);
        }
        a.attn_mask = views[ATTN_MASK];
        a.key_padding_mask = views[KEY_PADDING_MASK];
        a.bias_k = views[BIAS_K];
        a.bias_v = views[BIAS_V];
        a.seed = views[SEED];
        a.cu_seqlens_q = views[CU_SEQLENS_Q];
        a.cu_seqlens_k = views[CU_SEQLENS_K];
        a.first_visible = -FAR;
        a.last_visible = is_causal ? 0 : FAR;
        a.add_zero_attn = adds_zero_attn;
        a.average_weights = averages;
        a.threads = thread_count();
        a.dropout_p = dropout_p;
        a.scale = scale;
        return a;
    }
};

}  // namespace

void multi_head_attention(Value* stack, uint64_t, uint64_t) {
    using M = ModuleCall;
    Arguments arguments(stack);
    M given(arguments);
    const bool keeps = arguments.boolean();
    given.prepare();
    const int64_t dtype = given.dtype, N = given.N, L = given.L;
    Tensor output = given.like(M::QUERY);
    Tensor weights = given.needs_weights ? Tensor::empty(given.weights_sizes(), dtype) : Tensor::nothing(dtype);
    Tensor projections = keeps ? Tensor::empty({given.projections_size()}, dtype) : Tensor::nothing(dtype);
    Tensor heads = keeps ? Tensor::empty({N, L, given.H, given.D}, dtype) : Tensor::nothing(dtype);
    Tensor stats = keeps ? Tensor::empty({2, N, given.H, L}, accumulator_of(dtype)) : Tensor::nothing(accumulator_of(dtype));
    fused_mha_module_arguments call = {};
    call.query = given.views[M::QUERY];
    if (given.tensors[M::KEY]) call.key = given.views[M::KEY];
    if (given.tensors[M::VALUE]) call.value = given.views[M::VALUE];
    if (given.views[M::IN_WEIGHT].data) {
        call.query_weight = given.views[M::IN_WEIGHT];
    } else {
        call.query_weight = given.views[M::QUERY_WEIGHT];
        call.key_weight = given.views[M::KEY_WEIGHT];
        call.value_weight = given.views[M::VALUE_WEIGHT];
    }
    call.query_bias = given.views[M::IN_BIAS];
    call.out_weight = given.views[M::OUT_WEIGHT];
    call.out_bias = given.views[M::OUT_BIAS];
    call.output = given.sequences(output.fields());
    call.core.attention = given.attention(keeps ? projections.fields() : fused_mha_tensor{});
    if (given.work() < SMALL_WORK && !shares_small_calls()) call.core.attention.threads = 1;
    if (keeps) {
        call.core.output = heads.fields();
        call.core.attention.stats = stats.fields();
    }
    if (given.needs_weights) call.core.weights = given.weights_view(weights.fields());
    call.num_heads = given.H;
    compute(call, call.core.attention.workspace, fused_mha_module_workspace, fused_mha_module);
    give(stack, output, weights, projections, heads, stats);
}

// The steps of the forward, backwards. `wanted` has a bit for each of the first tensors of the call; the gradient of
// an input that stands for others is that of all of them.
void multi_head_attention_backward(Value* stack, uint64_t, uint64_t) {
    using M = ModuleCall;
    Arguments arguments(stack);
    Tensor grad_output = arguments.optional_tensor(), grad_weights = arguments.optional_tensor();
    Tensor projections = arguments.tensor(), heads = arguments.tensor(), stats = arguments.tensor();
    M given(arguments);
    const int64_t wanted = arguments.integer();
    given.prepare();
    make_last_contiguous(grad_output);
    make_contiguous(grad_weights, projections, heads, stats);
    const int64_t dtype = given.dtype, N = given.N, L = given.L, E = given.E, threads = thread_count();
    if (projections.sizes().count != 1 || projections.sizes().at[0] != given.projections_size())
        fail("the forward has kept nothing for a backward");
    const auto wants = [&](int i) { return (wanted >> i & 1) != 0; };

    Tensor grads[M::DIFFERENTIABLE];
    for (int i = 0; i < M::DIFFERENTIABLE; ++i) {
        const bool is_bias = i == M::IN_BIAS || i == M::OUT_BIAS;  // which need not be given
        const Sizes sizes = is_bias ? Sizes{i == M::IN_BIAS ? 3 * E : E} : given.tensors[i] ? given.tensors[i].sizes() : Sizes{0};
        grads[i] = Tensor::empty(wants(i) ? sizes : Sizes{0}, dtype);
    }
    const auto sum_columns = [&](const fused_mha_tensor& matrix, const fused_mha_tensor& sums) {
        check(fused_mha_column_sums(&matrix, &sums, threads));
    };

    Tensor grad_heads = Tensor::empty({N, L, E}, dtype);
    const fused_mha_tensor merged = part(heads.fields(), 0, {N, L, E}), grad_merged = grad_heads.fields();
    if (grad_output) {
        const fused_mha_tensor grad = given.sequences(grad_output.fields());
        multiply(grad, as_sequence(given.views[M::OUT_WEIGHT]), {}, grad_merged, false, false);
        if (wants(M::OUT_WEIGHT)) multiply(grad, merged, {}, as_sequence(grads[M::OUT_WEIGHT].fields()), true, false);
        if (wants(M::OUT_BIAS)) sum_columns(grad, grads[M::OUT_BIAS].fields());
    } else {
        memset(grad_merged.data, 0, size_t(grad_merged.bytes));
        for (const int i : {M::OUT_WEIGHT, M::OUT_BIAS})
            if (const fused_mha_tensor grad = grads[i].fields(); grad.data) memset(grad.data, 0, size_t(grad.bytes));
    }
    constexpr int64_t OF_OUTPUT = 1 << M::OUT_WEIGHT | 1 << M::OUT_BIAS;
    if (wanted & ~OF_OUTPUT) {
        Tensor grad_projections = Tensor::empty({given.projections_size()}, dtype);
        const fused_mha_tensor of_projections = grad_projections.fields();
        Tensor bias_sums[2];
        fused_mha_backward_arguments call = {};
        call.attention = given.attention(projections.fields());
        call.attention.stats = stats.fields();
        call.output = heads.fields();
        call.grad_output = given.heads_view(grad_merged);
        call.grad_weights = given.weights_view(grad_weights.fields());
        call.grad_query = given.heads_of(of_projections, 0);
        call.grad_key = given.heads_of(of_projections, 1);
        call.grad_value = given.heads_of(of_projections, 2);
        const fused_mha_tensor& offsets = call.attention.cu_seqlens_q;
        const int64_t parts_of_batch = offsets.data ? offsets.size[0] : N;
        fused_mha_tensor* const of_biases[] = {&call.grad_bias_k, &call.grad_bias_v};
        for (int i = 0; i < 2; ++i)
            if (given.views[M::BIAS_K + i].data) {
                bias_sums[i] = Tensor::empty({parts_of_batch, given.H, given.D}, accumulator_of(dtype));
                *of_biases[i] = bias_sums[i].fields();
            }
        compute(call, call.attention.workspace, fused_mha_backward_workspace, fused_mha_backward);
        for (int i = 0; i < 2; ++i)
            if (wants(M::BIAS_K + i) && bias_sums[i]) {
                fused_mha_tensor sums = grads[M::BIAS_K + i].fields();
                sums = {sums.data, sums.dtype, sums.bytes, {E, 1, 1, 1}, {1, 0, 0, 0}};
                sum_columns(part(bias_sums[i].fields(), 0, {1, parts_of_batch, E}), sums);
            }
        const bool is_packed = given.views[M::IN_WEIGHT].data != nullptr;
        for (const M::Range& range : given.ranges()) {
            const int weight = is_packed ? int(M::IN_WEIGHT) : M::QUERY_WEIGHT + range.first;
            const int64_t rows = range.columns(E), first_row = is_packed ? range.first * E : 0;
            const fused_mha_tensor grad = part(of_projections, range.offset, {N, range.length, rows});
            const fused_mha_tensor x = given.views[range.first];
            if (wants(range.first))
                multiply(grad, part(given.views[weight], first_row * x.size[2], {1, rows, x.size[2]}), {},
                         given.sequences(grads[range.first].fields()), false, false);
            if (wants(weight))
                multiply(grad, x, {}, part(grads[weight].fields(), first_row * x.size[2], {1, rows, x.size[2]}), true, false);
            if (wants(M::IN_BIAS)) {
                fused_mha_tensor sums = part(grads[M::IN_BIAS].fields(), range.first * E, {1, 1, rows});
                sums = {sums.data, sums.dtype, sums.bytes, {rows, 1, 1, 1}, {1, 0, 0, 0}};
                sum_columns(grad, sums);
            }
        }
    }
    for (Tensor& grad : grads) give(stack++, grad);
}

}  // namespace fused_mha
