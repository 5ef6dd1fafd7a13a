// The operators of ops/schema.py on the CPU: their tensors as the C ABI takes them. Python registers them, and those of
// torch_module.cpp, by fused_mha_register_operators.
#include "torch_operators.h"

#include <cstring>
#include <iterator>

namespace fused_mha {
namespace {

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

// What the operators of the attention share: their tensors, and the numbers behind them.
struct AttentionCall {
    static constexpr int COUNT = 12;
    Tensor tensors[COUNT];
    fused_mha_attention fields = {};
    bool needs_weights;
    std::vector<int64_t> weights_of_heads;  // empty for all

    explicit AttentionCall(Arguments& arguments) {
        for (int i = 0; i < COUNT; ++i) tensors[i] = i < 3 ? arguments.tensor() : arguments.optional_tensor();
        fields.first_visible = arguments.optional_integer().value_or(-FAR);
        fields.last_visible = arguments.optional_integer().value_or(FAR);
        fields.bottom_right = arguments.boolean();
        fields.add_zero_attn = arguments.boolean();
        fields.dropout_p = arguments.number();
        fields.scale = arguments.number();
        fields.softcap = arguments.optional_number().value_or(0);
        needs_weights = arguments.boolean();
        fields.average_weights = arguments.boolean();
        weights_of_heads = arguments.optional_integers();
        fields.threads = thread_count();
    }

    // Fails where a tensor cannot be what it stands for; the C ABI finds what else is wrong.
    void take_fields() {
        constexpr const char* NAMES[COUNT] = {"query",  "key",    "value", "attn_mask", "key_padding_mask",
                                              "bias_k", "bias_v", "seed",  "sinks",     "alibi_slopes",
                                              "cu_seqlens_q", "cu_seqlens_k"};
        fused_mha_tensor* const targets[COUNT] = {&fields.query,  &fields.key,    &fields.value,
                                                  &fields.attn_mask, &fields.key_padding_mask, &fields.bias_k,
                                                  &fields.bias_v, &fields.seed,   &fields.sinks,
                                                  &fields.alibi_slopes, &fields.cu_seqlens_q, &fields.cu_seqlens_k};
        for (int i = 0; i < COUNT; ++i) {
            const int64_t count = tensors[i] ? tensors[i].sizes().count : 4;
            if (count > 4 || (count < 4 && i < 4))
                fail("%s has a wrong number of dimensions, %d", NAMES[i], int(count));
            if (i != SEED) tensors[i] = std::move(tensors[i]).last_contiguous();
            *targets[i] = tensors[i].fields();
            if (targets[i]->dtype < 0) fail("%s is of an unsupported dtype", NAMES[i]);
            if (i > SEED && tensors[i] && !targets[i]->data) fail("%s must not be empty", NAMES[i]);
        }
        if (const int64_t count = int64_t(weights_of_heads.size()))
            fields.weights_of_heads = {weights_of_heads.data(), FUSED_MHA_INT64, count * 8, {count, 1, 1, 1}, {1, 0, 0, 0}};
    }

    static constexpr int SEED = 7;

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
    const int64_t heads = given.weights_of_heads.empty() ? H : int64_t(given.weights_of_heads.size());
    Tensor weights = !given.needs_weights            ? Tensor::nothing(dtype)
                     : given.fields.average_weights ? Tensor::empty({N, L, given.columns()}, dtype)
                                                    : Tensor::empty({N, heads, L, given.columns()}, dtype);
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
    const int64_t parts_of_batch = a.cu_seqlens_q.data ? a.cu_seqlens_q.size[0] : N;
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
        return bias ? Tensor::empty({parts_of_batch, t.size[0], t.size[1]}, accumulator) : Tensor::nothing(accumulator);
    };
    Tensor grad_query = like(a.query), grad_key = like(a.key), grad_value = like(a.value);
    Tensor grad_mask = zeros(wants_mask, {a.attn_mask.size[0], a.attn_mask.size[1], a.query.size[1], a.key.size[1]});
    Tensor grad_columns = zeros(wants_columns, {N, a.query.size[2], a.key.size[1]});
    Tensor grad_bias_k = of_bias(given.tensors[5], a.bias_k), grad_bias_v = of_bias(given.tensors[6], a.bias_v);
    Tensor grad_sinks = zeros(a.sinks.data, {parts_of_batch, a.query.size[2]});
    Tensor grad_distances = zeros(a.alibi_slopes.data, {N, a.query.size[2], a.key.size[1]});
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
                                         if_wanted(a.bias_v.data, grad_bias_v),
                                         if_wanted(a.sinks.data, grad_sinks),
                                         if_wanted(a.alibi_slopes.data, grad_distances)};
    compute(call, call.attention.workspace, fused_mha_backward_workspace, fused_mha_backward);
    give(stack, grad_query, grad_key, grad_value, grad_mask, grad_columns, grad_bias_k, grad_bias_v, grad_sinks,
         grad_distances);
}

// x, weight, bias, cos and sin, and the numbers behind them.
struct HeadsCall {
    Tensor x, weight, bias, cos, sin;
    fused_mha_heads_arguments fields = {};

    explicit HeadsCall(Arguments& arguments)
        : x(arguments.tensor()), weight(arguments.optional_tensor()), bias(arguments.optional_tensor()),
          cos(arguments.optional_tensor()), sin(arguments.optional_tensor()) {
        fields.norm = arguments.integer();
        fields.interleaved = arguments.boolean();
        fields.eps = arguments.number();
        fields.threads = thread_count();
    }

    void take_fields() {
        make_last_contiguous(x);
        make_contiguous(weight, bias, cos, sin);
        if (x.sizes().count != 4) fail("x must be 4-D, (N, L, H, D)");
        fields.x = x.fields();
        fields.weight = weight.fields();
        fields.bias = bias.fields();
        fields.cos = rotation(cos);
        fields.sin = rotation(sin);
    }

    Tensor like_x() const {
        return Tensor::empty({fields.x.size[0], fields.x.size[1], fields.x.size[2], fields.x.size[3]}, fields.x.dtype);
    }

private:
    // (L, R / 2) or (N, L, R / 2).
    static fused_mha_tensor rotation(const Tensor& t) {
        fused_mha_tensor f = t.fields();
        if (!t || t.sizes().count != 2) return f;
        return {f.data, f.dtype, f.bytes, {1, f.size[0], f.size[1], 1}, {0, f.stride[0], f.stride[1], 0}};
    }
};

void transform_heads(Value* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    HeadsCall call(arguments);
    call.take_fields();
    Tensor output = call.like_x();
    call.fields.output = output.fields();
    check(fused_mha_heads(&call.fields));
    give(stack, output);
}

// The gradients of the norm's parameters in parts, whose sum is left to the caller.
void transform_heads_backward(Value* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Tensor grad_output = arguments.tensor();
    HeadsCall call(arguments);
    call.take_fields();
    make_last_contiguous(grad_output);
    Tensor grad_x = call.like_x();
    const fused_mha_tensor& x = call.fields.x;
    const int64_t parts = (x.size[0] * x.size[1] + FUSED_MHA_HEAD_POSITIONS - 1) / FUSED_MHA_HEAD_POSITIONS;
    const int64_t accumulator = accumulator_of(x.dtype);
    const auto of_parts = [&](const Tensor& t) {
        return t ? Tensor::empty({parts, x.size[3]}, accumulator) : Tensor::nothing(accumulator);
    };
    Tensor grad_weight = of_parts(call.weight), grad_bias = of_parts(call.bias);
    call.fields.output = grad_x.fields();
    call.fields.grad_output = grad_output.fields();
    if (call.weight) call.fields.grad_weight = grad_weight.fields();
    if (call.bias) call.fields.grad_bias = grad_bias.fields();
    check(fused_mha_heads(&call.fields));
    give(stack, grad_x, grad_weight, grad_bias);
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

}  // namespace
}  // namespace fused_mha

extern "C" int64_t fused_mha_register_operators(void* torch_library) {
    using namespace fused_mha;
    if (const char* missing = load(torch_library)) return refuse("this torch has no function %s", missing);
    constexpr NamedKernel KERNELS[] = {{"product", product},
                                       {"attention", attention},
                                       {"attention_gradients", attention_gradients},
                                       {"transform_heads", transform_heads},
                                       {"transform_heads_backward", transform_heads_backward},
                                       {"dropout_mask", dropout_mask},
                                       {"multi_head_attention", multi_head_attention},
                                       {"multi_head_attention_backward", multi_head_attention_backward}};
    if (!register_cpu_kernels(KERNELS, std::size(KERNELS))) return refuse("torch did not take the operators' kernels");
    return 0;
}
