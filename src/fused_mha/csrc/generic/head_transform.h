// Q/K norm and rotation of heads, forward and backward, in one pass over them: what `core/heads.py` says in PyTorch.
// instantiate.h calls it.
#pragma once

#include "generic/attention.h"
#include "parallel.h"

namespace fused_mha::FMHA_ISA {
namespace {

// A task has the heads of some positions, the same for any number of threads: the gradients of the norm's parameters are
// given for each task.
template <class T>
class HeadTransform {
public:
    explicit HeadTransform(const fused_mha_heads_arguments& call)
        : call(call), L(call.x.size[1]), H(call.x.size[2]), D(call.x.size[3]), pairs(call.cos.data ? call.cos.size[2] : 0) {}

    void run() const {
        const int64_t positions = call.x.size[0] * L;
        auto task = [&](int64_t index, int64_t) {
            const int64_t first = index * FUSED_MHA_HEAD_POSITIONS, last = min(first + FUSED_MHA_HEAD_POSITIONS, positions);
            Task of_index(*this);
            for (int64_t i = first; i < last; ++i)
                for (int64_t h = 0; h < H; ++h)
                    call.grad_output.data ? of_index.go_back(i / L, i % L, h) : of_index.transform(i / L, i % L, h);
            of_index.write_gradients(index);
        };
        fused_mha::run(ceil_div(positions, FUSED_MHA_HEAD_POSITIONS), call.threads, task);
    }

private:
    static constexpr int W = LANES<T>;
    static constexpr int64_t ROOM = FUSED_MHA_MOST_HEAD_SIZE + 2 * W;  // zeros stand behind the last component
    const fused_mha_heads_arguments& call;
    const int64_t L, H, D, pairs;

    class Task {
    public:
        explicit Task(const HeadTransform& of) : of(of), call(of.call), D(of.D) {
            if (call.weight.data) load_row(call.weight.dtype, call.weight.data, weight);
            if (call.bias.data) load_row(call.bias.dtype, call.bias.data, bias);
            zero(grad_weight, sizeof grad_weight);
            zero(grad_bias, sizeof grad_bias);
        }

        void transform(int64_t n, int64_t l, int64_t h) {
            load_row(call.x.dtype, row_of(call.x, n, l, h), x);
            if (call.norm != FUSED_MHA_NO_NORM) {
                normalize();
                for (int64_t c = 0; c < D; c += W) {
                    const Vec<T> scaled = load(x + c) * load(weight + c);
                    store(x + c, call.bias.data ? scaled + load(bias + c) : scaled);
                }
            }
            write_row(of.pairs ? rotated(n, l, x, T(1)) : x, n, l, h);
        }

        void go_back(int64_t n, int64_t l, int64_t h) {
            load_row(call.grad_output.dtype, row_of(call.grad_output, n, l, h), g);
            T* const grad = of.pairs ? rotated(n, l, g, T(-1)) : g;
            if (call.norm == FUSED_MHA_NO_NORM) return write_row(grad, n, l, h);
            load_row(call.x.dtype, row_of(call.x, n, l, h), x);
            const T factor = normalize();
            Vec<T> along{}, sum{};
            for (int64_t c = 0; c < D; c += W) {
                const Vec<T> of_component = load(grad + c), normal = load(x + c), inner = of_component * load(weight + c);
                store(grad_weight + c, of_component * normal + load(grad_weight + c));
                store(grad_bias + c, load(grad_bias + c) + of_component);
                store(grad + c, inner);
                along = inner * normal + along;
                sum = sum + inner;
            }
            const T count = call.norm == FUSED_MHA_L2_NORM ? T(1) : T(D);
            const Vec<T> share = splat(reduce_add(along) / count);
            const Vec<T> mean = splat(call.norm == FUSED_MHA_LAYER_NORM ? reduce_add(sum) / T(D) : T(0));
            for (int64_t c = 0; c < D; c += W)
                store(grad + c, ((load(grad + c) - mean) - load(x + c) * share) * splat(factor));
            write_row(grad, n, l, h);
        }

        void write_gradients(int64_t index) const {
            if (call.grad_weight.data) memcpy(element<T>(call.grad_weight, index), grad_weight, size_t(D) * sizeof(T));
            if (call.grad_bias.data) memcpy(element<T>(call.grad_bias, index), grad_bias, size_t(D) * sizeof(T));
        }

    private:
        const HeadTransform& of;
        const fused_mha_heads_arguments& call;
        const int64_t D;
        alignas(64) T x[ROOM], g[ROOM], turned[ROOM], weight[ROOM], bias[ROOM], grad_weight[ROOM], grad_bias[ROOM];

        void load_row(int64_t dtype, const void* from, T* to) const {
            with_data<T>(dtype, [&](auto data) {
                using Data = decltype(data);
                const auto* row = static_cast<const typename Data::Stored*>(from);
                for (int64_t c = 0; c < D; c += W) store(to + c, load_some<T, Data>(row + c, D - c));
            });
            end(to);
        }
        void end(T* row) const { store(row + D, Vec<T>{}); }

        void write_row(const T* from, int64_t n, int64_t l, int64_t h) const {
            void* const to = row_of(call.output, n, l, h);
            with_data<T>(call.output.dtype, [&](auto data) {
                using Data = decltype(data);
                for (int64_t c = 0; c < D; c += W)
                    store_some<T, Data>(static_cast<typename Data::Stored*>(to) + c, load(from + c), D - c);
            });
        }

        // Makes x what the norm's weight scales, and gives the factor of its components, less their mean.
        T normalize() {
            if (call.norm == FUSED_MHA_LAYER_NORM) {
                Vec<T> sum{};
                for (int64_t c = 0; c < D; c += W) sum = sum + load(x + c);
                const Vec<T> mean = splat(reduce_add(sum) / T(D));
                for (int64_t c = 0; c < D; c += W) store(x + c, load(x + c) - mean);
                end(x);
            }
            Vec<T> squares{};
            for (int64_t c = 0; c < D; c += W) squares = load(x + c) * load(x + c) + squares;
            const T sum = reduce_add(squares), size = call.norm == FUSED_MHA_L2_NORM ? sum : sum / T(D);
            const T factor = T(1) / std::sqrt(size + T(call.eps));
            for (int64_t c = 0; c < D; c += W) store(x + c, load(x + c) * splat(factor));
            return factor;
        }

        // (a, b) becomes (a cos - b sin, a sin + b cos), sin times `direction`; the components behind the pairs stay.
        T* rotated(int64_t n, int64_t l, const T* row, T direction) {
            const int64_t of_batch = call.cos.size[0] > 1 ? n : 0, pairs = of.pairs;
            const T *const cos = element<T>(call.cos, of_batch, l), *const sin = element<T>(call.sin, of_batch, l);
            if (call.interleaved) {
                for (int64_t j = 0; j < pairs; ++j) {
                    const T a = row[2 * j], b = row[2 * j + 1], s = sin[j] * direction;
                    turned[2 * j] = a * cos[j] - b * s;
                    turned[2 * j + 1] = a * s + b * cos[j];
                }
            } else {
                const auto turn = [&](int64_t to, const T* first, const T* second, T sign) {
                    for (int64_t j = 0; j < pairs; j += W) {
                        const Vec<T> c = load_some<T, OwnData<T>>(cos + j, pairs - j);
                        const Vec<T> s = load_some<T, OwnData<T>>(sin + j, pairs - j) * splat(sign);
                        store(turned + to + j, load(first + j) * c + load(second + j) * s);
                    }
                };
                turn(0, row, row + pairs, -direction);
                turn(pairs, row + pairs, row, direction);
            }
            for (int64_t c = 2 * pairs; c < D; ++c) turned[c] = row[c];
            end(turned);
            return turned;
        }
    };
};

}  // namespace
}  // namespace fused_mha::FMHA_ISA
