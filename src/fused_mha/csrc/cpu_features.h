// Whether this machine runs what an instruction-set variant was compiled for; kernel_table.cpp asks.
#pragma once

namespace fused_mha {

bool cpu_has_avx2();         // with FMA, F16C and BMI2
bool cpu_has_avx512();       // F, BW, DQ, VL
bool cpu_has_avx512_bf16();
const char* cpu_vendor();    // as CPUID gives it; empty on other processors

}  // namespace fused_mha
