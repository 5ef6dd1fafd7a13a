// The entry points of one instruction set. kernel_table.cpp chooses among them at run time.
#pragma once

#include <atomic>

#include "c_api.h"

namespace fused_mha {

extern std::atomic<bool> tiles_in_use;  // whether bfloat16 is multiplied by the processor's tiles, in kernel_table.cpp

struct KernelTable {
    const char* name;
    const KernelTable* base;  // which computes on all types but bfloat16; null where this one does itself
    int64_t (*forward_workspace)(const fused_mha_forward_arguments&);
    void (*forward)(const fused_mha_forward_arguments&);
    int64_t (*backward_workspace)(const fused_mha_backward_arguments&);
    void (*backward)(const fused_mha_backward_arguments&);
    int64_t (*product_workspace)(const fused_mha_product_arguments&);
    void (*product)(const fused_mha_product_arguments&);
    int64_t (*module_workspace)(const fused_mha_module_arguments&);
    void (*module)(const fused_mha_module_arguments&);
    void (*column_sums)(const fused_mha_tensor& matrix, const fused_mha_tensor& sums, int64_t threads);
    void (*heads)(const fused_mha_heads_arguments&);
    void (*dropout_mask)(const fused_mha_tensor& seed, const fused_mha_tensor& mask, double dropout_p, int64_t threads);
    void (*exp2_float)(const float* x, float* result, int64_t count);
    void (*exp2_double)(const double* x, double* result, int64_t count);
};

}  // namespace fused_mha
