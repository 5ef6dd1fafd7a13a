// What this machine's processor is and runs; kernel_table.cpp and c_api.cpp ask.
#pragma once

namespace fused_mha {

bool cpu_has_avx2();         // with FMA, F16C and BMI2
bool cpu_has_avx512();       // F, BW, DQ, VL
bool cpu_has_avx512_bf16();
bool cpu_has_slow_bf16_dots();  // Intel's with AVX512-FP16, which have tiles: half as fast as products of fp32
bool cpu_has_amx_bf16();     // tiles of products
bool cpu_has_amx_fp16();     // which the library does not use, and torch does
bool system_lends_tiles();   // to this process: Linux wants to be asked
const char* cpu_name();      // as CPUID gives it; empty on other processors

}  // namespace fused_mha
