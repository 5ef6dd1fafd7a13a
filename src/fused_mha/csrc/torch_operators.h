// What the kernels of torch's operators share: torch_operators.cpp and torch_module.cpp include this.
#pragma once

#include <atomic>
#include <utility>

#include "checks.h"
#include "torch_shim.h"

namespace fused_mha {

using namespace torch_shim;

constexpr int64_t FAR = int64_t(1) << 60;  // a key position that no query has

inline void check(int64_t status) {
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
    inline static std::atomic<Piece*> kept{nullptr};
    Piece* piece;
};

// Measures, allocates a workspace and runs.
template <class Call, class Pointer>
void compute(Call& call, fused_mha_tensor& workspace, int64_t (*measure)(Pointer), int64_t (*run)(Pointer)) {
    const int64_t bytes = measure(&call);
    check(bytes);
    const Workspace memory(bytes);
    workspace = memory.fields();
    check(run(&call));
}

inline int64_t accumulator_of(int64_t dtype) { return dtype == FUSED_MHA_FLOAT64 ? FUSED_MHA_FLOAT64 : FUSED_MHA_FLOAT32; }

// A matrix, (rows, columns), as the sequence of a single batch element.
inline fused_mha_tensor as_sequence(fused_mha_tensor t) {
    return {t.data, t.dtype, t.bytes, {1, t.size[0], t.size[1], 1}, {0, t.stride[0], t.stride[1], 0}};
}

// Contiguous, of these sizes, `offset` elements behind the start of `t`.
inline fused_mha_tensor part(const fused_mha_tensor& t, int64_t offset, const int64_t (&size)[3]) {
    const int64_t bytes = offset * fused_mha_item_size(t.dtype);
    return {static_cast<char*>(t.data) + bytes, t.dtype, t.bytes - bytes, {size[0], size[1], size[2], 1},
            {size[1] * size[2], size[2], 1, 0}};
}

inline void multiply(const fused_mha_tensor& left, const fused_mha_tensor& right, const fused_mha_tensor& bias,
                     const fused_mha_tensor& output, bool left_is_transposed, bool right_is_transposed) {
    fused_mha_product_arguments call = {left, right, bias, output, {}, left_is_transposed, right_is_transposed,
                                        thread_count()};
    compute(call, call.workspace, fused_mha_product_workspace, fused_mha_product);
}

// The operators of a whole module.
void multi_head_attention(Value* stack, uint64_t inputs, uint64_t outputs);
void multi_head_attention_backward(Value* stack, uint64_t inputs, uint64_t outputs);

}  // namespace fused_mha
