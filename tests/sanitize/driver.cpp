// Runs random calls on every instruction set, for sanitizers and emulators, which are no place for Python and torch.
//
// Each call must give what the fp64 reference gives, the same bits with one thread and with several, nothing between the
// rows of its results, and an error for any tensor that is a byte too short. `run` in this folder builds and runs it.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "calls.h"
#include "machine.h"
#include "module.h"
#include "product.h"
#include "reference.h"

namespace {

// One call's results, by the names of the fields in c_api.h.
class Results {
public:
    std::vector<std::pair<const char*, Tensor>> tensors;

    const fused_mha_tensor& add(const char* name, Random& layouts, int64_t dtype, std::vector<int64_t> size,
                                bool is_zero = false) {
        Tensor tensor;
        tensor.allocate(layouts, dtype, std::move(size), layouts.pick({Layout::ROWS, Layout::PERMUTED}));
        if (is_zero) tensor.fill([] { return 0.0; });
        tensors.emplace_back(name, std::move(tensor));
        return tensors.back().second.c;
    }
};

class Runner {
public:
    Runner(const Call& call, uint64_t index) : call(call), index(index) {
        attention.query = call.query.c;
        attention.key = call.key.c;
        attention.value = call.value.c;
        attention.attn_mask = call.attn_mask.c;
        attention.key_padding_mask = call.key_padding_mask.c;
        attention.bias_k = call.bias_k.c;
        attention.bias_v = call.bias_v.c;
        attention.seed = call.seed.c;
        attention.sinks = call.sinks.c;
        attention.alibi_slopes = call.alibi_slopes.c;
        attention.cu_seqlens_q = call.cu_seqlens_q.c;
        attention.cu_seqlens_k = call.cu_seqlens_k.c;
        attention.bottom_right = call.bottom_right;
        attention.weights_of_heads = call.weights_of_heads.c;
        attention.first_visible = call.first_visible;
        attention.last_visible = call.last_visible;
        attention.add_zero_attn = call.add_zero_attn;
        attention.average_weights = call.average_weights;
        attention.dropout_p = call.dropout_p;
        attention.scale = call.scale;
        attention.softcap = call.softcap;
    }

    Results run(int64_t threads, bool tries_short_tensors = false) {
        Random layouts(index);
        Results results;
        attention.threads = threads;
        const int64_t type = accumulator(call.dtype);
        const fused_mha_tensor stats = results.add("stats", layouts, type, {2, call.N, call.H, call.L});
        fused_mha_forward_arguments forward{};
        forward.attention = attention;
        forward.output = results.add("output", layouts, call.dtype, {call.N, call.L, call.H, call.D_v});
        if (call.needs_weights) forward.weights = results.add("weights", layouts, call.dtype, call.weights_size());
        if (layouts.chance(0.8)) forward.lse = results.add("lse", layouts, type, {call.N, call.H, call.L});
        const auto finish_forward = [&] {
            finish("forward", forward, fused_mha_forward_workspace, fused_mha_forward, tries_short_tensors);
        };
        if (layouts.chance(0.2)) finish_forward();  // it may do without stats
        forward.attention.stats = stats;
        finish_forward();

        fused_mha_backward_arguments backward{};
        backward.attention = attention;
        backward.attention.stats = stats;
        backward.output = forward.output;
        backward.grad_output = call.grad_output.c;
        backward.grad_weights = call.grad_weights.c;
        backward.grad_lse = call.grad_lse.c;
        backward.grad_query = results.add("grad_query", layouts, call.dtype, {call.N, call.L, call.H, call.D});
        backward.grad_key = results.add("grad_key", layouts, call.dtype, {call.N, call.S, call.H_kv, call.D});
        backward.grad_value = results.add("grad_value", layouts, call.dtype, {call.N, call.S, call.H_kv, call.D_v});
        if (call.needs_mask_gradient)
            backward.grad_attn_mask = results.add(
                "grad_attn_mask", layouts, type, {call.attn_mask.c.size[0], call.attn_mask.c.size[1], call.L, call.S}, true);
        if (call.needs_column_gradient)
            backward.grad_columns = results.add("grad_columns", layouts, type, {call.N, call.H, call.S}, true);
        if (call.bias_k && call.needs_bias_gradient) {
            backward.grad_bias_k = results.add("grad_bias_k", layouts, type, {call.N, call.H_kv, call.D});
            backward.grad_bias_v = results.add("grad_bias_v", layouts, type, {call.N, call.H_kv, call.D_v});
        }
        if (call.sinks) {
            const int64_t parts = call.is_packed ? call.elements() + 1 : call.N;
            backward.grad_sinks = results.add("grad_sinks", layouts, type, {parts, call.H}, true);
        }
        if (call.alibi_slopes)
            backward.grad_distances = results.add("grad_distances", layouts, type, {call.N, call.H, call.S}, true);
        finish("backward", backward, fused_mha_backward_workspace, fused_mha_backward, tries_short_tensors);

        if (call.dropout_p > 0) {
            const fused_mha_tensor mask = results.add("kept", layouts, FUSED_MHA_BOOL, {call.elements(), call.H, call.L, call.columns});
            if (fused_mha_dropout_mask(&call.seed.c, &mask, call.dropout_p, threads) != 0) fail_with_error("dropout_mask");
        }
        for (const auto& [name, tensor] : results.tensors)
            if (!tensor.has_intact_gaps()) fail(std::string(name) + " has something written between its rows");
        return results;
    }

private:
    const Call& call;
    const uint64_t index;
    fused_mha_attention attention{};

    [[noreturn]] void fail_with_error(const char* function) const {
        fail(std::string(function) + ": " + fused_mha_last_error());
    }

    // `arguments` is nothing but tensors up to the numbers at the end of `attention`, and behind those.
    template <class Arguments>
    static std::vector<fused_mha_tensor*> tensors_of(Arguments& arguments) {
        std::vector<fused_mha_tensor*> tensors;
        for (auto* t = &arguments.attention.query; t <= &arguments.attention.workspace; ++t) tensors.push_back(t);
        auto* const end = reinterpret_cast<fused_mha_tensor*>(&arguments + 1);
        for (auto* t = reinterpret_cast<fused_mha_tensor*>(&arguments.attention + 1); t < end; ++t) tensors.push_back(t);
        return tensors;
    }

    template <class Arguments>
    void finish(const char* name, Arguments& arguments, int64_t (*measure)(const Arguments*), int64_t (*run)(const Arguments*),
                bool tries_short_tensors) {
        const int64_t needed = measure(&arguments);
        if (needed < 0) fail_with_error(name);
        const int64_t offset = int64_t(index % 64);  // from the alignment that the library wants
        const std::unique_ptr<char[]> workspace(new char[size_t(offset + needed)]);
        memset(workspace.get(), 0xff, size_t(offset + needed));
        arguments.attention.workspace = {workspace.get() + offset, FUSED_MHA_UINT8, needed, {needed, 1, 1, 1}, {1, 0, 0, 0}};
        if (tries_short_tensors)
            for (fused_mha_tensor* tensor : tensors_of(arguments)) {
                if (!tensor->data || !tensor->bytes) continue;
                --tensor->bytes;
                if (run(&arguments) == 0) fail(std::string(name) + " takes a tensor that is a byte too short");
                ++tensor->bytes;
            }
        if (run(&arguments) != 0) fail_with_error(name);
    }
};

void check_same_bits(const std::string& where, const Results& one, const Results& other) {
    for (size_t t = 0; t < one.tensors.size(); ++t) {
        const Tensor &a = one.tensors[t].second, &b = other.tensors[t].second;
        if (memcmp(a.storage.get(), b.storage.get(), size_t(a.c.bytes)) != 0)
            fail(where + one.tensors[t].first + " depends on the threads");
    }
}

// Coarse: tests/native/ judges accuracy, here a wrong element has to stand out. The backward starts from the rounded
// output: its error grows with the terms of rowsum(dO * O) and of the sums over queries and heads.
double tolerance(const Call& call, bool is_gradient) {
    const double kept = call.dropout_p < 1 ? 1 / (1 - call.dropout_p) : 1;
    return rounding_of(call.dtype) * kept * (is_gradient ? 64 + 2 * std::sqrt(double(call.D_v * call.L * call.H)) : 32);
}

void check_values(const std::string& where, const Call& call, const Results& results, const Reference& reference) {
    for (const auto& [name, tensor] : results.tensors) {
        const std::vector<double>* const expected = reference.find(name);
        if (!expected) continue;
        const std::vector<double> values = tensor.values();
        double most = 1;
        for (const double x : *expected)
            if (x != HIDES) most = std::fmax(most, std::fabs(x));
        const double allowed = most * tolerance(call, strncmp(name, "grad_", 5) == 0);
        for (size_t i = 0; i < values.size(); ++i)
            if (values[i] != (*expected)[i] && !(std::fabs(values[i] - (*expected)[i]) <= allowed))
                fail(where + name + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) + ", not " +
                     std::to_string((*expected)[i]));
    }
}

std::vector<double> kept_of(const Results& results) {
    for (const auto& [name, tensor] : results.tensors)
        if (std::string(name) == "kept") return tensor.values();
    return {};
}

void run_call(const Options& options, uint64_t index) {
    const Call call(index);
    std::unique_ptr<const Reference> reference;
    std::vector<double> kept;
    ranges_per_thread = 1 + int64_t(index % 2);
    for (const char* isa : options.isas) {
        const std::string where = std::string("--isa ") + isa + " --first " + std::to_string(index) + " --count 1: ";
        if (!use_for(call.dtype, isa)) continue;
        Runner runner(call, index);
        const Results one = runner.run(1, true);
        check_same_bits(where, one, runner.run(2 + int64_t(index % 3)));
        if (!options.compares) continue;
        if (!reference) {
            kept = kept_of(one);
            reference.reset(new Reference(call, kept));
        }
        if (kept_of(one) != kept) fail(where + "dropout keeps others than with " + options.isas[0]);
        check_values(where, call, one, *reference);
    }
}

// From two threads at once, as two Python threads may.
void run_call_twice(const Options& options, uint64_t index) {
    const Call call(index);
    const auto run = [&](Results& results) { results = Runner(call, index).run(2); };
    use(options.isas[index % options.isas.size()]);
    Results results[2];
    std::thread first(run, std::ref(results[0])), second(run, std::ref(results[1]));
    first.join();
    second.join();
    check_same_bits("two at once, --first " + std::to_string(index) + ": ", results[0], results[1]);
}

template <class T>
void check_exp2(int64_t dtype, double tolerance) {
    for (int64_t count = 0; count < 40; ++count) {
        const std::unique_ptr<T[]> x(new T[size_t(count)]), result(new T[size_t(count)]);
        for (int64_t i = 0; i < count; ++i) x[size_t(i)] = T(-3.1) * T(i);  // no subnormal powers
        if (fused_mha_exp2(x.get(), result.get(), count, dtype) != 0) fail("exp2");
        for (int64_t i = 0; i < count; ++i) {
            const double exact = std::exp2(double(x[size_t(i)]));
            if (std::fabs(double(result[size_t(i)]) - exact) > tolerance * exact) fail("exp2 of " + std::to_string(x[size_t(i)]));
        }
    }
}

}  // namespace

// driver [--first N] [--count N] [--isa NAME] [--without-reference]
int main(int count, char** words) {
    Options options;
    std::string wanted;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word == "--without-reference")
            options.compares = false;
        else if (i + 1 == count)
            fail("unknown option " + word);
        else if (word == "--first")
            options.first = strtoull(words[++i], nullptr, 10);
        else if (word == "--count")
            options.count = strtoull(words[++i], nullptr, 10);
        else if (word == "--isa")
            wanted = words[++i];
        else
            fail("unknown option " + word);
    }
    fused_mha_set_parallel_for(parallel_for);
    for (int64_t i = 0; const char* isa = fused_mha_available_isa(i); ++i)
        if (wanted.empty() || wanted == isa) options.isas.push_back(isa);
    if (options.isas.empty()) fail("no instruction set " + wanted);
    for (uint64_t index = options.first; index < options.first + options.count; ++index) {
        run_call(options, index);
        if (index % 8 == 0) run_call_twice(options, index);
        if (index % 2 == 0) run_product(options, index);
        run_module(options, index);
    }
    std::string names;
    for (const char* isa : options.isas) {
        use(isa);
        check_exp2<float>(FUSED_MHA_FLOAT32, 1e-6);
        check_exp2<double>(FUSED_MHA_FLOAT64, 1e-14);
        names += std::string(" ") + isa;
    }
    printf("%llu calls are right on%s\n", (unsigned long long)options.count, names.c_str());
    return 0;
}
