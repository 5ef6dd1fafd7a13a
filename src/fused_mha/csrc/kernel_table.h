// The choice among the compiled instruction sets; c_api.cpp calls it.
#pragma once

#include "generic/kernels.h"

namespace fused_mha {

// The names of the variants that this machine runs, slowest first; null behind the last.
const char* available_kernels(int64_t index);
// The variant in use: the last available one, unless another was chosen.
const KernelTable& current_kernels();
const char* current_name();
bool choose_kernels(const char* name);

}  // namespace fused_mha
