// Fewer page faults where large results and workspaces are first written. The C API calls it.
#pragma once

#include <cstdint>

namespace fused_mha {

// Asks the system to back memory that is about to be written with huge pages, as far as it holds whole ones. Fresh memory of 4 KiB pages takes
// a fault for each, which can cost as much as computing what it holds. Only advice: nothing depends on it.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fused_mha
