// The entry points of the library: a call is checked, measured and run.
#include "c_api.h"

#include <initializer_list>

#include "checks.h"
#include "cpu_features.h"
#include "huge_pages.h"
#include "kernel_table.h"
#include "parallel.h"

namespace {

using namespace fused_mha;

void check_workspace(Checker& checker, const fused_mha_tensor& workspace, int64_t needed) {
    checker.check("workspace", workspace, FUSED_MHA_UINT8, 1, {-1, 1, 1, 1});
    if (checker.ok && workspace.size[0] < needed)
        checker.fail_with("workspace must have %lld bytes; got %lld", (long long)needed, (long long)workspace.size[0]);
}

// Of tensors that have been checked and are about to be written.
void advise_huge_pages(std::initializer_list<const fused_mha_tensor*> tensors) {
    for (const fused_mha_tensor* t : tensors) {
        int64_t last = 0, elements = 1;
        for (int d = 0; d < 4; ++d) {
            last += (t->size[d] - 1) * t->stride[d];
            elements *= t->size[d];
        }
        if (t->data && elements > 0) fused_mha::advise_huge_pages(t->data, (last + 1) * fused_mha_item_size(t->dtype));
    }
}

// How a computation is checked, measured and run, with where a call has its workspace.
template <class Call>
struct Computation {
    int64_t (*dtype)(const Call&);
    void (*check)(Checker&, const Call&);
    int64_t (*KernelTable::*workspace_bytes)(const Call&);
    void (*KernelTable::*run)(const Call&);
    const fused_mha_tensor& (*workspace)(const Call&);
};

template <class Call>
int64_t workspace_bytes(const Computation<Call>& computation, const Call& call) {
    Checker checker;
    computation.check(checker, call);
    return checker.ok ? (kernels_of(computation.dtype(call)).*computation.workspace_bytes)(call) : -1;
}

template <class Call>
int64_t run(const Computation<Call>& computation, const Call& call, std::initializer_list<const fused_mha_tensor*> results) {
    Checker checker;
    computation.check(checker, call);
    const KernelTable& kernels = kernels_of(computation.dtype(call));
    if (checker.ok) check_workspace(checker, computation.workspace(call), (kernels.*computation.workspace_bytes)(call));
    if (!checker.ok) return -1;
    advise_huge_pages({&computation.workspace(call)});
    advise_huge_pages(results);
    (kernels.*computation.run)(call);
    return 0;
}

const Computation<fused_mha_forward_arguments> FORWARD = {
    [](const fused_mha_forward_arguments& call) { return call.attention.query.dtype; },
    check_forward, &KernelTable::forward_workspace, &KernelTable::forward,
    [](const fused_mha_forward_arguments& call) -> const fused_mha_tensor& { return call.attention.workspace; }};
const Computation<fused_mha_backward_arguments> BACKWARD = {
    [](const fused_mha_backward_arguments& call) { return call.attention.query.dtype; },
    check_backward, &KernelTable::backward_workspace, &KernelTable::backward,
    [](const fused_mha_backward_arguments& call) -> const fused_mha_tensor& { return call.attention.workspace; }};
const Computation<fused_mha_product_arguments> PRODUCT = {
    [](const fused_mha_product_arguments& call) { return call.output.dtype; },
    check_product, &KernelTable::product_workspace, &KernelTable::product,
    [](const fused_mha_product_arguments& call) -> const fused_mha_tensor& { return call.workspace; }};
const Computation<fused_mha_module_arguments> MODULE = {
    [](const fused_mha_module_arguments& call) { return call.query.dtype; },
    check_module, &KernelTable::module_workspace, &KernelTable::module,
    [](const fused_mha_module_arguments& call) -> const fused_mha_tensor& { return call.core.attention.workspace; }};

}  // namespace

extern "C" {

int64_t fused_mha_abi_version(void) { return FUSED_MHA_ABI_VERSION; }

const char* fused_mha_last_error(void) { return fused_mha::last_error(); }

void fused_mha_set_parallel_for(fused_mha_parallel_for parallel_for) { fused_mha::set_parallel_for(parallel_for); }

const char* fused_mha_available_isa(int64_t index) {
    return fused_mha::available_kernels(index);
}

const char* fused_mha_cpu_name(void) { return fused_mha::cpu_name(); }
int64_t fused_mha_cpu_has_tiles(int64_t dtype) {
    const bool has = dtype == FUSED_MHA_BFLOAT16 ? cpu_has_amx_bf16() : dtype == FUSED_MHA_FLOAT16 && cpu_has_amx_fp16();
    return has && fused_mha::system_lends_tiles();
}

const char* fused_mha_isa(void) { return fused_mha::current_name(); }
const char* fused_mha_isa_of(int64_t dtype) { return fused_mha::name_of_kernels_of(dtype); }

int64_t fused_mha_set_isa(const char* name) {
    return name && fused_mha::choose_kernels(name) ? 0 : refuse("no instruction set %s", name ? name : "(null)");
}

int64_t fused_mha_forward_workspace(const fused_mha_forward_arguments* call) { return workspace_bytes(FORWARD, *call); }
int64_t fused_mha_forward(const fused_mha_forward_arguments* call) {
    return run(FORWARD, *call, {&call->output, &call->weights});
}

int64_t fused_mha_backward_workspace(const fused_mha_backward_arguments* call) { return workspace_bytes(BACKWARD, *call); }
int64_t fused_mha_backward(const fused_mha_backward_arguments* call) {
    return run(BACKWARD, *call, {&call->grad_query, &call->grad_key, &call->grad_value});
}

int64_t fused_mha_product_workspace(const fused_mha_product_arguments* call) { return workspace_bytes(PRODUCT, *call); }
int64_t fused_mha_product(const fused_mha_product_arguments* call) { return run(PRODUCT, *call, {&call->output}); }

int64_t fused_mha_module_workspace(fused_mha_module_arguments* call) {
    Checker checker;
    complete(checker, *call);
    return checker.ok ? workspace_bytes(MODULE, *call) : -1;
}
int64_t fused_mha_module(fused_mha_module_arguments* call) {
    Checker checker;
    complete(checker, *call);
    return !checker.ok ? -1 : run(MODULE, *call, {&call->output, &call->core.weights});
}

int64_t fused_mha_column_sums(const fused_mha_tensor* matrix, const fused_mha_tensor* sums, int64_t threads) {
    Checker checker;
    checker.check_floating("matrix", *matrix);
    checker.check_floating("sums", *sums);
    if (!checker.ok) return -1;
    if (sums->dtype != matrix->dtype) checker.check_sizes("matrix", *matrix, accumulator_dtype(sums->dtype), {-1, -1, -1, 1});
    checker.check("matrix", *matrix, matrix->dtype, 3, {-1, -1, -1, 1});
    checker.check("sums", *sums, sums->dtype, 1, {matrix->size[2], 1, 1, 1});
    check_threads(checker, threads);
    if (!checker.ok) return -1;
    kernels_of(sums->dtype).column_sums(*matrix, *sums, threads);
    return 0;
}

int64_t fused_mha_heads(const fused_mha_heads_arguments* call) {
    Checker checker;
    check_heads(checker, *call);
    if (!checker.ok) return -1;
    if (call->x.size[0] > 0 && call->x.size[1] > 0 && call->x.size[2] > 0) kernels_of(accumulator_dtype(call->x.dtype)).heads(*call);
    return 0;
}

int64_t fused_mha_dropout_mask(const fused_mha_tensor* seed, const fused_mha_tensor* mask, double dropout_p,
                               int64_t threads) {
    Checker checker;
    check_seed(checker, *seed);
    checker.check("mask", *mask, FUSED_MHA_BOOL, 4, {-1, -1, -1, -1});
    if (checker.ok && !(dropout_p >= 0 && dropout_p <= 1))
        checker.fail_with("dropout_p must be between 0 and 1; got %g", dropout_p);
    if (!checker.ok) return -1;
    kernels_of(FUSED_MHA_BOOL).dropout_mask(*seed, *mask, dropout_p, threads);
    return 0;
}

int64_t fused_mha_exp2(const void* x, void* result, int64_t count, int64_t dtype) {
    if (dtype != FUSED_MHA_FLOAT32 && dtype != FUSED_MHA_FLOAT64) return refuse("exp2 takes float32 or float64");
    if (dtype == FUSED_MHA_FLOAT32)
        kernels_of(dtype).exp2_float(static_cast<const float*>(x), static_cast<float*>(result), count);
    else
        kernels_of(dtype).exp2_double(static_cast<const double*>(x), static_cast<double*>(result), count);
    return 0;
}

}  // extern "C"