// Tasks on torch's threads. The kernels call `run`; results never depend on which thread runs a task.
#pragma once

#include <atomic>

#include "c_api.h"

namespace fused_mha {

void set_parallel_for(fused_mha_parallel_for parallel_for);

// Tasks start in order, or each worker begins with a share of neighbours, so that it finds in its own cache what the call
// before left there; then it takes of the others' shares.
enum class Order { IN_TURN, IN_SHARES };

// Whether a call of a tenth of a millisecond is worth sharing: on a quiet machine that takes two thirds of the time. Beside
// busy processes the system takes threads away for milliseconds, and whoever shares waits for them. So once the others have
// kept a caller waiting, such calls stay on their own thread for a while.
bool shares_small_calls();

// Calls task(index, worker) for every index in [0, tasks) on up to `threads` workers.
void run_tasks(int64_t tasks, int64_t threads, Order order, void (*task)(void* context, int64_t index, int64_t worker),
               void* context);

// Tasks that add to one place in order: each waits until the ticket shows its turn, and passes it on.
void wait_for(const int32_t* ticket, int32_t turn);
void pass_on(int32_t* ticket, int32_t next);

template <Order ORDER = Order::IN_TURN, class F>
inline __attribute__((always_inline)) void run(int64_t tasks, int64_t threads, F& f) {
    run_tasks(
        tasks, threads, ORDER, [](void* context, int64_t index, int64_t worker) { (*static_cast<F*>(context))(index, worker); },
        &f);
}

}  // namespace fused_mha
