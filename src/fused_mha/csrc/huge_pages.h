// Fewer page faults where large results and workspaces are first written. The C API calls it.
#pragma once

#include "c_api.h"

namespace fused_mha {

// Asks the system to back a large tensor that is about to be written with huge pages. Fresh memory of 4 KiB pages takes
// a fault for each, which can cost as much as computing what it holds. Only advice: nothing depends on it.
void advise_huge_pages(const fused_mha_tensor& tensor);

}  // namespace fused_mha
