// What a call must give, in fp64 and in plain loops; driver.cpp compares the library with it.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "calls.h"

class Reference {
public:
    // `kept`: the dropout mask (N, H, L, S'), empty without dropout.
    Reference(const Call& call, const std::vector<double>& kept)
        : call(call),
          query(call.query.values()),
          key(with_virtual(call.key, call.bias_k, call.D)),
          value(with_virtual(call.value, call.bias_v, call.D_v)),
          grad_output(call.grad_output.values()),
          grad_weights(call.grad_weights.values()),
          grad_lse(call.grad_lse.values()),
          sinks(call.sinks.values()),
          slopes(call.alibi_slopes.values()),
          kept(kept) {
        const int64_t N = call.N, H = call.H, H_kv = call.H_kv, L = call.L, S = call.S, D = call.D, D_v = call.D_v;
        const auto& mask_size = call.attn_mask.c.size;
        output.resize(size_t(N * L * H * D_v));
        weights.resize(size_t(N * L * (call.average_weights ? 1 : int64_t(call.heads.size())) * call.columns));
        lse.resize(size_t(N * H * L));
        grad_query.resize(size_t(N * L * H * D));
        grad_key.resize(size_t(N * S * H_kv * D));
        grad_value.resize(size_t(N * S * H_kv * D_v));
        grad_attn_mask.resize(size_t(mask_size[0] * mask_size[1] * L * S));
        grad_columns.resize(size_t(N * H * S));
        grad_bias_k.resize(size_t(N * H_kv * D));
        grad_bias_v.resize(size_t(N * H_kv * D_v));
        grad_sinks.resize(size_t((call.is_packed ? call.elements() + 1 : N) * H));
        grad_distances.resize(size_t(N * H * S));
        for (int64_t n = 0; n < N; ++n)
            for (int64_t h = 0; h < H; ++h)
                for (int64_t i = 0; i < L; ++i) attend(n, h, i);
    }

    // By the name of the field in c_api.h; null if that is none of these.
    const std::vector<double>* find(const std::string& name) const {
        const std::pair<const char*, const std::vector<double>*> all[] = {
            {"output", &output},
            {"weights", &weights},
            {"lse", &lse},
            {"grad_query", &grad_query},
            {"grad_key", &grad_key},
            {"grad_value", &grad_value},
            {"grad_attn_mask", &grad_attn_mask},
            {"grad_columns", &grad_columns},
            {"grad_bias_k", &grad_bias_k},
            {"grad_bias_v", &grad_bias_v},
            {"grad_sinks", &grad_sinks},
            {"grad_distances", &grad_distances},
        };
        for (const auto& [own, values] : all)
            if (name == own) return values;
        return nullptr;
    }

private:
    std::vector<double> output, weights, lse, grad_query, grad_key, grad_value, grad_attn_mask, grad_columns, grad_bias_k,
        grad_bias_v, grad_sinks, grad_distances;
    const Call& call;
    const std::vector<double> query, key, value;  // key and value with the virtual ones: (N, S', H_kv, D)
    const std::vector<double> grad_output, grad_weights, grad_lse, sinks, slopes;
    const std::vector<double>& kept;

    std::vector<double> with_virtual(const Tensor& real, const Tensor& bias, int64_t width) const {
        const std::vector<double> reals = real.values(), biases = bias.values();
        std::vector<double> rows;
        for (int64_t n = 0; n < call.N; ++n) {
            const auto begin = reals.begin() + n * call.S * call.H_kv * width;
            if (!reals.empty()) rows.insert(rows.end(), begin, begin + call.S * call.H_kv * width);
            rows.insert(rows.end(), biases.begin(), biases.end());
            rows.resize(size_t((n + 1) * call.columns * call.H_kv * width));  // the zero key
        }
        return rows;
    }

    static double mask_value(const Tensor& mask, int64_t i, int64_t j, int64_t k, int64_t l) {
        if (!mask) return 0;
        const auto& size = mask.c.size;
        const double x = decode(mask.c.dtype, mask.at(size[0] > 1 ? i : 0, size[1] > 1 ? j : 0, size[2] > 1 ? k : 0, l));
        return mask.c.dtype == FUSED_MHA_BOOL ? (x != 0 ? HIDES : 0) : x;
    }
    // Added to the score; -inf where the key is hidden.
    double mask_of(int64_t n, int64_t h, int64_t i, int64_t j) const {
        if (j >= call.S) return 0;
        if (call.is_packed) return mask_of_sequence(n, i, j);
        if (j < i + call.first_visible || j > i + call.last_visible) return HIDES;
        return mask_value(call.attn_mask, n, h, i, j) + mask_value(call.key_padding_mask, n, j, 0, 0);
    }

    double mask_of_sequence(int64_t n, int64_t i, int64_t j) const {
        const Call::Sequence s = call.sequence_of(i);
        if (s.number < 0 || j < s.first_key || j >= s.first_key + s.keys) return HIDES;
        const int64_t position = i - s.first_query + (call.bottom_right ? s.keys - s.queries : 0), of_key = j - s.first_key;
        if (of_key < position + call.first_visible || of_key > position + call.last_visible) return HIDES;
        return mask_value(call.key_padding_mask, n, j, 0, 0);
    }
    // Of a query and a real key.
    double distance(int64_t i, int64_t j) const {
        const Call::Sequence s = call.is_packed ? call.sequence_of(i) : Call::Sequence{0, 0, call.L, 0, call.S};
        const int64_t position = i - s.first_query + (call.bottom_right ? s.keys - s.queries : 0);
        return std::fabs(double(position - (j - s.first_key)));
    }
    // Of the dropout mask; packed sequences have a part each.
    int64_t kept_index(int64_t n, int64_t h, int64_t i, int64_t j) const {
        const Call::Sequence s = call.is_packed ? call.sequence_of(i) : Call::Sequence{n, 0, 0, 0, 0};
        return ((s.number * call.H + h) * call.L + i - s.first_query) * call.columns + j - s.first_key;
    }

    void attend(int64_t n, int64_t h, int64_t i) {
        const int64_t D = call.D, D_v = call.D_v, H = call.H, head = h / (H / call.H_kv), columns = call.columns;
        const double* q = query.data() + ((n * call.L + i) * H + h) * D;
        const double* grad = grad_output.data() + ((n * call.L + i) * H + h) * D_v;
        const auto row = [&](int64_t j) { return (n * columns + j) * call.H_kv + head; };
        std::vector<double> p(size_t(columns), HIDES), dp(p.size()), factor(p.size(), 1), cap_slope(p.size(), 1);
        const double sink = sinks.empty() ? HIDES : sinks[size_t(h)];
        double most = sink, sum = 0;
        for (int64_t j = 0; j < columns; ++j) {
            const double mask = mask_of(n, h, i, j);
            if (mask == HIDES) continue;
            double score = 0;
            for (int64_t d = 0; d < D; ++d) score += q[d] * key[size_t(row(j) * D + d)];
            score *= call.scale;
            if (call.softcap > 0) {
                const double t = std::tanh(score / call.softcap);
                score = call.softcap * t;
                cap_slope[size_t(j)] = 1 - t * t;
            }
            if (!slopes.empty() && j < call.S) score -= slopes[size_t(h)] * distance(i, j);
            p[size_t(j)] = score + mask;
            most = std::fmax(most, p[size_t(j)]);
        }
        for (double& x : p) sum += x = x == HIDES ? 0 : std::exp(x - most);
        const double of_sink = sink == HIDES ? 0 : std::exp(sink - most);
        sum += of_sink;
        lse[size_t((n * H + h) * call.L + i)] = sum == 0 ? HIDES : most + std::log(sum);
        if (sum == 0) return;

        double delta = grad_lse.empty() ? 0 : -grad_lse[size_t((n * H + h) * call.L + i)];
        double* out = output.data() + ((n * call.L + i) * H + h) * D_v;
        const int64_t index = call.average_weights ? 0 : call.index_of_weights(h);
        const int64_t weights_row = (n * (call.average_weights ? 1 : int64_t(call.heads.size())) + index) * call.L + i;
        const double share = call.average_weights ? 1 / double(H) : 1;
        for (int64_t j = 0; j < columns; ++j) {
            double& x = p[size_t(j)];
            if (x == 0) continue;
            x /= sum;
            if (call.dropout_p > 0)
                factor[size_t(j)] = call.dropout_p < 1 && kept[size_t(kept_index(n, h, i, j))] != 0
                                        ? 1 / (1 - std::round(call.dropout_p * 65536) / 65536)
                                        : 0;
            const double dropped = x * factor[size_t(j)];
            double d_weight = 0;
            if (index >= 0) {
                weights[size_t(weights_row * columns + j)] += dropped * share;
                if (!grad_weights.empty()) d_weight = grad_weights[size_t(weights_row * columns + j)] * share;
            }
            for (int64_t d = 0; d < D_v; ++d) {
                out[d] += dropped * value[size_t(row(j) * D_v + d)];
                d_weight += grad[d] * value[size_t(row(j) * D_v + d)];
            }
            dp[size_t(j)] = d_weight * factor[size_t(j)];
            delta += x * dp[size_t(j)];
        }
        for (int64_t j = 0; j < columns; ++j) {
            const double x = p[size_t(j)];
            if (x != 0) go_back(n, h, i, j, x * (dp[size_t(j)] - delta), cap_slope[size_t(j)], x * factor[size_t(j)]);
        }
        if (sinks.empty()) return;
        const int64_t number = call.is_packed ? call.sequence_of(i).number : n;
        grad_sinks[size_t((number < 0 ? call.elements() : number) * H + h)] -= of_sink / sum * delta;
    }

    // Adds what one score's gradient `ds`, which the cap takes times `cap_slope`, and one weight `dropped` contribute.
    void go_back(int64_t n, int64_t h, int64_t i, int64_t j, double ds, double cap_slope, double dropped) {
        const int64_t D = call.D, D_v = call.D_v, H = call.H, H_kv = call.H_kv, S = call.S, head = h / (H / H_kv);
        const bool is_real = j < S, is_bias = j == S && call.bias_k;
        const int64_t q = (n * call.L + i) * H + h, k = (n * call.columns + j) * H_kv + head;
        const int64_t to = is_real ? (n * S + j) * H_kv + head : n * H_kv + head;
        std::vector<double>& d_key = is_real ? grad_key : grad_bias_k;
        std::vector<double>& d_value = is_real ? grad_value : grad_bias_v;
        for (int64_t d = 0; d < D; ++d) {
            grad_query[size_t(q * D + d)] += call.scale * cap_slope * ds * key[size_t(k * D + d)];
            if (is_real || is_bias) d_key[size_t(to * D + d)] += call.scale * cap_slope * ds * query[size_t(q * D + d)];
        }
        for (int64_t d = 0; d < D_v && (is_real || is_bias); ++d)
            d_value[size_t(to * D_v + d)] += dropped * grad_output[size_t(q * D_v + d)];
        if (!is_real) return;
        grad_columns[size_t((n * H + h) * S + j)] += ds;
        if (!slopes.empty()) grad_distances[size_t((n * H + h) * S + j)] += ds * distance(i, j);
        if (!call.attn_mask) return;
        const auto& size = call.attn_mask.c.size;
        const int64_t mask_row = (size[0] > 1 ? n : 0) * size[1] + (size[1] > 1 ? h : 0);
        grad_attn_mask[size_t((mask_row * call.L + i) * S + j)] += ds;
    }
};
