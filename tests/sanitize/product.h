// Products of whole matrices, whose rows may be those of sequences, against a plain loop; driver.cpp runs them.
#pragma once

#include "calls.h"
#include "machine.h"

// The sizes of a matrix as (batch, length, columns).
inline std::vector<int64_t> sequences(Random& random, int64_t rows, int64_t columns) {
    int64_t batch = random.integer(1, 7);
    while (rows % batch) --batch;
    return {batch, rows / batch, columns};
}

inline std::vector<fused_mha_tensor*> tensors_of_product(fused_mha_product_arguments& call) {
    return {&call.left, &call.right, &call.bias, &call.output, &call.workspace};
}

inline void check_product(const std::string& where, const Tensor& left, const Tensor& right, const Tensor& bias,
                          const Tensor& output, int64_t K, bool of_left, bool of_right) {
    const std::vector<double> a = left.values(), b = right.values(), added = bias.values(), result = output.values();
    const int64_t M = output.c.size[0] * output.c.size[1], N = output.c.size[2];
    for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < N; ++j) {
            double exact = bias ? added[size_t(j)] : 0, size = std::fabs(exact);
            for (int64_t k = 0; k < K; ++k) {
                const double term = a[size_t(of_left ? k * M + i : i * K + k)] * b[size_t(of_right ? j * K + k : k * N + j)];
                exact += term;
                size += std::fabs(term);
            }
            if (!(std::fabs(result[size_t(i * N + j)] - exact) <= size * rounding_of(output.c.dtype) * 4))
                fail(where + "[" + std::to_string(i) + ", " + std::to_string(j) + "] is wrong");
        }
}

inline void run_product(const Options& options, uint64_t index) {
    Random random(~index);
    const int64_t dtype = random.pick<int64_t>({FUSED_MHA_FLOAT32, FUSED_MHA_FLOAT64, FUSED_MHA_BFLOAT16, FUSED_MHA_FLOAT16});
    const int64_t M = random.integer(0, random.pick({9, 70, 150})), N = random.integer(0, 150), K = random.integer(0, 300);
    const bool of_left = random.chance(0.3), of_right = random.chance(0.6), has_bias = random.chance(0.5);
    Tensor left, right, bias, outputs[2];
    const auto draw = [&](Tensor& tensor, int64_t rows, int64_t columns) {
        tensor.allocate(random, dtype, sequences(random, rows, columns), random.pick({Layout::ROWS, Layout::PERMUTED}));
    };
    of_left ? draw(left, K, M) : draw(left, M, K);
    of_right ? draw(right, N, K) : draw(right, K, N);
    if (has_bias) bias.allocate(random, dtype, {N}, Layout::ROWS);
    for (Tensor* tensor : {&left, &right, &bias}) tensor->fill([&] { return random.number(); });
    for (const char* isa : options.isas) {
        if (!use_for(dtype, isa)) continue;
        const std::string where = std::string("product, --isa ") + isa + " --first " + std::to_string(index) + ": ";
        for (const int64_t threads : {1, 3}) {
            Tensor& output = outputs[threads / 2];
            draw(output, M, N);
            const fused_mha_product_arguments call{left.c, right.c, bias.c, output.c, {}, of_left, of_right, threads};
            run_in_workspace(where, call, int64_t(index % 64), fused_mha_product_workspace, fused_mha_product,
                             tensors_of_product, threads == 1);
            if (!output.has_intact_gaps()) fail(where + "something is written between the rows");
        }
        if (outputs[0].values() != outputs[1].values()) fail(where + "depends on the threads");
        if (options.compares) check_product(where, left, right, bias, outputs[0], K, of_left, of_right);
    }
}
