#include "parallel.h"

#include <chrono>
#include <thread>

namespace fused_mha {

namespace {

using Clock = std::chrono::steady_clock;

std::atomic<fused_mha_parallel_for> torch_parallel_for{nullptr};
constexpr int64_t MOST_SHARES = 32;
constexpr int64_t CALLS_ALONE = 256;  // after others have kept one waiting, for up to a hundred times a small call's time
std::atomic<int64_t> calls_alone{0};  // how many of the next small calls stay on their own thread

struct Job {
    void (*task)(void*, int64_t, int64_t);
    void* context;
    int64_t tasks, shares;
    struct alignas(64) Next {  // a cache line each: threads count at once
        std::atomic<int64_t> index{0};
    } next[MOST_SHARES];  // of each share
    Clock::time_point begun, worked;  // by the calling thread, which is the first worker

    // Tasks as they come, since they differ in length.
    void work(int64_t worker) {
        for (int64_t i = 0; i < shares; ++i) {
            const int64_t share = (worker + i) % shares;
            const int64_t begin = share * tasks / shares, end = (share + 1) * tasks / shares;
            for (int64_t t; (t = begin + next[share].index.fetch_add(1, std::memory_order_relaxed)) < end;)
                task(context, t, worker);
        }
    }

    // At the end of a shared one: whether the others were away for longer than it would have taken to do without them.
    bool has_waited() const { return Clock::now() - worked > 2 * (worked - begun); }
};

}  // namespace

void set_parallel_for(fused_mha_parallel_for parallel_for) { torch_parallel_for.store(parallel_for); }

void run_tasks(int64_t tasks, int64_t threads, Order order, void (*task)(void*, int64_t, int64_t), void* context) {
    const fused_mha_parallel_for parallel_for = torch_parallel_for.load();
    const int64_t workers = tasks < threads ? tasks : threads;
    const int64_t shares = order == Order::IN_TURN || workers < 1 ? 1 : workers < MOST_SHARES ? workers : MOST_SHARES;
    Job job{task, context, tasks, shares, {}, {}, {}};
    if (parallel_for == nullptr || workers <= 1) {
        job.work(0);
        return;
    }
    job.begun = job.worked = Clock::now();
    const int32_t status = parallel_for(
        0, workers, 1,
        [](int64_t begin, int64_t end, void* context) {
            Job& job = *static_cast<Job*>(context);
            for (int64_t worker = begin; worker < end; ++worker) {
                job.work(worker);
                if (worker == 0) job.worked = Clock::now();
            }
        },
        &job);
    if (status != 0) job.work(0);  // whatever it did not start
    if (job.has_waited()) calls_alone.store(CALLS_ALONE, std::memory_order_relaxed);
}

bool shares_small_calls() {
    const int64_t left = calls_alone.load(std::memory_order_relaxed);
    if (left > 0) calls_alone.store(left - 1, std::memory_order_relaxed);
    return left <= 0;
}

void wait_for(const int32_t* ticket, int32_t turn) {
    // Tasks start in the order of their turns, so the one that is waited for runs, if not on this machine's other cores
    // then when it gets this one.
    for (int spins = 0; __atomic_load_n(ticket, __ATOMIC_ACQUIRE) != turn; ++spins)
        if (spins > 1000) std::this_thread::yield();
}

void pass_on(int32_t* ticket, int32_t next) { __atomic_store_n(ticket, next, __ATOMIC_RELEASE); }

}  // namespace fused_mha
