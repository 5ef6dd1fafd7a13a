// The operators of ops/schema.py and ops/module.py on the CPU: their tensors as the C ABI takes them. Python registers
// them by fused_mha_register_operators.
#include <atomic>
#include <cstring>
#include <iterator>
#include <utility>

#include "checks.h"
#include "torch_shim.h"

namespace {

using namespace fused_mha::torch_shim;

constexpr int64_t FAR = int64_t(1) << 60;  // a key position that no query has

void check(int64_t status) {
    if (status < 0) fail("%s", fused_mha_last_error());
}

// Copies where they must; every argument of an operator is taken before, so that none is lost where a copy fails.
template <class... Tensors>
void make_contiguous(Tensors&... tensors) {
    ((tensors = std::move(tensors).contiguous()), ...);
}
template <class... Tensors>
void make_last_contiguous(Tensors&... tensors) {
    ((tensors = std::move(tensors).last_contiguous()), ...);
}

// Memory for one call. What malloc would return to the system, which would have to clear it for the next call, is kept for
// that: one piece in a process.
class Workspace {
public:
    explicit Workspace(int64_t bytes) : piece(bytes >= FEWEST_KEPT ? kept.exchange(nullptr) : nullptr) {
        if (piece && piece->bytes >= bytes) return;
        delete piece;
        piece = nullptr;
        piece = new Piece{Tensor::empty({bytes}, FUSED_MHA_UINT8), bytes};
    }
    Workspace(const Workspace&) = delete;
    ~Workspace() {
        const bool is_kept = piece->bytes >= FEWEST_KEPT && piece->bytes <= MOST_KEPT;
        delete (is_kept ? kept.exchange(piece) : piece);
    }
    fused_mha_tensor fields() const { return piece->tensor.fields(); }

private:
    static constexpr int64_t FEWEST_KEPT = 8 << 20, MOST_KEPT = 128 << 20;  // bytes
    struct Piece {
        Tensor tensor;
        int64_t bytes;
    };
    static std::atomic<Piece*> kept;
    Piece* piece;
};
std::atomic<Workspace::Piece*> Workspace::kept{nullptr};

// Measures, allocates a workspace and runs.
template <class Call, class Pointer>
void compute(Call& call, fused_mha_tensor& workspace, int64_t (*measure)(Pointer), int64_t (*run)(Pointer)) {
    const int64_t bytes = measure(&call);
    check(bytes);
    const Workspace memory(bytes);
    workspace = memory.fields();
    check(run(&call));
}

int64_t accumulator_of(int64_t dtype) { return dtype == FUSED_MHA_FLOAT64 ? FUSED_MHA_FLOAT64 : FUSED_MHA_FLOAT32; }

// A matrix, (rows, columns), as the sequence of a single batch element.
fused_mha_tensor as_sequence(fused_mha_tensor t) {
    return {t.data, t.dtype, t.bytes, {1, t.size[0], t.size[1], 1}, {0, t.stride[0], t.stride[1], 0}};
}

// Contiguous, of these sizes, `offset` elements behind the start of `t`.
fused_mha_tensor part(const fused_mha_tensor& t, int64_t offset, const int64_t (&size)[3]) {
    const int64_t bytes = offset * fused_mha_item_size(t.dtype);
    return {static_cast<char*>(t.data) + bytes, t.dtype, t.bytes - bytes, {size[0], size[1], size[2], 1},
            {size[1] * size[2], size[2], 1, 0}};
}

void multiply(const fused_mha_tensor& left, const fused_mha_tensor& right, const fused_mha_tensor& bias,
              const fused_mha_tensor& output, bool left_is_transposed, bool right_is_transposed) {
    fused_mha_product_arguments call = {left, right, bias, output, {}, left_is_transposed, right_is_transposed,
                                        thread_count()};
    compute(call, call.workspace, fused_mha_product_workspace, fused_mha_product);
}

void product(Value* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Tensor left = arguments.tensor(), right = arguments.tensor(), bias = arguments.optional_tensor();
    const bool left_is_transposed = arguments.boolean(), right_is_transposed = arguments.boolean();
    make_last_contiguous(left, right);
    make_contiguous(bias);
    const fused_mha_tensor a = left.fields(), b = right.fields();
    for (const auto& [name, operand] : {std::pair("left", &left), std::pair("right", &right)})
        if (operand->sizes().count != 2) fail("%s must be a matrix; got %d dimensions", name, int(operand->sizes().count));
    Tensor output = Tensor::empty({a.size[left_is_transposed ? 1 : 0], b.size[right_is_transposed ? 0 : 1]}, a.dtype);
    multiply(as_sequence(a), as_sequence(b), bias.fields(), as_sequence(output.fields()), left_is_transposed,
             right_is_transposed);
    give(stack, output);
}

// What the operators of the attention share: query to seed, and the numbers behind them.
struct AttentionCall {
    Tensor tensors[8];
    fused_mha_attention fields = {};
    bool needs_weights;

    explicit AttentionCall(Arguments& arguments) {
        for (int i = 0; i < 8; ++i) tensors[i] = i < 3 ? arguments.tensor() : arguments.optional_tensor();
        fields.first_visible = arguments.optional_integer().value_or(-FAR);
        fields.last_visible = arguments.optional_integer().value_or(FAR);
        fields.add_zero_attn = arguments.boolean();
        fields.dropout_p = arguments.number();
        fields.scale = arguments.number();
        needs_weights = arguments.boolean();
        fields.average_weights = arguments.boolean();
        fields.threads = thread_count();
    }

    // Fails where a tensor cannot be what it stands for; the C ABI finds what else is wrong.
    void take_fields() {
        constexpr const char* NAMES[] = {"query", "key", "value", "attn_mask", "key_padding_mask", "bias_k", "bias_v", "seed"};
        fused_mha_tensor* const targets[] = {&fields.query,  &fields.key,    &fields.value,
                                             &fields.attn_mask, &fields.key_padding_mask, &fields.bias_k,
                                             &fields.bias_v, &fields.seed};
        for (int i = 0; i < 8; ++i) {
            const int64_t count = tensors[i] ? tensors[i].sizes().count : 4;
            if (count > 4 || (count < 4 && i < 4))
                fail("%s has a wrong number of dimensions, %d", NAMES[i], int(count));
            if (i < 7) tensors[i] = std::move(tensors[i]).last_contiguous();
            *targets[i] = tensors[i].fields();
            if (targets[i]->dtype < 0) fail("%s is of an unsupported dtype", NAMES[i]);
        }
    }

    int64_t dtype() const { return fields.query.dtype; }
    int64_t accumulator() const { return accumulator_of(dtype()); }
    int64_t columns() const { return fields.key.size[1] + (fields.bias_k.data ? 1 : 0) + (fields.add_zero_attn ? 1 : 0); }
};

void attention(Value* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    AttentionCall given(arguments);
    given.take_fields();
    const int64_t(&size)[4] = given.fields.query.size;
    const int64_t N = size[0], L = size[1], H = size[2], dtype = given.dtype(), accumulator = given.accumulator();
    Tensor output = Tensor::empty({N, L, H, given.fields.value.size[3]}, dtype);
    Tensor weights = !given.needs_weights            ? Tensor::nothing(dtype)
                     : given.fields.average_weights ? Tensor::empty({N, L, given.columns()}, dtype)
                                                    : Tensor::empty({N, H, L, given.columns()}, dtype);
    Tensor lse = Tensor::empty({N, H, L}, accumulator), stats = Tensor::empty({2, N, H, L}, accumulator);
    given.fields.stats = stats.fields();
    fused_mha_forward_arguments call = {given.fields, output.fields(), {}, lse.fields()};
    if (given.needs_weights) call.weights = weights.fields();
    compute(call, call.attention.workspace, fused_mha_forward_workspace, fused_mha_forward);
    give(stack, output, weights, lse, stats);
}

// Sums over the batch and over queries that share an element of a mask are left to the caller.
void attention_gradients(Value* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Tensor grad_output = arguments.tensor(), grad_weights = arguments.optional_tensor(), grad_lse = arguments.optional_tensor();
    Tensor output = arguments.tensor(), stats = arguments.tensor();
    const bool wants_mask = arguments.boolean(), wants_columns = arguments.boolean();
    AttentionCall given(arguments);
    given.take_fields();
    make_last_contiguous(grad_output, output);
    make_contiguous(grad_weights, grad_lse, stats);
    const fused_mha_attention& a = given.fields;
    const int64_t dtype = given.dtype(), accumulator = given.accumulator(), N = a.query.size[0];
    const auto like = [&](const fused_mha_tensor& t) {
        return Tensor::empty({t.size[0], t.size[1], t.size[2], t.size[3]}, dtype);
    };
    const auto zeros = [&](bool is_wanted, const Sizes& sizes) {
        Tensor t = is_wanted ? Tensor::empty(sizes, accumulator) : Tensor::nothing(accumulator);
        const fused_mha_tensor fields = t.fields();
        if (fields.data) memset(fields.data, 0, size_t(fields.bytes));
        return t;
    };
    const auto of_bias = [&](const Tensor& bias, const fused_mha_tensor& t) {
        return bias ? Tensor::empty({N, t.size[0], t.size[1]}, accumulator) : Tensor::nothing(accumulator);
    };
    Tensor grad_query = like(a.query), grad_key = like(a.key), grad_value = like(a.value);
    Tensor grad_mask = zeros(wants_mask, {a.attn_mask.size[0], a.attn_mask.size[1], a.query.size[1], a.key.size[1]});
    Tensor grad_columns = zeros(wants_columns, {N, a.query.size[2], a.key.size[1]});
    Tensor grad_bias_k = of_bias(given.tensors[5], a.bias_k), grad_bias_v = of_bias(given.tensors[6], a.bias_v);
    given.fields.stats = stats.fields();
    const auto if_wanted = [](bool is_wanted, const Tensor& t) { return is_wanted ? t.fields() : fused_mha_tensor{}; };
    fused_mha_backward_arguments call = {given.fields,
                                         output.fields(),
                                         grad_output.fields(),
                                         grad_weights.fields(),
                                         grad_lse.fields(),
                                         grad_query.fields(),
                                         grad_key.fields(),
                                         grad_value.fields(),
                                         if_wanted(wants_mask, grad_mask),
                                         if_wanted(wants_columns, grad_columns),
                                         if_wanted(a.bias_k.data, grad_bias_k),
                                         if_wanted(a.bias_v.data, grad_bias_v)};
    compute(call, call.attention.workspace, fused_mha_backward_workspace, fused_mha_backward);
    give(stack, grad_query, grad_key, grad_value, grad_mask, grad_columns, grad_bias_k, grad_bias_v);
}

void dropout_mask(Value* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Tensor seed = arguments.tensor();
    const Sizes shape = arguments.sizes();
    const double dropout_p = arguments.number();
    make_contiguous(seed);
    if (shape.count != 4) fail("shape must be (N, H, L, S)");
    Tensor mask = Tensor::empty(shape, FUSED_MHA_BOOL);
    const fused_mha_tensor seed_fields = seed.fields(), mask_fields = mask.fields();
    check(fused_mha_dropout_mask(&seed_fields, &mask_fields, dropout_p, thread_count()));
    give(stack, mask);
}

// A call of a whole module, as ops/module.py describes it. Tensors are taken as they are given; `prepare` makes views of
// them: sequences (N, length, E), masks with all their dimensions, biases by heads.
struct ModuleCall {
    enum { QUERY, KEY, VALUE, IN_WEIGHT, QUERY_WEIGHT, KEY_WEIGHT, VALUE_WEIGHT, IN_BIAS, OUT_WEIGHT, OUT_BIAS, BIAS_K, BIAS_V,
           ATTN_MASK, KEY_PADDING_MASK, SEED, TENSORS };
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
        fused_mha_tensor* const of_biases[] = {&call.grad_bias_k, &call.grad_bias_v};
        for (int i = 0; i < 2; ++i)
            if (given.views[M::BIAS_K + i].data) {
                bias_sums[i] = Tensor::empty({N, given.H, given.D}, accumulator_of(dtype));
                *of_biases[i] = bias_sums[i].fields();
            }
        compute(call, call.attention.workspace, fused_mha_backward_workspace, fused_mha_backward);
        for (int i = 0; i < 2; ++i)
            if (wants(M::BIAS_K + i) && bias_sums[i]) {
                fused_mha_tensor sums = grads[M::BIAS_K + i].fields();
                sums = {sums.data, sums.dtype, sums.bytes, {E, 1, 1, 1}, {1, 0, 0, 0}};
                sum_columns(part(bias_sums[i].fields(), 0, {1, N, E}), sums);
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

}  // namespace

extern "C" int64_t fused_mha_register_operators(void* torch_library) {
    if (const char* missing = load(torch_library)) return fused_mha::refuse("this torch has no function %s", missing);
    constexpr NamedKernel KERNELS[] = {{"product", product},
                                       {"attention", attention},
                                       {"attention_gradients", attention_gradients},
                                       {"dropout_mask", dropout_mask},
                                       {"multi_head_attention", multi_head_attention},
                                       {"multi_head_attention_backward", multi_head_attention_backward}};
    if (!register_cpu_kernels(KERNELS, std::size(KERNELS))) return fused_mha::refuse("torch did not take the operators' kernels");
    return 0;
}
