// What every check of driver.cpp stands on: failing, threads, instruction sets, and a C function's workspace.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "c_api.h"

[[noreturn]] inline void fail(const std::string& text) {
    fprintf(stderr, "FAILED %s\n", text.c_str());
    exit(1);
}

inline std::atomic<int64_t> ranges_per_thread{1};

// As torch's: some ranges may share a thread, and then run one after the other. All threads start at once.
inline int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
    const int64_t step = ranges_per_thread;
    std::atomic<int64_t> awaited{(end - begin + step - 1) / step};
    const auto work = [&](int64_t i) {
        for (--awaited; awaited > 0;) std::this_thread::yield();
        f(i, i + step < end ? i + step : end, context);
    };
    std::vector<std::thread> threads;
    for (int64_t i = begin; i < end; i += step) threads.emplace_back(work, i);
    for (std::thread& thread : threads) thread.join();
    return 0;
}

struct Options {
    uint64_t first = 0, count = 200;
    bool compares = true;  // with the reference
    std::vector<const char*> isas;
};

inline void use(const char* isa) {
    if (fused_mha_set_isa(isa) != 0) fail(fused_mha_last_error());
}

// Uses it, unless it leaves the dtype to the code of another.
inline bool use_for(int64_t dtype, const char* isa) {
    use(isa);
    return strcmp(fused_mha_isa_of(dtype), isa) == 0;
}

inline double rounding_of(int64_t dtype) {
    return dtype == FUSED_MHA_FLOAT64    ? 0x1p-53
           : dtype == FUSED_MHA_FLOAT32  ? 0x1p-24
           : dtype == FUSED_MHA_BFLOAT16 ? 0x1p-9
                                         : 0x1p-11;
}

// Runs a C function with a workspace of just the bytes that it asks for, `offset` from the alignment that it wants. It may
// complete its arguments in place: each run gets a copy. `tensors_of` lists the tensors of one, the workspace the last;
// of each, a byte too little must be refused.
template <class Arguments, class Measured, class TensorsOf>
void run_in_workspace(const std::string& where, const Arguments& arguments, int64_t offset, int64_t (*measure)(Measured*),
                      int64_t (*run)(Measured*), TensorsOf&& tensors_of, bool tries_short_tensors) {
    Arguments copy = arguments;
    const int64_t needed = measure(&copy);
    if (needed < 0) fail(where + fused_mha_last_error());
    const std::unique_ptr<char[]> workspace(new char[size_t(offset + needed)]);
    memset(workspace.get(), 0xff, size_t(offset + needed));
    const auto fresh = [&] {
        Arguments call = arguments;
        *tensors_of(call).back() = {workspace.get() + offset, FUSED_MHA_UINT8, needed, {needed, 1, 1, 1}, {1, 0, 0, 0}};
        return call;
    };
    if (tries_short_tensors)
        for (size_t i = 0; i < tensors_of(copy).size(); ++i) {
            Arguments call = fresh();
            fused_mha_tensor& tensor = *tensors_of(call)[i];
            if (!tensor.data || !tensor.bytes) continue;
            --tensor.bytes;
            if (run(&call) == 0) fail(where + "takes a tensor that is a byte too short: number " + std::to_string(i));
        }
    Arguments call = fresh();
    if (run(&call) != 0) fail(where + fused_mha_last_error());
}
