// What the sanitizers run: every formula and format, odd sizes in buffers without a byte to spare, special
// numbers, one thread and many, and callers at the same time. Exits with 1 where two thread counts
// disagree in a bit; the sanitizers see to the rest.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "api.h"
#include "shards/merge.h"
#include "complement/complement.h"

namespace {

using Bytes = std::unique_ptr<unsigned char[]>;

// Any bits at all in every other row, small numbers in the rest.
Bytes logits(kl::Dtype dtype, std::int64_t rows, std::int64_t columns, unsigned seed) {
    std::mt19937 random(seed);
    const std::int64_t size = size_of(dtype);
    Bytes out(new unsigned char[static_cast<std::size_t>(rows * columns * size)]);
    for (std::int64_t i = 0; i < rows * columns; ++i) {
        std::uint64_t bits = (static_cast<std::uint64_t>(random()) << 32) | random();
        if (i / columns % 2 == 0) {
            const float x = static_cast<float>(static_cast<int>(random() % 2048) - 1024) / 128;
            const double wide = static_cast<double>(x);
            std::uint32_t narrow;
            std::memcpy(&narrow, &x, 4);
            if (dtype == kl::Dtype::f64) std::memcpy(&bits, &wide, 8);
            if (dtype == kl::Dtype::f32) bits = narrow;
            if (dtype == kl::Dtype::bf16) bits = narrow >> 16;
            if (dtype == kl::Dtype::f16) bits = (bits & 0x83ffu) | 0x3c00u;
        }
        std::memcpy(out.get() + i * size, &bits, static_cast<std::size_t>(size));
    }
    return out;
}

struct Result {
    std::vector<double> value, alone, stats, token_stats;  // alone: the value asked for without the stats
    Bytes to_a, to_b;
};

Result run(kl::Dtype a, kl::Dtype b, std::int64_t rows, std::int64_t columns, int threads, bool fused,
           kl::Formula formula) {
    const Bytes left = logits(a, rows, columns, 1), right = logits(b, rows, columns, 2);
    std::unique_ptr<std::uint8_t[]> mask(new std::uint8_t[static_cast<std::size_t>(rows)]);
    for (std::int64_t i = 0; i < rows; ++i) mask[static_cast<std::size_t>(i)] = i % 5 != 3;
    const bool wide = a == kl::Dtype::f64 || b == kl::Dtype::f64;
    const double other_scale = columns % 2 == 0 ? 1.0 : 0.5;
    const kl::Logits x{left.get(), columns, columns, a, 1.0},
        y{right.get(), columns, columns, b, other_scale};
    const kl::RowPair p{x, y, {mask.get(), 1, 1}, rows, 1, columns, threads, formula, 0.3};
    Result out;
    const auto n = static_cast<std::size_t>(rows);
    out.value.resize(n);
    out.alone.resize(n);
    out.stats.resize(n * kl::kStats);
    const std::vector<double> wide_scale(n, 0.5);
    const std::vector<float> scale(n, 0.5f);
    const void* row_scale = wide ? static_cast<const void*>(wide_scale.data()) : scale.data();
    out.to_a.reset(new unsigned char[static_cast<std::size_t>(rows * columns * size_of(a))]);
    out.to_b.reset(new unsigned char[static_cast<std::size_t>(rows * columns * size_of(b))]);
    const kl::Gradient to_a{out.to_a.get(), columns, columns, a}, to_b{out.to_b.get(), columns, columns, b};
    out.token_stats.resize(n * kl::kTokenStats);
    std::unique_ptr<std::int64_t[]> tokens(new std::int64_t[n]);
    for (std::int64_t i = 0; i < rows; ++i)
        tokens[static_cast<std::size_t>(i)] = i % 2 == 0 ? columns - 1 : -1;
    if (formula == kl::Formula::kl) kl::token_stats(p, wide, tokens.get(), out.token_stats.data());
    kl::value(p, wide, out.alone.data(), nullptr);
    if (fused) {
        kl::value_and_gradient(p, wide, row_scale, out.value.data(), out.stats.data(), to_a, to_b);
    } else {
        kl::value(p, wide, out.value.data(), out.stats.data());
        kl::gradient(p, wide, out.stats.data(), row_scale, to_a, to_b);
    }
    return out;
}

bool same(const Result& x, const Result& y, std::size_t bytes_a, std::size_t bytes_b) {
    return std::memcmp(x.value.data(), y.value.data(), x.value.size() * sizeof(double)) == 0 &&
           std::memcmp(x.value.data(), y.alone.data(), x.value.size() * sizeof(double)) == 0 &&
           std::memcmp(x.token_stats.data(), y.token_stats.data(), x.token_stats.size() * sizeof(double)) ==
               0 &&
           std::memcmp(x.to_a.get(), y.to_a.get(), bytes_a) == 0 &&
           std::memcmp(x.to_b.get(), y.to_b.get(), bytes_b) == 0;
}

// What lies outside some columns, among them the first, the last, one twice, and ids that name none.
std::vector<unsigned char> run_complement(kl::Dtype dtype, std::int64_t rows, std::int64_t columns,
                                          int threads) {
    const Bytes x = logits(dtype, rows, columns, 3);
    const std::int64_t k = 7;
    std::vector<std::int64_t> ids;
    for (std::int64_t r = 0; r < rows; ++r)
        for (const std::int64_t id :
             {std::int64_t{0}, columns - 1, columns / 2, columns / 2, std::int64_t{-1}, columns, INT64_MAX})
            ids.push_back(id);
    const kl::ComplementArgs p{
        {x.get(), columns, columns, dtype, 0.7}, {nullptr, 0, 0}, ids.data(), k, rows, 1, columns, threads};
    const auto n = static_cast<std::size_t>(rows);
    std::vector<double> u(n), rest_entropy(n), stats(n * kl::kComplementStats), flow(n, 0.25),
        grad_picked(n * k, 0.5);
    std::vector<unsigned char> grad(static_cast<std::size_t>(rows * columns * size_of(dtype)));
    kl::complement(p, true, u.data(), rest_entropy.data(), stats.data());
    kl::complement_gradient(p, stats.data(), grad_picked.data(), flow.data(), flow.data(),
                            {grad.data(), columns, columns, dtype});
    const auto* bits = reinterpret_cast<const unsigned char*>(u.data());
    grad.insert(grad.end(), bits, bits + n * sizeof(double));
    return grad;
}

// Two shards of a row that are its two halves, from their stats to the whole rows', any bits among them.
void merge_halves(bool wide, kl::Dtype dtype, std::int64_t rows, std::int64_t columns) {
    const Bytes a = logits(dtype, rows, 2 * columns, 5), b = logits(dtype, rows, 2 * columns, 6);
    const auto n = static_cast<std::size_t>(rows);
    std::vector<double> found(2 * 4 * n), whole(4 * n), sums(3 * n, 0.5), out(n * kl::kStats);
    std::vector<double> value(n), stats(n * kl::kStats);
    for (std::size_t half = 0; half < 2; ++half) {
        const std::int64_t first = static_cast<std::int64_t>(half) * columns * size_of(dtype);
        const kl::Logits x{a.get() + first, 2 * columns, 2 * columns, dtype, 1.0},
            y{b.get() + first, 2 * columns, 2 * columns, dtype, 1.0};
        const kl::RowPair p{x, y, {nullptr, 0, 0}, rows, 1, columns, 1, kl::Formula::kl, 0.0};
        kl::value(p, wide, value.data(), stats.data());
        const void* const inside[] = {value.data(), value.data()};
        kl::shard_states(stats.data(), wide, 0.7, rows, inside, 2, found.data() + half * 4 * n);
    }
    kl::merge_shards(found.data(), 2, rows, 2, whole.data());
    kl::whole_row_stats(stats.data(), wide, 0.7, rows, kl::Formula::kl, whole.data(), whole.data() + n,
                        sums.data(), out.data());
}

}  // namespace

int main() {
    const kl::Dtype dtypes[] = {kl::Dtype::f32, kl::Dtype::bf16, kl::Dtype::f16, kl::Dtype::f64};
    std::atomic<int> wrong{0};
    const auto check_formula = [&](kl::Dtype a, kl::Dtype b, std::int64_t rows, std::int64_t columns,
                                   kl::Formula formula) {
        const Result one = run(a, b, rows, columns, 1, false, formula);
        const Result many = run(a, b, rows, columns, 4, true, formula);
        const auto size = static_cast<std::size_t>(rows * columns);
        if (same(one, many, size * static_cast<std::size_t>(size_of(a)),
                 size * static_cast<std::size_t>(size_of(b))))
            return;
        ++wrong;
        std::printf("formula %d, dtypes %d and %d, %lld x %lld: the bits depend on the threads\n",
                    static_cast<int>(formula), static_cast<int>(a), static_cast<int>(b),
                    static_cast<long long>(rows), static_cast<long long>(columns));
    };
    const auto check = [&](kl::Dtype a, kl::Dtype b, std::int64_t rows, std::int64_t columns) {
        for (const kl::Formula formula :
             {kl::Formula::kl, kl::Formula::jeffreys, kl::Formula::js, kl::Formula::skew, kl::Formula::tv})
            check_formula(a, b, rows, columns, formula);
    };
    for (const kl::Dtype a : dtypes)
        for (const kl::Dtype b : dtypes)
            for (const std::int64_t columns : {1, 2, 15, 33, 127, 2049, 4100}) check(a, b, 7, columns);
    for (const kl::Dtype a : {kl::Dtype::f32, kl::Dtype::bf16}) check(a, a, 2, 70001);

    const auto check_complement = [&](kl::Dtype dtype, std::int64_t rows, std::int64_t columns) {
        if (run_complement(dtype, rows, columns, 1) == run_complement(dtype, rows, columns, 4)) return;
        ++wrong;
        std::printf("complement, dtype %d, %lld x %lld: the bits depend on the threads\n",
                    static_cast<int>(dtype), static_cast<long long>(rows), static_cast<long long>(columns));
    };
    for (const kl::Dtype dtype : dtypes) {
        for (const std::int64_t columns : {1, 2, 15, 33, 127, 2049, 4100})
            check_complement(dtype, 7, columns);
        check_complement(dtype, 2, 70001);
    }

    merge_halves(false, kl::Dtype::f32, 9, 33);
    merge_halves(true, kl::Dtype::f64, 9, 33);

    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&] { check(kl::Dtype::f32, kl::Dtype::f32, 40, 5003); });
    for (std::thread& t : callers) t.join();
    std::printf("%s: %s\n", kl::isa(), wrong == 0 ? "clean" : "WRONG");
    return wrong == 0 ? 0 : 1;
}
