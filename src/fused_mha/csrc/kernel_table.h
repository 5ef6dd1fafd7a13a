// The choice among the compiled instruction sets; c_api.cpp calls it.
#pragma once

#include "generic/kernels.h"

namespace fused_mha {

// The names of the variants that this machine runs, the slowest in bfloat16 first; null behind the last.
const char* available_kernels(int64_t index);
// The variant in use: the last available one, unless another was chosen.
const char* current_name();
// What computes on tensors of a dtype, and its name: the variant itself, or the one that it adds products of bfloat16 to.
const KernelTable& kernels_of(int64_t dtype);
const char* name_of_kernels_of(int64_t dtype);
bool choose_kernels(const char* name);

}  // namespace fused_mha
