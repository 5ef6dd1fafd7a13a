// Whole modules in one call against the same by a call for each step, bit for bit; driver.cpp runs them.
#pragma once

#include "calls.h"
#include "machine.h"
#include "product.h"

// A call of a module around the attention of a `Call`, whose masks, biases and numbers it takes.
class ModuleCall {
public:
    explicit ModuleCall(const Call& call, uint64_t index) : call(call), index(index), random(index ^ 0x6d6f64756c65) {
        shares_length = call.L == call.S;
        is_packed = call.H == call.H_kv && call.D == call.D_v && random.chance(0.6);
        E = features();
        kdim = is_packed ? E : features();
        vdim = is_packed ? E : features();
        E_out = features();
        draw_inputs();
        draw_weights();
    }

    // Everything that the call gives, by one call of the library.
    std::vector<Tensor> run(const std::string& where, int64_t threads, bool keeps, bool tries_short_tensors) {
        Random layouts(index + keeps);
        std::vector<Tensor> results = empty_results(layouts);
        fused_mha_module_arguments m{};
        m.query = query.c;
        m.query_weight = weights[0].c;
        m.query_bias = biases[0].c;
        m.out_weight = weights[3].c;
        m.out_bias = biases[3].c;
        m.output = results[0].c;
        m.key = key;
        m.value = value;
        m.key_weight = weights[1].c;
        m.value_weight = weights[2].c;
        m.key_bias = biases[1].c;
        m.value_bias = biases[2].c;
        m.core = core(results, threads);
        m.num_heads = call.H;
        if (keeps) {
            m.core.attention.query = results[4].c;
            m.core.attention.key = results[5].c;
            m.core.attention.value = results[6].c;
            m.core.output = results[7].c;
        } else {
            results.resize(4);
        }
        run_in_workspace(where, m, int64_t(index % 64), fused_mha_module_workspace, fused_mha_module, tensors_of, tries_short_tensors);
        for (const Tensor& tensor : results)
            if (tensor.storage && !tensor.has_intact_gaps()) fail(where + "something is written between the rows");
        return results;
    }

    // The same by products and attention.
    std::vector<Tensor> compose(const std::string& where, int64_t threads) {
        Random layouts(index + 2);
        std::vector<Tensor> results = empty_results(layouts);
        const fused_mha_tensor keys = key.data ? key : query.c, values = value.data ? value : keys;
        project(where, query.c, weight_of(0), bias_of(0), joined(results[4].c), threads);
        project(where, keys, weight_of(1), bias_of(1), joined(results[5].c), threads);
        project(where, values, weight_of(2), bias_of(2), joined(results[6].c), threads);
        fused_mha_forward_arguments f = core(results, threads);
        f.attention.query = results[4].c;
        f.attention.key = results[5].c;
        f.attention.value = results[6].c;
        f.output = results[7].c;
        run_in_workspace(where, f, 0, fused_mha_forward_workspace, fused_mha_forward, tensors_of_forward, false);
        project(where, joined(results[7].c), weights[3].c, biases[3].c, results[0].c, threads);
        return results;
    }

private:
    const Call& call;
    const uint64_t index;
    Random random;
    bool is_packed, shares_length;
    int64_t E, kdim, vdim, E_out;
    Tensor query, own_key, own_value, weights[4], biases[4];  // packed ones, and those of query: the first
    fused_mha_tensor key{}, value{};                          // absent where they are what stands before them

    int64_t features() { return random.integer(1, random.pick({5, 40, 100})); }
    Layout layout() { return random.pick({Layout::ROWS, Layout::PERMUTED}); }
    void draw(Tensor& tensor, std::vector<int64_t> size) {
        tensor.allocate(random, call.dtype, std::move(size), layout());
        tensor.fill([&] { return random.number(); });
    }

    static void shorten(fused_mha_tensor& t, int64_t length) {
        t.bytes -= (t.size[1] - length) * t.stride[1] * item_size(t.dtype);
        t.size[1] = length;
    }

    void draw_inputs() {
        // One sequence, the longer of query's and key's, may be both: each then begins where it does.
        const bool is_one = kdim == E && random.chance(0.5);
        draw(query, {call.N, is_one ? std::max(call.L, call.S) : call.L, E});
        if (is_one) {
            key = query.c;
            shorten(key, call.S);
            shorten(query.c, call.L);
            if (shares_length && random.chance(0.7)) key = {};
        } else if (kdim == E && shares_length && random.chance(0.5)) {
            key = {};
        } else {
            draw(own_key, {call.N, call.S, kdim});
            key = own_key.c;
        }
        if (vdim != kdim || random.chance(0.3)) {
            draw(own_value, {call.N, call.S, vdim});
            value = own_value.c;
        }
    }

    void draw_weights() {
        const int64_t HD = call.H * call.D, rows[] = {HD, call.H_kv * call.D, call.H_kv * call.D_v};
        const bool has_bias = random.chance(0.7), has_packed_bias = random.chance(0.7);
        const int64_t all = rows[0] + rows[1] + rows[2], widths[] = {E, kdim, vdim};
        for (int i = 0; i < 3; ++i) {
            if (i == 0 || !is_packed) draw(weights[i], {is_packed ? all : rows[i], widths[i]});
            if (has_bias && (i == 0 || !has_packed_bias)) draw(biases[i], {has_packed_bias ? all : rows[i]});
        }
        draw(weights[3], {E_out, call.H * call.D_v});
        if (random.chance(0.7)) draw(biases[3], {E_out});
    }

    fused_mha_tensor part_of(const fused_mha_tensor& packed, int i) const {
        const int64_t rows[] = {call.H * call.D, call.H_kv * call.D, call.H_kv * call.D_v};
        const int64_t first = (i > 0 ? rows[0] : 0) + (i > 1 ? rows[1] : 0);
        fused_mha_tensor part = packed;
        part.data = static_cast<char*>(part.data) + first * part.stride[0] * item_size(part.dtype);
        part.bytes -= first * part.stride[0] * item_size(part.dtype);
        part.size[0] = rows[i];
        return part;
    }
    fused_mha_tensor weight_of(int i) const { return is_packed ? part_of(weights[0].c, i) : weights[i].c; }
    fused_mha_tensor bias_of(int i) const {
        const bool has_packed = biases[0] && !biases[1];
        return has_packed ? part_of(biases[0].c, i) : biases[i].c;
    }

    // Output, weights, lse, stats, projected query, key and value, heads.
    std::vector<Tensor> empty_results(Random& layouts) const {
        const int64_t type = accumulator(call.dtype);
        std::vector<Tensor> results(8);
        const auto add = [&](int i, int64_t dtype, std::vector<int64_t> size) {
            results[size_t(i)].allocate(layouts, dtype, std::move(size), layouts.pick({Layout::ROWS, Layout::PERMUTED}));
        };
        add(0, call.dtype, {call.N, call.L, E_out});
        if (call.needs_weights) add(1, call.dtype, call.weights_size());
        add(2, type, {call.N, call.H, call.L});
        add(3, type, {2, call.N, call.H, call.L});
        const auto add_heads = [&](int i, int64_t length, int64_t H, int64_t D) {
            add(i, call.dtype, {call.N, length, H * D});
            fused_mha_tensor& t = results[size_t(i)].c;
            t = {t.data, t.dtype, t.bytes, {t.size[0], t.size[1], H, D}, {t.stride[0], t.stride[1], D, 1}};
        };
        add_heads(4, call.L, call.H, call.D);
        add_heads(5, call.S, call.H_kv, call.D);
        add_heads(6, call.S, call.H_kv, call.D_v);
        add_heads(7, call.L, call.H, call.D_v);
        return results;
    }

    fused_mha_forward_arguments core(const std::vector<Tensor>& results, int64_t threads) const {
        fused_mha_forward_arguments f{};
        f.attention.attn_mask = call.attn_mask.c;
        f.attention.key_padding_mask = call.key_padding_mask.c;
        f.attention.bias_k = call.bias_k.c;
        f.attention.bias_v = call.bias_v.c;
        f.attention.seed = call.seed.c;
        f.attention.cu_seqlens_q = call.cu_seqlens_q.c;
        f.attention.cu_seqlens_k = call.cu_seqlens_k.c;
        f.attention.bottom_right = call.bottom_right;
        f.attention.stats = results[3].c;
        f.attention.first_visible = call.first_visible;
        f.attention.last_visible = call.last_visible;
        f.attention.add_zero_attn = call.add_zero_attn;
        f.attention.average_weights = call.average_weights;
        f.attention.weights_of_heads = call.weights_of_heads.c;
        f.attention.threads = threads;
        f.attention.dropout_p = call.dropout_p;
        f.attention.scale = call.scale;
        f.weights = results[1].c;
        f.lse = results[2].c;
        return f;
    }

    // (N, length, H, D) as (N, length, H * D).
    static fused_mha_tensor joined(const fused_mha_tensor& t) {
        return {t.data, t.dtype, t.bytes, {t.size[0], t.size[1], t.size[2] * t.size[3], 1}, {t.stride[0], t.stride[1], 1, 0}};
    }

    void project(const std::string& where, const fused_mha_tensor& x, const fused_mha_tensor& weight,
                 const fused_mha_tensor& bias, const fused_mha_tensor& y, int64_t threads) const {
        const fused_mha_tensor matrix = {weight.data, weight.dtype, weight.bytes, {1, weight.size[0], weight.size[1], 1},
                                         {0, weight.stride[0], weight.stride[1], 0}};
        const fused_mha_product_arguments product{x, matrix, bias, y, {}, false, true, threads};
        run_in_workspace(where, product, 0, fused_mha_product_workspace, fused_mha_product, tensors_of_product, false);
    }

    static std::vector<fused_mha_tensor*> tensors_of_forward(fused_mha_forward_arguments& f) {
        fused_mha_attention& a = f.attention;
        return {&a.query, &a.key, &a.value, &a.attn_mask, &a.key_padding_mask, &a.bias_k, &a.bias_v, &a.seed, &a.stats,
                &f.output, &f.weights, &f.lse, &a.workspace};
    }
    static std::vector<fused_mha_tensor*> tensors_of(fused_mha_module_arguments& m) {
        std::vector<fused_mha_tensor*> tensors = {&m.query, &m.query_weight, &m.query_bias, &m.out_weight, &m.out_bias,
                                                  &m.output, &m.key, &m.value, &m.key_weight, &m.value_weight, &m.key_bias,
                                                  &m.value_bias};
        for (fused_mha_tensor* tensor : tensors_of_forward(m.core)) tensors.push_back(tensor);
        return tensors;
    }
};

inline void run_module(const Options& options, uint64_t index) {
    const Call call(index);
    if (!call.N || !call.L || !call.S || !call.D_v) return;
    for (const char* isa : options.isas) {
        if (!use_for(call.dtype, isa)) continue;
        const std::string where = std::string("module, --isa ") + isa + " --first " + std::to_string(index) + ": ";
        ModuleCall module(call, index);
        const std::vector<Tensor> composed = module.compose(where, 1);
        const auto check = [&](const char* name, const std::vector<Tensor>& results) {
            for (size_t i = 0; i < results.size(); ++i) {
                const std::vector<double> a = results[i].values(), b = composed[i].values();
                if (a.size() != b.size() || (!a.empty() && memcmp(a.data(), b.data(), a.size() * sizeof(double)) != 0))
                    fail(where + "result " + std::to_string(i) + " differs: " + name);
            }
        };
        check("one thread, kept", module.run(where, 1, true, true));
        check("one thread", module.run(where, 1, false, true));
        check("three threads, kept", module.run(where, 3, true, false));
        check("three threads", module.run(where, 3, false, false));
        check("composed by three threads", module.compose(where, 3));
    }
}
